"""Token log-probs from hidden states, for any gradient of theirs.

With a trained head, three matmuls are the least if all logits are kept; this library makes them
again instead, which is a fourth.
"""

from contest import Operation
from providers import FUSED_LINEAR_LOGPROBS, PEER_LINEAR_LOGPROBS, eager_logprobs, plain

OPERATION = Operation(
    "token log-probs from hidden states",
    "hidden",
    FUSED_LINEAR_LOGPROBS | plain(eager_logprobs) | PEER_LINEAR_LOGPROBS,
    exact=eager_logprobs,
    matmuls=(1, 2, 3),
)


def test_benchmark(outcome) -> None:
    outcome()
