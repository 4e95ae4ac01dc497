"""Two rows of logits → KL divergence or generalised JSD of their distributions, and its gradient.

Two sweeps over both rows, of which the second goes backwards and finds in the cache what fits
there: online sums for the normalisers, then the terms. With w = ln p - ln q, those of KL(p‖q) are
q - p + p·w, never negative, since Σ p·w of nearly equal distributions is a small difference of
large numbers, which one sweep cannot tell from rounding; likewise of the JSD. One program has a row
of each, so that nothing depends on the batch.

The gradient with respect to the logits of one side is p·(w - E_p[w]) for both, w the log-ratio of
that side to the other, or to the mixture; and q - p with respect to q of KL(p‖q). The formula is a
device function that the launcher hands to the kernel, launched once for each side that needs a
gradient. Rows that are masked are not read, and neither are rows without an upstream gradient.

Called by `fastrlhf/ops/divergence.py`, and for its sums alone by `divergence_over_ranks.py` there;
read `rows.py` first.

Dims: N rows = outer x inner, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import RowPlan, on_their_device, row_plan
from .rows import Row, finite_base, load_tile, row_of, strides, tile_columns
from .tiles import (
    exp,
    expm1,
    expm1_minus_near_0,
    log1p_near_0,
    log1p_surplus_near_0,
    stored,
)
from .transform import Transform, capped_logits, row_temperature, transform_options


def _plan(kernel: str, softcap: float | None, *sides: torch.Tensor) -> RowPlan:
    """Cut rows by the wider dtype of the two sides."""
    dtype = max((x.dtype for x in sides), key=lambda dtype: dtype.itemsize)
    return row_plan(kernel, sides[0].shape[2], dtype, capped=softcap is not None)


# Planes of the statistics of a row: peak and log_norm of each side, and two means. For the JSD,
# those of the log-ratios of p and of q to the mixture; for KL(p‖q), that of p to q in both.
PLANES = 6


class Side(NamedTuple):
    """One of the two distributions of a row, whose normaliser is known."""

    logits: Row
    base: tl.tensor  # the peak, or 0 in a row of nothing but -inf
    norm: tl.tensor  # lse - base / temperature
    inverse: tl.tensor  # e^-norm
    share: tl.tensor  # its weight in the mixture


class Terms(NamedTuple):
    """Sums over the columns that one lane, or a whole row, has had so far."""

    value: tl.tensor  # of the terms of the divergence
    mean_p: tl.tensor  # E_p of the log-ratio of p to the other side, or to the mixture
    mean_q: tl.tensor  # E_q of the log-ratio of q to the mixture; a copy of mean_p for KL
    excess: tl.tensor  # by how much q sums to more than p


@triton.jit
def _capped_tile(row, columns, inside, transform, acc: tl.constexpr, EVICTION: tl.constexpr):
    """Logits of one side, transformed but for the temperature; -inf beyond the vocabulary."""
    z, _ = capped_logits(load_tile(row, columns, inside, -float("inf"), acc, EVICTION), transform)
    if transform.HAS_SOFTCAP:
        z = tl.where(inside, z, -float("inf"))
    return z


@triton.jit
def _add_side(capped, peak, rest, rate):
    """Take a tile into the online sum of one side: the new peak and sum."""
    new_peak = tl.maximum(peak, tl.max(capped, axis=1))
    base = finite_base(new_peak)
    weight = tl.exp2((capped - base[:, None]) * rate)
    return new_peak, rest * tl.exp2((peak - base) * rate) + tl.sum(weight, axis=1)


@triton.jit
def _merge(peak, rest, rate):
    """Merge the lanes of one side: its base, the sum, and whether there was nothing but -inf."""
    row_peak = tl.max(peak, axis=0)
    base = finite_base(row_peak)
    total = tl.sum(rest * tl.exp2((peak - base) * rate), axis=0)
    return base, total, (row_peak == -float("inf")) & (total == 0.0)


@triton.jit
def _normalisers(
    row_p, row_q, within_tile, vocab, transform, acc: tl.constexpr,
    LANES: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sweep both rows for the first time, and return the results of `_merge` for p and for q."""
    peak_p = tl.full((LANES,), -float("inf"), acc)
    peak_q = tl.full((LANES,), -float("inf"), acc)
    rest_p = tl.zeros((LANES,), acc)
    rest_q = tl.zeros((LANES,), acc)
    for start in tl.range(0, vocab, TILE, num_stages=STAGES):
        columns = (start + within_tile).to(tl.int64)
        inside = columns < vocab
        z_p = _capped_tile(row_p, columns, inside, transform, acc, "evict_last")
        z_q = _capped_tile(row_q, columns, inside, transform, acc, "evict_last")
        peak_p, rest_p = _add_side(z_p, peak_p, rest_p, transform.rate)
        peak_q, rest_q = _add_side(z_q, peak_q, rest_q, transform.rate)
    base_p, total_p, empty_p = _merge(peak_p, rest_p, transform.rate)
    base_q, total_q, empty_q = _merge(peak_q, rest_q, transform.rate)
    return base_p, total_p, empty_p, base_q, total_q, empty_q


@triton.jit
def _log_ratio(z, base, norm, z_other, base_other, norm_other, per_t):
    """Compute ln p - ln q from the differences of the logits.

    Those of nearly equal logits are exact, and would not be once something else is subtracted. But
    sides that are far apart as a whole, which changes no distribution, are taken from their bases.
    """
    far = tl.abs(base - base_other) > 1.0
    anchor = tl.where(far, base, 0.0)
    anchor_other = tl.where(far, base_other, 0.0)
    apart = (base - anchor) - (base_other - anchor_other)
    return ((z - anchor) - (z_other - anchor_other) - apart) * per_t - (norm - norm_other)


@triton.jit
def _by_the_larger(gap, share, share_other):
    """Compute ln m - ln max(p, q) for m = share·p + share_other·q, from the gap ln q - ln p."""
    smaller = exp(-tl.abs(gap))
    mixed = tl.where(gap > 0, share_other + share * smaller, share + share_other * smaller)
    return tl.log(mixed)


@triton.jit
def _log_to_mixture(gap, excess, by_the_larger):
    """Compute ln m - ln p for p > 0, from m / p - 1; where that is large, or nearly -1, by way of
    the larger of p and q.
    """
    moderate = (excess >= -0.5) & (excess <= 1.0)
    return tl.where(moderate, log1p_near_0(excess), tl.maximum(gap, 0.0) + by_the_larger)


@triton.jit
def _mean(p, w):
    """Terms p·w of E_p[w]: 0 where p is 0, whatever w is; a p of NaN gives NaN."""
    return tl.where(p == 0, 0.0, p * w)


@triton.jit
def _kl_terms(p, q, w):
    """Terms q - p + p·w, w = ln p - ln q: without cancellation where w is small."""
    return tl.where(tl.abs(w) < 0.5, p * expm1_minus_near_0(-w), q - p + _mean(p, w))


@triton.jit
def _jsd_terms(p, q, to_p, to_q, excess_p, excess_q, w, share_p, share_q):
    """Terms of the JSD from to_p = ln m - ln p and to_q. Where p and q are nearly equal, m - p and
    m - q are added, whose weighted sum is 0: p has the term p·(u - ln(1 + u)), u = m/p - 1.
    """
    of_near = share_p * p * log1p_surplus_near_0(excess_p)
    of_near += share_q * q * log1p_surplus_near_0(excess_q)
    return tl.where(tl.abs(w) < 0.5, of_near, -share_p * _mean(p, to_p) - share_q * _mean(q, to_q))


@triton.jit
def _add_mixture(terms, p, q, w, share_p, share_q):
    """Take a tile of probabilities p and q, w = ln p - ln q, into the sums of a JSD."""
    growth = expm1(-w)
    excess_p = share_q * growth
    excess_q = share_p * expm1(w)
    by_the_larger = _by_the_larger(-w, share_p, share_q)
    to_p = _log_to_mixture(-w, excess_p, by_the_larger)
    to_q = _log_to_mixture(w, excess_q, by_the_larger)
    added = _jsd_terms(p, q, to_p, to_q, excess_p, excess_q, w, share_p, share_q)
    value = terms.value + tl.sum(added, axis=1)
    mean_p = terms.mean_p - tl.sum(_mean(p, to_p), axis=1)
    mean_q = terms.mean_q - tl.sum(_mean(q, to_q), axis=1)
    excess = terms.excess + tl.sum(tl.where(tl.abs(w) < 0.5, p * growth, q - p), axis=1)
    return Terms(value, mean_p, mean_q, excess)


@triton.jit
def _sums_of_terms(
    p, q, within_tile, vocab, transform, acc: tl.constexpr,
    MIXTURE: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The second sweep, backwards: the terms of a row.

    A maximum passes over NaN, and a sum does not: a row with a NaN has NaN for its sums, as it
    should.
    """
    per_t = 1.0 / transform.temperature
    rate = transform.rate
    zero = tl.zeros((LANES,), acc)
    terms = Terms(zero, zero, zero, zero)
    tiles = tl.cdiv(vocab, TILE)
    for done in tl.range(0, tiles, num_stages=STAGES):
        columns = ((tiles - 1 - done) * TILE + within_tile).to(tl.int64)
        inside = columns < vocab
        z_p = _capped_tile(p.logits, columns, inside, transform, acc, "evict_first")
        z_q = _capped_tile(q.logits, columns, inside, transform, acc, "evict_first")
        of_p = tl.exp2((z_p - p.base) * rate) * p.inverse
        of_q = tl.exp2((z_q - q.base) * rate) * q.inverse
        w = _log_ratio(z_p, p.base, p.norm, z_q, q.base, q.norm, per_t)
        if MIXTURE:
            terms = _add_mixture(terms, of_p, of_q, w, p.share, q.share)
        else:
            value = terms.value + tl.sum(_kl_terms(of_p, of_q, w), axis=1)
            mean_p = terms.mean_p + tl.sum(_mean(of_p, w), axis=1)
            terms = Terms(value, mean_p, zero, zero)
    value = tl.sum(terms.value, axis=0)
    mean_p = tl.sum(terms.mean_p, axis=0)
    if MIXTURE:
        mean_q = tl.sum(terms.mean_q, axis=0)
        excess = tl.sum(terms.excess, axis=0)
    else:
        mean_q = mean_p
        # Both are inf where q is 0 and p is not; inf - inf would be NaN.
        excess = tl.where(value == float("inf"), 0.0, value - mean_p)
    return Terms(value, mean_p, mean_q, excess)


@triton.jit
def _without_rounding(terms, p, q, empty_p, empty_q, MIXTURE: tl.constexpr):
    """The value of a row: what its terms say, but for what comes of rounded normalisers, and for
    sides of nothing but -inf.
    """
    # Σ(q - p) is 0 but for the rounding of the normalisers. It adds a multiple of its square to the
    # value, which is too much where p and q are nearly equal.
    if MIXTURE:
        curvature = p.share * q.share
        rounding = 0.5 * curvature * terms.excess * terms.excess
        if_q_is_empty = 0.0
    else:
        rounding = 0.5 * terms.excess * terms.excess
        if_q_is_empty = float("inf")
    value = tl.where(terms.value <= rounding, 0.0, terms.value - rounding)
    value = tl.where(empty_q, if_q_is_empty, value)
    # A row of nothing but -inf has no distribution, and so is no distance away from another; but
    # where q is such a row, and p is not, q is 0 where p is not.
    return tl.where(empty_p, 0.0, value)


@triton.jit(do_not_specialize=["rows", "inner_p", "inner_q"])
def _divergence_fwd_kernel(
    values,  # (N,) out
    stats,  # (PLANES, N) out
    logits_p,  # (outer, inner, V), any strides, as those of q
    logits_q,
    mask,  # (N,)
    rows,
    vocab,
    inner_p,
    inner_q,
    p_stride_outer,
    p_stride_inner,
    p_stride_vocab,
    q_stride_outer,
    q_stride_inner,
    q_stride_vocab,
    share_p: tl.float64,  # of each side in the mixture
    share_q: tl.float64,
    token_temperature,  # (N,) or unused
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MIXTURE: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    LANE_STRIDE: tl.constexpr,
    VEC_STRIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    acc: tl.constexpr = values.dtype.element_ty
    TILE: tl.constexpr = LANES * VEC
    row = tl.program_id(0).to(tl.int64)
    plane = rows.to(tl.int64)
    out = stats + row
    if tl.load(mask + row) == 0:
        tl.store(values + row, 0.0)
        for i in tl.static_range(6):
            tl.store(out + i * plane, 0.0)
        return

    row_t, rate = row_temperature(
        row, True, token_temperature, temperature, acc, PER_TOKEN_TEMPERATURE
    )
    row_p = row_of(logits_p, row, inner_p, p_stride_outer, p_stride_inner, p_stride_vocab)
    row_q = row_of(logits_q, row, inner_q, q_stride_outer, q_stride_inner, q_stride_vocab)
    within_tile = tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)
    base_p, total_p, empty_p, base_q, total_q, empty_q = _normalisers(
        row_p, row_q, within_tile, vocab, Transform(scale, softcap, row_t, rate, HAS_SOFTCAP), acc,
        LANES, TILE, STAGES,
    )  # fmt: skip
    part_p, part_q = tl.full((), share_p, acc), tl.full((), share_q, acc)
    p = Side(row_p, base_p, tl.log(total_p), 1.0 / total_p, part_p)
    q = Side(row_q, base_q, tl.log(total_q), 1.0 / total_q, part_q)
    terms = _sums_of_terms(
        p, q, within_tile, vocab, Transform(scale, softcap, row_t, rate, HAS_SOFTCAP), acc,
        MIXTURE, LANES, TILE, STAGES,
    )  # fmt: skip
    tl.store(values + row, _without_rounding(terms, p, q, empty_p, empty_q, MIXTURE))
    tl.store(out, tl.where(empty_p, -float("inf"), base_p))
    tl.store(out + plane, p.norm)
    tl.store(out + 2 * plane, tl.where(empty_q, -float("inf"), base_q))
    tl.store(out + 3 * plane, q.norm)
    tl.store(out + 4 * plane, terms.mean_p)
    tl.store(out + 5 * plane, terms.mean_q)


@triton.jit
def _normalised_side(norms, plane, row, share, acc: tl.constexpr):
    """A side of which the normaliser is known: peak, log_norm and e^log_norm, a plane apart."""
    base = finite_base(tl.load(norms))
    norm, total = tl.load(norms + plane), tl.load(norms + 2 * plane)
    return Side(row, base, norm, 1.0 / total, tl.full((), share, acc))


@triton.jit(do_not_specialize=["rows", "inner_p", "inner_q"])
def _divergence_sums_kernel(
    sums,  # (4, N) out
    logits_p,  # (outer, inner, V), any strides: columns of rows of which ranks have others
    logits_q,
    mask,  # (N,)
    norms,  # (6, N): peak, log_norm and e^log_norm of whole rows, of p and of q
    rows,
    vocab,
    inner_p,
    inner_q,
    p_stride_outer,
    p_stride_inner,
    p_stride_vocab,
    q_stride_outer,
    q_stride_inner,
    q_stride_vocab,
    share_p: tl.float64,  # of each side in the mixture
    share_q: tl.float64,
    token_temperature,  # (N,) or unused
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MIXTURE: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    LANE_STRIDE: tl.constexpr,
    VEC_STRIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    acc: tl.constexpr = sums.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    plane = rows.to(tl.int64)
    out = sums + row
    if tl.load(mask + row) == 0:
        for i in tl.static_range(4):
            tl.store(out + i * plane, 0.0)
        return

    row_t, rate = row_temperature(
        row, True, token_temperature, temperature, acc, PER_TOKEN_TEMPERATURE
    )
    row_p = row_of(logits_p, row, inner_p, p_stride_outer, p_stride_inner, p_stride_vocab)
    row_q = row_of(logits_q, row, inner_q, q_stride_outer, q_stride_inner, q_stride_vocab)
    within_tile = tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)
    p = _normalised_side(norms + row, plane, row_p, share_p, acc)
    q = _normalised_side(norms + row + 3 * plane, plane, row_q, share_q, acc)
    terms = _sums_of_terms(
        p, q, within_tile, vocab, Transform(scale, softcap, row_t, rate, HAS_SOFTCAP), acc,
        MIXTURE, LANES, LANES * VEC, STAGES,
    )  # fmt: skip
    tl.store(out, terms.value)
    tl.store(out + plane, terms.excess)
    tl.store(out + 2 * plane, terms.mean_p)
    tl.store(out + 3 * plane, terms.mean_q)


# The gradient with respect to a logit of one side after the temperature, given the probabilities of
# a word on that side (`own`) and on the other, w = ln own - ln other, and a mean of `stats`.
@triton.jit
def _of_first(own, other, w, mean, share, share_other):
    return tl.where(own == 0, 0.0, own * (w - mean))


@triton.jit
def _of_second(own, other, w, mean, share, share_other):
    return own - other


@triton.jit
def _of_mixture(own, other, w, mean, share, share_other):
    excess = share_other * expm1(-w)
    to_mixture = _log_to_mixture(-w, excess, _by_the_larger(-w, share, share_other))
    return tl.where(own == 0, 0.0, share * own * (-to_mixture - mean))


FORMULAS: dict[str, Callable] = {
    "first": _of_first,
    "second": _of_second,
    "mixture": _of_mixture,
}


@triton.jit(do_not_specialize=["inner", "inner_other", "tiles", "rows"])
def _divergence_bwd_kernel(
    d_own,  # (N, V) out
    own,  # (outer, inner, V), any strides, as those of the other
    other,
    mask,  # (N,)
    own_stats,  # (2, N): peak and log_norm, as the next
    other_stats,
    mean,  # (N,)
    d_values,  # (N,)
    rows,
    vocab,
    tiles,
    inner,
    inner_other,
    d_stride_row,
    stride_outer,
    stride_inner,
    stride_vocab,
    other_stride_outer,
    other_stride_inner,
    other_stride_vocab,
    share: tl.float64,  # of the own side in the mixture, and of the other
    share_other: tl.float64,
    token_temperature,  # (N,) or unused
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FORMULA: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    LANE_STRIDE: tl.constexpr,
    VEC_STRIDE: tl.constexpr,
):
    acc: tl.constexpr = mean.dtype.element_ty
    dtype: tl.constexpr = d_own.dtype.element_ty
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    columns = (pid % tiles) * (LANES * VEC)
    columns += tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)
    columns = columns.to(tl.int64)
    inside = columns < vocab
    destination = d_own + row * d_stride_row + columns
    g = tl.load(d_values + row)
    base = tl.load(own_stats + row)
    # The peak of a row of nothing but -inf, on either side, is -inf.
    other_base = tl.load(other_stats + row)
    nothing = (base == -float("inf")) | (other_base == -float("inf"))
    if (tl.load(mask + row) == 0) | (g == 0.0) | nothing:
        tl.store(destination, tl.zeros((LANES, VEC), dtype), mask=inside)
        return

    row_t, rate = row_temperature(
        row, True, token_temperature, temperature, acc, PER_TOKEN_TEMPERATURE
    )
    plane = rows.to(tl.int64)
    row_own = row_of(own, row, inner, stride_outer, stride_inner, stride_vocab)
    row_other = row_of(
        other, row, inner_other, other_stride_outer, other_stride_inner, other_stride_vocab
    )
    z, slope = capped_logits(
        load_tile(row_own, columns, inside, 0.0, acc, ""),
        Transform(scale, softcap, row_t, rate, HAS_SOFTCAP),
    )
    z_other, _ = capped_logits(
        load_tile(row_other, columns, inside, 0.0, acc, ""),
        Transform(scale, softcap, row_t, rate, HAS_SOFTCAP),
    )  # fmt: skip
    per_t = 1.0 / row_t
    norm = tl.load(own_stats + plane + row)
    other_norm = tl.load(other_stats + plane + row)
    w = _log_ratio(z, base, norm, z_other, other_base, other_norm, per_t)
    own_p = exp((z - base) * per_t - norm)
    other_p = exp((z_other - other_base) * per_t - other_norm)
    dz = FORMULA(
        own_p, other_p, w, tl.load(mean + row),
        tl.full((), share, acc), tl.full((), share_other, acc),
    )  # fmt: skip
    tl.store(destination, stored(g * dz * (slope * per_t), dtype), mask=inside)


def _sizes_and_shares(
    rows: int, logits_p: torch.Tensor, logits_q: torch.Tensor, share: float | None
) -> tuple[float, ...]:
    """Arguments of the forward's kernels: sizes, strides, and the shares of p and q in a mixture,
    which have no effect where there is none.
    """
    sizes = (rows, logits_p.shape[2], logits_p.shape[1], logits_q.shape[1])
    shares = (1.0, 0.0) if share is None else (1 - share, share)
    return (*sizes, *strides(logits_p), *strides(logits_q), *shares)


@on_their_device
def divergence_forward(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    mask: torch.Tensor,
    *,
    share: float | None,
    temperature: float | torch.Tensor,
    softcap: float | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward on logits (outer, inner, V) of p and of q: KL(p‖q), or with the share of q
    in a mixture their JSD.

    The mask, and temperatures of tokens, are contiguous (N,). Returns values (N,) and statistics
    (PLANES, N), in the wider dtype of the two, fp32 at least.
    """
    rows = mask.numel()
    acc = torch.promote_types(torch.promote_types(logits_p.dtype, logits_q.dtype), torch.float32)
    values, stats = (
        torch.empty(shape, dtype=acc, device=mask.device) for shape in ((rows,), (PLANES, rows))
    )
    _divergence_fwd_kernel[(rows,)](
        values, stats, logits_p, logits_q, mask,
        *_sizes_and_shares(rows, logits_p, logits_q, share),
        **transform_options(temperature, softcap, scale, values), MIXTURE=share is not None,
        **_plan("divergence", softcap, logits_p, logits_q).sweep_options(),
    )  # fmt: skip
    return values, stats


@on_their_device
def divergence_sums(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    mask: torch.Tensor,
    norms: torch.Tensor,
    *,
    share: float | None,
    temperature: float | torch.Tensor,
    softcap: float | None,
    scale: float,
) -> torch.Tensor:
    """Launch the second sweep of the forward alone, on some columns of the vocabulary, given peak,
    log_norm and e^log_norm of whole rows, of p and of q: (6, N).

    Returns (4, N): the sum of the terms, that of q - p, and the mean log-ratios of p and q.
    """
    rows = mask.numel()
    sums = norms.new_empty(4, rows)
    _divergence_sums_kernel[(rows,)](
        sums, logits_p, logits_q, mask, norms,
        *_sizes_and_shares(rows, logits_p, logits_q, share),
        **transform_options(temperature, softcap, scale, norms), MIXTURE=share is not None,
        **_plan("divergence", softcap, logits_p, logits_q).sweep_options(),
    )  # fmt: skip
    return sums


@on_their_device
def divergence_backward(
    d_own: torch.Tensor,
    own: torch.Tensor,
    other: torch.Tensor,
    mask: torch.Tensor,
    stats: torch.Tensor,
    d_values: torch.Tensor,
    *,
    of_p: bool,
    share: float | None,
    temperature: float | torch.Tensor,
    softcap: float | None,
    scale: float,
) -> None:
    """Launch the backward with respect to p or q, the own side: write its gradient into d_own
    (N, V), from the statistics (6, N) of the forward. The kernel knows no p and q.
    """
    norms_p, norms_q, mean_p, mean_q = stats.split((2, 2, 1, 1))
    of_q = 0.0 if share is None else share
    if of_p:
        of_sides, mean, shares = (norms_p, norms_q), mean_p, (1 - of_q, of_q)
    else:
        of_sides, mean, shares = (norms_q, norms_p), mean_q, (of_q, 1 - of_q)
    formula = "mixture" if share is not None else "first" if of_p else "second"
    rows, vocab = mask.numel(), own.shape[2]
    plan = _plan("divergence_backward", softcap, own, other)
    tiles = triton.cdiv(vocab, plan.tile)
    _divergence_bwd_kernel[(rows * tiles,)](
        d_own, own, other, mask, *of_sides, mean, d_values.contiguous(),
        rows, vocab, tiles, own.shape[1], other.shape[1],
        d_own.stride(0), *strides(own), *strides(other), *shares,
        **transform_options(temperature, softcap, scale, mean), FORMULA=FORMULAS[formula],
        **plan.options(),
    )  # fmt: skip
