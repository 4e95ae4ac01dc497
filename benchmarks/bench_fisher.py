"""The product of a softmax's Fisher matrix with a tangent of the logits."""

from contest import FORWARD, Operation
from providers import Provider, plain, upcast

import fastrlhf


def _eager(batch):
    p, tangent = upcast(batch.logits).softmax(-1), upcast(batch.other_logits)
    return p * (tangent - (p * tangent).sum(-1, keepdim=True)) * batch.mask[..., None]


def _fused(batch):
    return fastrlhf.softmax_fisher_product(batch.logits, batch.other_logits, mask=batch.mask)[0]


OPERATION = Operation(
    "Fisher product from logits",
    "two logits",
    {"fastrlhf": Provider(lambda: _fused), **plain(_eager)},
    exact=_eager,
    passes={FORWARD: (2, 1)},  # logits and tangent read, the product written
)


def test_benchmark(outcome) -> None:
    outcome()
