"""One row of logits, a tile at a time: its statistics by online sums, its gradient.

The recurrence keeps the largest logit so far (`peak`), Σ e^(z - peak) over all tokens but the
target (`rest`) and, for the entropy, Σ e^(z - peak)·(z - peak) over the same tokens (`moment`).
Each lane keeps its own over short vectors that one thread loads at once, so that an element costs
one exponential and nothing is exchanged before the end of the row, or of the split of it.

Two decisions carry the numerics. The target stays out of `rest`, so that log p = -softplus(ln rest
- z_target) is exact where p → 1 and `z_target - lse` would cancel. And the gradient gets `peak` and
`log_norm` = lse - peak apart, because their sum loses 1e-3 nats in fp32 where logits reach 1e4.

`with_entropy` may be a constexpr, which leaves the entropy's code out, or a number known at run
time, which skips it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .tiles import LN2, LOG2E, capped_logits, expm1, log1p, log_sigmoid


@triton.jit
def tile_columns(
    LANES: tl.constexpr, VEC: tl.constexpr, LANE_STRIDE: tl.constexpr, VEC_STRIDE: tl.constexpr
):
    """Columns of a (LANES, VEC) tile, relative to its first."""
    return tl.arange(0, LANES)[:, None] * LANE_STRIDE + tl.arange(0, VEC)[None, :] * VEC_STRIDE


@triton.jit
def left_in(inside, columns, numbers, left_out, start, stop):
    """Take the words that a row leaves out from a tile of the columns [start, stop).

    `left_out` points to the numbers of these words, which increase, so that those of a tile are
    neighbours; `numbers` holds all of them.
    """
    first = tl.sum((numbers < start).to(tl.int32), axis=0)
    last = tl.sum((numbers < stop).to(tl.int32), axis=0)
    for place in range(first, last):
        inside &= columns != tl.load(left_out + place)
    return inside


@triton.jit
def finite_base(peak):
    """The peak, or 0 where there were only -inf logits: any finite base then gives e^-inf = 0."""
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def move_base(peak, rest, moment, base, rate, with_entropy):
    """Express sums taken relative to `peak` relative to `base` instead; `rate` turns logits into
    bits.
    """
    shift = (peak - base) * rate
    fade = tl.exp2(shift)
    if with_entropy:
        # A sum that fades to nothing (an empty one has peak -inf) must not meet inf·0.
        moment = (moment + rest * tl.where(fade > 0, shift, 0.0)) * fade
    return rest * fade, moment


@triton.jit
def add_tile(
    x,
    inside,
    columns,
    target,
    peak,
    rest,
    moment,
    rate,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    with_entropy,
):
    """Take one tile of logits into each lane's peak, rest and moment."""
    capped, _ = capped_logits(x, scale, softcap, HAS_SOFTCAP)
    if HAS_SOFTCAP:
        capped = tl.where(inside, capped, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(capped, axis=1))
    base = finite_base(new_peak)
    bits = (capped - base[:, None]) * rate
    weight = tl.where(columns == target, 0.0, tl.exp2(bits))
    rest, moment = move_base(peak, rest, moment, base, rate, with_entropy)
    rest += tl.sum(weight, axis=1)
    if with_entropy:
        moment += tl.sum(tl.where(weight > 0, weight * bits, 0.0), axis=1)
    return new_peak, rest, moment


@triton.jit
def move_squares(peak, squares, base, rate):
    """Express a sum of squares taken relative to `peak` relative to `base` instead."""
    fade = tl.exp2((peak - base) * rate)
    return squares * (fade * fade)


@triton.jit
def add_further(
    x,
    inside,
    columns,
    target,
    old_peak,
    peak,
    before,
    own,
    total,
    squares,
    rate,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    WITH_TOP1: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
):
    """Take a tile that `add_tile` took, which moved each lane's peak from `old_peak`, into what
    further statistics need: the largest logit before the target and the target's own, the sum of
    all logits, and Σ e^2(z - peak) over all tokens but the target. What both compute, the compiler
    computes once.

    The target's logit comes out of the same code as all others: made elsewhere, it might differ in
    its last bit from one that equals it.
    """
    capped, _ = capped_logits(x, scale, softcap, HAS_SOFTCAP)
    if WITH_MEAN:
        total += tl.sum(tl.where(inside, capped, 0.0), axis=1)
    if HAS_SOFTCAP:
        capped = tl.where(inside, capped, -float("inf"))
    if WITH_TOP1:
        earlier = tl.where(columns < target, capped, -float("inf"))
        before = tl.maximum(before, tl.max(earlier, axis=1))
        own = tl.maximum(own, tl.max(tl.where(columns == target, capped, -float("inf")), axis=1))
    if WITH_SQUARES:
        base = finite_base(peak)
        weight = tl.where(columns == target, 0.0, tl.exp2((capped - base[:, None]) * rate))
        squares = move_squares(old_peak, squares, base, rate)
        squares += tl.sum(weight * weight, axis=1)
    return before, own, total, squares


@triton.jit
def merged_lanes(peak, rest, moment, rate, with_entropy):
    """Merge the lanes: the row's peak, and its rest and moment relative to it."""
    row_peak = tl.max(peak, axis=0)
    rest, moment = move_base(peak, rest, moment, finite_base(row_peak), rate, with_entropy)
    return row_peak, tl.sum(rest, axis=0), tl.sum(moment, axis=0)


@triton.jit
def statistics(peak, rest, moment, target_capped, row_t, with_entropy):
    """Log-prob, entropy, log_norm of a row, or of several, whether it is nothing but -inf, and the
    base that log_norm is relative to.
    """
    base = finite_base(peak)
    # Not by way of bits, whose rounding would be that of the log-prob of an unlikely target.
    target_shift = (target_capped - base) / row_t
    target_bits = target_shift * LOG2E
    target_weight = tl.exp2(target_bits)
    total = rest + target_weight
    log_norm = tl.log(total)
    logprob = log_sigmoid(target_shift - tl.log(rest))
    # The maximum passes over NaN, which the sums and the target show.
    empty = (peak == -float("inf")) & (rest == 0.0) & (target_capped == -float("inf"))
    logprob = tl.where(empty, -float("inf"), logprob)
    entropy = rest * 0.0
    if with_entropy:
        moment += tl.where(target_weight > 0, target_weight * target_bits, 0.0)
        entropy = tl.where(empty, 0.0, log_norm - LN2 * moment / total)
    return logprob, entropy, log_norm, empty, base


@triton.jit
def log_sum_squares(squares, target_capped, base, row_t, logprob, log_norm, empty):
    """Ln Σ p² of a row, or of several, from what `statistics` found. From the log-prob where the
    target weighs as much as the peak or nearly, for that is accurate where p → 1.
    """
    weight = tl.exp2((target_capped - base) / row_t * LOG2E)
    square = weight * weight
    heavy = square > 0.25
    of_heavy = 2.0 * logprob + log1p(squares / tl.where(heavy, square, 1.0))
    of_light = tl.log(squares + square) - 2.0 * log_norm
    return tl.where(empty, 0.0, tl.where(heavy, of_heavy, of_light))


@triton.jit
def gradient_tile(
    x,
    columns,
    target,
    base,
    log_norm,
    logprob,
    entropy,
    g,
    h,
    row_t,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    with_entropy,
    l=0.0,
    WITH_LSE: tl.constexpr = False,
    m=0.0,
    WITH_MEAN: tl.constexpr = False,
):
    """Gradient of g·logprob + h·entropy + l·lse + m·(sum of the effective logits) with respect to a
    tile of logits.
    """
    capped, slope = capped_logits(x, scale, softcap, HAS_SOFTCAP)
    bits = (capped - base) * (LOG2E / row_t) - log_norm * LOG2E
    p = tl.exp2(bits)
    # g·(1 - p) at the target, from log p where p is nearly 1.
    if WITH_LSE:
        dz = tl.where(columns == target, l * p - g * expm1(logprob), (l - g) * p)
    else:
        dz = tl.where(columns == target, -g * expm1(logprob), -g * p)
    if with_entropy:
        dz -= tl.where(p > 0, h * p * (bits * LN2 + entropy), 0.0)
    if WITH_MEAN:
        dz += m
    return dz * (slope * (1.0 / row_t))


def strides(rows: torch.Tensor) -> tuple[int, ...]:
    """Strides of an (outer, inner, V) view; that of a single outer block is never used, so never
    large.
    """
    return (rows.stride(0) if rows.shape[0] > 1 else 0, *rows.stride()[1:])


def transform_options(
    temperature: float | torch.Tensor,
    softcap: float | None,
    scale: float,
    placeholder: torch.Tensor,
) -> tuple[dict[str, Any], torch.Tensor]:
    """Kernel arguments of the logit transform, and the pointer to per-token temperatures.

    A pointer that the kernel, told so by a constexpr, never follows is any tensor's.
    """
    per_token = isinstance(temperature, torch.Tensor)
    options: dict[str, Any] = {
        "temperature": 1.0 if per_token else temperature,
        "softcap": 1.0 if softcap is None else softcap,
        "scale": scale,
        "PER_TOKEN_TEMPERATURE": per_token,
        "HAS_SOFTCAP": softcap is not None,
    }
    return options, temperature if isinstance(temperature, torch.Tensor) else placeholder
