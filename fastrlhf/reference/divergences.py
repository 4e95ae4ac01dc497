"""The definition of `kl_divergence`, and its gradient in closed form, as the kernels compute it.

Dims: N rows, V vocabulary, ... any leading shape.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .distributions import Distribution, Norm, distribution, log_ratio, norm_of, of_live_rows
from .divergence_terms import Shares, both_shares, jsd_terms, kl_terms, log_to_mixture, surplus
from .effective_logits import cap_slope, column_of, divide_, row_sums
from .scalars import accumulation_dtype


def divergence(
    logits_p: Tensor,
    logits_q: Tensor,
    mask: Tensor | None,
    *,
    share: float | None,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Compute KL(p‖q) of each row (...), 0 where the mask is 0. With a share of q in a mixture m,
    compute the JSD instead, which is share·KL(q‖m) + (1-share)·KL(p‖m).
    """
    sides = (of_live_rows(x, mask) for x in (logits_p, logits_q))
    value, *_ = divergence_and_stats(
        *sides, share=share, temperature=temperature, softcap=softcap, scale=scale
    )
    return value if mask is None else torch.where(mask != 0, value, 0.0)


def of_sums_of_terms(
    value: Tensor,
    excess: Tensor,
    p_is_empty: Tensor,
    q_is_empty: Tensor,
    share: float | Shares | None,
) -> Tensor:
    """Finish divergences (...), given the sums of their terms and the sums of q - p."""
    # The sum s of q - p is rounding. It adds s²/2 to the KL, which is as large as a KL of 1e-13.
    curvature = 1.0 if share is None else both_shares(share).q * both_shares(share).p
    rounding = 0.5 * curvature * excess.square()
    value = value - torch.minimum(rounding, value).detach()
    # A row of nothing but -inf has no distribution, and its divergence is 0. But if q is such a row
    # and p is not, then q is 0 where p is not, and KL(p‖q) is infinite.
    if_q_is_empty = torch.inf if share is None else 0.0
    return torch.where(p_is_empty, 0.0, torch.where(q_is_empty, if_q_is_empty, value))


class DivergenceStats(NamedTuple):
    """What the forward keeps of each row for the backward, each (N,), or stacked to (6, N)."""

    peak_p: Tensor
    log_norm_p: Tensor
    peak_q: Tensor
    log_norm_q: Tensor
    mean_p: Tensor  # E_p of the log-ratio of p to q, or to the mixture
    mean_q: Tensor  # E_q of that of q to the mixture; for KL(p‖q), mean_p again


def divergence_and_stats(
    logits_p: Tensor,
    logits_q: Tensor,
    *,
    share: float | Shares | None,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    scale: float | Tensor,
) -> tuple[Tensor, ...]:
    """Compute the divergence of rows (..., V), none of which is masked, followed by its
    `DivergenceStats`, each (...).
    """
    dtype = accumulation_dtype(torch.promote_types(logits_p.dtype, logits_q.dtype))
    rows_t = column_of(temperature, dtype)
    p, q = (distribution(x.to(dtype), rows_t, softcap, scale) for x in (logits_p, logits_q))
    return divergence_of_sums(_sums(p, q, rows_t, share), (*norm_of(p), *norm_of(q)), share)


def divergence_of_sums(
    sums: tuple[Tensor, ...], norms: tuple[Tensor, ...], share: float | Shares | None
) -> tuple[Tensor, ...]:
    """Compute what `divergence_and_stats` returns, from `divergence_sums` of whole rows, and peak
    and log_norm of p and of q.
    """
    terms, excess, mean_p, mean_q = sums
    p_is_empty, q_is_empty = (peak == -torch.inf for peak in norms[::2])
    values = of_sums_of_terms(terms, excess, p_is_empty, q_is_empty, share)
    return values, *norms, mean_p, mean_q


def divergence_sums(
    logits_p: Tensor,
    logits_q: Tensor,
    norms: tuple[Norm, Norm],
    *,
    share: float | Shares | None,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    scale: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the sums of the terms and of q - p, and the mean log-ratios of p and of q, each (N,),
    over some columns (N, V) of rows whose norms are known.
    """
    dtype = norms[0][0].dtype
    rows_t = column_of(temperature, dtype)
    p, q = (
        distribution(x.to(dtype), rows_t, softcap, scale, norm)
        for x, norm in zip((logits_p, logits_q), norms, strict=True)
    )
    return _sums(p, q, rows_t, share)


def _sums(
    p: Distribution, q: Distribution, rows_t: float | Tensor, share: float | Shares | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what `divergence_sums` returns."""
    w = log_ratio(p, q, rows_t)
    excess = surplus(p.p, q.p, w)
    if share is None:
        value = row_sums(kl_terms(p.p, q.p, w)).squeeze(-1)
        # The terms are q - p + p·w, so the mean of w is their sum less the sum of q - p. The
        # gradient with respect to q needs no mean.
        return value, excess, value - excess, value - excess
    value = row_sums(jsd_terms(p.p, q.p, w, share)).squeeze(-1)
    mean_p, mean_q = (
        row_sums(own.p * _ratio(own, ratio, of_p, share)[1]).squeeze(-1)
        for own, ratio, of_p in ((p, w, True), (q, -w, False))
    )
    return value, excess, mean_p, mean_q


def _ratio(
    own: Distribution, w: Tensor, of_p: bool, share: float | Shares | None
) -> tuple[float | Tensor, Tensor]:
    """Return the share of a side in the divergence, and its log-ratio to the other side (w), or to
    the mixture if there is one. The log-ratio is 0 where the side has probability 0, since the word
    adds nothing then.
    """
    part: float | Tensor = 1.0
    if share is not None:
        of = both_shares(share)
        part, other = (of.p, of.q) if of_p else (of.q, of.p)
        w = -log_to_mixture(-w, part, other)
    return part, torch.where(own.p == 0, 0.0, w)


def divergence_backward(
    own: Tensor,
    other: Tensor,
    d_values: Tensor,
    *,
    of_p: bool,
    share: float | Shares | None,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    scale: float | Tensor,
    stats: Tensor | tuple[Tensor, ...] | None = None,
) -> Tensor:
    """Compute the gradient of the divergence of rows (N, V) with respect to one side, in the dtype
    of d_values (N,); no row is masked. `stats` are `DivergenceStats`, which are needed where only
    some columns of the rows are given.

    With w the log-ratio of the own side p to the other side, or to the mixture, dz = p⊙(w - E_p[w])
    (times the share of the own side in the mixture). With respect to q in KL(p‖q), dz = q - p. Both
    are multiplied by dz/dlogits.
    """
    rows_t = column_of(temperature, d_values.dtype)
    of_own, of_other, mean = None, None, None
    if stats is not None:
        known = DivergenceStats(*stats)
        norms = (known.peak_p, known.log_norm_p), (known.peak_q, known.log_norm_q)
        of_own, of_other = norms if of_p else norms[::-1]
        mean = (known.mean_p if of_p else known.mean_q).unsqueeze(-1)
    p = distribution(own.to(d_values.dtype), rows_t, softcap, scale, of_own)
    q = distribution(other.to(d_values.dtype), rows_t, softcap, scale, of_other)
    if share is None and not of_p:
        dz = p.p - q.p
    else:
        part, w = _ratio(p, log_ratio(p, q, rows_t), of_p, share)
        dz = part * p.p * (w - (row_sums(p.p * w) if mean is None else mean))
    dz = torch.where((p.empty | q.empty).unsqueeze(-1), 0.0, dz * d_values.unsqueeze(-1))
    if softcap is not None:
        dz = dz * cap_slope(own.to(dz.dtype), softcap, scale)
    return divide_(dz, rows_t) * scale
