"""Losses of preference pairs that need no reference model: SimPO, CPO and ORPO.

`linear_preference.py` computes the same losses from hidden states, and `triple.py` adds a third
sequence. `preference.py` has the losses with a reference.

Dims: B sequences, P pairs.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_lengths, check_pairs
from fastrlhf.ops.checks import (
    check_between,
    check_counts,
    check_finite,
    check_floating,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
)
from fastrlhf.reference import (
    MARGIN_LOSSES,
    accumulation_dtype,
    log_sigmoid,
    masked_sum,
    sequence_lengths,
    sigmoid_loss,
)

ContrastType = Literal["sigmoid", "hinge", "ipo"]


def simpo_loss(
    logps: Tensor,
    lengths: Tensor,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float = 2.0,
    gamma: float = 0.5,
    *,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute the SimPO loss: reference-free, of log-probs averaged over tokens, with a target
    margin.

    Eager equivalent: `r = beta * logps / lengths; losses = -F.logsigmoid(r[yw_idxs] - r[yl_idxs] -
    gamma)`.

    Args:
        logps: (B,) log-probs of whole sequences, in nats.
        lengths: (B,) tokens of each sequence.
        yw_idxs, yl_idxs: (P,) integer indices of the preferred and the other sequences.
        beta: positive scale of the reward.
        gamma: target margin between the rewards of a pair.
        label_smoothing: probability ε in [0, 0.5] that a label is flipped, as in cDPO.

    Returns:
        losses (P,), differentiable with respect to logps, and rewards (B,) = β·mean log-prob,
        detached.

    Raises:
        TypeError, ValueError: as `dpo_loss`.

    Source: 2405.14734 Eq. 6.

    Example:
        >>> logps = torch.tensor([-10.0, -12.0, -14.0, -11.0])  # of four answers
        >>> lengths = torch.tensor([10, 8, 7, 11])
        >>> chosen, rejected = torch.tensor([0, 1]), torch.tensor([2, 3])
        >>> losses, rewards = fastrlhf.simpo_loss(logps, lengths, chosen, rejected)
        >>> losses, rewards
        (tensor([0.2014, 1.7014]), tensor([-2., -3., -4., -2.]))
    """
    beta = check_positive("beta", beta)
    gamma = check_finite("gamma", gamma)
    mean = mean_logps(logps, lengths, yw_idxs, yl_idxs)
    label_smoothing = check_between("label_smoothing", label_smoothing, 0, 0.5)
    margin = beta * (mean[yw_idxs.long()] - mean[yl_idxs.long()]) - gamma
    losses = sigmoid_loss(margin, 1.0, label_smoothing)
    return losses, (beta * mean).detach()


def cpo_loss(
    logps: Tensor,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float = 0.1,
    *,
    nll: Tensor | None = None,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    loss_type: ContrastType = "sigmoid",
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the CPO loss: DPO against a uniform reference, plus the likelihood of the preferred
    sequences.

    Eager equivalent: `losses = -F.logsigmoid(beta * (logps[yw_idxs] - logps[yl_idxs])) + alpha *
    nll`.

    Args:
        logps: (B,) log-probs of whole sequences, in nats.
        yw_idxs, yl_idxs: (P,) integer indices of the preferred and the other sequences.
        beta: positive scale of the reward.
        nll: (P,) or 0-d negative log-likelihood of the preferred sequences; None: their sums,
            -logps[yw_idxs].
        alpha: weight of nll, 0 for none.
        label_smoothing: probability ε in [0, 0.5] that a label is flipped, for sigmoid alone.
        loss_type: "sigmoid"; "hinge", max(0, 1 - d) with d = β·(logps[yw_idxs] - logps[yl_idxs]);
            or "ipo", (d/β - 1/(2β))² of log-probs averaged over tokens. nll is weighed alike.
        lengths: (B,) tokens of each sequence, for ipo.

    Returns:
        losses (P,), differentiable with respect to logps and nll, and rewards (B,) = β·logps,
        of averages for ipo, detached.

    Raises:
        TypeError, ValueError: as `dpo_loss`; label_smoothing with a type that has none.

    Source: 2401.08417 Eq. 5 and 6; the types as TRL's CPOTrainer has them.

    Example:
        >>> logps = torch.tensor([-10.0, -12.0, -14.0, -11.0])  # of four answers
        >>> chosen, rejected = torch.tensor([0, 1]), torch.tensor([2, 3])
        >>> losses, rewards = fastrlhf.cpo_loss(logps, chosen, rejected, alpha=0.5)
        >>> losses, rewards
        (tensor([5.5130, 6.7444]), tensor([-1.0000, -1.2000, -1.4000, -1.1000]))
    """
    check_pairs("logps", logps, yw_idxs, yl_idxs, None)
    beta = check_positive("beta", beta)
    alpha = check_finite("alpha", alpha)
    check_one_of("loss_type", loss_type, get_args(ContrastType))
    sums = scores = masked_sum(logps, None)
    if loss_type == "ipo":
        scores = mean_logps(logps, lengths, yw_idxs, yl_idxs)
    elif lengths is not None:
        check_counts("lengths", lengths)  # this type does not use them
    chosen = yw_idxs.long()
    losses = contrast(scores[chosen] - scores[yl_idxs.long()], loss_type, beta, label_smoothing)
    return losses + alpha * chosen_nll(nll, -sums[chosen]), (beta * scores).detach()


def contrast(margin: Tensor, loss_type: str, beta: float, label_smoothing: float) -> Tensor:
    """Compute the loss of a margin between log-probs without a reference."""
    label_smoothing = check_between("label_smoothing", label_smoothing, 0, 0.5)
    loss = MARGIN_LOSSES[loss_type]
    if label_smoothing > 0 and not loss.smoothed:
        raise ValueError(
            f"label_smoothing: expected 0 for loss_type {loss_type!r}, got {label_smoothing}"
        )
    return loss.formula(margin, beta, label_smoothing)


def orpo_loss(
    logps: Tensor,
    lengths: Tensor,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float = 0.1,
    *,
    nll: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the ORPO loss: the likelihood of the preferred sequences, and the odds ratio of each
    pair.

    Eager equivalent, with m = logps / lengths and odds(m) = e^m / (1 - e^m)::

        losses = nll - beta * F.logsigmoid(log(odds(m[yw_idxs])) - log(odds(m[yl_idxs])))

    Args:
        logps: (B,) log-probs of whole sequences, in nats.
        lengths: (B,) tokens of each sequence.
        yw_idxs, yl_idxs: (P,) integer indices of the preferred and the other sequences.
        beta: positive weight of the odds-ratio term (λ in the paper).
        nll: (P,) or 0-d negative log-likelihood of the preferred sequences; None: their mean over
            tokens.

    Returns:
        losses (P,), differentiable with respect to logps and nll, and rewards (B,) = β·mean
        log-prob, detached.

    1 - e^m is taken without cancellation.

    Raises:
        TypeError, ValueError: as `dpo_loss`.

    Source: 2403.07691 Eq. 6 and 7.

    Example:
        >>> logps = torch.tensor([-10.0, -12.0, -14.0, -11.0])  # of four answers
        >>> lengths = torch.tensor([10, 8, 7, 11])
        >>> chosen, rejected = torch.tensor([0, 1]), torch.tensor([2, 3])
        >>> losses, rewards = fastrlhf.orpo_loss(logps, lengths, chosen, rejected)
        >>> losses
        tensor([1.0238, 1.6107])
    """
    beta = check_positive("beta", beta)
    mean = mean_logps(logps, lengths, yw_idxs, yl_idxs)
    log_odds = mean - _log1mexp(mean)
    chosen = yw_idxs.long()
    ratio = log_odds[chosen] - log_odds[yl_idxs.long()]
    losses = chosen_nll(nll, -mean[chosen]) - beta * log_sigmoid(ratio)
    return losses, (beta * mean).detach()


def mean_logps(logps: Tensor, lengths: Tensor | None, yw_idxs: Tensor, yl_idxs: Tensor) -> Tensor:
    """Check the arguments of a length-normalised loss and average its log-probs over tokens."""
    check_pairs("logps", logps, yw_idxs, yl_idxs, None)
    check_lengths(lengths, logps, "the loss averages over tokens")
    sums = masked_sum(logps, None)
    return sums / sequence_lengths(None, lengths, sums.dtype)


def chosen_nll(nll: Tensor | None, default: Tensor) -> Tensor:
    """Check the negative log-likelihood that goes with each pair, if it is given."""
    if nll is None:
        return default
    check_floating("nll", nll)
    check_same_device("nll", nll, "log-probs", default)
    if nll.ndim > 0:
        check_shape("nll", nll, tuple(default.shape), "one for each pair, or 0-d")
    return nll.to(accumulation_dtype(nll.dtype))


def _log1mexp(x: Tensor) -> Tensor:
    """ln(1 - e^x) for x < 0; a probability of 1 counts as the nearest one below, so that odds stay
    finite.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    # Each branch gets arguments in its own range alone: the gradient of a branch that is not taken
    # would be NaN outside of it.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )
