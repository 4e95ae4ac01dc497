"""Statistics over the ids that each token keeps: their logits, what these say, and gradients.

Tokens keep one id or thousands. Products with rows of the weight are therefore taken id by id,
whatever token an id is of: every program has as many, and nothing is compiled anew for another
number. Statistics take one program a token, which goes over its ids a block at a time. Sums of
rows, which are the gradients of hidden states and of the weight, take one program for some columns
of a row of the result; which rows are added, and in which order, is in an index that was sorted
before. There are no atomics, and a result does not depend on what else is in a batch.

Ids that nobody looks at, and rows whose factor is 0, are not read.

Dims: N tokens, M kept ids of all of them, U hidden states, K their width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import on_their_device
from .rows import (
    add_further,
    add_tile,
    finite_base,
    gradient_tile,
    log_sum_squares,
    merged_lanes,
    move_squares,
    statistics,
    transform_options,
)
from .tiles import ASSERTING, LOG2E, capped_logits, row_temperature, stored

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
    out_stride,
    source_stride,
    blocks,  # of columns
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
    logits,  # (M,)
    ids,  # (M,)
    offsets,  # (N + 1,)
    live,  # (N,) whether a token has a target
    targets,  # (N,)
    own,  # (N,) where among the M the target is
    token_temperature,  # (N,) or unused
    logprob_out,  # (N,), as are all below; the last three, and the entropy, unused unless asked for
    entropy_out,
    lse_out,
    peak_out,
    log_norm_out,
    is_top1_out,
    mean_out,
    log_sum_squares_out,
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
    row_t = row_temperature(token_temperature, temperature, row, True, acc, PER_TOKEN_TEMPERATURE)
    tl.device_assert(row_t > 0, "fastrlhf: a temperature is not positive")
    rate = LOG2E / row_t
    scale = tl.full((), scale, acc)
    softcap = tl.full((), softcap, acc)
    start = tl.load(offsets + row)
    stop = tl.load(offsets + row + 1)

    peak = tl.full((BLOCK,), -float("inf"), acc)
    rest = tl.zeros((BLOCK,), acc)
    moment = tl.zeros((BLOCK,), acc)
    before, first_own = peak, peak
    total, squares = rest, rest
    for first in range(start, stop, BLOCK):
        place = first + tl.arange(0, BLOCK)[:, None]
        inside = place < stop
        columns = tl.load(ids + place, mask=inside, other=-1)
        x = tl.load(logits + place, mask=inside, other=-float("inf"))
        old_peak = peak
        peak, rest, moment = add_tile(
            x, inside, columns, target, peak, rest, moment, rate, scale, softcap,
            HAS_SOFTCAP, WITH_ENTROPY,
        )  # fmt: skip
        if WITH_TOP1 or WITH_MEAN or WITH_SQUARES:
            before, first_own, total, squares = add_further(
                x, inside, columns, target, old_peak, peak, before, first_own, total, squares,
                rate, scale, softcap, HAS_SOFTCAP, WITH_TOP1, WITH_MEAN, WITH_SQUARES,
            )  # fmt: skip
    row_peak, row_rest, row_moment = merged_lanes(peak, rest, moment, rate, WITH_ENTROPY)
    capped, _ = capped_logits(tl.load(logits + tl.load(own + row)), scale, softcap, HAS_SOFTCAP)
    logprob, entropy, log_norm, empty, base = statistics(
        row_peak, row_rest, row_moment, capped, row_t, WITH_ENTROPY
    )
    tl.store(logprob_out + row, logprob)
    tl.store(lse_out + row, base / row_t + log_norm)
    tl.store(peak_out + row, tl.where(empty, -float("inf"), base))
    tl.store(log_norm_out + row, log_norm)
    if WITH_ENTROPY:
        tl.store(entropy_out + row, entropy)
    if WITH_TOP1:
        top = tl.max(first_own, axis=0)
        is_top1 = (top > tl.max(before, axis=0)) & (top == row_peak) & (log_norm == log_norm)
        tl.store(is_top1_out + row, is_top1)
    if WITH_MEAN:
        tl.store(mean_out + row, tl.sum(total, axis=0) / (stop - start) / row_t)
    if WITH_SQUARES:
        squares = tl.sum(move_squares(peak, squares, finite_base(row_peak), rate), axis=0)
        found = log_sum_squares(squares, capped, base, row_t, logprob, log_norm, empty)
        tl.store(log_sum_squares_out + row, found)


@triton.jit(do_not_specialize=["pairs"])
def _kept_stats_bwd_kernel(
    d_logits,  # (M,)
    logits,  # (M,)
    ids,  # (M,)
    token,  # (M,)
    targets,  # (N,), as are all below
    counts,
    active,
    token_temperature,  # or unused
    logprob,
    entropy,  # unused without the gradient of the entropy
    peak,
    log_norm,
    d_logprob,
    d_entropy,  # unused, as are those below, where there is none
    d_lse,
    d_mean,
    pairs,
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
    row_t = row_temperature(
        token_temperature, temperature, row, counting, acc, PER_TOKEN_TEMPERATURE
    )
    g = tl.load(d_logprob + row, mask=counting, other=0.0)
    h, row_entropy, l, m = g, g, g, g  # unused, each without its statistic
    if WITH_ENTROPY:
        h = tl.load(d_entropy + row, mask=counting, other=0.0)
        row_entropy = tl.load(entropy + row, mask=counting, other=0.0)
    if WITH_LSE:
        l = tl.load(d_lse + row, mask=counting, other=0.0)
    if WITH_MEAN:
        m = tl.load(d_mean + row, mask=counting, other=0.0)
        m /= tl.load(counts + row, mask=counting, other=1)
    dx = gradient_tile(
        tl.load(logits + pair, mask=counting, other=0.0),
        tl.load(ids + pair, mask=counting, other=0),
        tl.load(targets + row, mask=counting, other=0),
        tl.load(peak + row, mask=counting, other=0.0),
        tl.load(log_norm + row, mask=counting, other=0.0),
        tl.load(logprob + row, mask=counting, other=0.0),
        row_entropy, g, h, row_t, tl.full((), scale, acc), tl.full((), softcap, acc), HAS_SOFTCAP,
        WITH_ENTROPY, l, WITH_LSE, m, WITH_MEAN,
    )  # fmt: skip
    # Of what was not loaded, all slopes are 0.
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
        source.shape[1], out.stride(0), source.stride(0), blocks,
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
    """Compute what `token_stats_forward` returns, over kept ids (M,) of N tokens, M > 0; of tokens
    that are not live nothing is written.
    """
    tokens = targets.shape[0]
    top1, mean, squares = (
        name in with_stats for name in ("is_top1", "mean_logit", "log_sum_sq_probs")
    )
    wanted = (True, entropy, True, True, True, top1, mean, squares)
    stats = [
        torch.zeros(tokens if want else 0, dtype=logits.dtype, device=logits.device)
        for want in wanted
    ]
    stats[5] = stats[5].bool()
    transform, token_temperature = transform_options(temperature, softcap, scale, logits)
    _kept_stats_fwd_kernel[(tokens,)](
        logits, ids, offsets, live, targets, own, token_temperature, *stats,
        **transform, WITH_ENTROPY=entropy, WITH_TOP1=top1, WITH_MEAN=mean, WITH_SQUARES=squares,
        BLOCK=_STATISTICS, num_warps=1, **ASSERTING,
    )  # fmt: skip
    return tuple(stats)


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
    d_logprob, d_entropy, d_lse, d_mean = slopes
    logprob, entropy, peak, log_norm = stats
    d_logits = torch.empty_like(logits)
    transform, token_temperature = transform_options(temperature, softcap, scale, logits)
    _kept_stats_bwd_kernel[(triton.cdiv(logits.shape[0], _GRADIENTS),)](
        d_logits, logits, ids, token, targets, counts, active, token_temperature,
        logprob, logprob if d_entropy is None else entropy, peak, log_norm,
        *(logprob if x is None else x.contiguous() for x in (d_logprob, d_entropy, d_lse, d_mean)),
        logits.shape[0],
        **transform, WITH_ENTROPY=d_entropy is not None, WITH_LSE=d_lse is not None,
        WITH_MEAN=d_mean is not None, BLOCK=_GRADIENTS, num_warps=4,
    )  # fmt: skip
    return d_logits
