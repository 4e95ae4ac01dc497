"""The definition of `preference_loss`: losses of the margin between the two sequences of a pair.

Dims: B sequences, T tokens, P pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import ROWS, Layout, sequence_lengths, sequence_scores
from .scalars import log_sigmoid


def sigmoid_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Compute (1-ε)·ℓ(βΔ) + ε·ℓ(-βΔ), ℓ = -ln σ: DPO, 2305.18290 Eq. 7; with ε, cDPO."""
    d = beta * margin
    clean = -(1 - label_smoothing) * log_sigmoid(d)
    # Without label smoothing a margin may be infinite; 0 times its other term would be NaN.
    return clean - label_smoothing * log_sigmoid(-d) if label_smoothing > 0 else clean


def robust_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Compute [(1-ε)·ℓ(βΔ) - ε·ℓ(-βΔ)] / (1-2ε), unbiased under label noise ε: 2403.00409."""
    d = beta * margin
    clean = -(1 - label_smoothing) * log_sigmoid(d)
    noisy = clean + label_smoothing * log_sigmoid(-d) if label_smoothing > 0 else clean
    return noisy / (1 - 2 * label_smoothing)


def hinge_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Compute max(0, 1 - βΔ): SLiC, 2305.10425."""
    return torch.relu(1 - beta * margin)


def ipo_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Compute (Δ - 1/(2β))², where Δ is of averages over tokens: IPO, 2310.12036 Eq. 17."""
    return (margin - 0.5 / beta).square()


class MarginLoss(NamedTuple):
    """A loss of the margin Δ between two sequences: its formula here, its name in the kernel, and
    how Δ is made.
    """

    formula: Callable[[Tensor, float, float], Tensor]
    kernel: str
    average: bool = False  # whether Δ is of scores averaged over tokens, not summed
    smoothed: bool = False  # whether the loss has a label smoothing


MARGIN_LOSSES = {
    "sigmoid": MarginLoss(sigmoid_loss, "sigmoid", smoothed=True),
    "robust": MarginLoss(robust_loss, "robust", smoothed=True),
    "hinge": MarginLoss(hinge_loss, "hinge"),
    "ipo": MarginLoss(ipo_loss, "ipo", average=True),
    "sigmoid_norm": MarginLoss(sigmoid_loss, "sigmoid", average=True),
}


def preference_loss(
    policy: Tensor,
    reference: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    layout: Layout = ROWS,
) -> tuple[Tensor, Tensor]:
    """Compute a margin loss of each pair (P,), and the rewards β·s (B,), from sums or masked token
    log-probs.
    """
    loss = MARGIN_LOSSES[loss_type]
    scores = sequence_scores(policy, reference, mask, layout)
    comparable = scores
    if loss.average:
        comparable = scores / sequence_lengths(mask, lengths, scores.dtype, layout)
    margin = comparable[chosen.long()] - comparable[rejected.long()]
    smoothing = label_smoothing if loss.smoothed else 0.0
    return loss.formula(margin, beta, smoothing), (beta * scores).detach()
