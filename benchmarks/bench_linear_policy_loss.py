"""GRPO's clipped loss from hidden states, either in chunks of tokens or through log-probs."""

import losses
from contest import Operation
from providers import Provider, by_linear_logprobs, eager_logprobs

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
        # The loss projects all hidden states it is given, so it gets only completions, as in TRL.
        kept = (slice(None), slice(batch.shape.prompt_tokens, None))
        return loss(
            batch.hidden[kept], batch.weight, batch.targets[kept], batch.mask[kept].long(),
            batch.advantages, old_per_token_logps=batch.old[kept],
        )[0]  # fmt: skip

    return of_completions


OPERATION = Operation(
    "GRPO loss from hidden states",
    "hidden",
    {
        "fastrlhf": Provider(lambda: _fused),
        **by_linear_logprobs(losses.fused_clipped, losses.clipped),
        "Liger fused linear GRPO": Provider(_load_liger, compiles=True),
    },
    exact=_eager,
    matmuls=(1, 2, 3),
)


def test_benchmark(outcome) -> None:
    outcome()
