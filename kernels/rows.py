"""One row of logits, a tile at a time: its statistics by online sums, its gradient.

The recurrence keeps `Sums`: the largest logit so far (`peak`), Σ e^(z - peak) over all tokens but
the target (`rest`) and, for the entropy, Σ e^(z - peak)·(z - peak) over the same tokens (`moment`).
Each lane keeps its own over short vectors that one thread loads at once, so that an element costs
one exponential and nothing is exchanged before the end of the row, or of its split.

Two decisions carry the numerics. The target stays out of `rest`, so that log p = -softplus(ln rest
- z_target) is exact where p → 1 and `z_target - lse` would cancel. And the gradient gets `base`
(the peak, if finite) and `log_norm` = lse - base apart, because their sum loses 1e-3 nats in fp32
where logits reach 1e4.

`with_entropy` may be a constexpr, which leaves the entropy's code out, or a number known at run
time, which skips it.

All kernels take their parameters in one order: what is written; rows of logits that are read;
vectors with a number for each token or sequence; sizes; strides, array by array; the operation's
own numbers; the transform of logits; and constexprs, first what is asked for, then how rows are
cut. A kernel groups them into the NamedTuples below before it hands them to device functions.

The kernels of `token_stats.py`, `policy_loss.py` and `kept_ids.py` are made of these device
functions; `divergence.py` and `fisher.py` use those that find and load tiles. Read this file first,
and then `token_stats.py`.

Dims: N rows = outer x inner, V vocabulary; a tile is (LANES, VEC), of one row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .tiles import LN2, LOG2E, expm1, log1p, log_sigmoid, quotient
from .transform import capped_logits


class Row(NamedTuple):
    """Where a row of an (outer, inner, V) view is in memory."""

    first: tl.tensor  # pointer to its first number
    stride: tl.tensor  # from one column to the next


class Asked(NamedTuple):
    """Which statistics are asked for: constexprs, but for the entropy's in the policy loss."""

    entropy: tl.constexpr
    top1: tl.constexpr
    mean: tl.constexpr
    squares: tl.constexpr


class Sums(NamedTuple):
    """Online sums over the columns that a lane, a split or a whole row has read so far."""

    peak: tl.tensor
    rest: tl.tensor
    moment: tl.tensor


class Further(NamedTuple):
    """Sums over the same columns that further statistics need; unused unless asked for."""

    before: tl.tensor  # the largest logit of a column before the target's
    own: tl.tensor  # the target's logit
    total: tl.tensor  # the sum of all logits
    squares: tl.tensor  # Σ e^2(z - peak) over all tokens but the target


class Statistics(NamedTuple):
    """Statistics of a row, or of each of several rows, after all of its columns were read."""

    logprob: tl.tensor
    entropy: tl.tensor  # 0 unless asked for
    base: tl.tensor  # the peak, or 0 in a row of nothing but -inf
    log_norm: tl.tensor  # lse - base / temperature


class Slopes(NamedTuple):
    """Derivatives of a loss with respect to the statistics of a row, or of each of several."""

    logprob: tl.tensor
    entropy: tl.tensor
    lse: tl.tensor
    total: tl.tensor  # the sum of the effective logits


@triton.jit
def tile_columns(
    LANES: tl.constexpr, VEC: tl.constexpr, LANE_STRIDE: tl.constexpr, VEC_STRIDE: tl.constexpr
):
    """Columns of a (LANES, VEC) tile, relative to its first."""
    return tl.arange(0, LANES)[:, None] * LANE_STRIDE + tl.arange(0, VEC)[None, :] * VEC_STRIDE


@triton.jit
def row_of(view, row, inner, stride_outer, stride_inner, stride_vocab):
    """One row of an (outer, inner, V) view; rows count in int64, so offsets pass 2^31."""
    first = view + (row // inner) * stride_outer + (row % inner) * stride_inner
    return Row(first, stride_vocab)


@triton.jit
def load_tile(row, columns, inside, other, acc: tl.constexpr, EVICTION: tl.constexpr):
    """A tile of a row in the type of accumulation; `other` where it is not inside. EVICTION says
    when it leaves the cache: "" at any time.
    """
    place = row.first + columns.to(tl.int64) * row.stride
    return tl.load(place, mask=inside, other=other, eviction_policy=EVICTION).to(acc)


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
def move_base(sums, base, rate, with_entropy):
    """Return rest and moment, whose exponents in `sums` are z - peak, for exponents z - base.
    `rate` turns logits into bits.
    """
    shift = (sums.peak - base) * rate
    fade = tl.exp2(shift)
    moment = sums.moment
    if with_entropy:
        # Where fade is 0 (a sum of no columns has the peak -inf), shift may be -inf: 0·inf is NaN.
        moment = (moment + sums.rest * tl.where(fade > 0, shift, 0.0)) * fade
    return sums.rest * fade, moment


@triton.jit
def move_squares(peak, squares, base, rate):
    """Return Σ e^2(z - base), given `squares`, which is Σ e^2(z - peak)."""
    fade = tl.exp2((peak - base) * rate)
    return squares * (fade * fade)


@triton.jit
def no_columns(LANES: tl.constexpr, acc: tl.constexpr):
    """Sums of each lane, and what further statistics need, before the first tile."""
    nothing = tl.full((LANES,), -float("inf"), acc)
    zero = tl.zeros((LANES,), acc)
    return Sums(nothing, zero, zero), Further(nothing, nothing, zero, zero)


@triton.jit
def add_tile(x, inside, columns, target, sums, transform, with_entropy):
    """Take one tile of logits into each lane's sums."""
    capped, _ = capped_logits(x, transform)
    if transform.HAS_SOFTCAP:
        capped = tl.where(inside, capped, -float("inf"))
    peak = tl.maximum(sums.peak, tl.max(capped, axis=1))
    base = finite_base(peak)
    bits = (capped - base[:, None]) * transform.rate
    weight = tl.where(columns == target, 0.0, tl.exp2(bits))
    rest, moment = move_base(sums, base, transform.rate, with_entropy)
    rest += tl.sum(weight, axis=1)
    if with_entropy:
        moment += tl.sum(tl.where(weight > 0, weight * bits, 0.0), axis=1)
    return Sums(peak, rest, moment)


@triton.jit
def add_further(x, inside, columns, target, further, old_peak, peak, transform, asked):
    """Take a tile that `add_tile` took, which moved each lane's peak from `old_peak`, into what
    further statistics need. What both compute, the compiler computes once.

    The target's logit comes out of the same code as all others: made elsewhere, it might differ in
    its last bit from one that equals it.
    """
    before, own, total, squares = further.before, further.own, further.total, further.squares
    capped, _ = capped_logits(x, transform)
    if asked.mean:
        total += tl.sum(tl.where(inside, capped, 0.0), axis=1)
    if transform.HAS_SOFTCAP:
        capped = tl.where(inside, capped, -float("inf"))
    if asked.top1:
        earlier = tl.where(columns < target, capped, -float("inf"))
        before = tl.maximum(before, tl.max(earlier, axis=1))
        own = tl.maximum(own, tl.max(tl.where(columns == target, capped, -float("inf")), axis=1))
    if asked.squares:
        base = finite_base(peak)
        bits = (capped - base[:, None]) * transform.rate
        others = tl.where(columns == target, 0.0, tl.exp2(bits))
        squares = move_squares(old_peak, squares, base, transform.rate)
        squares += tl.sum(others * others, axis=1)
    return Further(before, own, total, squares)


@triton.jit
def add_to_both(x, inside, columns, target, sums, further, transform, asked):
    """Take one tile of logits into each lane's sums, and into what further statistics need."""
    moved = add_tile(x, inside, columns, target, sums, transform, asked.entropy)
    if asked.top1 or asked.mean or asked.squares:
        further = add_further(
            x, inside, columns, target, further, sums.peak, moved.peak, transform, asked
        )
    return moved, further


@triton.jit
def merged_lanes(sums, rate, with_entropy):
    """Merge the lanes: the row's peak, and its rest and moment relative to it."""
    peak = tl.max(sums.peak, axis=0)
    rest, moment = move_base(sums, finite_base(peak), rate, with_entropy)
    return Sums(peak, tl.sum(rest, axis=0), tl.sum(moment, axis=0))


@triton.jit
def merged_lanes_of_both(sums, further, rate, asked):
    """Merge the lanes: sums of the row, and what further statistics need of it."""
    row_sums = merged_lanes(sums, rate, asked.entropy)
    before, own, total, squares = further.before, further.own, further.total, further.squares
    if asked.top1:
        before, own = tl.max(before, axis=0), tl.max(own, axis=0)
    if asked.mean:
        total = tl.sum(total, axis=0)
    if asked.squares:
        base = finite_base(row_sums.peak)
        squares = tl.sum(move_squares(sums.peak, squares, base, rate), axis=0)
    return row_sums, Further(before, own, total, squares)


@triton.jit
def statistics(sums, target_capped, transform, with_entropy):
    """Statistics of a row, or of several, and whether it is nothing but -inf."""
    base = finite_base(sums.peak)
    # Not by way of bits, whose rounding would be that of the log-prob of an unlikely target.
    target_shift = quotient(target_capped - base, transform.temperature)
    target_bits = target_shift * LOG2E
    target_weight = tl.exp2(target_bits)
    total = sums.rest + target_weight
    log_norm = tl.log(total)
    logprob = log_sigmoid(target_shift - tl.log(sums.rest))
    # A maximum ignores NaN. So the peak alone does not tell whether a row is empty: its NaN is in
    # the sum, or in the target's logit.
    empty = (sums.peak == -float("inf")) & (sums.rest == 0.0) & (target_capped == -float("inf"))
    logprob = tl.where(empty, -float("inf"), logprob)
    entropy = sums.rest * 0.0
    if with_entropy:
        moment = sums.moment
        moment += tl.where(target_weight > 0, target_weight * target_bits, 0.0)
        entropy = tl.where(empty, 0.0, log_norm - LN2 * moment / total)
    return Statistics(logprob, entropy, base, log_norm), empty


@triton.jit
def log_sum_squares(squares, target_capped, stats, empty, row_t):
    """Compute ln Σ p² of a row, or of several, from what `statistics` found. Where the target
    weighs more than half as much as the peak, it is taken from the log-prob, which is accurate
    where p → 1.
    """
    weight = tl.exp2((target_capped - stats.base) / row_t * LOG2E)
    square = weight * weight
    heavy = square > 0.25
    of_heavy = 2.0 * stats.logprob + log1p(squares / tl.where(heavy, square, 1.0))
    of_light = tl.log(squares + square) - 2.0 * stats.log_norm
    return tl.where(empty, 0.0, tl.where(heavy, of_heavy, of_light))


class Outputs(NamedTuple):
    """Pointers to what `store_statistics` stores, (N,) each; what is not asked for is unused."""

    logprob: tl.tensor
    entropy: tl.tensor
    lse: tl.tensor
    peak: tl.tensor
    log_norm: tl.tensor
    is_top1: tl.tensor
    mean: tl.tensor
    log_sum_squares: tl.tensor


@triton.jit
def store_statistics(out, row, inside, live, sums, further, target_capped, count, transform, asked):
    """Store the statistics of a row of `count` tokens, or of the rows of a block that are inside.
    Those that are not live get 0, but -inf as their peak.
    """
    stats, empty = statistics(sums, target_capped, transform, asked.entropy)
    row_t = transform.temperature
    lse = quotient(stats.base, row_t) + stats.log_norm
    tl.store(out.logprob + row, tl.where(live, stats.logprob, 0.0), mask=inside)
    tl.store(out.lse + row, tl.where(live, lse, 0.0), mask=inside)
    peak = tl.where(live & (empty == 0), stats.base, -float("inf"))
    tl.store(out.peak + row, peak, mask=inside)
    tl.store(out.log_norm + row, tl.where(live, stats.log_norm, 0.0), mask=inside)
    if asked.entropy:
        tl.store(out.entropy + row, tl.where(live, stats.entropy, 0.0), mask=inside)
    if asked.top1:
        # In an ignored row both are -inf. Maxima ignore NaN; if a row has one, so has its norm.
        is_top1 = (further.own > further.before) & (further.own == sums.peak)
        is_top1 &= stats.log_norm == stats.log_norm
        tl.store(out.is_top1 + row, is_top1, mask=inside)
    if asked.mean:
        tl.store(out.mean + row, tl.where(live, further.total / count / row_t, 0.0), mask=inside)
    if asked.squares:
        log_squares = log_sum_squares(further.squares, target_capped, stats, empty, row_t)
        tl.store(out.log_sum_squares + row, tl.where(live, log_squares, 0.0), mask=inside)


@triton.jit
def load_slopes(
    d_logprob, d_entropy, d_lse, d_mean, row, inside, count,
    WITH_ENTROPY: tl.constexpr, WITH_LSE: tl.constexpr, WITH_MEAN: tl.constexpr,
):  # fmt: skip
    """Slopes of a row of `count` tokens, or of those rows of a block that are inside. For a
    slope that is not asked for, that of the log-prob is returned.
    """
    of_logprob = tl.load(d_logprob + row, mask=inside, other=0.0)
    of_entropy, of_lse, of_total = of_logprob, of_logprob, of_logprob
    if WITH_ENTROPY:
        of_entropy = tl.load(d_entropy + row, mask=inside, other=0.0)
    if WITH_LSE:
        of_lse = tl.load(d_lse + row, mask=inside, other=0.0)
    if WITH_MEAN:
        of_total = tl.load(d_mean + row, mask=inside, other=0.0) / count
    return Slopes(of_logprob, of_entropy, of_lse, of_total)


@triton.jit
def gradient_tile(
    x, columns, target, stats, slopes, transform,
    with_entropy, WITH_LSE: tl.constexpr = False, WITH_MEAN: tl.constexpr = False,
):  # fmt: skip
    """Gradient with respect to a tile of logits: Σ of each slope times that of its statistic."""
    g, h = slopes.logprob, slopes.entropy
    capped, slope = capped_logits(x, transform)
    bits = (capped - stats.base) * transform.rate - stats.log_norm * LOG2E
    p = tl.exp2(bits)
    # g·(1 - p) at the target, from log p where p is nearly 1.
    if WITH_LSE:
        l = slopes.lse
        dz = tl.where(columns == target, l * p - g * expm1(stats.logprob), (l - g) * p)
    else:
        dz = tl.where(columns == target, -g * expm1(stats.logprob), -g * p)
    if with_entropy:
        dz -= tl.where(p > 0, h * p * (bits * LN2 + stats.entropy), 0.0)
    if WITH_MEAN:
        dz += slopes.total
    return dz * (slope * (1.0 / transform.temperature))


def strides(rows: torch.Tensor) -> tuple[int, ...]:
    """Strides of an (outer, inner, V) view; that of a single outer block is never used, so never
    large.
    """
    return (rows.stride(0) if rows.shape[0] > 1 else 0, *rows.stride()[1:])


def asked_options(entropy: bool, with_stats: Sequence[str]) -> dict[str, bool]:
    """Kernel arguments that say which statistics are asked for."""
    return {
        "WITH_ENTROPY": entropy,
        "WITH_TOP1": "is_top1" in with_stats,
        "WITH_MEAN": "mean_logit" in with_stats,
        "WITH_SQUARES": "log_sum_sq_probs" in with_stats,
    }


def statistics_room(
    rows: int, asked: dict[str, bool], like: torch.Tensor, acc: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Make room for statistics in the order of `Outputs`, (N,) each, or empty if not asked for."""
    entropy, *further = asked.values()
    wanted = (True, entropy, True, True, True, *further)
    dtypes = (acc, acc, acc, acc, acc, torch.bool, acc, acc)
    return tuple(
        like.new_empty(rows if want else 0, dtype=dtype)
        for want, dtype in zip(wanted, dtypes, strict=True)
    )


def slope_options(
    d_logprob: torch.Tensor,
    d_entropy: torch.Tensor | None,
    d_lse: torch.Tensor | None,
    d_mean: torch.Tensor | None,
) -> tuple[tuple[torch.Tensor, ...], dict[str, bool]]:
    """Kernel arguments of the slopes (N,), and which of them there are; where there is none, the
    log-prob's stands in.
    """
    others = (d_entropy, d_lse, d_mean)
    names = ("WITH_ENTROPY", "WITH_LSE", "WITH_MEAN")
    slopes = (d_logprob, *(d_logprob if x is None else x for x in others))
    return slopes, {name: x is not None for name, x in zip(names, others, strict=True)}
