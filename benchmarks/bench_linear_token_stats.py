"""Token log-probs from hidden states, when their gradient may be anything.

With a trained head, three matmuls are the least if all logits are kept between forward and
backward. This library does not keep the logits but computes them again, which is a fourth matmul.
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
