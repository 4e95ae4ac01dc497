"""Token log-probs from logits, when their gradient may be anything.

The forward reads the logits once; the backward reads them once and writes their gradient.
"""

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
