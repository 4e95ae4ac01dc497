"""DPO from logits: the logits are read twice, because gradients depend on the whole pair."""

import losses
from contest import BOTH, FORWARD, Operation
from providers import FUSED_LOGPROBS, PEER_LOGPROBS, composed, eager_logprobs, plain


def _eager(batch):
    return losses.dpo(eager_logprobs(batch), batch)


OPERATION = Operation(
    "DPO loss from logits",
    "logits",
    composed(FUSED_LOGPROBS, losses.fused_dpo)
    | plain(_eager)
    | composed(PEER_LOGPROBS, losses.dpo),
    exact=_eager,
    passes={FORWARD: (1, 0), BOTH: (2, 1)},
)


def test_benchmark(outcome) -> None:
    outcome()
