"""The softmax of rows of logits, and log-ratios of two of them.

A softmax is kept in parts, because differences of logits are more accurate than differences of
log-probs.

Dims: V vocabulary, ... any leading shape.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .effective_logits import capped_logits, column_of, divided, exp_of_sums, finite_base, row_sums
from .scalars import accumulation_dtype


def of_live_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Put 0 into rows of (..., V) where the mask (...) is 0, whatever they hold; None keeps all."""
    return x if mask is None else torch.where((mask != 0).unsqueeze(-1), x, 0.0)


class Distribution(NamedTuple):
    """Softmax of rows of logits, in parts whose differences keep the accuracy of the logits."""

    z: Tensor  # (..., V) effective logits before the division by the temperature
    peak: Tensor  # (..., 1) the largest, a constant
    log_norm: Tensor  # (..., 1) log-sum-exp of (z - peak) / temperature
    p: Tensor  # (..., V)
    empty: Tensor  # (...) whether all logits are -inf: there is no distribution, and p is 0


# Peak and log_norm (...) of whole rows, given where only some columns of the rows are at hand.
Norm = tuple[Tensor, Tensor]


def distribution(
    logits: Tensor,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    scale: float | Tensor,
    norm: Norm | None = None,
) -> Distribution:
    """Compute the softmax of the effective logits; the temperature is a number or (..., 1)."""
    z = capped_logits(logits.to(accumulation_dtype(logits.dtype)), softcap, scale)
    peak = z.detach().amax(-1, keepdim=True) if norm is None else norm[0].unsqueeze(-1)
    empty = peak == -torch.inf
    peak = torch.where(empty, 0.0, peak)
    shifted = divided(z - peak, temperature)
    if norm is None:
        weight = shifted.exp()
        total = torch.where(empty, 1.0, row_sums(weight))
        log_norm, p = total.log(), weight * (1 / total)
    else:
        log_norm = torch.where(empty, 0.0, norm[1].unsqueeze(-1))
        p = (shifted - log_norm).exp()
    return Distribution(z, peak, log_norm, p, empty.squeeze(-1))


def log_ratio(p: Distribution, q: Distribution, temperature: float | Tensor) -> Tensor:
    """Compute ln p - ln q (..., V) from the differences of the logits.

    The difference of two nearly equal logits is exact, and would not be if the norms had been
    subtracted from each before. But the logits of one side may all be larger than those of the
    other by about the same number, which changes no distribution; then peaks are subtracted first.
    """
    far = (p.peak - q.peak).abs() > 1
    anchor_p, anchor_q = (torch.where(far, side.peak, 0.0) for side in (p, q))
    apart = (p.peak - anchor_p) - (q.peak - anchor_q)
    differences = (p.z - anchor_p) - (q.z - anchor_q)
    norms = p.log_norm - q.log_norm
    return divided(differences, temperature) - (divided(apart, temperature) + norms)


def row_norm(
    logits: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    scale: float | Tensor,
) -> Norm:
    """Compute peak and log_norm (N,) of rows (N, V)."""
    rows_t = column_of(temperature, accumulation_dtype(logits.dtype))
    return norm_of(distribution(logits, rows_t, softcap, scale))


def norm_of(side: Distribution) -> Norm:
    return torch.where(side.empty, -torch.inf, side.peak.squeeze(-1)), side.log_norm.squeeze(-1)


def log_ratio_terms(
    z_p: Tensor, z_q: Tensor, peak_p: Tensor, peak_q: Tensor, rows_t: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the terms whose sums over a row give the norms of p and q, and E_p[ln p - ln q], for
    columns (..., V) of rows whose peaks and temperatures are (..., 1).
    """
    shifted_p, shifted_q = (
        divided(z - finite_base(peak), rows_t) for z, peak in ((z_p, peak_p), (z_q, peak_q))
    )
    weight_p, weight_q = exp_of_sums(shifted_p), exp_of_sums(shifted_q)
    # A word with p = 0 adds nothing, whatever q is there.
    moment = weight_p * torch.where(weight_p == 0, 0.0, shifted_p - shifted_q)
    return weight_p, weight_q, moment


def log_ratio_of_sums(
    peak_p: Tensor, peak_q: Tensor, total_p: Tensor, total_q: Tensor, moment: Tensor
) -> tuple[Tensor, ...]:
    """Compute, from the sums (N,) of these terms, peak and log_norm of p and of q, and
    E_p[ln p - ln q]. That is KL(p‖q), but its rounding error is relative to the log-ratios, not to
    the KL.
    """
    log_p, log_q = total_p.log(), total_q.log()
    return peak_p, log_p, peak_q, log_q, moment / total_p - (log_p - log_q)
