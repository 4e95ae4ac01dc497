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

Dims: N rows = outer x inner, V vocabulary.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .launch import RowPlan, on_their_device, row_plan
from .rows import (
    finite_base,
    strides,
    tile_columns,
    transform_options,
)
from .tiles import (
    LOG2E,
    capped_logits,
    exp,
    expm1,
    expm1_minus_near_0,
    log1p_near_0,
    log1p_surplus_near_0,
    row_start,
    row_temperature,
    stored,
)


def _plan(kernel: str, softcap: float | None, *sides: torch.Tensor) -> RowPlan:
    """Cut rows by the wider dtype of the two sides."""
    dtype = max((x.dtype for x in sides), key=lambda dtype: dtype.itemsize)
    return row_plan(kernel, sides[0].shape[2], dtype, capped=softcap is not None)


# Planes of the statistics of a row: peak and log_norm of each side, and the mean of the log-ratio
# of each side to the other (KL), or to the mixture (JSD).
PLANES = 6


@triton.jit
def _capped_tile(x, inside, scale, softcap, HAS_SOFTCAP: tl.constexpr, EVICTION: tl.constexpr):
    """Logits of one side at the addresses x, transformed; -inf beyond the vocabulary."""
    logits = tl.load(x, mask=inside, other=-float("inf"), eviction_policy=EVICTION)
    z, _slope = capped_logits(logits.to(scale.dtype), scale, softcap, HAS_SOFTCAP)
    if HAS_SOFTCAP:
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
def _log_ratio(z, base, norm, z_other, base_other, norm_other, per_t):
    """Ln p - ln q from the differences of the logits.

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
    """Ln m - ln of the larger of p and q, m = share·p + share_other·q, from the gap ln q - ln p."""
    smaller = exp(-tl.abs(gap))
    mixed = tl.where(gap > 0, share_other + share * smaller, share + share_other * smaller)
    return tl.log(mixed)


@triton.jit
def _log_to_mixture(gap, excess, by_the_larger):
    """Ln m - ln p, for p > 0, from m / p - 1; where that is large, or nearly -1, by way of the
    larger of p and q.
    """
    moderate = (excess >= -0.5) & (excess <= 1.0)
    return tl.where(moderate, log1p_near_0(excess), tl.maximum(gap, 0.0) + by_the_larger)


@triton.jit
def _mean(p, w):
    """Terms of E_p[w]: what has no probability takes no part, whatever w is; NaN does."""
    return tl.where(p == 0, 0.0, p * w)


@triton.jit
def _kl_terms(p, q, w):
    """Terms q - p + p·w, w = ln p - ln q: without cancellation where w is small."""
    return tl.where(tl.abs(w) < 0.5, p * expm1_minus_near_0(-w), q - p + _mean(p, w))


@triton.jit
def _jsd_terms(p, q, to_p, to_q, excess_p, excess_q, w, share_p, share_q):
    """Of ln m - ln p and ln m - ln q; near 0, with terms m - p and m - q, whose weighted sum is 0:
    those of p are then u - ln(1 + u) of m / p = 1 + u.
    """
    of_near = share_p * p * log1p_surplus_near_0(excess_p)
    of_near += share_q * q * log1p_surplus_near_0(excess_q)
    return tl.where(tl.abs(w) < 0.5, of_near, -share_p * _mean(p, to_p) - share_q * _mean(q, to_q))


# A NaN is a maximum's loss and a sum's gain: sums of NaN say NaN, as they should.
@triton.jit
def _sums_of_terms(
    source_p,  # the first logit of a row of each side
    source_q,
    within_tile,
    stride_vocab,
    q_stride_vocab,
    vocab,
    base_p,
    norm_p,
    base_q,
    norm_q,
    inverse_p,  # 1 / the sum that each side's norm is the logarithm of
    inverse_q,
    row_t,
    share_p,
    share_q,
    scale,
    softcap,
    MIXTURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The second sweep, backwards: the sum of the terms, the mean log-ratio of p and of q, and by
    how much q sums to more than p.
    """
    acc: tl.constexpr = scale.dtype
    rate = LOG2E / row_t
    per_t = 1.0 / row_t
    part_p = tl.full((), share_p, acc)
    part_q = tl.full((), share_q, acc)
    sums = tl.zeros((LANES,), acc)
    mean_p = tl.zeros((LANES,), acc)
    mean_q = tl.zeros((LANES,), acc)
    surplus = tl.zeros((LANES,), acc)
    tiles = tl.cdiv(vocab, TILE)
    for done in tl.range(0, tiles, num_stages=STAGES):
        columns = ((tiles - 1 - done) * TILE + within_tile).to(tl.int64)
        inside = columns < vocab
        x = source_p + columns * stride_vocab
        y = source_q + columns * q_stride_vocab
        z_p = _capped_tile(x, inside, scale, softcap, HAS_SOFTCAP, "evict_first")
        z_q = _capped_tile(y, inside, scale, softcap, HAS_SOFTCAP, "evict_first")
        p = tl.exp2((z_p - base_p) * rate) * inverse_p
        q = tl.exp2((z_q - base_q) * rate) * inverse_q
        w = _log_ratio(z_p, base_p, norm_p, z_q, base_q, norm_q, per_t)
        if MIXTURE:
            growth = expm1(-w)
            excess_p = part_q * growth
            excess_q = part_p * expm1(w)
            by_the_larger = _by_the_larger(-w, part_p, part_q)
            to_p = _log_to_mixture(-w, excess_p, by_the_larger)
            to_q = _log_to_mixture(w, excess_q, by_the_larger)
            terms = _jsd_terms(p, q, to_p, to_q, excess_p, excess_q, w, part_p, part_q)
            sums += tl.sum(terms, axis=1)
            mean_p -= tl.sum(_mean(p, to_p), axis=1)
            mean_q -= tl.sum(_mean(q, to_q), axis=1)
            surplus += tl.sum(tl.where(tl.abs(w) < 0.5, p * growth, q - p), axis=1)
        else:
            sums += tl.sum(_kl_terms(p, q, w), axis=1)
            mean_p += tl.sum(_mean(p, w), axis=1)
    value = tl.sum(sums, axis=0)
    of_p = tl.sum(mean_p, axis=0)
    if MIXTURE:
        of_q = tl.sum(mean_q, axis=0)
        excess = tl.sum(surplus, axis=0)
    else:
        of_q = of_p
        # Both are inf where q alone is 0.
        excess = tl.where(value == float("inf"), 0.0, value - of_p)
    return value, of_p, of_q, excess


@triton.jit(do_not_specialize=["rows", "inner", "inner_q"])
def _divergence_fwd_kernel(
    logits_p,  # (outer, inner, V), any strides
    logits_q,
    mask,  # (N,)
    token_temperature,  # (N,) or unused
    values,  # (N,) out
    stats,  # (PLANES, N) out
    rows,
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    inner_q,
    q_stride_outer,
    q_stride_inner,
    q_stride_vocab,
    vocab,
    share_p: tl.float64,  # of each side in the mixture
    share_q: tl.float64,
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    MIXTURE: tl.constexpr,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
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

    row_t = row_temperature(token_temperature, temperature, row, True, acc, PER_TOKEN_TEMPERATURE)
    rate = LOG2E / row_t
    scale = tl.full((), scale, acc)
    softcap = tl.full((), softcap, acc)
    source_p = logits_p + row_start(row, inner, stride_outer, stride_inner)
    source_q = logits_q + row_start(row, inner_q, q_stride_outer, q_stride_inner)
    within_tile = tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)

    peak_p = tl.full((LANES,), -float("inf"), acc)
    peak_q = tl.full((LANES,), -float("inf"), acc)
    rest_p = tl.zeros((LANES,), acc)
    rest_q = tl.zeros((LANES,), acc)
    for start in tl.range(0, vocab, TILE, num_stages=STAGES):
        columns = (start + within_tile).to(tl.int64)
        inside = columns < vocab
        x = source_p + columns * stride_vocab
        y = source_q + columns * q_stride_vocab
        z_p = _capped_tile(x, inside, scale, softcap, HAS_SOFTCAP, "evict_last")
        z_q = _capped_tile(y, inside, scale, softcap, HAS_SOFTCAP, "evict_last")
        peak_p, rest_p = _add_side(z_p, peak_p, rest_p, rate)
        peak_q, rest_q = _add_side(z_q, peak_q, rest_q, rate)

    base_p, total_p, empty_p = _merge(peak_p, rest_p, rate)
    base_q, total_q, empty_q = _merge(peak_q, rest_q, rate)
    norm_p = tl.log(total_p)
    norm_q = tl.log(total_q)
    value, of_p, of_q, excess = _sums_of_terms(
        source_p, source_q, within_tile, stride_vocab, q_stride_vocab, vocab, base_p, norm_p,
        base_q, norm_q, 1.0 / total_p, 1.0 / total_q, row_t, share_p, share_q, scale, softcap,
        MIXTURE, HAS_SOFTCAP, LANES, TILE, STAGES,
    )  # fmt: skip
    # Of q over p, Σ(q - p) is rounding of the normalisers, and adds its square to what is nearly 0.
    if MIXTURE:
        curvature = tl.full((), share_p, acc) * tl.full((), share_q, acc)
        rounding = 0.5 * curvature * excess * excess
        if_q_is_empty = 0.0
    else:
        rounding = 0.5 * excess * excess
        if_q_is_empty = float("inf")
    value = tl.where(value <= rounding, 0.0, value - rounding)
    value = tl.where(empty_q, if_q_is_empty, value)
    # A row of nothing but -inf has no distribution, and so is no distance away from another; but
    # where q is such a row, and p is not, q is 0 where p is not.
    value = tl.where(empty_p, 0.0, value)
    tl.store(values + row, value)
    tl.store(out, tl.where(empty_p, -float("inf"), base_p))
    tl.store(out + plane, norm_p)
    tl.store(out + 2 * plane, tl.where(empty_q, -float("inf"), base_q))
    tl.store(out + 3 * plane, norm_q)
    tl.store(out + 4 * plane, of_p)
    tl.store(out + 5 * plane, of_q)


@triton.jit(do_not_specialize=["rows", "inner", "inner_q"])
def _divergence_sums_kernel(
    logits_p,  # (outer, inner, V), any strides: columns of rows of which ranks have others
    logits_q,
    mask,  # (N,)
    token_temperature,  # (N,) or unused
    norms,  # (6, N): peak, log_norm and e^log_norm of whole rows, of p and of q
    sums,  # (4, N) out
    rows,
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    inner_q,
    q_stride_outer,
    q_stride_inner,
    q_stride_vocab,
    vocab,
    share_p: tl.float64,
    share_q: tl.float64,
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    MIXTURE: tl.constexpr,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
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

    row_t = row_temperature(token_temperature, temperature, row, True, acc, PER_TOKEN_TEMPERATURE)
    place = norms + row
    base_p = finite_base(tl.load(place))
    base_q = finite_base(tl.load(place + 3 * plane))
    value, of_p, of_q, excess = _sums_of_terms(
        logits_p + row_start(row, inner, stride_outer, stride_inner),
        logits_q + row_start(row, inner_q, q_stride_outer, q_stride_inner),
        tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE), stride_vocab, q_stride_vocab, vocab,
        base_p, tl.load(place + plane), base_q, tl.load(place + 4 * plane),
        1.0 / tl.load(place + 2 * plane), 1.0 / tl.load(place + 5 * plane), row_t, share_p, share_q,
        tl.full((), scale, acc), tl.full((), softcap, acc),
        MIXTURE, HAS_SOFTCAP, LANES, LANES * VEC, STAGES,
    )  # fmt: skip
    tl.store(out, value)
    tl.store(out + plane, excess)
    tl.store(out + 2 * plane, of_p)
    tl.store(out + 3 * plane, of_q)


# Of the probabilities of the side that the gradient is of and of the other side, and the log-ratio
# of the two.
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
    own,  # (outer, inner, V), any strides
    other,
    mask,  # (N,)
    token_temperature,  # (N,) or unused
    own_stats,  # planes of peak and log_norm, N apart, as the next
    other_stats,
    mean,  # (N,)
    d_values,  # (N,)
    rows,
    d_stride_row,
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    inner_other,
    other_stride_outer,
    other_stride_inner,
    other_stride_vocab,
    vocab,
    tiles,
    share: tl.float64,  # of the own side in the mixture, and of the other
    share_other: tl.float64,
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    FORMULA: tl.constexpr,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    LANE_STRIDE: tl.constexpr,
    VEC_STRIDE: tl.constexpr,
):
    acc: tl.constexpr = mean.dtype.element_ty
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
        tl.store(destination, tl.zeros((LANES, VEC), d_own.dtype.element_ty), mask=inside)
        return

    row_t = row_temperature(token_temperature, temperature, row, True, acc, PER_TOKEN_TEMPERATURE)
    scale = tl.full((), scale, acc)
    softcap = tl.full((), softcap, acc)
    plane = rows.to(tl.int64)
    x = tl.load(
        own + row_start(row, inner, stride_outer, stride_inner) + columns * stride_vocab,
        mask=inside, other=0.0,
    ).to(acc)  # fmt: skip
    place = row_start(row, inner_other, other_stride_outer, other_stride_inner)
    y = tl.load(other + place + columns * other_stride_vocab, mask=inside, other=0.0).to(acc)
    z, slope = capped_logits(x, scale, softcap, HAS_SOFTCAP)
    z_other, _ = capped_logits(y, scale, softcap, HAS_SOFTCAP)
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
    tl.store(destination, stored(g * dz * (slope * per_t), d_own.dtype.element_ty), mask=inside)


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
    rows, vocab = mask.numel(), logits_p.shape[2]
    acc = torch.promote_types(torch.promote_types(logits_p.dtype, logits_q.dtype), torch.float32)
    values, stats = (
        torch.empty(shape, dtype=acc, device=mask.device) for shape in ((rows,), (PLANES, rows))
    )
    transform, token_temperature = transform_options(temperature, softcap, scale, values)
    plan = _plan("divergence", softcap, logits_p, logits_q)
    _divergence_fwd_kernel[(rows,)](
        logits_p, logits_q, mask, token_temperature, values, stats, rows,
        logits_p.shape[1], *strides(logits_p), logits_q.shape[1], *strides(logits_q), vocab,
        1.0 if share is None else 1 - share, 0.0 if share is None else share, **transform,
        MIXTURE=share is not None, **plan.sweep_options(),
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
    rows, vocab = mask.numel(), logits_p.shape[2]
    sums = norms.new_empty(4, rows)
    transform, token_temperature = transform_options(temperature, softcap, scale, norms)
    plan = _plan("divergence", softcap, logits_p, logits_q)
    _divergence_sums_kernel[(rows,)](
        logits_p, logits_q, mask, token_temperature, norms, sums, rows,
        logits_p.shape[1], *strides(logits_p), logits_q.shape[1], *strides(logits_q), vocab,
        1.0 if share is None else 1 - share, 0.0 if share is None else share, **transform,
        MIXTURE=share is not None, **plan.sweep_options(),
    )  # fmt: skip
    return sums


@on_their_device
def divergence_backward(
    d_own: torch.Tensor,
    own: torch.Tensor,
    other: torch.Tensor,
    mask: torch.Tensor,
    own_stats: torch.Tensor,
    other_stats: torch.Tensor,
    mean: torch.Tensor,
    d_values: torch.Tensor,
    *,
    formula: str,
    share: float,
    temperature: float | torch.Tensor,
    softcap: float | None,
    scale: float,
) -> None:
    """Launch the backward with respect to one side: write its gradient into d_own (N, V).

    `own_stats` and `other_stats` (2, N) are peak and log_norm, `mean` (N,) is of the own side.
    """
    rows, vocab = mask.numel(), own.shape[2]
    plan = _plan("divergence_backward", softcap, own, other)
    tiles = triton.cdiv(vocab, plan.tile)
    transform, token_temperature = transform_options(temperature, softcap, scale, mean)
    _divergence_bwd_kernel[(rows * tiles,)](
        d_own, own, other, mask, token_temperature, own_stats, other_stats, mean, d_values, rows,
        d_own.stride(0), own.shape[1], *strides(own), other.shape[1], *strides(other), vocab, tiles,
        share, 1 - share, **transform, FORMULA=FORMULAS[formula], **plan.options(),
    )  # fmt: skip
