"""KTO, which learns from sequences with a label of their own.

Dims: B sequences.
"""

import torch
from torch import Tensor

from fastrlhf.ops.checks import (
    check_at_least,
    check_finite,
    check_floating,
    check_mask,
    check_positive,
    check_real,
    check_same_device,
    check_shape,
)
from fastrlhf.reference import sequence_scores, sigmoid


def kto_loss(
    pi_logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    beta: float = 0.1,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute the KTO loss of each sequence from a label of its own, without pairs.

    Eager equivalent, with s = pi_logps - ref_logps and z0 = max(0, kl)::

        losses = where(desirable, w_d * (1 - σ(beta * (s - z0))), w_u * (1 - σ(beta * (z0 - s))))

    Args:
        pi_logps, ref_logps: (B,) log-probs of whole sequences under policy and reference, in nats.
        desirable: (B,) bool.
        kl: estimate of KL(π‖ref) in nats, a number or a 0-d or (B,) tensor; clamped at 0 and
            detached.
        beta: positive strength of the KL regularisation.
        desirable_weight, undesirable_weight: weights of the two kinds.

    Returns:
        losses (B,), differentiable with respect to pi_logps and ref_logps, and rewards (B,) = β·s,
        detached.

    Raises:
        TypeError, ValueError: as `dpo_loss`.

    Source: 2402.01306 Eq. 8.
    """
    check_floating("pi_logps", pi_logps)
    if pi_logps.ndim != 1:
        raise ValueError(f"pi_logps: expected shape (B,), got {tuple(pi_logps.shape)}")
    check_floating("ref_logps", ref_logps)
    check_mask("desirable", desirable)
    for name, tensor in (("ref_logps", ref_logps), ("desirable", desirable)):
        check_shape(name, tensor, tuple(pi_logps.shape), "the shape of pi_logps")
        check_same_device(name, tensor, "pi_logps", pi_logps)
    beta = check_positive("beta", beta)
    desirable_weight = check_at_least("desirable_weight", desirable_weight, 0)
    undesirable_weight = check_at_least("undesirable_weight", undesirable_weight, 0)
    scores = sequence_scores(pi_logps, ref_logps, None)
    baseline = _baseline(kl, scores)
    gain = beta * (scores - baseline)
    losses = torch.where(
        desirable != 0,
        desirable_weight * sigmoid(-gain),
        undesirable_weight * sigmoid(gain),
    )
    return losses, (beta * scores).detach()


def _baseline(kl: Tensor | float, scores: Tensor) -> Tensor:
    """Clamp the estimate of the divergence (0-d or (B,)) at 0; a constant."""
    if not isinstance(kl, Tensor):
        return scores.new_full((), max(check_finite("kl", kl), 0.0))
    check_real("kl", kl)
    if kl.ndim > 0:
        check_shape("kl", kl, tuple(scores.shape), "a number, or one for each sequence")
    return kl.detach().to(scores).clamp(min=0)
