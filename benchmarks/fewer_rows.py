"""Time a policy loss that does not need the logits of every token for every word.

There are three reasons for this, which are measured one by one and all together: tokens that keep
only some ids of the vocabulary, tokens without a gradient, and hidden states that predict several
tokens.

Usage: python benchmarks/fewer_rows.py [FILE]. Median times of forward and backward, of losses that
take turns, and peak memory go to standard output as JSON, and to FILE.

The number of ids that a token keeps is drawn to resemble top-p sampling, from a distribution in
which 47% of the tokens keep one id, the median is 2, the mean 8, and the 99th percentile 82.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import measure
import torch
from environment import publish
from torch import Tensor

import fastrlhf
from fastrlhf.ops import linear_plans
from fastrlhf.recipes.memory import peak_memory

SEQUENCES, TOKENS, VOCAB, WIDTH = 8, 128, 32_000, 1024
DTYPE, DEVICE = torch.bfloat16, torch.device("cpu")
ALONE, LOG_MEDIAN, LOG_SPREAD = 0.47, 1.796, 1.252  # of the number of ids kept beside the target
SECONDS, ROUNDS = 30.0, (5, 11)

Run = Callable[[], Any]


def support_of(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the ids that each token keeps, the target first."""
    flat = targets.reshape(-1)
    others = (LOG_MEDIAN + LOG_SPREAD * torch.randn(len(flat))).exp().round().long()
    others = torch.where(torch.rand(len(flat)) < ALONE, 0, others.clamp(1, 2000))
    kept = []
    for target, count in zip(flat.tolist(), others.tolist(), strict=True):
        drawn = torch.randperm(VOCAB)[: count + 1]
        kept.append(torch.cat((torch.tensor([target]), drawn[drawn != target][:count])))
    lengths = torch.tensor([len(ids) for ids in kept])
    return torch.cat(kept), torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))


class Batch:
    """N tokens, a share of which has an advantage, and U hidden states that predict them."""

    def __init__(self, live: float, states: float, trained: bool) -> None:
        shape = SEQUENCES, TOKENS
        tokens = SEQUENCES * TOKENS
        self.targets = torch.randint(VOCAB, shape)
        self.rows = torch.arange(tokens).view(shape) % round(states * tokens)
        self.hidden = torch.randn(round(states * tokens), WIDTH).to(DTYPE).requires_grad_()
        weight = torch.randn(VOCAB, WIDTH) / WIDTH**0.5
        self.weight = weight.to(DTYPE).requires_grad_(trained)
        self.advantages = torch.ones(tokens)
        self.advantages[round(live * tokens) :] = 0.0
        self.advantages = self.advantages[torch.randperm(tokens)].view(shape)
        self.support = support_of(self.targets)
        self.mask = torch.ones(shape, dtype=torch.bool)
        with torch.no_grad():
            self.old = fastrlhf.linear_token_logprobs(
                self.hidden, self.weight, self.targets, rows=self.rows
            )

    def loss(self, hidden: Tensor, **options: Any) -> Tensor:
        return fastrlhf.linear_policy_loss(
            hidden, self.weight, self.targets, self.old, self.advantages, self.mask,
            ref_logprobs=self.old, **options,
        )[0]  # fmt: skip

    def written_out(self, **options: Any) -> Tensor:
        """Compute the loss with one hidden state for each token, without shared rows."""
        return self.loss(self.hidden[self.rows], **options)

    def gathered(self) -> Tensor:
        """Compute the loss of kept ids in plain PyTorch, by gathering rows of states and weight."""
        ids, offsets = self.support
        token = torch.repeat_interleave(offsets.diff())
        hidden = self.hidden[self.rows.reshape(-1)]
        logits = (hidden[token].float() * self.weight[ids].float()).sum(-1)
        peak = torch.segment_reduce(logits.detach(), "max", offsets=offsets)[token]
        total = logits.new_zeros(len(offsets) - 1).index_add(0, token, (logits - peak).exp())
        own = offsets[:-1]  # the target comes first
        logprobs = (logits - peak)[own] - total.log()
        return fastrlhf.policy_loss(
            logprobs.view(self.targets.shape), self.old, self.advantages, self.mask,
            ref_logprobs=self.old,
        )[0]  # fmt: skip


def all_rows(loss: Run) -> Run:
    """Make the backward of a loss include all rows, even those whose gradient is 0."""

    def run() -> Any:
        usual = linear_plans._FEWEST
        linear_plans._FEWEST = 2**60
        try:
            return loss()
        finally:
            linear_plans._FEWEST = usual

    return run


def backward(batch: Batch, loss: Run) -> None:
    wanted = [x for x in (batch.hidden, batch.weight) if x.requires_grad]
    torch.autograd.grad(loss(), wanted)


def measured(batch: Batch, losses: dict[str, Run]) -> dict[str, dict[str, float]]:
    works = {name: partial(backward, batch, loss) for name, loss in losses.items()}
    turns = {name: measure.Turn(work, lambda: None) for name, work in works.items()}
    times, errors = measure.take_turns(turns, DEVICE, SECONDS, ROUNDS)
    for error in errors.values():
        raise error
    return {
        name: {
            "milliseconds": round(1e3 * statistics.median(times[name]), 1),
            "peak_bytes": peak_memory(work, DEVICE)[1],
        }
        for name, work in works.items()
    }


def case(live: float, states: float, trained: bool, *, kept: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    batch = Batch(live, states, trained)
    shared = {"rows": batch.rows}
    losses = {
        "every token, every word": all_rows(batch.written_out),
        "no gradient, no matmul": batch.written_out,
        "and shared rows": partial(batch.loss, batch.hidden, **shared),
    }
    if kept:
        support = {"support": batch.support}
        losses["kept ids"] = partial(batch.written_out, **support)
        losses["kept ids and shared rows"] = partial(batch.loss, batch.hidden, **shared, **support)
        losses["kept ids, gathered by hand"] = batch.gathered
    return {
        "live_share": live,
        "states_per_token": states,
        "head": "trained" if trained else "frozen",
        "kept_ids": len(batch.support[0]),
        "figures": measured(batch, losses),
    }


def main() -> None:
    cases = [
        case(live, states, trained, kept=live in (1.0, 0.37))
        for trained in (True, False)
        for states in (1.0, 0.5)
        for live in (1.0, 0.6, 0.37)
    ]
    sizes = {"tokens": SEQUENCES * TOKENS, "vocab": VOCAB, "width": WIDTH, "dtype": "bfloat16"}
    publish({"sizes": sizes, "cases": cases})


if __name__ == "__main__":
    main()
