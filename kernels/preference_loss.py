"""Token log-probs → sequence scores → preference loss and its slope, one launch; and back, one
launch.

For the losses that depend on a pair only through the margin Δ = s_chosen - s_rejected of the
sequence scores s = ln π - ln π_ref, summed over tokens or averaged. The formula of a loss is a
device function that the launcher hands to the kernel: from Δ it gives the loss and the slope
dloss/dΔ.

Forward, one program scores both sequences of a pair, and further programs, one a sequence, write
the rewards. Backward, one program a sequence adds up the slopes of the pairs that it takes part in,
in the order of the pairs, so that there are no atomics and the bits do not depend on scheduling.

Packed sequences are (1, N), and cu_seqlens says where each begins and ends.

Called by `fastrlhf/ops/preference_loss.py`. It reads no logits: of this folder it uses `launch.py`
and `tiles.py` alone.

Dims: B sequences, T tokens, N tokens of all packed sequences, P pairs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import on_their_device
from .tiles import ASSERTING, extent, log_sigmoid, sigmoid, stored

_TOKENS = tl.constexpr(1024)  # tokens of a sequence that a program handles at once
_PAIRS = tl.constexpr(256)  # pairs that a program handles at once


# Arguments that Triton must not specialise on, so that no batch compiles a kernel anew.
_VARYING = ["pairs", "sequences", "tokens", "policy_stride", "reference_stride", "mask_stride"]


@triton.jit
def _flipped(d, label_smoothing):
    """ε·ln σ(-d), and 0 without smoothing, also where d is infinite."""
    return tl.where(label_smoothing > 0, label_smoothing * log_sigmoid(-d), 0.0)


@triton.jit
def _sigmoid_loss(margin, beta, label_smoothing):
    d = beta * margin
    loss = -(1.0 - label_smoothing) * log_sigmoid(d) - _flipped(d, label_smoothing)
    slope = label_smoothing * sigmoid(d) - (1.0 - label_smoothing) * sigmoid(-d)
    return loss, beta * slope


@triton.jit
def _robust_loss(margin, beta, label_smoothing):
    d = beta * margin
    confidence = 1.0 - 2.0 * label_smoothing
    loss = -(1.0 - label_smoothing) * log_sigmoid(d) + _flipped(d, label_smoothing)
    slope = -(1.0 - label_smoothing) * sigmoid(-d) - label_smoothing * sigmoid(d)
    return loss / confidence, beta * slope / confidence


@triton.jit
def _hinge_loss(margin, beta, label_smoothing):
    shortfall = 1.0 - beta * margin
    # Written so that a NaN margin stays one.
    return tl.where(shortfall <= 0, 0.0, shortfall), tl.where(shortfall <= 0, 0.0, -beta)


@triton.jit
def _ipo_loss(margin, beta, label_smoothing):
    error = margin - 0.5 / beta
    return error * error, 2.0 * error


FORMULAS = {
    "sigmoid": _sigmoid_loss,
    "robust": _robust_loss,
    "hinge": _hinge_loss,
    "ipo": _ipo_loss,
}


@triton.jit
def _kept(mask, row, start, stop, mask_stride, HAS_MASK: tl.constexpr):
    """Positions from `start`, and which of them count; without a mask, a "token" is a whole
    sequence.
    """
    if HAS_MASK:
        token = start + tl.arange(0, _TOKENS)
        keep = token < stop
        keep = tl.load(mask + row * mask_stride + token, mask=keep, other=0) != 0
    else:
        token = start + tl.arange(0, 1)
        keep = token < stop
    return token, keep


class Tokens(NamedTuple):
    """Where the log-probs of all sequences are, in the forward kernel."""

    policy: tl.tensor
    reference: tl.tensor
    mask: tl.tensor
    lengths: tl.tensor
    cu_seqlens: tl.tensor
    tokens: tl.tensor  # in a row
    policy_stride: tl.tensor
    reference_stride: tl.tensor
    mask_stride: tl.tensor


@triton.jit
def _sequence_score(
    of, sequence, acc: tl.constexpr, HAS_MASK: tl.constexpr, REFERENCE_PER_TOKEN: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Σ(ln π - ln π_ref) of one sequence of `Tokens`, and its number of tokens (at least 1)."""
    score = tl.zeros((), acc)
    count = tl.zeros((), acc)
    row, first, stop = extent(of.cu_seqlens, sequence, of.tokens, PACKED)
    for start in range(first, stop, _TOKENS):
        token, keep = _kept(of.mask, row, start, stop, of.mask_stride, HAS_MASK)
        place = of.policy + row * of.policy_stride + token
        ratio = tl.load(place, mask=keep, other=0.0).to(acc)
        if REFERENCE_PER_TOKEN:
            place = of.reference + row * of.reference_stride + token
            ratio -= tl.load(place, mask=keep, other=0.0).to(acc)
        score += tl.sum(ratio, axis=0)
        count += tl.sum(keep.to(acc), axis=0)
    if not REFERENCE_PER_TOKEN:
        score -= tl.load(of.reference + sequence * of.reference_stride).to(acc)
    if HAS_LENGTHS:
        count = tl.load(of.lengths + sequence).to(acc)
    return score, tl.maximum(count, 1.0)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=["cu_seqlens"])
def _preference_loss_fwd_kernel(
    losses,  # (P,) out
    slopes,  # (P,) out
    rewards,  # (B,) out
    weights,  # (B,) out: what one unit of a sequence's sum is worth in its score
    policy,  # (B, T) or packed (1, N), or (B, 1) sums
    reference,  # likewise, or (B,) sums
    mask,  # (B, T) or packed (1, N), or unused
    lengths,  # (B,) or unused
    cu_seqlens,  # (B + 1,) int64, or unused
    chosen,  # (P,)
    rejected,  # (P,)
    pairs,
    sequences,
    tokens,
    policy_stride,
    reference_stride,
    mask_stride,
    beta: tl.float64,
    label_smoothing: tl.float64,
    FORMULA: tl.constexpr,
    AVERAGE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    REFERENCE_PER_TOKEN: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PACKED: tl.constexpr,
):
    acc: tl.constexpr = losses.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    beta = tl.full((), beta, acc)
    # A program that is not a pair's writes the reward of one sequence, which stands in for both.
    is_pair = program < pairs
    sequence = program - pairs
    first = tl.load(chosen + program, mask=is_pair, other=0).to(tl.int64)
    second = tl.load(rejected + program, mask=is_pair, other=0).to(tl.int64)
    in_batch = (first >= 0) & (first < sequences) & (second >= 0) & (second < sequences)
    tl.device_assert(in_batch, "fastrlhf: a pair names a sequence outside [0, B)")
    first = tl.where(is_pair & in_batch, first, tl.maximum(sequence, 0))
    second = tl.where(is_pair & in_batch, second, tl.maximum(sequence, 0))
    of = Tokens(
        policy, reference, mask, lengths, cu_seqlens, tokens, policy_stride, reference_stride,
        mask_stride,
    )  # fmt: skip
    score, count = _sequence_score(
        of, first, acc, HAS_MASK, REFERENCE_PER_TOKEN, HAS_LENGTHS, PACKED
    )
    other_score, other_count = _sequence_score(
        of, second, acc, HAS_MASK, REFERENCE_PER_TOKEN, HAS_LENGTHS, PACKED
    )
    if AVERAGE:
        margin = score / count - other_score / other_count
        weight = 1.0 / count
    else:
        margin = score - other_score
        weight = tl.full((), 1.0, acc)
    loss, slope = FORMULA(margin, beta, tl.full((), label_smoothing, acc))
    tl.store(losses + program, loss, mask=is_pair)
    tl.store(slopes + program, slope, mask=is_pair)
    tl.store(rewards + sequence, beta * score, mask=is_pair == 0)
    tl.store(weights + sequence, weight, mask=is_pair == 0)


@triton.jit(
    do_not_specialize=["pairs", "tokens", "mask_stride"],
    do_not_specialize_on_alignment=["cu_seqlens"],
)
def _preference_loss_bwd_kernel(
    d_policy,  # (B, T) or packed (1, N), contiguous
    d_sums,  # (B,): gradient of the sum of each sequence
    mask,  # (B, T) or packed (1, N), or unused
    cu_seqlens,  # (B + 1,) int64, or unused
    chosen,  # (P,)
    rejected,  # (P,)
    slopes,  # (P,)
    weights,  # (B,)
    d_losses,  # (P,)
    pairs,
    tokens,
    mask_stride,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
):
    acc: tl.constexpr = slopes.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64)
    d_sum = tl.zeros((), acc)
    for start in range(0, pairs, _PAIRS):
        pair = start + tl.arange(0, _PAIRS)
        inside = pair < pairs
        as_chosen = inside & (tl.load(chosen + pair, mask=inside, other=0) == sequence)
        as_rejected = inside & (tl.load(rejected + pair, mask=inside, other=0) == sequence)
        involved = as_chosen | as_rejected
        slope = tl.load(slopes + pair, mask=involved, other=0.0)
        slope *= tl.load(d_losses + pair, mask=involved, other=0.0)
        d_sum += tl.sum(tl.where(as_chosen, slope, 0.0) - tl.where(as_rejected, slope, 0.0), axis=0)
    d_sum *= tl.load(weights + sequence)
    tl.store(d_sums + sequence, d_sum)
    row, first, stop = extent(cu_seqlens, sequence, tokens, PACKED)
    for start in range(first, stop, _TOKENS):
        token, keep = _kept(mask, row, start, stop, mask_stride, HAS_MASK)
        gradient = stored(tl.where(keep, d_sum, 0.0), d_policy.dtype.element_ty)
        tl.store(d_policy + row * tokens + token, gradient, mask=token < stop)


@on_their_device
def preference_loss_forward(
    policy: torch.Tensor,
    reference: torch.Tensor,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    *,
    formula: str,
    average: bool,
    beta: float,
    label_smoothing: float,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward: policy (B, T) with mask (B, T), or sums (B, 1) without; reference (B, T)
    or (B,). With cu_seqlens (B + 1,), what is (B, T) is (1, N).

    Token strides are 1 and the vectors contiguous. Returns losses (P,), slopes dloss/dmargin (P,),
    rewards (B,) and weights dscore/dsum (B,).
    """
    acc = torch.promote_types(torch.promote_types(policy.dtype, reference.dtype), torch.float32)
    sequences = policy.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    losses, slopes = (policy.new_empty(len(chosen), dtype=acc) for _ in range(2))
    rewards, weights = (policy.new_empty(sequences, dtype=acc) for _ in range(2))
    _preference_loss_fwd_kernel[(len(chosen) + sequences,)](
        losses, slopes, rewards, weights, policy, reference,
        policy if mask is None else mask, policy if lengths is None else lengths,
        policy if cu_seqlens is None else cu_seqlens, chosen, rejected,
        len(chosen), sequences, policy.shape[1],
        policy.stride(0), reference.stride(0), 0 if mask is None else mask.stride(0),
        beta, label_smoothing,
        FORMULA=FORMULAS[formula], AVERAGE=average, HAS_MASK=mask is not None,
        REFERENCE_PER_TOKEN=reference.ndim == 2, HAS_LENGTHS=lengths is not None,
        PACKED=cu_seqlens is not None, **ASSERTING,
    )  # fmt: skip
    return losses, slopes, rewards, weights


@on_their_device
def preference_loss_backward(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    mask: torch.Tensor | None,
    slopes: torch.Tensor,
    weights: torch.Tensor,
    d_losses: torch.Tensor,
    *,
    tokens: int,
    dtype: torch.dtype,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the backward. Returns the gradients of the policy (B, T), with cu_seqlens (1, N), in
    `dtype`, and of each sum (B,).
    """
    sequences, packed = len(weights), cu_seqlens is not None
    d_policy = weights.new_empty((1 if packed else sequences, tokens), dtype=dtype)
    d_sums = torch.empty_like(weights)
    _preference_loss_bwd_kernel[(sequences,)](
        d_policy, d_sums, slopes if mask is None else mask,
        slopes if cu_seqlens is None else cu_seqlens, chosen, rejected, slopes, weights, d_losses,
        len(chosen), tokens, 0 if mask is None else mask.stride(0),
        HAS_MASK=mask is not None, PACKED=packed,
    )  # fmt: skip
    return d_policy, d_sums
