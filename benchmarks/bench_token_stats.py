"""Token log-probs from logits, for any gradient: a read forward, a read and a write backward."""

from contest import BOTH, FORWARD, Operation
from providers import FUSED_LOGPROBS, PEER_LOGPROBS, eager_logprobs, plain

OPERATION = Operation(
    "token log-probs from logits",
    "logits",
    FUSED_LOGPROBS | plain(eager_logprobs) | PEER_LOGPROBS,
    exact=eager_logprobs,
    passes={FORWARD: (1, 0), BOTH: (2, 1)},
)


def test_benchmark(outcome) -> None:
    outcome()
