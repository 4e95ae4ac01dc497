"""KTO, which learns from sequences with a label of their own.

`linear_unpaired.py` computes the same loss from hidden states; `preference.py` has the losses of
pairs.

Dims: B sequences.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_like
from fastrlhf.ops.checks import (
    check_at_least,
    check_finite,
    check_floating,
    check_mask,
    check_one_of,
    check_positive,
    check_real,
    check_shape,
)
from fastrlhf.ops.ranks import Group, check_group, summed
from fastrlhf.reference import sequence_scores, sigmoid

KTOLossType = Literal["kto", "apo_zero_unpaired"]


def kto_loss(
    pi_logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | float | None,
    beta: float = 0.1,
    *,
    loss_type: KTOLossType = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute the KTO loss of each sequence from a label of its own, without pairs.

    Eager equivalent, with s = pi_logps - ref_logps and z0 = max(0, kl)::

        losses = where(desirable, w_d * (1 - σ(beta * (s - z0))), w_u * (1 - σ(beta * (z0 - s))))

    Args:
        pi_logps, ref_logps: (B,) log-probs of whole sequences under policy and reference, in nats.
        desirable: (B,) bool.
        kl: estimate of KL(π‖ref) in nats, as `kto_kl` makes it, a number or a 0-d, (1,) or (B,)
            tensor; clamped at 0 and detached. None for apo_zero_unpaired.
        beta: positive strength of the KL regularisation.
        loss_type: "kto", or "apo_zero_unpaired", which has no z0: APO-zero of each sequence, whose
            sum over a pair is the "apo_zero" of `dpo_loss`.
        desirable_weight, undesirable_weight: weights of the two kinds.

    Returns:
        losses (B,), differentiable with respect to pi_logps and ref_logps, and rewards (B,) = β·s,
        detached.

    Raises:
        TypeError, ValueError: as `dpo_loss`.

    Source: 2402.01306 Eq. 8; 2408.06266 Eq. 7.

    Example:
        >>> pi_logps, ref_logps = torch.tensor([-10.0, -12.0]), torch.tensor([-11.0, -12.5])
        >>> desirable = torch.tensor([True, False])
        >>> losses, rewards = fastrlhf.kto_loss(pi_logps, ref_logps, desirable, kl=0.75)
        >>> losses, rewards
        (tensor([0.4938, 0.4938]), tensor([0.1000, 0.0500]))
    """
    check_unpaired(pi_logps, ref_logps)
    check_labels(desirable, pi_logps)
    check_one_of("loss_type", loss_type, get_args(KTOLossType))
    beta = check_positive("beta", beta)
    desirable_weight = check_at_least("desirable_weight", desirable_weight, 0)
    undesirable_weight = check_at_least("undesirable_weight", undesirable_weight, 0)
    scores = sequence_scores(pi_logps, ref_logps, None)
    baseline = _baseline(kl, scores, loss_type)
    above = beta * (scores - baseline)
    losses = torch.where(
        desirable != 0,
        desirable_weight * sigmoid(-above),
        undesirable_weight * sigmoid(above),
    )
    return losses, (beta * scores).detach()


def kto_kl(pi_logps: Tensor, ref_logps: Tensor, *, group: Group | None = None) -> Tensor:
    """Estimate KL(π‖ref) for `kto_loss`, from completions of other prompts of the batch.

    Eager equivalent: `(pi_logps - ref_logps).mean().clamp(min=0).detach()`.

    Args:
        pi_logps, ref_logps: (B,) log-probs under policy and reference, in nats, of completions that
            belong to other prompts, such as each prompt with the completion of the one before.
        group: torch.distributed group of the ranks over which the batch is spread; None: this
            process alone. Ranks may have different numbers of sequences.

    Returns:
        0-d, fp32 (fp64 for fp64 log-probs), at least 0, detached, the same on all ranks; 0 without
        any sequence.

    Raises:
        TypeError, ValueError: as `kto_loss`; a group that is none, or without this process.

    Source: 2402.01306, section 4.1.

    Example:
        >>> pi_logps, ref_logps = torch.tensor([-20.0, -18.0]), torch.tensor([-21.0, -18.5])
        >>> fastrlhf.kto_kl(pi_logps, ref_logps)
        tensor(0.7500)
    """
    check_unpaired(pi_logps, ref_logps)
    scores = sequence_scores(pi_logps.detach(), ref_logps.detach(), None)
    total, count = scores.sum(), scores.new_full((), scores.shape[0])
    if (group := check_group(group)) is not None:
        total, count = summed(torch.stack((total, count)), group).unbind()
    return (total / count.clamp(min=1)).clamp(min=0)


def check_unpaired(pi_logps: Tensor, ref_logps: Tensor) -> None:
    """Check log-probs of sequences, (B,) each."""
    check_floating("pi_logps", pi_logps)
    if pi_logps.ndim != 1:
        raise ValueError(f"pi_logps: expected shape (B,), got {tuple(pi_logps.shape)}")
    check_floating("ref_logps", ref_logps)
    check_like("ref_logps", ref_logps, "pi_logps", pi_logps)


def check_labels(desirable: Tensor, pi_logps: Tensor) -> None:
    """Check which sequences (B,) are desirable."""
    check_mask("desirable", desirable)
    check_like("desirable", desirable, "pi_logps", pi_logps)


def _baseline(kl: Tensor | float | None, scores: Tensor, loss_type: str) -> Tensor:
    """Return the estimate of the divergence that scores are compared with, at least 0 and without a
    gradient; 0 for a type that has no such baseline.
    """
    if loss_type == "apo_zero_unpaired":
        if kl is not None:
            raise ValueError(
                f"kl: expected None for loss_type {loss_type!r}, which has no baseline"
            )
        return scores.new_zeros(())
    if kl is None:
        raise ValueError("kl: expected a number or a tensor for loss_type 'kto', got None")
    if not isinstance(kl, Tensor):
        return scores.new_full((), max(check_finite("kl", kl), 0.0))
    check_real("kl", kl)
    if kl.ndim > 0 and kl.shape != (1,):
        check_shape("kl", kl, tuple(scores.shape), "a number, or one for each sequence")
    return kl.detach().to(scores).clamp(min=0)
