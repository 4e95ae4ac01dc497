"""Logits and a tangent → the Fisher matrix of the softmax times the tangent, one launch.

F u = p⊙(u - E_p[u]) / T² and uᵀF u = Var_p(u) / T². The mean needs the whole row, so one program
sweeps a row twice: forward for the normaliser and the mean, backward for the product and, from
squares of differences that cannot cancel, the variance. Masked rows are not read.

Dims: N rows = outer x inner, V vocabulary.
"""

import torch
import triton
import triton.language as tl

from .launch import on_their_device, row_plan
from .rows import finite_base, strides, tile_columns, transform_options
from .tiles import LOG2E, row_start, row_temperature, stored


@triton.jit(do_not_specialize=["inner", "inner_u"])
def _fisher_kernel(
    product,  # (N, V) contiguous, out
    quadratic,  # (N,) out
    logits,  # (outer, inner, V), any strides
    tangent,  # (outer, inner, V), any strides
    mask,  # (N,)
    token_temperature,  # (N,) or unused
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    inner_u,
    u_stride_outer,
    u_stride_inner,
    u_stride_vocab,
    vocab,
    temperature: tl.float64,
    softcap: tl.float64,  # of no effect, as the next
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
    TILE: tl.constexpr = LANES * VEC
    row = tl.program_id(0).to(tl.int64)
    destination = product + row * vocab
    within_tile = tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)
    live = tl.load(mask + row) != 0
    row_t = row_temperature(token_temperature, temperature, row, live, acc, PER_TOKEN_TEMPERATURE)
    rate = LOG2E / row_t
    source = logits + row_start(row, inner, stride_outer, stride_inner)
    source_u = tangent + row_start(row, inner_u, u_stride_outer, u_stride_inner)

    peak = tl.full((LANES,), -float("inf"), acc)
    total = tl.zeros((LANES,), acc)
    moment = tl.zeros((LANES,), acc)
    # Of a row that is masked, no column is read.
    for start in tl.range(0, tl.where(live, vocab, 0), TILE, num_stages=STAGES):
        columns = (start + within_tile).to(tl.int64)
        inside = columns < vocab
        x = tl.load(
            source + columns * stride_vocab, mask=inside, other=-float("inf"),
            eviction_policy="evict_last",
        ).to(acc)  # fmt: skip
        u = tl.load(
            source_u + columns * u_stride_vocab, mask=inside, other=0.0,
            eviction_policy="evict_last",
        ).to(acc)  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(x, axis=1))
        base = finite_base(new_peak)
        fade = tl.exp2((peak - base) * rate)
        weight = tl.exp2((x - base[:, None]) * rate)
        total = total * fade + tl.sum(weight, axis=1)
        # What has no probability takes no part, whatever its tangent is; NaN does.
        moment = moment * fade + tl.sum(tl.where(weight == 0, 0.0, weight * u), axis=1)
        peak = new_peak
    row_peak = tl.max(peak, axis=0)
    base = finite_base(row_peak)
    fade = tl.exp2((peak - base) * rate)
    row_total = tl.sum(total * fade, axis=0)
    mean = tl.sum(moment * fade, axis=0) / row_total
    # A row that is masked, or has nothing but -inf.
    nothing = (row_peak == -float("inf")) & (row_total == 0.0)

    squares = tl.zeros((LANES,), acc)
    # Divided once, not at every token.
    inverse_total = 1.0 / row_total
    inverse_t2 = 1.0 / (row_t * row_t)
    tiles = tl.cdiv(vocab, TILE)
    read = tl.where(nothing, 0, vocab)
    for done in tl.range(0, tiles, num_stages=STAGES):
        columns = ((tiles - 1 - done) * TILE + within_tile).to(tl.int64)
        inside = columns < read
        x = tl.load(
            source + columns * stride_vocab, mask=inside, other=-float("inf"),
            eviction_policy="evict_first",
        ).to(acc)  # fmt: skip
        u = tl.load(
            source_u + columns * u_stride_vocab, mask=inside, other=0.0,
            eviction_policy="evict_first",
        ).to(acc)  # fmt: skip
        weight = tl.exp2((x - base) * rate)
        p = weight * inverse_total
        centred = u - mean
        value = tl.where(weight == 0, 0.0, p * centred)
        squares += tl.sum(tl.where(weight == 0, 0.0, value * centred), axis=1)
        value = value * inverse_t2
        tl.store(
            destination + columns, stored(value, product.dtype.element_ty), mask=columns < vocab,
            eviction_policy="evict_first",
        )  # fmt: skip
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
    """Launch it on logits and tangent (outer, inner, V); the mask, and temperatures of tokens, are
    contiguous (N,).

    Returns the product (N, V) in `dtype` and the quadratic form (N,), fp32 at least.
    """
    rows, vocab = mask.numel(), logits.shape[2]
    acc = torch.promote_types(torch.promote_types(logits.dtype, tangent.dtype), torch.float32)
    product = torch.empty((rows, vocab), dtype=dtype, device=mask.device)
    quadratic = torch.empty(rows, dtype=acc, device=mask.device)
    transform, token_temperature = transform_options(temperature, None, 1.0, quadratic)
    wider = max(logits.dtype, tangent.dtype, key=lambda dtype: dtype.itemsize)
    _fisher_kernel[(rows,)](
        product, quadratic, logits, tangent, mask, token_temperature,
        logits.shape[1], *strides(logits), tangent.shape[1], *strides(tangent), vocab,
        **transform, **row_plan("fisher", vocab, wider).sweep_options(),
    )  # fmt: skip
    return product, quadratic
