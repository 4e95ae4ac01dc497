"""Logits → policy loss of each token and its gradient with respect to the logits, one launch (K3).

The gradient of a token's loss needs the token's log-prob, which needs the whole row, so a row is
swept twice by one program: forward for the statistics, from which follow the loss and its slopes,
and then backward for the gradient. Going back, the sweep meets first what was read last, which is
in the cache as far as all rows that are swept at once fit there. At a vocabulary of 32k they do. At
128k they do not: 396 rows, three programs on each multiprocessor of an H100, are 101 MB, and its
cache has 50. The gradient may be written over the logits. Rows that are ignored are written as
zeros, unread; so are rows whose slopes turn out to be 0 (a clipped ratio), without being read a
second time.

The formula of a surrogate, and that of a KL penalty, is a device function that the launcher hands
to the kernel. From what is known of one token it gives the value and its derivative with respect to
the token's log-prob. Everything else that varies (bounds, coefficients, temperature, lengths) is an
ordinary argument: one compiled kernel serves every batch.

Dims: N rows = outer x inner, V vocabulary.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import on_their_device, row_plan
from .rows import (
    add_tile,
    gradient_tile,
    merged_lanes,
    statistics,
    strides,
    tile_columns,
    transform_options,
)
from .tiles import (
    ASSERTING,
    LOG2E,
    capped_logits,
    exp,
    expm1,
    expm1_minus,
    row_start,
    row_temperature,
    sigmoid,
)


class PolicySettings(NamedTuple):
    """The numbers of a policy loss, as the kernel's arguments of the same names."""

    ratio_low: float  # 1 - clip_low, or what the surrogate bounds for a ratio
    ratio_high: float
    dual_clip: float  # inf for none
    tau_positive: float
    tau_negative: float
    kl_coef: float
    entropy_coef: float


@triton.jit
def _saturated(log_ratio):
    """The log of a ratio, which ends at 80, in fp64 at 700, and whether it has, when its derivative
    is 0. Beyond lies inf, which makes NaN of every product with 0.
    """
    ceiling: tl.constexpr = 700.0 if log_ratio.dtype == tl.float64 else 80.0
    # Written so that NaN stays one.
    beyond = log_ratio > ceiling
    return tl.where(beyond, ceiling, log_ratio), beyond


@triton.jit
def _clip(log_ratio, logprob, advantage, low, high, dual, tau_positive, tau_negative):
    log_ratio, ended = _saturated(log_ratio)
    ratio = exp(log_ratio)
    bad = advantage < 0
    too_low = bad & (ratio < low)
    too_high = tl.where(bad, ratio > dual, ratio > high)
    bounded = tl.where(too_low, low, tl.where(too_high, tl.where(bad, dual, high), ratio))
    slope = tl.where(too_low | too_high | ended, 0.0, -ratio * advantage)
    return -bounded * advantage, slope


@triton.jit
def _likelihood(weight, logprob):
    """-weight·ln p and its derivative; 0 for weight 0 even where ln p is -inf."""
    return tl.where(weight == 0, 0.0, -weight * logprob), -weight


@triton.jit
def _cispo(log_ratio, logprob, advantage, low, high, dual, tau_positive, tau_negative):
    ratio = exp(_saturated(log_ratio)[0])
    bounded = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
    return _likelihood(bounded * advantage, logprob)


@triton.jit
def _sapo(log_ratio, logprob, advantage, low, high, dual, tau_positive, tau_negative):
    log_ratio, ended = _saturated(log_ratio)
    tau = tl.where(advantage > 0, tau_positive, tau_negative)
    gate = tau * expm1(log_ratio)
    slope = -4.0 * sigmoid(gate) * sigmoid(-gate) * exp(log_ratio) * advantage
    return -(4.0 / tau) * sigmoid(gate) * advantage, tl.where(ended, 0.0, slope)


@triton.jit
def _plain(log_ratio, logprob, advantage, low, high, dual, tau_positive, tau_negative):
    return _likelihood(advantage, logprob)


@triton.jit
def _unless_too_far(log_ratio, advantage, dual, too_low, too_high):
    """-r·A where the advantage does not lead further away; beyond `dual`, r stays what it is there,
    in the derivative too.
    """
    log_ratio, ended = _saturated(log_ratio)
    ratio = exp(log_ratio)
    ended = ended & (dual == float("inf"))
    loss = -tl.where(ratio > dual, dual, ratio) * advantage
    gone = tl.where(advantage > 0, too_high, too_low)
    return tl.where(gone, 0.0, loss), tl.where(gone | ended, 0.0, loss)


@triton.jit
def _dppo_tv(log_ratio, logprob, advantage, low, high, dual, tau_positive, tau_negative):
    # Of the larger probability, a share that needs no difference of nearly equal numbers.
    grown = log_ratio > 0
    larger = exp(tl.where(grown, logprob, logprob - log_ratio))
    moved = larger * tl.where(grown, -expm1(-log_ratio), expm1(log_ratio))
    return _unless_too_far(log_ratio, advantage, dual, moved < low, moved > high)


@triton.jit
def _log_of_others(logprob):
    """ln(1 - p), of a probability below 1 by the least that there is."""
    tiny: tl.constexpr = 2.2250738585072014e-308 if logprob.dtype == tl.float64 else 1.1754944e-38
    return tl.log(-expm1(tl.where(logprob > -tiny, -tiny, logprob)))


@triton.jit
def _dppo_kl(log_ratio, logprob, advantage, low, high, dual, tau_positive, tau_negative):
    old = logprob - log_ratio
    of_token = tl.where(old == -float("inf"), 0.0, -exp(old) * log_ratio)
    divergence = of_token - expm1(old) * (_log_of_others(old) - _log_of_others(logprob))
    too_low = (divergence > -low) & (log_ratio < 0)
    too_high = (divergence > high) & (log_ratio > 0)
    return _unless_too_far(log_ratio, advantage, dual, too_low, too_high)


SURROGATES = {"clip": _clip, "cispo": _cispo, "sapo": _sapo, "plain": _plain}
SURROGATES |= {"dppo_tv": _dppo_tv, "dppo_kl": _dppo_kl}


# Of x = ln ref - ln p; the derivative is with respect to ln p.
@triton.jit
def _k1(x):
    return -x, tl.where(x == x, 1.0, x)


@triton.jit
def _k2(x):
    return 0.5 * x * x, -x


@triton.jit
def _k3(x):
    x, ended = _saturated(x)
    return expm1_minus(x), tl.where(ended, 0.0, -expm1(x))


@triton.jit
def _abs(x):
    return tl.abs(x), tl.where(x > 0, -1.0, tl.where(x < 0, 1.0, x * 0.0))


@triton.jit
def _k1_plus(x):
    # Where k2 is infinite, there is no number that has its derivative.
    return -x + (x - x), -x


@triton.jit
def _k3_plus(x):
    return expm1_minus(_saturated(x)[0]) + (x - x), -x


KL_ESTIMATORS = {"k1": _k1, "k2": _k2, "k3": _k3, "abs": _abs, "k1+": _k1_plus, "k3+": _k3_plus}


@triton.jit
def _as_it_is(KL: tl.constexpr, x, log_ratio):
    return KL(x)


@triton.jit
def _corrected(KL: tl.constexpr, x, log_ratio):
    """The ratio times an estimate."""
    # Of a token that the policy forbids, and of its gradient, the ratio leaves nothing.
    kl, slope = KL(tl.where(x == float("inf"), 0.0, x))
    log_ratio, ended = _saturated(log_ratio)
    ratio = exp(log_ratio)
    return ratio * kl, ratio * tl.where(ended, slope, kl + slope)


@triton.jit
def _corrected_k3(KL: tl.constexpr, x, log_ratio):
    """r·k3 = e^(x + ln r) - r·(1 + x), whose first term, ref/p_old, is a constant."""
    constant = exp(_saturated(x + log_ratio)[0])
    log_ratio, ended = _saturated(log_ratio)
    ratio = exp(log_ratio)
    x = tl.where(x == float("inf"), 0.0, x)  # as above
    near = tl.abs(x) < 1
    kl = tl.where(near, ratio * expm1_minus(x), constant - ratio * (1 + x))
    return kl, ratio * tl.where(ended, tl.where(near, -expm1(x), 1.0), -x)


def _penalty(kl_estimator: str, bias_correction: bool):
    """What makes a penalty of an estimator and the ratio."""
    if not bias_correction:
        return _as_it_is
    return _corrected_k3 if kl_estimator == "k3" else _corrected


_VECTORS = ["targets", "old_logprobs", "ref_logprobs", "advantages", "weights", "kl_weights"]
_VECTORS += ["token_temperature", "losses", "logprobs", "entropies"]


@triton.jit
def _zero_row(destination, within_tile, d_stride_vocab, vocab, TILE: tl.constexpr):
    for start in range(0, vocab, TILE):
        columns = start + within_tile
        zeros = tl.zeros(columns.shape, destination.dtype.element_ty)
        tl.store(destination + columns.to(tl.int64) * d_stride_vocab, zeros, mask=columns < vocab)


@triton.jit(
    do_not_specialize=["inner", "ignore_index", "on_policy", "weighs_kl", "with_entropy"],
    do_not_specialize_on_alignment=_VECTORS,
)
def _policy_loss_kernel(
    d_logits,  # (outer, inner, V): gradient out; may be the memory of the logits
    logits,  # (outer, inner, V), any strides
    targets,  # (N,)
    token_temperature,  # (N,) or unused
    old_logprobs,  # (N,), of no effect where on_policy is 1
    ref_logprobs,  # (N,), of no effect where kl_coef is 0
    advantages,  # (N,)
    weights,  # (N,) of each token's loss in the loss that the gradient is of
    kl_weights,  # (N,) of each token's penalty, of no effect unless weighs_kl is 1
    losses,  # (N,) out, as are all below
    logprobs,
    entropies,
    inner,
    d_stride_outer,
    d_stride_inner,
    d_stride_vocab,
    stride_outer,
    stride_inner,
    stride_vocab,
    vocab,
    ignore_index,
    on_policy,  # 0 or 1, as are the next two
    weighs_kl,
    with_entropy,
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    ratio_low: tl.float64,
    ratio_high: tl.float64,
    dual_clip: tl.float64,
    tau_positive: tl.float64,
    tau_negative: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    PENALTY: tl.constexpr,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    LANE_STRIDE: tl.constexpr,
    VEC_STRIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    acc: tl.constexpr = losses.dtype.element_ty
    TILE: tl.constexpr = LANES * VEC
    row = tl.program_id(0).to(tl.int64)
    destination = d_logits + row_start(row, inner, d_stride_outer, d_stride_inner)
    within_tile = tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)
    wide = tl.load(targets + row)
    live = wide != ignore_index
    target = wide.to(tl.int32)

    row_t = row_temperature(token_temperature, temperature, row, live, acc, PER_TOKEN_TEMPERATURE)
    in_vocab = (wide >= 0) & (wide < vocab)
    tl.device_assert(in_vocab | (live == 0), "fastrlhf: a target is outside [0, vocabulary)")
    tl.device_assert(row_t > 0, "fastrlhf: a temperature is not positive")
    rate = LOG2E / row_t
    scale = tl.full((), scale, acc)
    softcap = tl.full((), softcap, acc)
    source = logits + row_start(row, inner, stride_outer, stride_inner)

    x_target = tl.load(
        source + target.to(tl.int64) * stride_vocab, mask=live & in_vocab, other=float("nan")
    )
    peak = tl.full((LANES,), -float("inf"), acc)
    rest = tl.zeros((LANES,), acc)
    moment = tl.zeros((LANES,), acc)
    # Of a row that is ignored, no column is read.
    for start in tl.range(0, tl.where(live, vocab, 0), TILE, num_stages=STAGES):
        columns = start + within_tile
        inside = columns < vocab
        x = tl.load(
            source + columns.to(tl.int64) * stride_vocab,
            mask=inside,
            other=-float("inf"),
            eviction_policy="evict_last",
        ).to(acc)
        peak, rest, moment = add_tile(
            x, inside, columns, target, peak, rest, moment, rate, scale, softcap,
            HAS_SOFTCAP, with_entropy,
        )  # fmt: skip
    row_peak, rest, moment = merged_lanes(peak, rest, moment, rate, with_entropy)
    capped, _ = capped_logits(x_target.to(acc), scale, softcap, HAS_SOFTCAP)
    logprob, entropy, log_norm, empty, base = statistics(
        row_peak, rest, moment, capped, row_t, with_entropy
    )

    advantage = tl.load(advantages + row)
    # On policy the ratio is 1, but NaN stays what it is.
    to_itself = tl.where(logprob == logprob, 0.0, logprob)
    log_ratio = tl.where(on_policy != 0, to_itself, logprob - tl.load(old_logprobs + row))
    # Without an advantage, what the token was sampled with must not matter.
    loss, slope = SURROGATE(
        tl.where(advantage == 0, 0.0, log_ratio), logprob, advantage,
        tl.full((), ratio_low, acc), tl.full((), ratio_high, acc), tl.full((), dual_clip, acc),
        tl.full((), tau_positive, acc), tl.full((), tau_negative, acc),
    )  # fmt: skip
    if kl_coef != 0:
        kl, kl_slope = PENALTY(KL, tl.load(ref_logprobs + row) - logprob, log_ratio)
        factor = tl.full((), kl_coef, acc)
        if weighs_kl != 0:
            factor *= tl.load(kl_weights + row)
            # Of a penalty that does not count, not even what is infinite.
            kl, kl_slope = tl.where(factor == 0, 0.0, kl), tl.where(factor == 0, 0.0, kl_slope)
        loss += factor * kl
        slope += factor * kl_slope
    loss -= tl.full((), entropy_coef, acc) * entropy
    tl.store(losses + row, tl.where(live, loss, 0.0))
    tl.store(logprobs + row, tl.where(live, logprob, 0.0))
    tl.store(entropies + row, tl.where(live, entropy, 0.0))

    weight = tl.load(weights + row)
    g = weight * slope
    h = -weight * tl.full((), entropy_coef, acc)
    # The target's logit, which every thread has read by itself, may be overwritten from here on.
    tl.debug_barrier()
    if (live == 0) | empty | ((g == 0) & (h == 0)):
        _zero_row(destination, within_tile, d_stride_vocab, vocab, TILE)
        return
    tiles = tl.cdiv(vocab, TILE)
    for done in tl.range(0, tiles, num_stages=STAGES):
        columns = (tiles - 1 - done) * TILE + within_tile
        inside = columns < vocab
        x = tl.load(
            source + columns.to(tl.int64) * stride_vocab,
            mask=inside,
            other=0.0,
            eviction_policy="evict_first",
        ).to(acc)
        dx = gradient_tile(
            x, columns, target, base, log_norm, logprob, entropy, g, h, row_t, scale, softcap,
            HAS_SOFTCAP, with_entropy,
        )  # fmt: skip
        tl.store(
            destination + columns.to(tl.int64) * d_stride_vocab,
            dx.to(destination.dtype.element_ty),
            mask=inside,
            eviction_policy="evict_first",
        )


_SCALE_BLOCK = tl.constexpr(4096)


# Of a size that is known to be a multiple of 16, it takes 16 bytes at once.
@triton.jit
def _scale_kernel(values, factor, size):
    by = tl.load(factor)
    if by == 1.0:
        return
    place = tl.program_id(0).to(tl.int64) * _SCALE_BLOCK + tl.arange(0, _SCALE_BLOCK)
    inside = place < size
    x = tl.load(values + place, mask=inside, other=0.0)
    tl.store(values + place, (x.to(by.dtype) * by).to(x.dtype), mask=inside)


@on_their_device
def policy_loss(
    d_logits: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    kl_weights: torch.Tensor | None = None,
    *,
    surrogate: str,
    kl_estimator: str,
    kl_bias_correction: bool = False,
    settings: PolicySettings,
    entropy: bool,
    temperature: float | torch.Tensor,
    softcap: float | None,
    scale: float,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch K3 on logits (outer, inner, V): write the gradient of Σ weights·losses into d_logits,
    which may be the logits themselves. Without old log-probs, the ratio is 1.

    All rows (N,) are contiguous, and but for the targets in the dtype of accumulation. Returns
    losses, log-probs and entropies (0 unless asked for), each (N,).
    """
    outer, inner, vocab = logits.shape
    rows = outer * inner
    losses, logprobs, entropies = (torch.empty_like(weights) for _ in range(3))
    transform, token_temperature = transform_options(temperature, softcap, scale, weights)
    _policy_loss_kernel[(rows,)](
        d_logits,
        logits,
        targets,
        token_temperature,
        weights if old_logprobs is None else old_logprobs,
        weights if ref_logprobs is None else ref_logprobs,
        advantages,
        weights,
        weights if kl_weights is None else kl_weights,
        losses,
        logprobs,
        entropies,
        inner,
        *strides(d_logits),
        *strides(logits),
        vocab,
        ignore_index,
        int(old_logprobs is None),
        int(kl_weights is not None),
        int(entropy),
        **transform,
        **settings._asdict(),
        SURROGATE=SURROGATES[surrogate],
        KL=KL_ESTIMATORS[kl_estimator],
        PENALTY=_penalty(kl_estimator, kl_bias_correction),
        **row_plan("policy_loss", vocab, logits.dtype).sweep_options(),
        **ASSERTING,
    )
    return losses, logprobs, entropies


@on_their_device
def scale_(values: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply contiguous values by a 0-d factor, which is looked at on the device: a factor of 1
    costs nothing.
    """
    size = values.numel()
    _scale_kernel[(triton.cdiv(size, _SCALE_BLOCK.value),)](values, factor, size, num_warps=8)
