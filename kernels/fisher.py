"""Logits and a tangent → the Fisher matrix of the softmax times the tangent, one launch.

F u = p⊙(u - E_p[u]) / T² and uᵀF u = Var_p(u) / T². The mean needs the whole row, so one program
sweeps a row twice: forward for the normaliser and the mean, backward for the product and, from
squares of differences that cannot cancel, the variance. Masked rows are not read.

Called by `fastrlhf/ops/fisher.py`; read `rows.py` first.

Dims: N rows = outer x inner, V vocabulary.
"""

import torch
import triton
import triton.language as tl

from .launch import on_their_device, row_plan
from .rows import finite_base, load_tile, row_of, strides, tile_columns
from .tiles import stored
from .transform import row_temperature, transform_options


@triton.jit
def _mean_sweep(
    row_x, row_u, within_tile, vocab, rate, acc: tl.constexpr,
    LANES: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The peak of a row, Σ e^(x - peak), and the mean of the tangent."""
    peak = tl.full((LANES,), -float("inf"), acc)
    total = tl.zeros((LANES,), acc)
    moment = tl.zeros((LANES,), acc)
    for start in tl.range(0, vocab, TILE, num_stages=STAGES):
        columns = (start + within_tile).to(tl.int64)
        inside = columns < vocab
        x = load_tile(row_x, columns, inside, -float("inf"), acc, "evict_last")
        u = load_tile(row_u, columns, inside, 0.0, acc, "evict_last")
        new_peak = tl.maximum(peak, tl.max(x, axis=1))
        base = finite_base(new_peak)
        fade = tl.exp2((peak - base) * rate)
        weight = tl.exp2((x - base[:, None]) * rate)
        total = total * fade + tl.sum(weight, axis=1)
        # A word of probability 0 adds 0, whatever its tangent is; a weight of NaN gives NaN.
        moment = moment * fade + tl.sum(tl.where(weight == 0, 0.0, weight * u), axis=1)
        peak = new_peak
    row_peak = tl.max(peak, axis=0)
    fade = tl.exp2((peak - finite_base(row_peak)) * rate)
    row_total = tl.sum(total * fade, axis=0)
    return row_peak, row_total, tl.sum(moment * fade, axis=0) / row_total


@triton.jit(do_not_specialize=["inner", "inner_u"])
def _fisher_kernel(
    product,  # (N, V) contiguous, out
    quadratic,  # (N,) out
    logits,  # (outer, inner, V), any strides
    tangent,  # (outer, inner, V), any strides
    mask,  # (N,)
    vocab,
    inner,
    inner_u,
    stride_outer,
    stride_inner,
    stride_vocab,
    u_stride_outer,
    u_stride_inner,
    u_stride_vocab,
    token_temperature,  # (N,) or unused
    temperature: tl.float64,
    softcap: tl.float64,  # not used here, nor is scale
    scale: tl.float64,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    LANE_STRIDE: tl.constexpr,
    VEC_STRIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    acc: tl.constexpr = quadratic.dtype.element_ty
    dtype: tl.constexpr = product.dtype.element_ty
    TILE: tl.constexpr = LANES * VEC
    row = tl.program_id(0).to(tl.int64)
    destination = product + row * vocab
    within_tile = tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)
    live = tl.load(mask + row) != 0
    row_t, rate = row_temperature(
        row, live, token_temperature, temperature, acc, PER_TOKEN_TEMPERATURE
    )
    row_x = row_of(logits, row, inner, stride_outer, stride_inner, stride_vocab)
    row_u = row_of(tangent, row, inner_u, u_stride_outer, u_stride_inner, u_stride_vocab)
    # No column of a masked row is read.
    peak, total, mean = _mean_sweep(
        row_x, row_u, within_tile, tl.where(live, vocab, 0), rate, acc,
        LANES, TILE, STAGES,
    )  # fmt: skip
    base = finite_base(peak)
    # True for a row that is masked, or that holds nothing but -inf.
    nothing = (peak == -float("inf")) & (total == 0.0)

    squares = tl.zeros((LANES,), acc)
    # One division for the row, instead of one for each column.
    inverse_total = 1.0 / total
    inverse_t2 = 1.0 / (row_t * row_t)
    tiles = tl.cdiv(vocab, TILE)
    read = tl.where(nothing, 0, vocab)
    for done in tl.range(0, tiles, num_stages=STAGES):
        columns = ((tiles - 1 - done) * TILE + within_tile).to(tl.int64)
        inside = columns < read
        x = load_tile(row_x, columns, inside, -float("inf"), acc, "evict_first")
        u = load_tile(row_u, columns, inside, 0.0, acc, "evict_first")
        weight = tl.exp2((x - base) * rate)
        p = weight * inverse_total
        centred = u - mean
        value = tl.where(weight == 0, 0.0, p * centred)
        squares += tl.sum(tl.where(weight == 0, 0.0, value * centred), axis=1)
        value = stored(value * inverse_t2, dtype)
        tl.store(destination + columns, value, mask=columns < vocab, eviction_policy="evict_first")
    variance = tl.where(nothing, 0.0, tl.sum(squares, axis=0) * inverse_t2)
    tl.store(quadratic + row, variance)


@on_their_device
def fisher_product(
    logits: torch.Tensor,
    tangent: torch.Tensor,
    mask: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on logits and tangent (outer, inner, V); the mask, and temperatures of
    tokens, are contiguous (N,).

    Returns the product (N, V) in `dtype` and the quadratic form (N,), fp32 at least.
    """
    rows, vocab = mask.numel(), logits.shape[2]
    acc = torch.promote_types(torch.promote_types(logits.dtype, tangent.dtype), torch.float32)
    product = torch.empty((rows, vocab), dtype=dtype, device=mask.device)
    quadratic = torch.empty(rows, dtype=acc, device=mask.device)
    wider = max(logits.dtype, tangent.dtype, key=lambda dtype: dtype.itemsize)
    _fisher_kernel[(rows,)](
        product, quadratic, logits, tangent, mask, vocab,
        logits.shape[1], tangent.shape[1], *strides(logits), *strides(tangent),
        **transform_options(temperature, None, 1.0, quadratic),
        **row_plan("fisher", vocab, wider).sweep_options(),
    )  # fmt: skip
    return product, quadratic
