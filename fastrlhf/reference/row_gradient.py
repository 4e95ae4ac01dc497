"""The gradient of `token_stats` in closed form, as the kernels compute it, for a few rows.

Dims: N rows, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .effective_logits import cap_slope, capped_logits, divide_, is_one
from .row_statistics import with_target


class RowSlopes(NamedTuple):
    """Factors (N,) of the terms of the gradient of a row's logits: `others` of p in all columns but
    the target's, `target` for the target's own entry, `entropy` of p⊙(ln p + H), which the gradient
    of the entropy needs, and `mean`, which is added to all columns.
    """

    others: Tensor
    target: Tensor
    entropy: Tensor | None = None
    mean: Tensor | None = None


def row_slopes(
    logprob: Tensor,
    d_logprob: Tensor,
    d_entropy: Tensor | None = None,
    d_lse: Tensor | None = None,
    d_mean: Tensor | None = None,
    *,
    columns: int | Tensor,
) -> RowSlopes:
    """Turn the gradients (N,) of the statistics into these factors, for rows of so many columns."""
    # The target's entry g·(1 - p) by expm1, which is accurate where p is nearly 1.
    others, target = -d_logprob, -d_logprob * torch.expm1(logprob)
    if d_lse is not None:
        others, target = d_lse - d_logprob, target + d_lse * logprob.exp()
    return RowSlopes(others, target, d_entropy, None if d_mean is None else d_mean / columns)


def token_stats_backward(
    logits: Tensor,
    targets: Tensor,
    stats: tuple[Tensor, ...],
    d_logprob: Tensor,
    d_entropy: Tensor | None,
    d_lse: Tensor | None = None,
    d_mean: Tensor | None = None,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Compute d_logits (N, V) in the accumulation dtype; no row is ignored or all -inf. If the
    columns are only a part of the rows, targets may lie outside of them.

    `stats` are the logprob, entropy, peak and log_norm of the forward. With g, h, l and m the
    gradients of log-prob, entropy, lse and the mean of the effective logits z, dz = g·(e_target -
    p) - h·p⊙(ln p + H) + l·p + m/V, times dz/dlogits.
    """
    logprob, row_entropy, peak, log_norm = stats
    slopes = row_slopes(
        logprob, d_logprob, d_entropy, d_lse, d_mean, columns=logits.shape[-1]
    )  # fmt: skip
    return logits_gradient(
        logits, targets, (row_entropy, peak, log_norm), slopes,
        temperature=temperature, softcap=softcap, scale=scale,
    )  # fmt: skip


def logits_gradient(
    logits: Tensor,
    targets: Tensor,
    stats: tuple[Tensor | None, Tensor, Tensor],
    slopes: RowSlopes,
    *,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    scale: float | Tensor,
    columns: Tensor | None = None,
) -> Tensor:
    """Compute the gradient from entropy, peak and log_norm of the rows, and the factors in
    `RowSlopes`. `columns`: see `with_target`.
    """
    index = targets.long().unsqueeze(-1)
    rows_t = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    row_entropy, peak, log_norm = stats
    capped = capped_logits(logits.to(peak.dtype), softcap, scale)
    log_p = divide_(capped - peak.unsqueeze(-1), rows_t).sub_(log_norm.unsqueeze(-1))
    surprise = None
    if slopes.entropy is not None and row_entropy is not None:
        # 0·ln 0 counts as 0: a finite number in place of ln 0 makes the product 0.
        surprise = log_p.clamp(min=torch.finfo(log_p.dtype).min).add_(row_entropy.unsqueeze(-1))
        surprise.mul_(log_p.exp()).mul_(slopes.entropy.unsqueeze(-1))
    dz = log_p.exp_().mul_(slopes.others.unsqueeze(-1))
    dz = with_target(dz, index, slopes.target.unsqueeze(-1), columns)
    if surprise is not None:
        dz.sub_(surprise)
    if slopes.mean is not None:
        dz.add_(slopes.mean.unsqueeze(-1))
    if softcap is not None:
        dz.mul_(cap_slope(logits.to(peak.dtype), softcap, scale))
    dz = divide_(dz, rows_t)
    return dz if is_one(scale) else dz.mul_(scale)
