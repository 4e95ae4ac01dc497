"""Logits → log-prob, entropy and log-sum-exp of each row (K1), and → their gradient (K2).

K1 reads every logit once. A program takes one *split* of one row and runs the online recurrence
over it: the largest logit so far (`peak`), Σ e^(z - peak) over all tokens but the target (`rest`)
and, for the entropy, Σ e^(z - peak)·(z - peak) over the same tokens (`moment`). Each lane keeps its
own recurrence over short vectors that one thread loads at once, so that an element costs one
exponential and nothing is exchanged before the end of the split. A second, tiny launch combines the
splits of a row.

Two decisions carry the numerics. The target stays out of `rest`, so that log p = -softplus(ln rest
- z_target) is exact where p → 1 and `z_target - lse` would cancel. And K2 gets `peak` and
`log_norm` = lse - peak apart, because their sum loses 1e-3 nats in fp32 where logits reach 1e4.

How a row is cut depends on the vocabulary and the dtype alone, never on the number of rows: few
rows fill the machine, and a row's result has the same bits whatever batch surrounds it. No atomics.

K2 reads a logit and writes its gradient, which may be the same memory. Rows without a gradient are
zeroed unread, whatever they hold.

Dims: N rows = outer x inner, V vocabulary, S splits.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .tiles import (
    ASSERTING,
    LN2,
    LOG2E,
    capped_logits,
    expm1,
    log_sigmoid,
    row_start,
    row_temperature,
)


class RowPlan(NamedTuple):
    """How one row is cut: S splits of `width` tokens, in tiles of `lanes` x `vec`."""

    lanes: int
    vec: int
    lane_stride: int
    vec_stride: int
    width: int
    splits: int
    warps: int

    @property
    def tile(self) -> int:
        return self.lanes * self.vec


# At large vocabularies, a tile is two 128-bit loads on each thread of 8 warps: 16 tokens of bf16.
# Four tiles share one final reduction, and a row of 128k still makes 8 programs.
_THREAD_BYTES = 32
_MAX_WARPS = 8
_TILES_PER_SPLIT = 4
_VEC = 8


def row_plan(vocab: int, dtype: torch.dtype) -> RowPlan:
    """Cut a row by its vocabulary and dtype alone, which is what makes results batch invariant."""
    warp_tokens = 32 * _THREAD_BYTES // dtype.itemsize
    tile = max(_VEC, min(_MAX_WARPS * warp_tokens, triton.next_power_of_2(vocab)))
    lanes = tile // _VEC
    # A thread owns the vectors of its lanes. Rows that all start at 16 bytes let it load neighbours
    # at once; other rows are loaded an element at a time, and then neighbouring threads take
    # neighbours.
    strides: tuple[int, int] = (_VEC, 1) if vocab % 16 == 0 else (1, lanes)
    width = _TILES_PER_SPLIT * tile
    warps = max(1, tile // warp_tokens)
    return RowPlan(lanes, _VEC, *strides, width, triton.cdiv(vocab, width), warps)


@triton.jit
def _tile_columns(
    LANES: tl.constexpr, VEC: tl.constexpr, LANE_STRIDE: tl.constexpr, VEC_STRIDE: tl.constexpr
):
    """Columns of a (LANES, VEC) tile, relative to its first."""
    return tl.arange(0, LANES)[:, None] * LANE_STRIDE + tl.arange(0, VEC)[None, :] * VEC_STRIDE


@triton.jit
def _move_base(peak, rest, moment, base, rate, WITH_ENTROPY: tl.constexpr):
    """Express sums taken relative to `peak` relative to `base` instead; `rate` turns logits into
    bits.
    """
    shift = (peak - base) * rate
    fade = tl.exp2(shift)
    if WITH_ENTROPY:
        # A sum that fades to nothing (an empty one has peak -inf) must not meet inf·0.
        moment = (moment + rest * tl.where(fade > 0, shift, 0.0)) * fade
    return rest * fade, moment


@triton.jit
def _finite_base(peak):
    """The peak, or 0 where there were only -inf logits: any finite base then gives e^-inf = 0."""
    return tl.where(peak == -float("inf"), 0.0, peak)


# What varies from batch to batch is not specialised, so that no batch compiles a kernel anew.
@triton.jit(do_not_specialize=["rows", "inner", "splits", "ignore_index"])
def _token_stats_fwd_kernel(
    logits,  # (outer, inner, V), any strides
    targets,  # (N,)
    token_temperature,  # (N,) or unused
    partials,  # (3, N, S): peak, rest, moment
    rows,
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    vocab,
    splits,
    ignore_index,
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    LANE_STRIDE: tl.constexpr,
    VEC_STRIDE: tl.constexpr,
):
    acc: tl.constexpr = partials.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    split = (program % splits).to(tl.int32)
    target = tl.load(targets + row)
    if target == ignore_index:
        return

    rate = LOG2E / row_temperature(
        token_temperature, temperature, row, True, acc, PER_TOKEN_TEMPERATURE
    )
    scale = tl.full((), scale, acc)
    softcap = tl.full((), softcap, acc)
    source = logits + row_start(row, inner, stride_outer, stride_inner)
    tile_columns = _tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)

    peak = tl.full((LANES,), -float("inf"), acc)
    rest = tl.zeros((LANES,), acc)
    moment = tl.zeros((LANES,), acc)
    first = split * WIDTH
    for start in range(first, tl.minimum(first + WIDTH, vocab), LANES * VEC):
        columns = start + tile_columns
        inside = columns < vocab
        x = tl.load(
            source + columns.to(tl.int64) * stride_vocab, mask=inside, other=-float("inf")
        ).to(acc)
        capped, _ = capped_logits(x, scale, softcap, HAS_SOFTCAP)
        if HAS_SOFTCAP:
            capped = tl.where(inside, capped, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(capped, axis=1))
        base = _finite_base(new_peak)
        bits = (capped - base[:, None]) * rate
        weight = tl.where(columns == target, 0.0, tl.exp2(bits))
        rest, moment = _move_base(peak, rest, moment, base, rate, WITH_ENTROPY)
        rest += tl.sum(weight, axis=1)
        if WITH_ENTROPY:
            moment += tl.sum(tl.where(weight > 0, weight * bits, 0.0), axis=1)
        peak = new_peak

    row_peak = tl.max(peak, axis=0)
    rest, moment = _move_base(peak, rest, moment, _finite_base(row_peak), rate, WITH_ENTROPY)
    plane = rows.to(tl.int64) * splits
    tl.store(partials + program, row_peak)
    tl.store(partials + plane + program, tl.sum(rest, axis=0))
    if WITH_ENTROPY:
        tl.store(partials + 2 * plane + program, tl.sum(moment, axis=0))


@triton.jit(do_not_specialize=["rows", "inner", "splits", "ignore_index"])
def _token_stats_combine_kernel(
    logits,
    targets,
    token_temperature,
    partials,
    logprob_out,
    entropy_out,
    lse_out,
    peak_out,
    log_norm_out,
    rows,
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    vocab,
    splits,
    ignore_index,
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = partials.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=ignore_index).to(tl.int64)
    live = inside & (target != ignore_index)
    row_t = row_temperature(token_temperature, temperature, row, live, acc, PER_TOKEN_TEMPERATURE)
    in_vocab = (target >= 0) & (target < vocab)
    tl.device_assert(in_vocab | (live == 0), "fastrlhf: a target is outside [0, vocabulary)")
    tl.device_assert(row_t > 0, "fastrlhf: a temperature is not positive")

    rate = LOG2E / row_t
    split = tl.arange(0, SPLITS_PADDED)[None, :]
    cell = row[:, None] * splits + split
    present = live[:, None] & (split < splits)
    plane = rows.to(tl.int64) * splits
    peak = tl.load(partials + cell, mask=present, other=-float("inf"))
    rest = tl.load(partials + plane + cell, mask=present, other=0.0)
    if WITH_ENTROPY:
        moment = tl.load(partials + 2 * plane + cell, mask=present, other=0.0)
    else:
        moment = rest
    row_peak = tl.max(peak, axis=1)
    base = _finite_base(row_peak)
    if PER_TOKEN_TEMPERATURE:
        split_rate = rate[:, None]
    else:
        split_rate = rate
    rest, moment = _move_base(peak, rest, moment, base[:, None], split_rate, WITH_ENTROPY)
    rest = tl.sum(rest, axis=1)

    x = tl.load(
        logits + row_start(row, inner, stride_outer, stride_inner) + target * stride_vocab,
        mask=live & in_vocab,
        other=float("nan"),
    ).to(acc)
    capped, _ = capped_logits(x, tl.full((), scale, acc), tl.full((), softcap, acc), HAS_SOFTCAP)
    target_bits = (capped - base) * rate
    target_weight = tl.exp2(target_bits)
    total = rest + target_weight
    log_norm = tl.log(total)
    logprob = log_sigmoid(target_bits * LN2 - tl.log(rest))
    # Nothing but -inf. The maximum passes over NaN, which the sums and the target show.
    empty = (row_peak == -float("inf")) & (rest == 0.0) & (capped == -float("inf"))
    logprob = tl.where(empty, -float("inf"), logprob)

    tl.store(logprob_out + row, tl.where(live, logprob, 0.0), mask=inside)
    tl.store(lse_out + row, tl.where(live, base / row_t + log_norm, 0.0), mask=inside)
    tl.store(peak_out + row, tl.where(live & (empty == 0), base, -float("inf")), mask=inside)
    tl.store(log_norm_out + row, tl.where(live, log_norm, 0.0), mask=inside)
    if WITH_ENTROPY:
        moment = tl.sum(moment, axis=1)
        moment += tl.where(target_weight > 0, target_weight * target_bits, 0.0)
        entropy = tl.where(empty, 0.0, log_norm - LN2 * moment / total)
        tl.store(entropy_out + row, tl.where(live, entropy, 0.0), mask=inside)


@triton.jit(do_not_specialize=["inner", "tiles"])
def _token_stats_bwd_kernel(
    d_logits,  # (outer, inner, V): gradient out; may be the memory of the logits
    logits,  # (outer, inner, V)
    targets,  # (N,)
    token_temperature,  # (N,) or unused
    logprob,  # (N,), as are all below
    entropy,
    peak,
    log_norm,
    d_logprob,
    d_entropy,  # unused without the entropy
    inner,
    d_stride_outer,
    d_stride_inner,
    d_stride_vocab,
    stride_outer,
    stride_inner,
    stride_vocab,
    vocab,
    tiles,
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    LANE_STRIDE: tl.constexpr,
    VEC_STRIDE: tl.constexpr,
):
    acc: tl.constexpr = peak.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    start = (program % tiles).to(tl.int32) * (LANES * VEC)
    columns = start + _tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)
    inside = columns < vocab
    destination = d_logits + row_start(row, inner, d_stride_outer, d_stride_inner)
    destination += columns.to(tl.int64) * d_stride_vocab

    base = tl.load(peak + row)
    g = tl.load(d_logprob + row)
    without_gradient = g == 0.0
    if WITH_ENTROPY:
        h = tl.load(d_entropy + row)
        without_gradient &= h == 0.0
    # The peak of a row that is ignored, or that holds nothing but -inf, is -inf.
    if without_gradient | (base == -float("inf")):
        tl.store(destination, tl.zeros((LANES, VEC), d_logits.dtype.element_ty), mask=inside)
        return

    target = tl.load(targets + row)
    row_t = row_temperature(token_temperature, temperature, row, True, acc, PER_TOKEN_TEMPERATURE)
    scale = tl.full((), scale, acc)
    softcap = tl.full((), softcap, acc)
    source = logits + row_start(row, inner, stride_outer, stride_inner)
    x = tl.load(source + columns.to(tl.int64) * stride_vocab, mask=inside, other=0.0).to(acc)
    capped, slope = capped_logits(x, scale, softcap, HAS_SOFTCAP)
    bits = (capped - base) * (LOG2E / row_t) - tl.load(log_norm + row) * LOG2E
    p = tl.exp2(bits)
    # g·(1 - p) at the target, from log p where p is nearly 1.
    dz = tl.where(columns == target, -g * expm1(tl.load(logprob + row)), -g * p)
    if WITH_ENTROPY:
        dz -= tl.where(p > 0, h * p * (bits * LN2 + tl.load(entropy + row)), 0.0)
    tl.store(destination, (dz * (slope * (1.0 / row_t))).to(d_logits.dtype.element_ty), mask=inside)


def token_stats_forward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch K1 on logits (outer, inner, V); targets, and a temperature tensor, are contiguous
    (N,).

    Returns logprob, entropy (empty unless asked for), lse, peak and log_norm, each (N,).
    """
    outer, inner, vocab = logits.shape
    rows = outer * inner
    plan = row_plan(vocab, logits.dtype)
    acc = torch.promote_types(logits.dtype, torch.float32)
    partials = logits.new_empty((3 if entropy else 2, rows, plan.splits), dtype=acc)
    logprob, lse, peak, log_norm = (logits.new_empty(rows, dtype=acc) for _ in range(4))
    stats = (logprob, logits.new_empty(rows if entropy else 0, dtype=acc), lse, peak, log_norm)
    transform, token_temperature = _transform_options(temperature, softcap, scale, logits)
    sources = (logits, targets, token_temperature, partials)
    shape = (rows, inner, *_strides(logits), vocab, plan.splits, ignore_index)
    options = {**transform, "WITH_ENTROPY": entropy}
    _token_stats_fwd_kernel[(rows * plan.splits,)](
        *sources,
        *shape,
        **options,
        WIDTH=plan.width,
        LANES=plan.lanes,
        VEC=plan.vec,
        LANE_STRIDE=plan.lane_stride,
        VEC_STRIDE=plan.vec_stride,
        num_warps=plan.warps,
    )
    padded = triton.next_power_of_2(plan.splits)
    block = max(1, 128 // padded)
    _token_stats_combine_kernel[(triton.cdiv(rows, block),)](
        *sources,
        *stats,
        *shape,
        **options,
        SPLITS_PADDED=padded,
        BLOCK=block,
        num_warps=1,
        **ASSERTING,
    )
    return stats


def token_stats_backward(
    d_logits: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    stats: tuple[torch.Tensor, ...],
    d_logprob: torch.Tensor,
    d_entropy: torch.Tensor | None,
    *,
    temperature: float | torch.Tensor,
    softcap: float | None,
    scale: float,
) -> None:
    """Launch K2: write the gradient into d_logits (outer, inner, V), which may be the logits
    themselves.

    `stats` are the logprob, entropy, peak and log_norm that K1 gave; all rows (N,) are contiguous.
    """
    outer, inner, vocab = logits.shape
    plan = row_plan(vocab, logits.dtype)
    tiles = triton.cdiv(vocab, plan.tile)
    transform, token_temperature = _transform_options(temperature, softcap, scale, logits)
    _token_stats_bwd_kernel[(outer * inner * tiles,)](
        d_logits,
        logits,
        targets,
        token_temperature,
        *stats,
        d_logprob,
        d_logprob if d_entropy is None else d_entropy,
        inner,
        *_strides(d_logits),
        *_strides(logits),
        vocab,
        tiles,
        **transform,
        WITH_ENTROPY=d_entropy is not None,
        LANES=plan.lanes,
        VEC=plan.vec,
        LANE_STRIDE=plan.lane_stride,
        VEC_STRIDE=plan.vec_stride,
        num_warps=plan.warps,
    )


def _strides(rows: torch.Tensor) -> tuple[int, ...]:
    """Strides of an (outer, inner, V) view; that of a single outer block is never used, so never
    large.
    """
    return (rows.stride(0) if rows.shape[0] > 1 else 0, *rows.stride()[1:])


def _transform_options(
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
