"""Statistics over the ids that each token keeps: their logits, what these say, and gradients.

Tokens keep one id or thousands. Products with rows of the weight are therefore taken id by id,
whatever token an id is of: every program has as many, and nothing is compiled anew for another
number. Statistics take one program a token, which goes over its ids a block at a time. Sums of
rows, which are the gradients of hidden states and of the weight, take one program for some columns
of a row of the result; which rows are added, and in which order, is in an index that was sorted
before. There are no atomics, and a result does not depend on what else is in a batch.

Ids that nobody looks at, and rows whose factor is 0, are not read.

Called by `kept_stats.py`, `kept_logits.py` and `weighted_rows.py` of `fastrlhf/ops`; read `rows.py`
first.

Dims: N tokens, M kept ids of all of them, U hidden states, K their width, V vocabulary, S rows of a
result.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import on_their_device
from .rows import (
    Asked,
    Outputs,
    Statistics,
    add_to_both,
    asked_options,
    gradient_tile,
    load_slopes,
    merged_lanes_of_both,
    no_columns,
    slope_options,
    statistics_room,
    store_statistics,
)
from .tiles import ASSERTING, stored
from .transform import Transform, capped_logits, row_temperature, transform_options

# Ids of a program, and columns of the rows that it reads at once.
_PRODUCTS, _PRODUCT_COLUMNS = 16, 128
_SUMMANDS, _SUM_COLUMNS = 8, 256
_STATISTICS = 32
_GRADIENTS = 256


@triton.jit(do_not_specialize=["pairs"])
def _kept_products_kernel(
    logits,  # (M,), to which the products are added
    hidden,  # (U, K)
    weight,  # (V, K)
    state,  # (M,) rows of hidden
    ids,  # (M,) rows of the weight
    wanted,  # (M,)
    pairs,
    width,
    hidden_stride,
    weight_stride,
    OPERANDS: tl.constexpr,  # the dtype that rows of the weight are rounded to
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    acc: tl.constexpr = logits.dtype.element_ty
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    inside &= tl.load(wanted + pair, mask=inside, other=0) != 0
    ours = hidden + tl.load(state + pair, mask=inside, other=0) * hidden_stride
    theirs = weight + tl.load(ids + pair, mask=inside, other=0) * weight_stride
    total = tl.zeros((BLOCK, COLUMNS), acc)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        there = inside[:, None] & (column < width)[None, :]
        a = tl.load(ours[:, None] + column[None, :], mask=there, other=0.0).to(acc)
        b = tl.load(theirs[:, None] + column[None, :], mask=there, other=0.0)
        total += a * stored(b, OPERANDS).to(acc)
    before = tl.load(logits + pair, mask=inside, other=0.0)
    tl.store(logits + pair, before + tl.sum(total, axis=1), mask=inside)


@triton.jit
def _weighted_sums_kernel(
    out,  # (S, K)
    factors,  # (M,)
    source,  # (., K)
    order,  # (M,) pairs, those of one row of the result together
    bounds,  # (S + 1,) where in the order those of each row begin
    numbers,  # (M,) rows of the source
    width,
    blocks,  # of columns
    out_stride,
    source_stride,
    OPERANDS: tl.constexpr,  # the dtype that rows of the source are rounded to
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    acc: tl.constexpr = factors.dtype.element_ty
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    column = (pid % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < width
    start = tl.load(bounds + row)
    stop = tl.load(bounds + row + 1)
    total = tl.zeros((BLOCK, COLUMNS), acc)
    for first in range(start, stop, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < stop
        pair = tl.load(order + place, mask=inside, other=0)
        factor = tl.load(factors + pair, mask=inside, other=0.0)
        inside &= factor != 0.0
        rows = source + tl.load(numbers + pair, mask=inside, other=0) * source_stride
        there = inside[:, None] & within[None, :]
        x = tl.load(rows[:, None] + column[None, :], mask=there, other=0.0)
        total += stored(x, OPERANDS).to(acc) * factor[:, None]
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + row * out_stride + column, stored(tl.sum(total, axis=0), dtype), mask=within)


@triton.jit
def _kept_stats_fwd_kernel(
    logprob_out,  # (N,) out, as are the next seven
    entropy_out,  # unused unless asked for, as are the last three of them
    lse_out,
    peak_out,
    log_norm_out,
    is_top1_out,
    mean_out,
    log_sum_squares_out,
    logits,  # (M,)
    ids,  # (M,)
    offsets,  # (N + 1,)
    live,  # (N,) whether a token has a target
    targets,  # (N,)
    own,  # (N,) where among the M the target is
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
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = logits.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    if tl.load(live + row) == 0:
        return
    target = tl.load(targets + row)
    row_t, rate = row_temperature(
        row, True, token_temperature, temperature, acc, PER_TOKEN_TEMPERATURE
    )
    tl.device_assert(row_t > 0, "fastrlhf: a temperature is not positive")
    start = tl.load(offsets + row)
    stop = tl.load(offsets + row + 1)
    sums, further = no_columns(BLOCK, acc)
    for first in range(start, stop, BLOCK):
        place = first + tl.arange(0, BLOCK)[:, None]
        inside = place < stop
        columns = tl.load(ids + place, mask=inside, other=-1)
        x = tl.load(logits + place, mask=inside, other=-float("inf"))
        sums, further = add_to_both(
            x, inside, columns, target, sums, further,
            Transform(scale, softcap, row_t, rate, HAS_SOFTCAP),
            Asked(WITH_ENTROPY, WITH_TOP1, WITH_MEAN, WITH_SQUARES),
        )  # fmt: skip
    sums, further = merged_lanes_of_both(
        sums, further, rate, Asked(WITH_ENTROPY, WITH_TOP1, WITH_MEAN, WITH_SQUARES)
    )
    capped, _ = capped_logits(
        tl.load(logits + tl.load(own + row)), Transform(scale, softcap, row_t, rate, HAS_SOFTCAP)
    )
    out = Outputs(
        logprob_out, entropy_out, lse_out, peak_out, log_norm_out, is_top1_out, mean_out,
        log_sum_squares_out,
    )  # fmt: skip
    store_statistics(
        out, row, True, True, sums, further, capped, stop - start,
        Transform(scale, softcap, row_t, rate, HAS_SOFTCAP),
        Asked(WITH_ENTROPY, WITH_TOP1, WITH_MEAN, WITH_SQUARES),
    )  # fmt: skip


@triton.jit(do_not_specialize=["pairs"])
def _kept_stats_bwd_kernel(
    d_logits,  # (M,) out
    logits,  # (M,)
    ids,  # (M,)
    token,  # (M,)
    targets,  # (N,), as are all below
    counts,
    active,
    logprob,
    entropy,  # unused without the gradient of the entropy
    peak,
    log_norm,
    d_logprob,
    d_entropy,  # unused, as are those below, where there is none
    d_lse,
    d_mean,
    pairs,
    token_temperature,  # (N,) or unused
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_LSE: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = logits.dtype.element_ty
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    row = tl.load(token + pair, mask=inside, other=0)
    counting = inside & (tl.load(active + row, mask=inside, other=0) != 0)
    row_t, rate = row_temperature(
        row, counting, token_temperature, temperature, acc, PER_TOKEN_TEMPERATURE
    )
    count = tl.load(counts + row, mask=counting, other=1)
    slopes = load_slopes(
        d_logprob, d_entropy, d_lse, d_mean, row, counting, count,
        WITH_ENTROPY, WITH_LSE, WITH_MEAN,
    )  # fmt: skip
    base = tl.load(peak + row, mask=counting, other=0.0)
    row_entropy = base
    if WITH_ENTROPY:
        row_entropy = tl.load(entropy + row, mask=counting, other=0.0)
    log_norm_of_row = tl.load(log_norm + row, mask=counting, other=0.0)
    logprob_of_row = tl.load(logprob + row, mask=counting, other=0.0)
    dx = gradient_tile(
        tl.load(logits + pair, mask=counting, other=0.0),
        tl.load(ids + pair, mask=counting, other=0),
        tl.load(targets + row, mask=counting, other=0),
        Statistics(logprob_of_row, row_entropy, base, log_norm_of_row),
        slopes, Transform(scale, softcap, row_t, rate, HAS_SOFTCAP),
        WITH_ENTROPY, WITH_LSE, WITH_MEAN,
    )  # fmt: skip
    # Ids of tokens that are not active have slopes 0, and so a gradient of 0.
    tl.store(d_logits + pair, dx, mask=inside)


@on_their_device
def add_kept_products(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor,
    ids: torch.Tensor,
    wanted: torch.Tensor,
    *,
    operands: torch.dtype,
) -> None:
    """Add products of rows of hidden (U, K) and of the weight (V, K), rounded to a dtype, to logits
    (M,), which are fp32 or fp64; which rows is in state and ids (M,). Those that are not wanted are
    not read.
    """
    hidden, weight = _rows(hidden), _rows(weight)
    pairs, width = logits.shape[0], hidden.shape[1]
    _kept_products_kernel[(triton.cdiv(pairs, _PRODUCTS),)](
        logits, hidden, weight, state, ids, wanted,
        pairs, width, hidden.stride(0), weight.stride(0), OPERANDS=_triton_dtype(operands),
        BLOCK=_PRODUCTS, COLUMNS=_PRODUCT_COLUMNS, num_warps=4,
    )  # fmt: skip


@on_their_device
def sum_weighted_rows(
    out: torch.Tensor,
    factors: torch.Tensor,
    source: torch.Tensor,
    order: torch.Tensor,
    bounds: torch.Tensor,
    numbers: torch.Tensor,
    *,
    operands: torch.dtype,
) -> None:
    """Write into out (S, K) the sums of rows of a source (., K), each rounded to a dtype, and times
    a factor (M,) in fp32 or fp64: see the kernel. Numbers of a row of the result are neighbours in
    memory.
    """
    source = _rows(source)
    blocks = triton.cdiv(source.shape[1], _SUM_COLUMNS)
    if out.numel() == 0:
        return
    _weighted_sums_kernel[(out.shape[0] * blocks,)](
        out, factors, source, order, bounds, numbers,
        source.shape[1], blocks, out.stride(0), source.stride(0),
        OPERANDS=_triton_dtype(operands),
        BLOCK=_SUMMANDS, COLUMNS=_SUM_COLUMNS, num_warps=4,
    )  # fmt: skip


def _triton_dtype(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _rows(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


@on_their_device
def kept_stats_forward(
    logits: torch.Tensor,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    live: torch.Tensor,
    targets: torch.Tensor,
    own: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    softcap: float | None,
    scale: float,
    entropy: bool,
    with_stats: Sequence[str],
) -> tuple[torch.Tensor, ...]:
    """Compute what `token_stats_forward` returns, over kept ids (M,) of N tokens, M > 0. All
    statistics of tokens that are not live are 0.
    """
    tokens, asked = targets.shape[0], asked_options(entropy, with_stats)
    stats = tuple(x.zero_() for x in statistics_room(tokens, asked, logits, logits.dtype))
    _kept_stats_fwd_kernel[(tokens,)](
        *stats, logits, ids, offsets, live, targets, own,
        **transform_options(temperature, softcap, scale, logits), **asked,
        BLOCK=_STATISTICS, num_warps=1, **ASSERTING,
    )  # fmt: skip
    return stats


@on_their_device
def kept_stats_backward(
    logits: torch.Tensor,
    ids: torch.Tensor,
    token: torch.Tensor,
    targets: torch.Tensor,
    counts: torch.Tensor,
    active: torch.Tensor,
    stats: tuple[Any, ...],
    slopes: tuple[Any, ...],
    *,
    temperature: float | torch.Tensor,
    softcap: float | None,
    scale: float,
) -> torch.Tensor:
    """Compute the gradient of the logits (M,) of kept ids, M > 0: exactly 0 for tokens that are not
    active.

    `stats` are log-prob, entropy, peak and log_norm (N,), `slopes` the gradients of log-prob,
    entropy, lse and mean logit, but for the first None where there is none.
    """
    logprob, entropy, peak, log_norm = stats
    d_logprob, *others = slopes
    others = [x if x is None else x.contiguous() for x in others]
    given, slopes_asked = slope_options(d_logprob.contiguous(), *others)
    d_logits = torch.empty_like(logits)
    pairs = logits.shape[0]
    _kept_stats_bwd_kernel[(triton.cdiv(pairs, _GRADIENTS),)](
        d_logits, logits, ids, token, targets, counts, active,
        logprob, entropy if slopes_asked["WITH_ENTROPY"] else logprob, peak, log_norm, *given,
        pairs,
        **transform_options(temperature, softcap, scale, logits), **slopes_asked,
        BLOCK=_GRADIENTS, num_warps=4,
    )  # fmt: skip
    return d_logits
