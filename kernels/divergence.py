"""Two rows of logits → KL divergence or generalised JSD of their distributions, and its gradient.

KL(p‖q) = E_p[z - z'] - lse(z) + lse(z') takes one pass over both rows: online sums of each, and
Σ e^(z - peak)·(z - z') with those of p. The JSD needs the logarithm of a mixture, and so both
normalisers first: a second pass. One program has a row of each, so that nothing depends on the
batch.

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

from .rows import (
    RowPlan,
    finite_base,
    strides,
    tile_columns,
    transform_options,
    whole_row_plan,
)
from .tiles import LOG2E, capped_logits, exp, row_start, row_temperature


def _plan(vocab: int, *sides: torch.Tensor) -> RowPlan:
    """Cut rows by the wider dtype of the two sides."""
    dtype = max((x.dtype for x in sides), key=lambda dtype: dtype.itemsize)
    return whole_row_plan(vocab, dtype, rows=2)


# Planes of the statistics of a row: peak and log_norm of each side, and the mean of the log-ratio
# of each side to the other (KL), or to the mixture (JSD).
PLANES = 6


@triton.jit
def _add_side(capped, peak, rest, rate):
    """Take a tile into the online sum of one side: its weights, what the sums so far fade to, and
    the new peak and sum.
    """
    new_peak = tl.maximum(peak, tl.max(capped, axis=1))
    base = finite_base(new_peak)
    weight = tl.exp2((capped - base[:, None]) * rate)
    fade = tl.exp2((peak - base) * rate)
    return weight, fade, new_peak, rest * fade + tl.sum(weight, axis=1)


@triton.jit
def _merge(peak, rest, rate):
    """Merge the lanes of one side: its base, the logarithm of its sum, what each lane fades to, and
    whether there was nothing but -inf.
    """
    row_peak = tl.max(peak, axis=0)
    base = finite_base(row_peak)
    fade = tl.exp2((peak - base) * rate)
    total = tl.sum(rest * fade, axis=0)
    return base, total, fade, (row_peak == -float("inf")) & (total == 0.0)


@triton.jit
def _log_to_mixture(log_p, log_q, share_p, share_q):
    """Ln p - ln(share_p·p + share_q·q), for p > 0, by way of the larger of the two."""
    gap = log_q - log_p
    smaller = exp(-tl.abs(gap))
    mixed = tl.where(gap > 0, share_q + share_p * smaller, share_p + share_q * smaller)
    return -tl.maximum(gap, 0.0) - tl.log(mixed)


@triton.jit
def _mean(p, w):
    """Terms of E_p[w]: what has no probability takes no part, whatever w is; NaN does."""
    return tl.where(p == 0, 0.0, p * w)


# A NaN is a maximum's loss and a sum's gain: sums of NaN say NaN, as they should.
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
    cross = tl.zeros((LANES,), acc)
    excluded = tl.zeros((LANES,), acc)  # weight of p where q is 0
    for start in range(0, vocab, TILE):
        columns = (start + within_tile).to(tl.int64)
        inside = columns < vocab
        x = tl.load(source_p + columns * stride_vocab, mask=inside, other=-float("inf")).to(acc)
        y = tl.load(source_q + columns * q_stride_vocab, mask=inside, other=-float("inf")).to(acc)
        z_p, _slope_p = capped_logits(x, scale, softcap, HAS_SOFTCAP)
        z_q, _slope_q = capped_logits(y, scale, softcap, HAS_SOFTCAP)
        if HAS_SOFTCAP:
            z_p = tl.where(inside, z_p, -float("inf"))
            z_q = tl.where(inside, z_q, -float("inf"))
        weight, fade, peak_p, rest_p = _add_side(z_p, peak_p, rest_p, rate)
        impossible = z_q == -float("inf")
        cross = cross * fade
        cross += tl.sum(_mean(tl.where(impossible, 0.0, weight), z_p - z_q), axis=1)
        excluded = excluded * fade + tl.sum(tl.where(impossible, weight, 0.0), axis=1)
        _weight, _fade, peak_q, rest_q = _add_side(z_q, peak_q, rest_q, rate)

    base_p, total_p, fade, empty_p = _merge(peak_p, rest_p, rate)
    base_q, total_q, _fade_q, empty_q = _merge(peak_q, rest_q, rate)
    mean = tl.sum(cross * fade, axis=0) / total_p
    disjoint = tl.sum(excluded * fade, axis=0) > 0
    norm_p = tl.log(total_p)
    norm_q = tl.log(total_q)
    if MIXTURE:
        part_p = tl.full((), share_p, acc)
        part_q = tl.full((), share_q, acc)
        per_t = 1.0 / row_t
        mean_p = tl.zeros((LANES,), acc)
        mean_q = tl.zeros((LANES,), acc)
        for start in range(0, vocab, TILE):
            columns = (start + within_tile).to(tl.int64)
            inside = columns < vocab
            x = tl.load(source_p + columns * stride_vocab, mask=inside, other=-float("inf")).to(acc)
            y = tl.load(source_q + columns * q_stride_vocab, mask=inside, other=-float("inf"))
            z_p, _slope_p = capped_logits(x, scale, softcap, HAS_SOFTCAP)
            z_q, _slope_q = capped_logits(y.to(acc), scale, softcap, HAS_SOFTCAP)
            log_p = (z_p - base_p) * per_t - norm_p
            log_q = (z_q - base_q) * per_t - norm_q
            if HAS_SOFTCAP:
                log_p = tl.where(inside, log_p, -float("inf"))
                log_q = tl.where(inside, log_q, -float("inf"))
            w = _log_to_mixture(log_p, log_q, part_p, part_q)
            mean_p += tl.sum(_mean(exp(log_p), w), axis=1)
            w = _log_to_mixture(log_q, log_p, part_q, part_p)
            mean_q += tl.sum(_mean(exp(log_q), w), axis=1)
        of_p = tl.sum(mean_p, axis=0)
        of_q = tl.sum(mean_q, axis=0)
        value = tl.where(empty_q, 0.0, part_p * of_p + part_q * of_q)
    else:
        of_p = (mean + (base_q - base_p)) / row_t + (norm_q - norm_p)
        of_p = tl.where(empty_q | disjoint, float("inf"), of_p)
        of_q = of_p
        value = of_p
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


# Of the probability and its logarithm of the side that the gradient is of, and of the other side.
@triton.jit
def _of_first(own, log_own, other, log_other, mean, share, share_other):
    return tl.where(own == 0, 0.0, own * ((log_own - log_other) - mean))


@triton.jit
def _of_second(own, log_own, other, log_other, mean, share, share_other):
    return own - other


@triton.jit
def _of_mixture(own, log_own, other, log_other, mean, share, share_other):
    w = _log_to_mixture(log_own, log_other, share, share_other)
    return tl.where(own == 0, 0.0, share * own * (w - mean))


FORMULAS: dict[str, Callable] = {
    "first": _of_first,
    "second": _of_second,
    "mixture": _of_mixture,
}


@triton.jit(do_not_specialize=["inner", "inner_other", "tiles", "rows"])
def _divergence_bwd_kernel(
    d_own,  # (outer, inner, V) contiguous, out
    own,  # (outer, inner, V), any strides
    other,
    mask,  # (N,)
    token_temperature,  # (N,) or unused
    own_stats,  # planes of peak and log_norm, N apart, as the next
    other_stats,
    mean,  # (N,)
    d_values,  # (N,)
    rows,
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
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    columns = (program % tiles).to(tl.int32) * (LANES * VEC)
    columns += tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)
    columns = columns.to(tl.int64)
    inside = columns < vocab
    destination = d_own + row * vocab + columns
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
    log_own = (z - base) * per_t - tl.load(own_stats + plane + row)
    log_other = (z_other - other_base) * per_t - tl.load(other_stats + plane + row)
    dz = FORMULA(
        exp(log_own), log_own, exp(log_other), log_other, tl.load(mean + row),
        tl.full((), share, acc), tl.full((), share_other, acc),
    )  # fmt: skip
    tl.store(destination, (g * dz * (slope * per_t)).to(d_own.dtype.element_ty), mask=inside)


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
    _divergence_fwd_kernel[(rows,)](
        logits_p, logits_q, mask, token_temperature, values, stats, rows,
        logits_p.shape[1], *strides(logits_p), logits_q.shape[1], *strides(logits_q), vocab,
        1.0 if share is None else 1 - share, 0.0 if share is None else share, **transform,
        MIXTURE=share is not None, **_plan(vocab, logits_p, logits_q).options(),
    )  # fmt: skip
    return values, stats


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
    """Launch the backward with respect to one side: write its gradient into d_own, contiguous.

    `own_stats` and `other_stats` (2, N) are peak and log_norm, `mean` (N,) is of the own side.
    """
    rows, vocab = mask.numel(), own.shape[2]
    plan = _plan(vocab, own, other)
    tiles = triton.cdiv(vocab, plan.tile)
    transform, token_temperature = transform_options(temperature, softcap, scale, mean)
    _divergence_bwd_kernel[(rows * tiles,)](
        d_own, own, other, mask, token_temperature, own_stats, other_stats, mean, d_values, rows,
        own.shape[1], *strides(own), other.shape[1], *strides(other), vocab, tiles,
        share, 1 - share, **transform, FORMULA=FORMULAS[formula], **plan.options(),
    )  # fmt: skip
