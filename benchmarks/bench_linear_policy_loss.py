"""GRPO's clipped loss from hidden states: a token at a time, or through token log-probs."""

import losses
from contest import Operation
from providers import (
    FUSED_LINEAR_LOGPROBS,
    PEER_LINEAR_LOGPROBS,
    Provider,
    composed,
    eager_logprobs,
    plain,
)

import fastrlhf


def _eager(batch):
    return losses.clipped(eager_logprobs(batch), batch)


def _fused(batch):
    rest = (batch.targets, batch.old, batch.advantages, batch.mask)
    return fastrlhf.linear_policy_loss(batch.hidden, batch.weight, *rest)[0]


def _load_liger():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    # "bnpo" is the mean over tokens.
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo")

    def of_completions(batch):
        # It projects whatever it is given, so it gets the completions alone, as in TRL.
        kept = (slice(None), slice(batch.shape.prompt_tokens, None))
        return loss(
            batch.hidden[kept], batch.weight, batch.targets[kept], batch.mask[kept].long(),
            batch.advantages, old_per_token_logps=batch.old[kept],
        )[0]  # fmt: skip

    return of_completions


_BY_LOGPROBS = composed(FUSED_LINEAR_LOGPROBS, losses.fused_clipped)["fastrlhf"]

OPERATION = Operation(
    "GRPO loss from hidden states",
    "hidden",
    {
        "fastrlhf": Provider(lambda: _fused),
        "fastrlhf, by log-probs": _BY_LOGPROBS._replace(backward_only=True),
        **plain(_eager),
        "Liger fused linear GRPO": Provider(_load_liger, compiles=True),
        **composed(PEER_LINEAR_LOGPROBS, losses.clipped),
    },
    exact=_eager,
    matmuls=(1, 2, 3),
)


def test_benchmark(outcome) -> None:
    outcome()
