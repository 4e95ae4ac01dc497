"""Logits → log-prob, entropy and log-sum-exp of each row, and → their gradient.

The statistics kernel reads every logit once. A program takes one *split* of one row and runs the
online recurrence of `rows.py` over it; a second, tiny launch combines the splits of a row.

Where ranks share the vocabulary, each has further splits: a launch merges its own into one message
a row, of the same numbers and the target's logit, and the second launch combines those of all.

How a row is cut depends on the vocabulary and the dtype alone, never on the number of rows: few
rows fill the machine, and a row's result has the same bits whatever batch surrounds it. No atomics.

The gradient kernel reads a logit and writes its gradient, which may be the same memory. Rows
without a gradient are zeroed unread, whatever they hold.

Further statistics, where asked for, come from the same pass: whether the target is the top token,
the mean of the logits, ln Σ p². And some words of each row can be left out of its statistics.

Called by `fastrlhf/ops/token_stats.py`; where the vocabulary is in several parts, by
`stats_over_ranks.py`, `divergence_over_ranks.py` and `bucket_logits.py` there. Read `rows.py`
first.

Dims: N rows = outer x inner, V vocabulary, S splits, P numbers of a split, W ranks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import on_their_device, row_plan
from .rows import (
    Asked,
    Further,
    Outputs,
    Statistics,
    Sums,
    add_to_both,
    asked_options,
    finite_base,
    gradient_tile,
    left_in,
    load_slopes,
    load_tile,
    merged_lanes_of_both,
    move_base,
    move_squares,
    no_columns,
    row_of,
    slope_options,
    statistics_room,
    store_statistics,
    strides,
    tile_columns,
)
from .tiles import ASSERTING
from .transform import Transform, capped_logits, row_temperature, transform_options

# Tiles of a split, which share one final reduction. In bf16 a tile is 4096 columns, so that a row
# of 128k still makes 8 programs.
_TILES_PER_SPLIT = 4


@triton.jit
def _store_numbers(place, plane, sums, further, asked, inside):
    """Store the numbers of a split, or of several that are inside, each a plane after the one
    before; return where the next one belongs.
    """
    tl.store(place, sums.peak, mask=inside)
    tl.store(place + plane, sums.rest, mask=inside)
    place += 2 * plane
    if asked.entropy:
        tl.store(place, sums.moment, mask=inside)
        place += plane
    if asked.top1:
        tl.store(place, further.before, mask=inside)
        tl.store(place + plane, further.own, mask=inside)
        place += 2 * plane
    if asked.mean:
        tl.store(place, further.total, mask=inside)
        place += plane
    if asked.squares:
        tl.store(place, further.squares, mask=inside)
        place += plane
    return place


# Numbers that vary from batch to batch are not specialised: no batch compiles a kernel anew.
@triton.jit(do_not_specialize=["rows", "inner", "splits", "ignore_index", "words"])
def _token_stats_fwd_kernel(
    # (P, N, S) out: peak and rest; and what is asked for of moment, before and own, total, squares.
    partials,
    logits,  # (outer, inner, V), any strides
    targets,  # (N,)
    left_out,  # (N, words) increasing numbers of columns, V and more where there is none; or unused
    rows,
    vocab,
    splits,
    words,
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    ignore_index,
    token_temperature,  # (N,) or unused
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_TOP1: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
    WORDS_PADDED: tl.constexpr,  # 0: none are left out
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    LANE_STRIDE: tl.constexpr,
    VEC_STRIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    acc: tl.constexpr = partials.dtype.element_ty
    pid = tl.program_id(0)
    row = (pid // splits).to(tl.int64)
    split = pid % splits
    target = tl.load(targets + row)
    if target == ignore_index:
        return
    target = target.to(tl.int32)

    row_t, rate = row_temperature(
        row, True, token_temperature, temperature, acc, PER_TOKEN_TEMPERATURE
    )
    source = row_of(logits, row, inner, stride_outer, stride_inner, stride_vocab)
    within_tile = tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)
    out_of_row = left_out
    numbers = target
    if WORDS_PADDED > 0:
        out_of_row += row * words
        place = tl.arange(0, WORDS_PADDED)
        numbers = tl.load(out_of_row + place, mask=place < words, other=2**31 - 1)
    first = split * WIDTH
    last = tl.minimum(first + WIDTH, vocab)
    sums, further = no_columns(LANES, acc)
    for start in tl.range(first, last, LANES * VEC, num_stages=STAGES):
        columns = start + within_tile
        inside = columns < vocab
        x = load_tile(source, columns, inside, -float("inf"), acc, "")
        if WORDS_PADDED > 0:
            inside = left_in(inside, columns, numbers, out_of_row, start, start + LANES * VEC)
            x = tl.where(inside, x, -float("inf"))
        sums, further = add_to_both(
            x, inside, columns, target, sums, further,
            Transform(scale, softcap, row_t, rate, HAS_SOFTCAP),
            Asked(WITH_ENTROPY, WITH_TOP1, WITH_MEAN, WITH_SQUARES),
        )  # fmt: skip

    sums, further = merged_lanes_of_both(
        sums, further, rate, Asked(WITH_ENTROPY, WITH_TOP1, WITH_MEAN, WITH_SQUARES)
    )
    _store_numbers(
        partials + pid.to(tl.int64), rows.to(tl.int64) * splits, sums, further,
        Asked(WITH_ENTROPY, WITH_TOP1, WITH_MEAN, WITH_SQUARES), True,
    )  # fmt: skip


@triton.jit
def _block_of_rows(targets, rows, splits, ignore_index, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """The rows of a program that has BLOCK of them with all of their splits: which they are, which
    of them are there, their targets, which are live; the splits, and which of them are there.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=ignore_index).to(tl.int64)
    live = inside & (target != ignore_index)
    split = tl.arange(0, PADDED)[None, :]
    return row, inside, target, live, split, live[:, None] & (split < splits)


@triton.jit
def _merged_splits(
    place,  # of the first number of each split (BLOCK, splits), the next ones a plane further
    plane,
    present,
    rate,
    asked,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
):
    """Merge the splits of rows, and return also the place of what follows their numbers."""
    if PER_TOKEN_TEMPERATURE:
        rate = rate[:, None]
    peak = tl.load(place, mask=present, other=-float("inf"))
    rest = tl.load(place + plane, mask=present, other=0.0)
    place += 2 * plane
    moment = rest
    if asked.entropy:
        moment = tl.load(place, mask=present, other=0.0)
        place += plane
    row_peak = tl.max(peak, axis=1)
    base = finite_base(row_peak)[:, None]
    rest, moment = move_base(Sums(peak, rest, moment), base, rate, asked.entropy)
    sums = Sums(row_peak, tl.sum(rest, axis=1), tl.sum(moment, axis=1))
    before, own, total, squares = sums.peak, sums.peak, sums.rest, sums.rest
    if asked.top1:
        before = tl.max(tl.load(place, mask=present, other=-float("inf")), axis=1)
        own = tl.max(tl.load(place + plane, mask=present, other=-float("inf")), axis=1)
        place += 2 * plane
    if asked.mean:
        total = tl.sum(tl.load(place, mask=present, other=0.0), axis=1)
        place += plane
    if asked.squares:
        squares = tl.load(place, mask=present, other=0.0)
        squares = tl.sum(move_squares(peak, squares, base, rate), axis=1)
        place += plane
    return sums, Further(before, own, total, squares), place


@triton.jit
def _target_capped(source, target, here, other, transform, acc: tl.constexpr):
    """The logits of the targets, transformed but for the temperature. Where a target is not here,
    `other` is transformed in place of its logit.
    """
    x = tl.load(source.first + target * source.stride, mask=here, other=other).to(acc)
    capped, _ = capped_logits(x, transform)
    return capped


@triton.jit(do_not_specialize=["rows", "inner", "splits", "ignore_index"])
def _token_stats_merge_kernel(
    message,  # (P + 1, N) out: as the partials of a split, then the target's logit or -inf
    logits,  # (outer, inner, V), any strides
    targets,  # (N,), of which some may be in columns that others have
    partials,  # (P, N, S)
    rows,
    vocab,
    splits,
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    ignore_index,
    token_temperature,  # (N,) or unused
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_TOP1: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = partials.dtype.element_ty
    row, inside, target, live, split, present = _block_of_rows(
        targets, rows, splits, ignore_index, BLOCK, SPLITS_PADDED
    )
    row_t, rate = row_temperature(
        row, live, token_temperature, temperature, acc, PER_TOKEN_TEMPERATURE
    )
    sums, further, _ = _merged_splits(
        partials + row[:, None] * splits + split, rows.to(tl.int64) * splits, present,
        rate, Asked(WITH_ENTROPY, WITH_TOP1, WITH_MEAN, WITH_SQUARES), PER_TOKEN_TEMPERATURE,
    )  # fmt: skip
    place = _store_numbers(
        message + row, rows.to(tl.int64), sums, further,
        Asked(WITH_ENTROPY, WITH_TOP1, WITH_MEAN, WITH_SQUARES), inside,
    )  # fmt: skip
    here = live & (target >= 0) & (target < vocab)
    source = row_of(logits, row, inner, stride_outer, stride_inner, stride_vocab)
    capped = _target_capped(
        source, target, here, 0.0, Transform(scale, softcap, row_t, rate, HAS_SOFTCAP), acc
    )
    tl.store(place, tl.where(here, capped, -float("inf")), mask=inside)


@triton.jit
def _target_of_ranks(place, present):
    """Find the logit of each target, scaled and capped but not divided by the temperature. Only
    one rank has it in its part of the vocabulary; the others have sent -inf.
    """
    of_ranks = tl.load(place, mask=present, other=-float("inf"))
    held = of_ranks != -float("inf")  # by one rank; NaN included
    capped = tl.sum(tl.where(held, of_ranks, 0.0), axis=1)
    return tl.where(tl.max(held.to(tl.int32), axis=1) > 0, capped, -float("inf"))


@triton.jit(
    do_not_specialize=["rows", "inner", "stride_plane", "stride_row", "stride_split", "splits",
                       "ignore_index"]
)  # fmt: skip
def _token_stats_combine_kernel(
    logprob_out,  # (N,) out, as are the next seven
    entropy_out,  # unused unless asked for, as are the last three of them
    lse_out,
    peak_out,
    log_norm_out,
    is_top1_out,
    mean_out,
    log_sum_squares_out,
    logits,  # (outer, inner, V), any strides; unused if OF_RANKS
    targets,  # (N,)
    partials,  # of splits, or messages of ranks
    rows,
    vocab,
    splits,
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    stride_plane,  # of the partials
    stride_row,
    stride_split,
    ignore_index,
    token_temperature,  # (N,) or unused
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_TOP1: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
    OF_RANKS: tl.constexpr,  # the target's logit comes with the partials
    SPLITS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = partials.dtype.element_ty
    row, inside, target, live, split, present = _block_of_rows(
        targets, rows, splits, ignore_index, BLOCK, SPLITS_PADDED
    )
    row_t, rate = row_temperature(
        row, live, token_temperature, temperature, acc, PER_TOKEN_TEMPERATURE
    )
    tl.device_assert(row_t > 0, "fastrlhf: a temperature is not positive")
    sums, further, place = _merged_splits(
        partials + row[:, None] * stride_row + split.to(tl.int64) * stride_split,
        stride_plane.to(tl.int64), present, rate,
        Asked(WITH_ENTROPY, WITH_TOP1, WITH_MEAN, WITH_SQUARES), PER_TOKEN_TEMPERATURE,
    )  # fmt: skip
    if OF_RANKS:
        capped = _target_of_ranks(place, present)
    else:
        in_vocab = (target >= 0) & (target < vocab)
        tl.device_assert(in_vocab | (live == 0), "fastrlhf: a target is outside [0, vocabulary)")
        source = row_of(logits, row, inner, stride_outer, stride_inner, stride_vocab)
        capped = _target_capped(
            source, target, live & in_vocab, float("nan"),
            Transform(scale, softcap, row_t, rate, HAS_SOFTCAP), acc,
        )  # fmt: skip
    out = Outputs(
        logprob_out, entropy_out, lse_out, peak_out, log_norm_out, is_top1_out, mean_out,
        log_sum_squares_out,
    )  # fmt: skip
    store_statistics(
        out, row, inside, live, sums, further, capped, vocab,
        Transform(scale, softcap, row_t, rate, HAS_SOFTCAP),
        Asked(WITH_ENTROPY, WITH_TOP1, WITH_MEAN, WITH_SQUARES),
    )  # fmt: skip


@triton.jit(do_not_specialize=["inner", "tiles"])
def _token_stats_bwd_kernel(
    d_logits,  # (outer, inner, V): gradient out; may be the memory of the logits
    logits,  # (outer, inner, V), any strides
    targets,  # (N,), as are all below
    logprob,
    entropy,
    peak,
    log_norm,
    d_logprob,
    d_entropy,  # unused without the entropy
    d_lse,  # unused without the lse
    d_mean,  # unused without the mean of the logits
    vocab,
    tiles,
    inner,
    d_stride_outer,
    d_stride_inner,
    d_stride_vocab,
    stride_outer,
    stride_inner,
    stride_vocab,
    token_temperature,  # (N,) or unused
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_LSE: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    LANE_STRIDE: tl.constexpr,
    VEC_STRIDE: tl.constexpr,
):
    acc: tl.constexpr = peak.dtype.element_ty
    dtype: tl.constexpr = d_logits.dtype.element_ty
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    start = (pid % tiles) * (LANES * VEC)
    columns = start + tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)
    inside = columns < vocab
    out = row_of(d_logits, row, inner, d_stride_outer, d_stride_inner, d_stride_vocab)
    destination = out.first + columns.to(tl.int64) * out.stride

    base = tl.load(peak + row)
    slopes = load_slopes(
        d_logprob, d_entropy, d_lse, d_mean, row, True, vocab, WITH_ENTROPY, WITH_LSE, WITH_MEAN
    )
    no_slope = (slopes.logprob == 0.0) & (slopes.entropy == 0.0)
    no_slope &= (slopes.lse == 0.0) & (slopes.total == 0.0)
    # The peak of a row that is ignored, or that holds nothing but -inf, is -inf.
    if no_slope | (base == -float("inf")):
        tl.store(destination, tl.zeros((LANES, VEC), dtype), mask=inside)
        return

    target = tl.load(targets + row).to(tl.int32)
    row_t, rate = row_temperature(
        row, True, token_temperature, temperature, acc, PER_TOKEN_TEMPERATURE
    )
    source = row_of(logits, row, inner, stride_outer, stride_inner, stride_vocab)
    x = load_tile(source, columns, inside, 0.0, acc, "")
    row_entropy = base
    if WITH_ENTROPY:
        row_entropy = tl.load(entropy + row)
    stats = Statistics(tl.load(logprob + row), row_entropy, base, tl.load(log_norm + row))
    dx = gradient_tile(
        x, columns, target, stats, slopes, Transform(scale, softcap, row_t, rate, HAS_SOFTCAP),
        WITH_ENTROPY, WITH_LSE, WITH_MEAN,
    )  # fmt: skip
    tl.store(destination, dx.to(dtype), mask=inside)


class RowQuestion(NamedTuple):
    """The question about rows of logits: their targets, the transform, which statistics."""

    targets: torch.Tensor  # (N,) contiguous
    temperature: float | torch.Tensor  # (N,) contiguous, of tokens
    softcap: float | None
    scale: float
    ignore_index: int
    entropy: bool
    with_stats: Sequence[str] = ()
    # (N, K) int32, contiguous: increasing numbers of columns that statistics leave out; V and more
    # are none.
    left_out: torch.Tensor | None = None

    @property
    def asked(self) -> dict[str, bool]:
        return asked_options(self.entropy, self.with_stats)

    @property
    def planes(self) -> int:
        """How many numbers a split of a row has."""
        asked = self.asked
        return 2 + sum(asked.values()) + asked["WITH_TOP1"]

    @property
    def constants(self) -> list[float]:
        """The message about a row (P + 1 numbers) of a rank that has no columns."""
        asked, nothing = self.asked, -float("inf")
        further = [0.0] * asked["WITH_ENTROPY"] + [nothing, nothing] * asked["WITH_TOP1"]
        further += [0.0] * (asked["WITH_MEAN"] + asked["WITH_SQUARES"])
        return [nothing, 0.0, *further, nothing]

    def options(self, placeholder: torch.Tensor) -> dict[str, Any]:
        """Kernel arguments of the transform and of what is asked for."""
        transform = transform_options(self.temperature, self.softcap, self.scale, placeholder)
        return transform | self.asked

    def room(self, like: torch.Tensor, acc: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Make room for the statistics, (N,) each or empty."""
        return statistics_room(self.targets.shape[0], self.asked, like, acc)


@on_their_device
def token_stats_forward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    entropy: bool,
    with_stats: Sequence[str] = (),
) -> tuple[torch.Tensor, ...]:
    """Launch the statistics kernel on logits (outer, inner, V), and combine its splits; targets,
    and a temperature tensor, are contiguous (N,).

    Returns logprob, entropy, lse, peak, log_norm, is_top1, mean_logit and log_sum_sq_probs, each
    (N,); the entropy and the last three are empty unless asked for.
    """
    question = RowQuestion(targets, temperature, softcap, scale, ignore_index, entropy, with_stats)
    partials = _partials(logits, question)
    _, rows, splits = partials.shape
    return _combined(logits, question, partials, (rows * splits, splits, 1), splits)


@on_their_device
def token_stats_message(logits: torch.Tensor, question: RowQuestion) -> torch.Tensor:
    """Launch the statistics kernel on some columns of the vocabulary, logits (outer, inner, V),
    V > 0, and merge the splits of each row: (P + 1, N).

    Targets count from the first of these columns, and may lie before or after them.
    """
    partials = _partials(logits, question)
    planes, rows, splits = partials.shape
    message = partials.new_empty(planes + 1, rows)
    block = _block_options(splits)
    _token_stats_merge_kernel[(triton.cdiv(rows, block["BLOCK"]),)](
        message, logits, question.targets, partials,
        rows, logits.shape[2], splits, logits.shape[1], *strides(logits), question.ignore_index,
        **question.options(logits), **block,
    )  # fmt: skip
    return message


@on_their_device
def token_stats_of_messages(
    messages: torch.Tensor, question: RowQuestion
) -> tuple[torch.Tensor, ...]:
    """Combine messages (W, P + 1, N) of W ranks, in their order: what `token_stats_forward`
    returns, but for the mean logit, which is the sum of the logits.
    """
    ranks, planes, rows = messages.shape
    nowhere = messages.view(1, -1, 1)  # no logits are read
    of_messages = (rows, 1, planes * rows)
    return _combined(nowhere, question, messages, of_messages, ranks, of_ranks=True)


def _partials(logits: torch.Tensor, question: RowQuestion) -> torch.Tensor:
    """Launch the statistics kernel: (P, N, S) numbers of each split."""
    outer, inner, vocab = logits.shape
    rows = outer * inner
    plan = row_plan("token_stats", vocab, logits.dtype)
    width = _TILES_PER_SPLIT * plan.tile
    splits = triton.cdiv(vocab, width)
    acc = torch.promote_types(logits.dtype, torch.float32)
    partials = logits.new_empty((question.planes, rows, splits), dtype=acc)
    left_out = question.left_out
    words = 0 if left_out is None else left_out.shape[1]
    _token_stats_fwd_kernel[(rows * splits,)](
        partials, logits, question.targets, question.targets if left_out is None else left_out,
        rows, vocab, splits, words, inner, *strides(logits), question.ignore_index,
        **question.options(logits),
        WORDS_PADDED=triton.next_power_of_2(words) if words else 0,
        WIDTH=width, **plan.sweep_options(),
    )  # fmt: skip
    return partials


def _block_options(splits: int) -> dict[str, int]:
    """Launch options of a kernel of which one warp has all splits of a block of rows."""
    padded = triton.next_power_of_2(splits)
    return {"SPLITS_PADDED": padded, "BLOCK": max(1, 128 // padded), "num_warps": 1}


def _combined(
    logits: torch.Tensor,
    question: RowQuestion,
    partials: torch.Tensor,
    partial_strides: tuple[int, int, int],  # of a plane, a row, a split
    splits: int,
    *,
    of_ranks: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Launch the second, tiny part of the statistics, on splits of this device or of several
    ranks.
    """
    rows = question.targets.shape[0]
    stats = question.room(logits, partials.dtype)
    block = _block_options(splits)
    _token_stats_combine_kernel[(triton.cdiv(rows, block["BLOCK"]),)](
        *stats, logits, question.targets, partials,
        rows, logits.shape[2], splits, logits.shape[1], *strides(logits), *partial_strides,
        question.ignore_index,
        **question.options(logits), OF_RANKS=of_ranks, **block, **ASSERTING,
    )  # fmt: skip
    return stats


@on_their_device
def token_stats_backward(
    d_logits: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    stats: tuple[torch.Tensor, ...],
    d_logprob: torch.Tensor,
    d_entropy: torch.Tensor | None,
    d_lse: torch.Tensor | None = None,
    d_mean: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor,
    softcap: float | None,
    scale: float,
) -> None:
    """Launch the gradient kernel: write the gradient into d_logits (outer, inner, V), which may be
    the logits themselves.

    `stats` are the logprob, entropy, peak and log_norm that the forward gave; all rows (N,) are
    contiguous.
    """
    outer, inner, vocab = logits.shape
    plan = row_plan("token_stats_backward", vocab, logits.dtype)
    tiles = triton.cdiv(vocab, plan.tile)
    slopes, slopes_asked = slope_options(d_logprob, d_entropy, d_lse, d_mean)
    _token_stats_bwd_kernel[(outer * inner * tiles,)](
        d_logits, logits, targets, *stats, *slopes,
        vocab, tiles, inner, *strides(d_logits), *strides(logits),
        **transform_options(temperature, softcap, scale, logits), **slopes_asked, **plan.options(),
    )  # fmt: skip
