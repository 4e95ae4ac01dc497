"""Cross-entropy from hidden states through `linear_loss`; most peers are made for this loss."""

import losses
from batch import IGNORED
from contest import Operation
from providers import (
    PEER_LINEAR_LOGPROBS,
    Provider,
    composed,
    eager_logprobs,
    linear_cross_entropy,
    load_linear_cross_entropy,
    plain,
)

import fastrlhf


def _eager(batch):
    return losses.nll(eager_logprobs(batch), batch)


def _fused(batch):
    total, _ = fastrlhf.linear_loss(
        lambda stats: -stats.logprob.sum(), batch.hidden, batch.weight, batch.targets
    )
    return total / batch.mask.sum()


def _load_liger():
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

    return lambda batch: liger(
        batch.hidden.flatten(0, 1), batch.weight, batch.targets.flatten(), ignore_index=IGNORED
    )


def _load_cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy as cut

    return lambda batch: cut(batch.hidden, batch.weight, batch.targets, ignore_index=IGNORED)


OPERATION = Operation(
    "cross-entropy from hidden states",
    "hidden",
    {
        "fastrlhf": Provider(lambda: _fused),
        **plain(_eager),
        **composed(PEER_LINEAR_LOGPROBS, losses.nll),
        # These providers compute the sum or mean themselves, which saves them work:
        "F.linear_cross_entropy": Provider(load_linear_cross_entropy(linear_cross_entropy)),
        "cut-cross-entropy": Provider(_load_cut_cross_entropy, gpu_only=True, compiles=True),
        "Liger fused linear cross-entropy": Provider(_load_liger, gpu_only=True),
    },
    exact=_eager,
    matmuls=(1, 2, 3),
)


def test_benchmark(outcome) -> None:
    outcome()
