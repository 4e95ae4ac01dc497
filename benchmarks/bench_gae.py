"""Generalized advantage estimation: a scan over the tokens of each sequence."""

import torch
from contest import FORWARD, Operation
from providers import Provider, plain

import fastrlhf


def _eager(batch):
    """Compute GAE with the loop that trainers write, backwards over the tokens that count."""
    rewards, values, mask = batch.upstream * batch.mask, batch.logprobs * batch.mask, batch.mask
    following = advantage = torch.zeros_like(values[:, 0])
    result = []
    for t in range(values.shape[1] - 1, -1, -1):
        advantage = rewards[:, t] + following - values[:, t] + 0.95 * advantage
        result.append(advantage * mask[:, t])
        following, advantage = values[:, t], advantage * mask[:, t]
    return torch.stack(result[::-1], 1)


def _fused(batch):
    return fastrlhf.gae(batch.upstream, batch.logprobs, batch.mask)[0]


OPERATION = Operation(
    "generalized advantage estimation",
    "tokens",
    {"fastrlhf": Provider(lambda: _fused), "eager": plain(_eager)["eager"]},
    exact=_eager,
    passes={FORWARD: (2, 2)},  # rewards and values read, advantages and returns written
)


def test_benchmark(outcome) -> None:
    outcome()
