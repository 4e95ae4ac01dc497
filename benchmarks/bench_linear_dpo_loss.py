"""DPO from hidden states, either in chunks of whole pairs or through token log-probs."""

import losses
import torch
from batch import IGNORED
from contest import Operation
from providers import Provider, by_linear_logprobs, eager_logprobs

import fastrlhf


def _eager(batch):
    return losses.dpo(eager_logprobs(batch), batch)


def _fused(batch):
    ref = torch.zeros(batch.shape.sequences, device=batch.targets.device)
    result, _ = fastrlhf.linear_dpo_loss(
        batch.hidden, batch.weight, batch.targets, ref, *losses.pairs(batch), losses.BETA
    )
    return result.mean()


def _load_liger():
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(
        IGNORED, losses.BETA, compute_nll_loss=False, use_ref_model=False, average_log_prob=False
    )
    # The loss marks its inputs as dynamic for the compiler. It gets views, so that the tensors of
    # the batch keep no mark when the other providers use them.
    return lambda batch: loss(
        batch.weight, batch.hidden.view_as(batch.hidden), batch.targets.view_as(batch.targets)
    )[0]


OPERATION = Operation(
    "DPO loss from hidden states",
    "hidden",
    {
        "fastrlhf": Provider(lambda: _fused),
        **by_linear_logprobs(losses.fused_dpo, losses.dpo),
        "Liger fused linear DPO": Provider(_load_liger, compiles=True),
    },
    exact=_eager,
    matmuls=(1, 2, 3),
)


def test_benchmark(outcome) -> None:
    outcome()
