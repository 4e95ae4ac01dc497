"""DPO from token log-probs: no vocabulary is involved, so launches of kernels are the cost."""

import losses
from contest import BOTH, FORWARD, Operation
from providers import Provider, plain


def _eager(batch):
    return losses.dpo(batch.logprobs, batch)


def _fused(batch):
    return losses.fused_dpo(batch.logprobs, batch)


OPERATION = Operation(
    "DPO loss from token log-probs",
    "tokens",
    {"fastrlhf": Provider(lambda: _fused), **plain(_eager)},
    exact=_eager,
    passes={FORWARD: (1, 0), BOTH: (1, 1)},
)


def test_benchmark(outcome) -> None:
    outcome()
