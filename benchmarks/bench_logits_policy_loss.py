"""PPO's clipped loss from logits.

The gradient is computed together with the loss, so one read and one write of the logits are enough.
"""

import losses
from contest import BOTH, FORWARD, Operation
from providers import FUSED_LOGPROBS, PEER_LOGPROBS, Provider, composed, eager_logprobs, plain

import fastrlhf


def _eager(batch):
    return losses.clipped(eager_logprobs(batch), batch)


def _fused(batch, logits=None, **options):
    logits = batch.logits if logits is None else logits
    rest = (batch.targets, batch.old, batch.advantages, batch.mask)
    return fastrlhf.logits_policy_loss(logits, *rest, **options)[0]


def _fused_inplace(batch):
    # A view of the leaf is passed, since the output of a head is not a leaf either.
    return _fused(batch, batch.logits.view_as(batch.logits), inplace_backward=True)


_TWO_STEPS = composed(FUSED_LOGPROBS, losses.fused_clipped)["fastrlhf"]

OPERATION = Operation(
    "PPO loss from logits",
    "logits",
    {
        "fastrlhf": Provider(lambda: _fused),
        "fastrlhf, in place": Provider(
            lambda: _fused_inplace, spends_logits=True, backward_only=True
        ),
        "fastrlhf, by log-probs": _TWO_STEPS._replace(passes=(2, 1), backward_only=True),
        **plain(_eager),
        **composed(PEER_LOGPROBS, losses.clipped),
    },
    exact=_eager,
    passes={FORWARD: (1, 0), BOTH: (1, 1)},
)


def test_benchmark(outcome) -> None:
    outcome()
