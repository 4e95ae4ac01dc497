"""The exact KL from a policy to a reference, both given by logits; the policy is trained.

The least work is one read of both logits and one write of the gradient, because the mean over
tokens is known beforehand. This library allows any gradient of its values, so its backward reads
both logits again.
"""

from batch import IGNORED
from contest import BOTH, FORWARD, Operation
from providers import Provider, plain, upcast

import fastrlhf


def _eager(batch):
    log_p, log_q = (upcast(x).log_softmax(-1) for x in (batch.logits, batch.other_logits))
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * batch.mask).sum() / batch.mask.sum()


def _fused(batch):
    values = fastrlhf.kl_divergence(batch.logits, batch.other_logits, mask=batch.mask)
    return values.sum() / batch.mask.sum()


def _load_trl():
    from trl.experimental.gkd import GKDTrainer

    return lambda batch: GKDTrainer.generalized_jsd_loss(
        batch.logits, batch.other_logits, batch.targets, beta=1.0
    )


def _load_liger():
    from liger_kernel.transformers.functional import liger_jsd

    return lambda batch: liger_jsd(
        batch.logits.flatten(0, 1).log_softmax(-1),
        batch.other_logits.flatten(0, 1).log_softmax(-1),
        batch.targets.flatten(),
        beta=1.0,
        ignore_index=IGNORED,
    )


OPERATION = Operation(
    "KL from logits",
    "two logits",
    {
        "fastrlhf": Provider(lambda: _fused, passes=(4, 1)),
        **plain(_eager),
        "TRL generalized_jsd_loss": Provider(_load_trl),
        "Liger JSD": Provider(_load_liger, gpu_only=True),
    },
    exact=_eager,
    passes={FORWARD: (2, 0), BOTH: (2, 1)},
)


def test_benchmark(outcome) -> None:
    outcome()
