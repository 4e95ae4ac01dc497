"""Logits → log-prob, entropy and log-sum-exp of each row (K1), and → their gradient (K2).

K1 reads every logit once. A program takes one *split* of one row and runs the online recurrence of
`rows.py` over it; a second, tiny launch combines the splits of a row.

Where ranks share the vocabulary, each has further splits: a launch merges its own into one message
a row, of the same numbers and the target's logit, and the second launch combines those of all.

How a row is cut depends on the vocabulary and the dtype alone, never on the number of rows: few
rows fill the machine, and a row's result has the same bits whatever batch surrounds it. No atomics.

K2 reads a logit and writes its gradient, which may be the same memory. Rows without a gradient are
zeroed unread, whatever they hold.

Further statistics, where asked for, come from the same pass: whether the target is the top token,
the mean of the logits, ln Σ p². And some words of each row can be left out of its statistics.

Dims: N rows = outer x inner, V vocabulary, S splits, P numbers of a split, W ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import on_their_device, row_plan
from .rows import (
    add_further,
    add_tile,
    finite_base,
    gradient_tile,
    left_in,
    log_sum_squares,
    merged_lanes,
    move_base,
    move_squares,
    statistics,
    strides,
    tile_columns,
    transform_options,
)
from .tiles import ASSERTING, LOG2E, capped_logits, row_start, row_temperature

# So many tiles share one final reduction, and a row of 128k still makes 8 programs.
_TILES_PER_SPLIT = 4


# What varies from batch to batch is not specialised, so that no batch compiles a kernel anew.
@triton.jit(do_not_specialize=["rows", "inner", "splits", "ignore_index", "words"])
def _token_stats_fwd_kernel(
    logits,  # (outer, inner, V), any strides
    targets,  # (N,)
    token_temperature,  # (N,) or unused
    left_out,  # (N, words) increasing numbers of columns, V and more where there is none; or unused
    # (P, N, S): peak and rest; and what is asked for of moment, before and own, total, squares.
    partials,
    rows,
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    vocab,
    splits,
    ignore_index,
    words,
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
    program = pid.to(tl.int64)
    row = (pid // splits).to(tl.int64)
    split = pid % splits
    target = tl.load(targets + row)
    if target == ignore_index:
        return
    target = target.to(tl.int32)

    rate = LOG2E / row_temperature(
        token_temperature, temperature, row, True, acc, PER_TOKEN_TEMPERATURE
    )
    scale = tl.full((), scale, acc)
    softcap = tl.full((), softcap, acc)
    source = logits + row_start(row, inner, stride_outer, stride_inner)
    within_tile = tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)

    peak = tl.full((LANES,), -float("inf"), acc)
    rest = tl.zeros((LANES,), acc)
    moment = tl.zeros((LANES,), acc)
    before, own = peak, peak
    total, squares = rest, rest
    first = split * WIDTH
    last = tl.minimum(first + WIDTH, vocab)
    out_of_row = left_out
    numbers = target
    if WORDS_PADDED > 0:
        out_of_row += row * words
        place = tl.arange(0, WORDS_PADDED)
        numbers = tl.load(out_of_row + place, mask=place < words, other=2**31 - 1)
    for start in tl.range(first, last, LANES * VEC, num_stages=STAGES):
        columns = start + within_tile
        inside = columns < vocab
        x = tl.load(
            source + columns.to(tl.int64) * stride_vocab, mask=inside, other=-float("inf")
        ).to(acc)
        if WORDS_PADDED > 0:
            inside = left_in(inside, columns, numbers, out_of_row, start, start + LANES * VEC)
            x = tl.where(inside, x, -float("inf"))
        old_peak = peak
        peak, rest, moment = add_tile(
            x, inside, columns, target, peak, rest, moment, rate, scale, softcap,
            HAS_SOFTCAP, WITH_ENTROPY,
        )  # fmt: skip
        if WITH_TOP1 or WITH_MEAN or WITH_SQUARES:
            before, own, total, squares = add_further(
                x, inside, columns, target, old_peak, peak, before, own, total, squares, rate,
                scale, softcap, HAS_SOFTCAP, WITH_TOP1, WITH_MEAN, WITH_SQUARES,
            )  # fmt: skip

    row_peak, rest, moment = merged_lanes(peak, rest, moment, rate, WITH_ENTROPY)
    plane = rows.to(tl.int64) * splits
    place = partials + program
    tl.store(place, row_peak)
    tl.store(place + plane, rest)
    place += 2 * plane
    if WITH_ENTROPY:
        tl.store(place, moment)
        place += plane
    if WITH_TOP1:
        tl.store(place, tl.max(before, axis=0))
        tl.store(place + plane, tl.max(own, axis=0))
        place += 2 * plane
    if WITH_MEAN:
        tl.store(place, tl.sum(total, axis=0))
        place += plane
    if WITH_SQUARES:
        squares = move_squares(peak, squares, finite_base(row_peak), rate)
        tl.store(place, tl.sum(squares, axis=0))


@triton.jit
def _merged_splits(
    place,  # of the first number of each split (BLOCK, splits), the next ones a plane further
    plane,
    present,
    rate,
    WITH_ENTROPY: tl.constexpr,
):
    """Merge the splits of rows: peak of each split and of the row, rest and moment relative to its
    finite base, and where the further numbers stand.
    """
    peak = tl.load(place, mask=present, other=-float("inf"))
    rest = tl.load(place + plane, mask=present, other=0.0)
    place += 2 * plane
    if WITH_ENTROPY:
        moment = tl.load(place, mask=present, other=0.0)
        place += plane
    else:
        moment = rest
    row_peak = tl.max(peak, axis=1)
    base = finite_base(row_peak)
    rest, moment = move_base(peak, rest, moment, base[:, None], rate, WITH_ENTROPY)
    return peak, row_peak, tl.sum(rest, axis=1), tl.sum(moment, axis=1), place


@triton.jit
def _split_rate(rate, PER_TOKEN_TEMPERATURE: tl.constexpr):
    """The rate of rows, for all splits of each."""
    if PER_TOKEN_TEMPERATURE:
        return rate[:, None]
    else:
        return rate


@triton.jit
def _own_target(
    logits, row, target, here, inner, stride_outer, stride_inner, stride_vocab, scale, softcap,
    other, acc: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The logits of the targets, transformed but for the temperature; another number where a target
    is not here.
    """
    x = tl.load(
        logits + row_start(row, inner, stride_outer, stride_inner) + target * stride_vocab,
        mask=here,
        other=other,
    ).to(acc)
    capped, _ = capped_logits(x, tl.full((), scale, acc), tl.full((), softcap, acc), HAS_SOFTCAP)
    return capped


@triton.jit(do_not_specialize=["rows", "inner", "splits", "ignore_index"])
def _token_stats_merge_kernel(
    logits,
    targets,  # (N,), of which some may be in columns that others have
    token_temperature,
    partials,
    message,  # (P + 1, N): as the partials of a split, then the target's logit or -inf
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
    WITH_TOP1: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = partials.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=ignore_index).to(tl.int64)
    live = inside & (target != ignore_index)
    row_t = row_temperature(token_temperature, temperature, row, live, acc, PER_TOKEN_TEMPERATURE)
    split = tl.arange(0, SPLITS_PADDED)[None, :]
    present = live[:, None] & (split < splits)
    plane = rows.to(tl.int64) * splits
    rate = LOG2E / row_t  # by itself: an assignment makes a tensor of it under the interpreter
    rate = _split_rate(rate, PER_TOKEN_TEMPERATURE)
    peak, row_peak, rest, moment, place = _merged_splits(
        partials + row[:, None] * splits + split, plane, present, rate, WITH_ENTROPY
    )
    out, out_plane = message + row, rows.to(tl.int64)
    tl.store(out, row_peak, mask=inside)
    tl.store(out + out_plane, rest, mask=inside)
    out += 2 * out_plane
    if WITH_ENTROPY:
        tl.store(out, moment, mask=inside)
        out += out_plane
    if WITH_TOP1:
        for _ in tl.static_range(2):
            largest = tl.max(tl.load(place, mask=present, other=-float("inf")), axis=1)
            tl.store(out, largest, mask=inside)
            place += plane
            out += out_plane
    if WITH_MEAN:
        total = tl.sum(tl.load(place, mask=present, other=0.0), axis=1)
        tl.store(out, total, mask=inside)
        place += plane
        out += out_plane
    if WITH_SQUARES:
        squares = tl.load(place, mask=present, other=0.0)
        squares = move_squares(peak, squares, finite_base(row_peak)[:, None], rate)
        tl.store(out, tl.sum(squares, axis=1), mask=inside)
        out += out_plane
    here = live & (target >= 0) & (target < vocab)
    capped = _own_target(
        logits, row, target, here, inner, stride_outer, stride_inner, stride_vocab, scale, softcap,
        0.0, acc, HAS_SOFTCAP,
    )  # fmt: skip
    tl.store(out, tl.where(here, capped, -float("inf")), mask=inside)


@triton.jit(
    do_not_specialize=["rows", "inner", "stride_plane", "stride_row", "stride_split", "splits",
                       "ignore_index"]
)  # fmt: skip
def _token_stats_combine_kernel(
    logits,
    targets,
    token_temperature,
    partials,  # of splits, or messages of ranks
    logprob_out,
    entropy_out,
    lse_out,
    peak_out,
    log_norm_out,
    is_top1_out,  # unused, as are those below, unless asked for
    mean_out,
    log_sum_squares_out,
    rows,
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    vocab,
    stride_plane,  # of the partials
    stride_row,
    stride_split,
    splits,
    ignore_index,
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
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=ignore_index).to(tl.int64)
    live = inside & (target != ignore_index)
    row_t = row_temperature(token_temperature, temperature, row, live, acc, PER_TOKEN_TEMPERATURE)
    tl.device_assert(row_t > 0, "fastrlhf: a temperature is not positive")

    split = tl.arange(0, SPLITS_PADDED)[None, :]
    present = live[:, None] & (split < splits)
    plane = stride_plane.to(tl.int64)
    rate = LOG2E / row_t
    split_rate = _split_rate(rate, PER_TOKEN_TEMPERATURE)
    place = partials + row[:, None] * stride_row + split.to(tl.int64) * stride_split
    peak, row_peak, rest, moment, place = _merged_splits(
        place, plane, present, split_rate, WITH_ENTROPY
    )
    if OF_RANKS:
        further: tl.constexpr = 2 * WITH_TOP1 + WITH_MEAN + WITH_SQUARES
        of_ranks = tl.load(place + further * plane, mask=present, other=-float("inf"))
        held = of_ranks != -float("inf")  # by one rank; NaN included
        capped = tl.sum(tl.where(held, of_ranks, 0.0), axis=1)
        capped = tl.where(tl.max(held.to(tl.int32), axis=1) > 0, capped, -float("inf"))
    else:
        in_vocab = (target >= 0) & (target < vocab)
        tl.device_assert(in_vocab | (live == 0), "fastrlhf: a target is outside [0, vocabulary)")
        capped = _own_target(
            logits, row, target, live & in_vocab, inner, stride_outer, stride_inner, stride_vocab,
            scale, softcap, float("nan"), acc, HAS_SOFTCAP,
        )  # fmt: skip
    logprob, entropy, log_norm, empty, base = statistics(
        row_peak, rest, moment, capped, row_t, WITH_ENTROPY
    )

    tl.store(logprob_out + row, tl.where(live, logprob, 0.0), mask=inside)
    tl.store(lse_out + row, tl.where(live, base / row_t + log_norm, 0.0), mask=inside)
    tl.store(peak_out + row, tl.where(live & (empty == 0), base, -float("inf")), mask=inside)
    tl.store(log_norm_out + row, tl.where(live, log_norm, 0.0), mask=inside)
    if WITH_ENTROPY:
        tl.store(entropy_out + row, tl.where(live, entropy, 0.0), mask=inside)
    if WITH_TOP1:
        before = tl.max(tl.load(place, mask=present, other=-float("inf")), axis=1)
        own = tl.max(tl.load(place + plane, mask=present, other=-float("inf")), axis=1)
        # Of an ignored row both are -inf. The maxima pass over NaN, which the norm shows.
        is_top1 = (own > before) & (own == row_peak) & (log_norm == log_norm)
        tl.store(is_top1_out + row, is_top1, mask=inside)
        place += 2 * plane
    if WITH_MEAN:
        total = tl.sum(tl.load(place, mask=present, other=0.0), axis=1)
        tl.store(mean_out + row, tl.where(live, total / vocab / row_t, 0.0), mask=inside)
        place += plane
    if WITH_SQUARES:
        squares = tl.load(place, mask=present, other=0.0)
        squares = tl.sum(move_squares(peak, squares, base[:, None], split_rate), axis=1)
        found = log_sum_squares(squares, capped, base, row_t, logprob, log_norm, empty)
        tl.store(log_sum_squares_out + row, tl.where(live, found, 0.0), mask=inside)


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
    d_lse,  # unused without the lse
    d_mean,  # unused without the mean of the logits
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
    WITH_LSE: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    LANE_STRIDE: tl.constexpr,
    VEC_STRIDE: tl.constexpr,
):
    acc: tl.constexpr = peak.dtype.element_ty
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    start = (pid % tiles) * (LANES * VEC)
    columns = start + tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)
    inside = columns < vocab
    destination = d_logits + row_start(row, inner, d_stride_outer, d_stride_inner)
    destination += columns.to(tl.int64) * d_stride_vocab

    base = tl.load(peak + row)
    g = tl.load(d_logprob + row)
    h = g  # unused without the entropy, as is row_entropy below
    without_gradient = g == 0.0
    if WITH_ENTROPY:
        h = tl.load(d_entropy + row)
        without_gradient &= h == 0.0
    l = g  # unused without the lse
    if WITH_LSE:
        l = tl.load(d_lse + row)
        without_gradient &= l == 0.0
    m = g  # unused without the mean
    if WITH_MEAN:
        m = tl.load(d_mean + row) / vocab
        without_gradient &= m == 0.0
    # The peak of a row that is ignored, or that holds nothing but -inf, is -inf.
    if without_gradient | (base == -float("inf")):
        tl.store(destination, tl.zeros((LANES, VEC), d_logits.dtype.element_ty), mask=inside)
        return

    target = tl.load(targets + row).to(tl.int32)
    row_t = row_temperature(token_temperature, temperature, row, True, acc, PER_TOKEN_TEMPERATURE)
    scale = tl.full((), scale, acc)
    softcap = tl.full((), softcap, acc)
    source = logits + row_start(row, inner, stride_outer, stride_inner)
    x = tl.load(source + columns.to(tl.int64) * stride_vocab, mask=inside, other=0.0).to(acc)
    row_entropy = g
    if WITH_ENTROPY:
        row_entropy = tl.load(entropy + row)
    dx = gradient_tile(
        x, columns, target, base, tl.load(log_norm + row), tl.load(logprob + row), row_entropy,
        g, h, row_t, scale, softcap, HAS_SOFTCAP, WITH_ENTROPY, l, WITH_LSE, m, WITH_MEAN,
    )  # fmt: skip
    tl.store(destination, dx.to(d_logits.dtype.element_ty), mask=inside)


class RowQuestion(NamedTuple):
    """What is asked of rows of logits: their targets, the transform, which statistics."""

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
        names = ("is_top1", "mean_logit", "log_sum_sq_probs")
        top1, mean, squares = (name in self.with_stats for name in names)
        return {
            "WITH_ENTROPY": self.entropy,
            "WITH_TOP1": top1,
            "WITH_MEAN": mean,
            "WITH_SQUARES": squares,
        }

    @property
    def planes(self) -> int:
        """How many numbers a split of a row has."""
        asked = self.asked
        return 2 + sum(asked.values()) + asked["WITH_TOP1"]

    @property
    def constants(self) -> list[float]:
        """What no columns at all say of a row: the numbers of its message."""
        asked, nothing = self.asked, -float("inf")
        further = [0.0] * asked["WITH_ENTROPY"] + [nothing, nothing] * asked["WITH_TOP1"]
        further += [0.0] * (asked["WITH_MEAN"] + asked["WITH_SQUARES"])
        return [nothing, 0.0, *further, nothing]

    def room(self, like: torch.Tensor, acc: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Make room for the statistics, (N,) each or empty."""
        asked = tuple(self.asked.values())
        wanted = (True, asked[0], True, True, True, *asked[1:])
        dtypes = (acc, acc, acc, acc, acc, torch.bool, acc, acc)
        rows = self.targets.shape[0]
        return tuple(
            like.new_empty(rows if want else 0, dtype=dtype)
            for want, dtype in zip(wanted, dtypes, strict=True)
        )


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
    """Launch K1 on logits (outer, inner, V); targets, and a temperature tensor, are contiguous
    (N,).

    Returns logprob, entropy, lse, peak, log_norm, is_top1, mean_logit and log_sum_sq_probs, each
    (N,); the entropy and the last three are empty unless asked for.
    """
    question = RowQuestion(targets, temperature, softcap, scale, ignore_index, entropy, with_stats)
    partials = _partials(logits, question)
    _, rows, splits = partials.shape
    return _combined(logits, question, partials, (rows * splits, splits, 1), splits)


@on_their_device
def token_stats_message(logits: torch.Tensor, question: RowQuestion) -> torch.Tensor:
    """Launch K1 on some columns of the vocabulary, logits (outer, inner, V), V > 0, and merge the
    splits of each row: (P + 1, N).

    Targets count from the first of these columns, and may lie before or after them.
    """
    partials = _partials(logits, question)
    planes, rows, splits = partials.shape
    message = partials.new_empty(planes + 1, rows)
    transform, token_temperature = transform_options(
        question.temperature, question.softcap, question.scale, logits
    )
    padded = triton.next_power_of_2(splits)
    block = max(1, 128 // padded)
    _token_stats_merge_kernel[(triton.cdiv(rows, block),)](
        logits, question.targets, token_temperature, partials, message,
        rows, logits.shape[1], *strides(logits), logits.shape[2], splits, question.ignore_index,
        **transform, **question.asked,
        SPLITS_PADDED=padded, BLOCK=block, num_warps=1,
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
    return _combined(
        nowhere, question, messages, (rows, 1, planes * rows), ranks, of_ranks=True
    )  # fmt: skip


def _partials(logits: torch.Tensor, question: RowQuestion) -> torch.Tensor:
    """Launch K1: (P, N, S) numbers of each split."""
    outer, inner, vocab = logits.shape
    rows = outer * inner
    plan = row_plan("token_stats", vocab, logits.dtype)
    width = _TILES_PER_SPLIT * plan.tile
    splits = triton.cdiv(vocab, width)
    acc = torch.promote_types(logits.dtype, torch.float32)
    partials = logits.new_empty((question.planes, rows, splits), dtype=acc)
    transform, token_temperature = transform_options(
        question.temperature, question.softcap, question.scale, logits
    )
    left_out = question.left_out
    words = 0 if left_out is None else left_out.shape[1]
    _token_stats_fwd_kernel[(rows * splits,)](
        logits, question.targets, token_temperature,
        question.targets if left_out is None else left_out, partials,
        rows, inner, *strides(logits), vocab, splits, question.ignore_index, words,
        **transform, **question.asked,
        WORDS_PADDED=triton.next_power_of_2(words) if words else 0,
        WIDTH=width, **plan.sweep_options(),
    )  # fmt: skip
    return partials


def _combined(
    logits: torch.Tensor,
    question: RowQuestion,
    partials: torch.Tensor,
    partial_strides: tuple[int, int, int],  # of a plane, a row, a split
    splits: int,
    *,
    of_ranks: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Launch the second, tiny part of K1, on splits of this device or of several ranks."""
    rows = question.targets.shape[0]
    stats = question.room(logits, partials.dtype)
    transform, token_temperature = transform_options(
        question.temperature, question.softcap, question.scale, logits
    )
    padded = triton.next_power_of_2(splits)
    block = max(1, 128 // padded)
    _token_stats_combine_kernel[(triton.cdiv(rows, block),)](
        logits, question.targets, token_temperature, partials, *stats,
        rows, logits.shape[1], *strides(logits), logits.shape[2], *partial_strides, splits,
        question.ignore_index,
        **transform, **question.asked, OF_RANKS=of_ranks,
        SPLITS_PADDED=padded, BLOCK=block, num_warps=1, **ASSERTING,
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
    """Launch K2: write the gradient into d_logits (outer, inner, V), which may be the logits
    themselves.

    `stats` are the logprob, entropy, peak and log_norm that K1 gave; all rows (N,) are contiguous.
    """
    outer, inner, vocab = logits.shape
    plan = row_plan("token_stats_backward", vocab, logits.dtype)
    tiles = triton.cdiv(vocab, plan.tile)
    transform, token_temperature = transform_options(temperature, softcap, scale, logits)
    _token_stats_bwd_kernel[(outer * inner * tiles,)](
        d_logits,
        logits,
        targets,
        token_temperature,
        *stats,
        d_logprob,
        d_logprob if d_entropy is None else d_entropy,
        d_logprob if d_lse is None else d_lse,
        d_logprob if d_mean is None else d_mean,
        inner,
        *strides(d_logits),
        *strides(logits),
        vocab,
        tiles,
        **transform,
        WITH_ENTROPY=d_entropy is not None,
        WITH_LSE=d_lse is not None,
        WITH_MEAN=d_mean is not None,
        **plan.options(),
    )
