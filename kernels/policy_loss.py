"""Logits → policy loss of each token and its gradient with respect to the logits, one launch.

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

Called by `fastrlhf/ops/policy_loss.py`; read `rows.py` first, and `token_stats.py`, which does one
half of this.

Dims: N rows = outer x inner, V vocabulary.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import on_their_device, row_plan
from .rows import (
    Slopes,
    add_tile,
    gradient_tile,
    load_tile,
    merged_lanes,
    no_columns,
    row_of,
    statistics,
    strides,
    tile_columns,
)
from .tiles import ASSERTING, exp, expm1, expm1_minus, sigmoid
from .transform import Transform, capped_logits, row_temperature, transform_options


class PolicySettings(NamedTuple):
    """The numbers of a policy loss, as the kernel's arguments of the same names."""

    ratio_low: float  # 1 - clip_low; the floor of cispo; for DPPO, which bounds no ratio, -clip_low
    ratio_high: float
    dual_clip: float  # inf for none
    tau_positive: float
    tau_negative: float
    kl_coef: float
    entropy_coef: float


class Bounds(NamedTuple):
    """The settings of `PolicySettings` that a surrogate takes, as numbers in the kernel."""

    low: tl.tensor
    high: tl.tensor
    dual: tl.tensor
    tau_positive: tl.tensor
    tau_negative: tl.tensor


@triton.jit
def _saturated(log_ratio):
    """The log of a ratio, bounded at 80 (700 in fp64), and whether it was above that; if so, its
    derivative is 0. Not far beyond, the ratio would be inf, whose product with 0 is NaN.
    """
    ceiling: tl.constexpr = 700.0 if log_ratio.dtype == tl.float64 else 80.0
    # Written so that NaN stays one.
    beyond = log_ratio > ceiling
    return tl.where(beyond, ceiling, log_ratio), beyond


@triton.jit
def _saturated_ratio(log_ratio, logprob):
    """Bound the log of a token's ratio as `_saturated` does. Where the policy forbids the token,
    the derivative is 0 too: the ratio to the policy itself is then the constant 1, and that to any
    other policy 0.
    """
    log_ratio, ended = _saturated(log_ratio)
    return log_ratio, ended | (logprob == -float("inf"))


@triton.jit
def _clip(log_ratio, logprob, advantage, bounds):
    """PPO's loss: -A times the clipped ratio, which a dual clip bounds above where A < 0."""
    log_ratio, ended = _saturated_ratio(log_ratio, logprob)
    ratio = exp(log_ratio)
    bad = advantage < 0
    too_low = bad & (ratio < bounds.low)
    too_high = tl.where(bad, ratio > bounds.dual, ratio > bounds.high)
    bound = tl.where(bad, bounds.dual, bounds.high)
    bounded = tl.where(too_low, bounds.low, tl.where(too_high, bound, ratio))
    slope = tl.where(too_low | too_high | ended, 0.0, -ratio * advantage)
    return -bounded * advantage, slope


@triton.jit
def _likelihood(weight, logprob):
    """-weight·ln p and its derivative; 0 for weight 0 even where ln p is -inf."""
    return tl.where(weight == 0, 0.0, -weight * logprob), -weight


@triton.jit
def _cispo(log_ratio, logprob, advantage, bounds):
    """Log-likelihood, weighted by the advantage and by a bounded ratio that has no gradient."""
    ratio = exp(_saturated(log_ratio)[0])
    bounded = tl.where(ratio < bounds.low, bounds.low, ratio)
    bounded = tl.where(ratio > bounds.high, bounds.high, bounded)
    return _likelihood(bounded * advantage, logprob)


@triton.jit
def _sapo(log_ratio, logprob, advantage, bounds):
    """-(4/τ)·σ(τ·(r - 1))·A: a smooth gate in the place of a clip."""
    log_ratio, ended = _saturated_ratio(log_ratio, logprob)
    tau = tl.where(advantage > 0, bounds.tau_positive, bounds.tau_negative)
    gate = tau * expm1(log_ratio)
    slope = -4.0 * sigmoid(gate) * sigmoid(-gate) * exp(log_ratio) * advantage
    return -(4.0 / tau) * sigmoid(gate) * advantage, tl.where(ended, 0.0, slope)


@triton.jit
def _plain(log_ratio, logprob, advantage, bounds):
    """Log-likelihood, weighted by the advantage."""
    return _likelihood(advantage, logprob)


@triton.jit
def _unless_too_far(log_ratio, logprob, advantage, dual, too_low, too_high):
    """-r·A where the advantage does not lead further away; beyond `dual`, r stays what it is there,
    in the derivative too.
    """
    log_ratio, ended = _saturated(log_ratio)
    ratio = exp(log_ratio)
    ended = (ended & (dual == float("inf"))) | (logprob == -float("inf"))
    loss = -tl.where(ratio > dual, dual, ratio) * advantage
    gone = tl.where(advantage > 0, too_high, too_low)
    return tl.where(gone, 0.0, loss), tl.where(gone | ended, 0.0, loss)


@triton.jit
def _dppo_tv(log_ratio, logprob, advantage, bounds):
    """-r·A, within bounds of how much probability the token has gained or lost."""
    # |π - π_old| is the larger of the two probabilities times 1 - e^-|log_ratio|, which expm1 gives
    # without subtracting nearly equal numbers.
    grown = log_ratio > 0
    larger = exp(tl.where(grown, logprob, logprob - log_ratio))
    moved = larger * tl.where(grown, -expm1(-log_ratio), expm1(log_ratio))
    return _unless_too_far(
        log_ratio, logprob, advantage, bounds.dual, moved < bounds.low, moved > bounds.high
    )


@triton.jit
def _log_of_others(logprob):
    """The log of 1 - p, from ln p; for p = 1 that of the smallest normal number."""
    tiny: tl.constexpr = 2.2250738585072014e-308 if logprob.dtype == tl.float64 else 1.1754944e-38
    return tl.log(-expm1(tl.where(logprob > -tiny, -tiny, logprob)))


@triton.jit
def _dppo_kl(log_ratio, logprob, advantage, bounds):
    """-r·A, within bounds of KL(π_old‖π) of two outcomes: this token, or any other."""
    old = logprob - log_ratio
    of_token = tl.where(old == -float("inf"), 0.0, -exp(old) * log_ratio)
    divergence = of_token - expm1(old) * (_log_of_others(old) - _log_of_others(logprob))
    too_low = (divergence > -bounds.low) & (log_ratio < 0)
    too_high = (divergence > bounds.high) & (log_ratio > 0)
    return _unless_too_far(log_ratio, logprob, advantage, bounds.dual, too_low, too_high)


SURROGATES = {"clip": _clip, "cispo": _cispo, "sapo": _sapo, "plain": _plain}
SURROGATES |= {"dppo_tv": _dppo_tv, "dppo_kl": _dppo_kl}


# Estimators of KL(π‖ref) by the names that Schulman gave them in 2020; those with a "+" have the
# value of one and the derivative of k2. Each takes x = ln ref - ln p, and gives its value and its
# derivative with respect to ln p.
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
    # x - x is 0, but NaN where x is infinite, as of the eager formula (`_with_gradient_of_k2`).
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
    # Where the policy forbids a token, x is inf: penalty and slope are to be 0.
    forbidden = x == float("inf")
    kl, slope = KL(tl.where(forbidden, 0.0, x))
    slope = tl.where(forbidden, 0.0, slope)
    log_ratio, ended = _saturated(log_ratio)
    ratio = exp(log_ratio)
    return ratio * kl, ratio * tl.where(ended, slope, kl + slope)


@triton.jit
def _corrected_k3(KL: tl.constexpr, x, log_ratio):
    """r·k3 = e^(x + ln r) - r·(1 + x), whose first term, ref/p_old, is a constant."""
    constant = exp(_saturated(x + log_ratio)[0])
    log_ratio, ended = _saturated(log_ratio)
    ratio = exp(log_ratio)
    x = tl.where(x == float("inf"), 0.0, x)  # a forbidden token adds 0
    near = tl.abs(x) < 1
    kl = tl.where(near, ratio * expm1_minus(x), constant - ratio * (1 + x))
    return kl, ratio * tl.where(ended, tl.where(near, -expm1(x), 1.0), -x)


def _penalty(kl_estimator: str, bias_correction: bool):
    """Choose the device function that turns the estimate of a KL into the penalty of a token."""
    if not bias_correction:
        return _as_it_is
    return _corrected_k3 if kl_estimator == "k3" else _corrected


@triton.jit
def _zero_row(destination, within_tile, vocab, TILE: tl.constexpr):
    for start in range(0, vocab, TILE):
        columns = start + within_tile
        zeros = tl.zeros(columns.shape, destination.first.dtype.element_ty)
        place = destination.first + columns.to(tl.int64) * destination.stride
        tl.store(place, zeros, mask=columns < vocab)


@triton.jit
def _row_statistics(
    source, target, readable, live, within_tile, vocab, transform, with_entropy, acc: tl.constexpr,
    LANES: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The first sweep: statistics of a row, which stays in the cache as far as it fits there, and
    whether it is nothing but -inf. A target that is not readable has the logit NaN.
    """
    x_target = load_tile(source, target, readable, float("nan"), acc, "")
    sums, _ = no_columns(LANES, acc)
    # No column of an ignored row is read.
    for start in tl.range(0, tl.where(live, vocab, 0), TILE, num_stages=STAGES):
        columns = start + within_tile
        inside = columns < vocab
        x = load_tile(source, columns, inside, -float("inf"), acc, "evict_last")
        sums = add_tile(x, inside, columns, target, sums, transform, with_entropy)
    merged = merged_lanes(sums, transform.rate, with_entropy)
    # After the merge: the compiler then rounds once where the base is subtracted from this logit.
    capped, _ = capped_logits(x_target, transform)
    return statistics(merged, capped, transform, with_entropy)


@triton.jit
def _gradient_sweep(
    destination, source, target, within_tile, vocab, stats, slopes, transform, with_entropy,
    acc: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a row, from its end to its start. Neither its logits nor its gradient
    are read again by this kernel, so they are the first to leave the cache.
    """
    tiles = tl.cdiv(vocab, TILE)
    for done in tl.range(0, tiles, num_stages=STAGES):
        columns = (tiles - 1 - done) * TILE + within_tile
        inside = columns < vocab
        x = load_tile(source, columns, inside, 0.0, acc, "evict_first")
        dx = gradient_tile(x, columns, target, stats, slopes, transform, with_entropy)
        tl.store(
            destination.first + columns.to(tl.int64) * destination.stride,
            dx.to(destination.first.dtype.element_ty),
            mask=inside,
            eviction_policy="evict_first",
        )


@triton.jit
def _penalised(
    loss, slope, row, logprob, log_ratio, ref_logprobs, kl_weights, weighs_kl, kl_coef,
    KL: tl.constexpr, PENALTY: tl.constexpr,
):  # fmt: skip
    """A token's loss and its slope, with those of the KL penalty."""
    kl, kl_slope = PENALTY(KL, tl.load(ref_logprobs + row) - logprob, log_ratio)
    factor = tl.full((), kl_coef, logprob.dtype)
    if weighs_kl != 0:
        factor *= tl.load(kl_weights + row)
        # A penalty of weight 0 adds nothing, even where it is infinite: 0·inf would be NaN.
        kl, kl_slope = tl.where(factor == 0, 0.0, kl), tl.where(factor == 0, 0.0, kl_slope)
    return loss + factor * kl, slope + factor * kl_slope


# Vectors may be slices, which start anywhere in memory. Triton would compile another kernel for a
# start that is not aligned, so it must not specialise on the alignment of these.
_VECTORS = ["targets", "old_logprobs", "ref_logprobs", "advantages", "weights", "kl_weights"]
_VECTORS += ["token_temperature", "losses", "logprobs", "entropies"]


@triton.jit(
    do_not_specialize=["inner", "ignore_index", "on_policy", "weighs_kl", "with_entropy"],
    do_not_specialize_on_alignment=_VECTORS,
)
def _policy_loss_kernel(
    d_logits,  # (outer, inner, V): gradient out; may be the memory of the logits
    losses,  # (N,) out
    logprobs,  # (N,) out
    entropies,  # (N,) out
    logits,  # (outer, inner, V), any strides
    targets,  # (N,), as are all below
    old_logprobs,  # of no effect where on_policy is 1
    ref_logprobs,  # of no effect where kl_coef is 0
    advantages,
    weights,  # of each token's loss in the loss that the gradient is of
    kl_weights,  # of each token's penalty, of no effect unless weighs_kl is 1
    vocab,
    inner,
    d_stride_outer,
    d_stride_inner,
    d_stride_vocab,
    stride_outer,
    stride_inner,
    stride_vocab,
    ignore_index,
    on_policy,  # 0 or 1, as are the next two
    weighs_kl,
    with_entropy,
    ratio_low: tl.float64,
    ratio_high: tl.float64,
    dual_clip: tl.float64,
    tau_positive: tl.float64,
    tau_negative: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    token_temperature,  # (N,) or unused
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    PENALTY: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    LANE_STRIDE: tl.constexpr,
    VEC_STRIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    acc: tl.constexpr = losses.dtype.element_ty
    TILE: tl.constexpr = LANES * VEC
    row = tl.program_id(0).to(tl.int64)
    destination = row_of(d_logits, row, inner, d_stride_outer, d_stride_inner, d_stride_vocab)
    source = row_of(logits, row, inner, stride_outer, stride_inner, stride_vocab)
    within_tile = tile_columns(LANES, VEC, LANE_STRIDE, VEC_STRIDE)
    wide = tl.load(targets + row)
    live = wide != ignore_index
    target = wide.to(tl.int32)
    row_t, rate = row_temperature(
        row, live, token_temperature, temperature, acc, PER_TOKEN_TEMPERATURE
    )
    in_vocab = (wide >= 0) & (wide < vocab)
    tl.device_assert(in_vocab | (live == 0), "fastrlhf: a target is outside [0, vocabulary)")
    tl.device_assert(row_t > 0, "fastrlhf: a temperature is not positive")

    stats, empty = _row_statistics(
        source, target, live & in_vocab, live, within_tile, vocab,
        Transform(scale, softcap, row_t, rate, HAS_SOFTCAP), with_entropy, acc, LANES, TILE, STAGES,
    )  # fmt: skip

    logprob = stats.logprob
    advantage = tl.load(advantages + row)
    # On policy the ratio is 1, but NaN stays what it is.
    to_itself = tl.where(logprob == logprob, 0.0, logprob)
    log_ratio = tl.where(on_policy != 0, to_itself, logprob - tl.load(old_logprobs + row))
    bounds = Bounds(
        tl.full((), ratio_low, acc), tl.full((), ratio_high, acc), tl.full((), dual_clip, acc),
        tl.full((), tau_positive, acc), tl.full((), tau_negative, acc),
    )  # fmt: skip
    # Without an advantage, what the token was sampled with must not matter.
    loss, slope = SURROGATE(tl.where(advantage == 0, 0.0, log_ratio), logprob, advantage, bounds)
    if kl_coef != 0:
        loss, slope = _penalised(
            loss, slope, row, logprob, log_ratio, ref_logprobs, kl_weights, weighs_kl, kl_coef,
            KL, PENALTY,
        )  # fmt: skip
    loss -= tl.full((), entropy_coef, acc) * stats.entropy
    tl.store(losses + row, tl.where(live, loss, 0.0))
    tl.store(logprobs + row, tl.where(live, logprob, 0.0))
    tl.store(entropies + row, tl.where(live, stats.entropy, 0.0))

    weight = tl.load(weights + row)
    g = weight * slope
    h = -weight * tl.full((), entropy_coef, acc)
    # The target's logit, which every thread has read by itself, may be overwritten from here on.
    tl.debug_barrier()
    if (live == 0) | empty | ((g == 0) & (h == 0)):
        _zero_row(destination, within_tile, vocab, TILE)
        return
    _gradient_sweep(
        destination, source, target, within_tile, vocab, stats, Slopes(g, h, 0.0, 0.0),
        Transform(scale, softcap, row_t, rate, HAS_SOFTCAP), with_entropy, acc, TILE, STAGES,
    )  # fmt: skip


_SCALE_BLOCK = tl.constexpr(4096)


# Where Triton knows that the size is a multiple of 16, each load and store is of 16 bytes.
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
    """Launch the kernel on logits (outer, inner, V): write the gradient of Σ weights·losses into
    d_logits, which may be the logits themselves. Without old log-probs, the ratio is 1.

    All rows (N,) are contiguous, and but for the targets in the dtype of accumulation. Returns
    losses, log-probs and entropies (0 unless asked for), each (N,).
    """
    outer, inner, vocab = logits.shape
    losses, logprobs, entropies = (torch.empty_like(weights) for _ in range(3))
    vectors = (
        weights if x is None else x
        for x in (old_logprobs, ref_logprobs, advantages, weights, kl_weights)
    )
    _policy_loss_kernel[(outer * inner,)](
        d_logits, losses, logprobs, entropies, logits, targets, *vectors,
        vocab, inner, *strides(d_logits), *strides(logits),
        ignore_index, int(old_logprobs is None), int(kl_weights is not None), int(entropy),
        **settings._asdict(), **transform_options(temperature, softcap, scale, weights),
        SURROGATE=SURROGATES[surrogate], KL=KL_ESTIMATORS[kl_estimator],
        PENALTY=_penalty(kl_estimator, kl_bias_correction),
        **row_plan("policy_loss", vocab, logits.dtype).sweep_options(), **ASSERTING,
    )  # fmt: skip
    return losses, logprobs, entropies


@on_their_device
def scale_(values: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply contiguous values by a 0-d factor, which is looked at on the device: a factor of 1
    costs nothing.
    """
    size = values.numel()
    _scale_kernel[(triton.cdiv(size, _SCALE_BLOCK.value),)](values, factor, size, num_warps=8)
