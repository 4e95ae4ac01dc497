"""One row of logits: how it is cut into tiles, its statistics by online sums, its gradient.

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

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .tiles import LN2, LOG2E, capped_logits, expm1, log_sigmoid


class RowPlan(NamedTuple):
    """How a row is cut: tiles of `lanes` x `vec` tokens, and how many warps share a tile."""

    lanes: int
    vec: int
    lane_stride: int
    vec_stride: int
    warps: int

    @property
    def tile(self) -> int:
        return self.lanes * self.vec

    def options(self) -> dict[str, Any]:
        """Launch options of a kernel that works on such tiles."""
        return {
            "LANES": self.lanes,
            "VEC": self.vec,
            "LANE_STRIDE": self.lane_stride,
            "VEC_STRIDE": self.vec_stride,
            "num_warps": self.warps,
        }


_MAX_VEC = 8


def row_plan(vocab: int, dtype: torch.dtype, *, max_warps: int, thread_bytes: int) -> RowPlan:
    """Cut a row by its vocabulary and dtype alone, which is what makes results batch invariant.

    At large vocabularies, a tile is `thread_bytes` on each thread of `max_warps`.
    """
    warp_tokens = 32 * thread_bytes // dtype.itemsize
    vec = min(_MAX_VEC, thread_bytes // dtype.itemsize)
    tile = max(vec, min(max_warps * warp_tokens, triton.next_power_of_2(vocab)))
    lanes = tile // vec
    # A thread owns the vectors of its lanes. Rows that all start at 16 bytes let it load neighbours
    # at once; other rows are loaded an element at a time, and then neighbouring threads take
    # neighbours.
    strides: tuple[int, int] = (vec, 1) if vocab % 16 == 0 else (1, lanes)
    return RowPlan(lanes, vec, *strides, max(1, tile // warp_tokens))


def whole_row_plan(vocab: int, dtype: torch.dtype, *, rows: int = 1) -> RowPlan:
    """Cut a row that one program sweeps as a whole, or two rows at once.

    A tile is two 128-bit loads on each thread of 8 warps, or one where registers are scarce: rows
    that start anywhere take an address for every token, and fp64 takes two registers a number.
    """
    scarce = vocab % 16 != 0 or (rows > 1 and dtype == torch.float64)
    return row_plan(vocab, dtype, max_warps=8, thread_bytes=16 if scarce else 32)


@triton.jit
def tile_columns(
    LANES: tl.constexpr, VEC: tl.constexpr, LANE_STRIDE: tl.constexpr, VEC_STRIDE: tl.constexpr
):
    """Columns of a (LANES, VEC) tile, relative to its first."""
    return tl.arange(0, LANES)[:, None] * LANE_STRIDE + tl.arange(0, VEC)[None, :] * VEC_STRIDE


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
):
    """Gradient of g·logprob + h·entropy with respect to a tile of logits."""
    capped, slope = capped_logits(x, scale, softcap, HAS_SOFTCAP)
    bits = (capped - base) * (LOG2E / row_t) - log_norm * LOG2E
    p = tl.exp2(bits)
    # g·(1 - p) at the target, from log p where p is nearly 1.
    dz = tl.where(columns == target, -g * expm1(logprob), -g * p)
    if with_entropy:
        dz -= tl.where(p > 0, h * p * (bits * LN2 + entropy), 0.0)
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
