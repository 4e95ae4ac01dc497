"""A candidate to replace the policy loss's kernel: one launch that works in row order.

First light times it beside the present kernel. The present kernel sweeps each row twice, and works
on hundreds of rows at once. At a large vocabulary these rows do not fit into the cache, so the
second sweep reads from memory again. In this candidate, a program first computes the statistics of
one split (a part of a row), as in the statistics kernel. Then it computes the gradient of the same
split of a row that came a few megabytes earlier, which is still in the cache whatever the
vocabulary.

Programs wait for each other, but the launch cannot block itself: a program takes its number when it
starts, so a program that it waits for has started before and waits for no later one. The last split
of a row to arrive merges the row's numbers in a fixed order, so results have the same bits from run
to run.

The kernel is here and not in `kernels/` because its counters and its waiting are worth their
complexity only if the policy loss's kernel turns out to be as slow as predicted (see
results/predictions.md). It covers the plain case: clipped ratios, no entropy, and logits as they
are (temperature 1, no scale, no softcap), which each call that takes a `Transform` says anew: in a
tuple that is returned or assigned, whether there is a softcap would be known at run time only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrlhf.kernels.launch import RowPlan, on_their_device, row_plan
from fastrlhf.kernels.policy_loss import SURROGATES, Bounds
from fastrlhf.kernels.rows import (
    Slopes,
    Statistics,
    Sums,
    add_tile,
    gradient_tile,
    merged_lanes,
    no_columns,
    statistics,
    tile_columns,
)
from fastrlhf.kernels.tiles import LOG2E
from fastrlhf.kernels.transform import Transform

_CACHED_BYTES = 24e6  # bytes of rows between a split's statistics and its gradient
_TILES_PER_SPLIT = 4
_clip = SURROGATES["clip"]
_NUMBERS = tl.constexpr(4)  # for each row: base, log_norm, logprob, coefficient g


@triton.jit
def _split_statistics(
    source, target, first, vocab, WIDTH: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    LANE_STRIDE: tl.constexpr, VEC_STRIDE: tl.constexpr,
):  # fmt: skip
    """Compute the peak of one split and the rest of its sum of exponentials."""
    within_tile = tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)
    sums, _ = no_columns(LANES, tl.float32)
    for start in range(first, tl.minimum(first + WIDTH, vocab), LANES * VEC):
        columns = start + within_tile
        inside = columns < vocab
        x = tl.load(
            source + columns, mask=inside, other=-float("inf"), eviction_policy="evict_last"
        ).to(tl.float32)
        sums = add_tile(
            x, inside, columns, target, sums, Transform(1.0, 1.0, 1.0, LOG2E, False), False
        )
    return merged_lanes(sums, LOG2E, False)


@triton.jit
def _row_numbers(
    partials, logits, old_logprobs, advantages, weights, losses, numbers, row, target, rows, splits,
    vocab, low, high, SPLITS_PADDED: tl.constexpr,
):  # fmt: skip
    """Merge the splits of a row, and store its loss and the numbers that its gradient needs."""
    split = tl.arange(0, SPLITS_PADDED)
    there = split < splits
    cell = row * splits + split
    peak = tl.load(partials + cell, mask=there, other=-float("inf"))
    rest = tl.load(partials + rows.to(tl.int64) * splits + cell, mask=there, other=0.0)
    sums = merged_lanes(Sums(peak, rest, rest), LOG2E, False)
    x = tl.load(logits + row * vocab + target).to(tl.float32)
    stats, _ = statistics(sums, x, Transform(1.0, 1.0, 1.0, LOG2E, False), False)
    loss, slope = _clip(
        stats.logprob - tl.load(old_logprobs + row), stats.logprob, tl.load(advantages + row),
        Bounds(low, high, float("inf"), 1.0, 1.0),
    )  # fmt: skip
    tl.store(losses + row, loss)
    out = numbers + row * _NUMBERS
    tl.store(out, stats.base)
    tl.store(out + 1, stats.log_norm)
    tl.store(out + 2, stats.logprob)
    tl.store(out + 3, slope * tl.load(weights + row))


@triton.jit(do_not_specialize=["rows", "splits", "distance"])
def _row_order_kernel(
    d_logits,  # (N, V) contiguous, may share the memory of the logits
    logits,  # (N, V) contiguous
    targets,  # (N,), none is ignored
    old_logprobs,
    advantages,
    weights,
    losses,  # (N,) out
    numbers,  # (N, 4)
    partials,  # (2, N, S)
    tickets,  # () zero
    arrived,  # (N,) zeros: counts splits with stored statistics
    ready,  # (N,) zeros: whether the row's numbers are stored
    rows,
    vocab,
    splits,
    distance,  # rows between the statistics and the gradient of a program
    low: tl.float64,
    high: tl.float64,
    SPLITS_PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    LANE_STRIDE: tl.constexpr,
    VEC_STRIDE: tl.constexpr,
):
    ticket = tl.atomic_add(tickets, 1, sem="relaxed")
    split = ticket % splits
    row = (ticket // splits).to(tl.int64)
    first = split * WIDTH
    if row < rows:
        target = tl.load(targets + row).to(tl.int32)
        sums = _split_statistics(
            logits + row * vocab, target, first, vocab, WIDTH, LANES, VEC, LANE_STRIDE, VEC_STRIDE
        )
        cell = row * splits + split
        tl.store(partials + cell, sums.peak)
        tl.store(partials + rows.to(tl.int64) * splits + cell, sums.rest)
        if tl.atomic_add(arrived + row, 1, sem="acq_rel") == splits - 1:
            _row_numbers(
                partials, logits, old_logprobs, advantages, weights, losses, numbers, row, target,
                rows, splits, vocab, tl.full((), low, tl.float32), tl.full((), high, tl.float32),
                SPLITS_PADDED,
            )  # fmt: skip
            tl.atomic_xchg(ready + row, 1, sem="release")
    earlier = row - distance
    if earlier >= 0:
        while tl.atomic_add(ready + earlier, 0, sem="acquire") == 0:
            pass
        target = tl.load(targets + earlier).to(tl.int32)
        base = tl.load(numbers + earlier * _NUMBERS)
        log_norm = tl.load(numbers + earlier * _NUMBERS + 1)
        logprob = tl.load(numbers + earlier * _NUMBERS + 2)
        slopes = Slopes(tl.load(numbers + earlier * _NUMBERS + 3), 0.0, 0.0, 0.0)
        stats = Statistics(logprob, 0.0, base, log_norm)
        within_tile = tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)
        for start in range(first, tl.minimum(first + WIDTH, vocab), LANES * VEC):
            columns = start + within_tile
            inside = columns < vocab
            place = earlier * vocab + columns
            x = tl.load(logits + place, mask=inside, other=0.0, eviction_policy="evict_first")
            dx = gradient_tile(
                x.to(tl.float32), columns, target, stats, slopes,
                Transform(1.0, 1.0, 1.0, LOG2E, False), False,
            )  # fmt: skip
            tl.store(
                d_logits + place, dx.to(d_logits.dtype.element_ty), mask=inside,
                eviction_policy="evict_first",
            )  # fmt: skip


def _plan(vocab: int, dtype: torch.dtype) -> tuple[RowPlan, int, int]:
    plan = row_plan("token_stats", vocab, dtype)
    width = _TILES_PER_SPLIT * plan.tile
    return plan, width, triton.cdiv(vocab, width)


@on_their_device
def policy_loss_in_row_order(
    d_logits: Tensor,
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    ratio_low: float = 0.8,
    ratio_high: float = 1.2,
    cached_bytes: float = _CACHED_BYTES,
) -> Tensor:
    """Compute the losses (N,) of logits (N, V), and the gradient of Σ weights·losses.

    The gradient is written into d_logits, which may be the logits.
    """
    rows, vocab = logits.shape
    plan, width, splits = _plan(vocab, logits.dtype)
    distance = min(rows, max(1, int(cached_bytes / (vocab * logits.itemsize))))
    losses = torch.empty_like(weights)
    numbers = weights.new_empty((rows, _NUMBERS.value))
    partials = weights.new_empty((2, rows, splits))
    counters = torch.zeros(1 + 2 * rows, dtype=torch.int32, device=logits.device)
    options = plan.options()
    _row_order_kernel[((rows + distance) * splits,)](
        d_logits, logits, targets, old_logprobs, advantages, weights, losses, numbers, partials,
        counters, counters[1:], counters[1 + rows :], rows, vocab, splits, distance,
        ratio_low, ratio_high, SPLITS_PADDED=triton.next_power_of_2(splits), WIDTH=width, **options,
    )  # fmt: skip
    return losses
