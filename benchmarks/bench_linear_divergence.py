"""The exact KL from a policy to a reference, both given by hidden states and heads.

The policy is trained.
"""

from batch import IGNORED
from contest import Operation
from providers import Provider, plain, upcast

import fastrlhf


def _eager(batch):
    logits = batch.hidden @ batch.weight.T, batch.other_hidden @ batch.other_weight.T
    log_p, log_q = (upcast(x).log_softmax(-1) for x in logits)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * batch.mask).sum() / batch.mask.sum()


def _fused(batch):
    values = fastrlhf.linear_kl_divergence(
        batch.hidden, batch.weight, batch.other_hidden, batch.other_weight, mask=batch.mask
    )
    return values.sum() / batch.mask.sum()


def _load_liger_chunks():
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, ignore_index=IGNORED
    )
    return lambda batch: loss(
        batch.hidden.flatten(0, 1), batch.weight,
        batch.other_hidden.flatten(0, 1), batch.other_weight, batch.targets.flatten(),
    )  # fmt: skip


def _load_liger():
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return lambda batch: liger_fused_linear_jsd(
        batch.hidden.flatten(0, 1), batch.weight,
        batch.other_hidden.flatten(0, 1), batch.other_weight, batch.targets.flatten(),
        jsd_beta=1.0, ignore_index=IGNORED,
    )  # fmt: skip


OPERATION = Operation(
    "KL from hidden states",
    "two hidden",
    {
        "fastrlhf": Provider(lambda: _fused),
        **plain(_eager),
        "Liger chunked JSD": Provider(_load_liger_chunks, compiles=True),
        "Liger fused linear JSD": Provider(_load_liger, gpu_only=True),
    },
    exact=_eager,
    matmuls=(2, 3, 4),
)


def test_benchmark(outcome) -> None:
    outcome()
