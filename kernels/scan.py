"""Generalised advantage estimation: rewards and values → advantages, one launch.

Going backwards over the tokens that count, A_t = δ_t + γλ·A_next with δ_t = r_t + γ·V_next - V_t.
As a function of A_next that is affine, and so is the composition of such functions, which makes the
recurrence an associative scan. A token that does not count is the identity: it hands A_next on, and
likewise V_next. One program scans one sequence, a block at a time from its end, and carries A and V
from block to block, so that a sequence can have any length.

Packed sequences are (1, N), and cu_seqlens says where each begins and ends. λ is one number, and
the value after the end 0, or each sequence has its own: that is a variant of the kernel, as packed
sequences are, so that no number is compiled in.

Called by `fastrlhf/ops/gae.py`. It reads no logits: of this folder it uses `launch.py` and
`tiles.py` alone.

Dims: B sequences, T tokens, N tokens of all packed sequences.
"""

import torch
import triton
import triton.language as tl

from .launch import on_their_device
from .tiles import extent

# Tokens that a program scans at once. The interpreter goes through them one by one, whether they
# are there or not.
_BLOCK = {"cpu": 32}
_GPU_BLOCK = 1024


@triton.jit
def _nearest(far_found, far, near_found, near):
    """Whether one of two tokens counts, and the value of the near one if it does, else the far."""
    return far_found | near_found, tl.where(near_found != 0, near, far)


@triton.jit
def _compose(far_scale, far_shift, near_scale, near_shift):
    """The scale and the shift of x → near(far(x)), of two affine functions."""
    return near_scale * far_scale, near_scale * far_shift + near_shift


@triton.jit(
    do_not_specialize=["tokens", "rewards_stride", "values_stride", "mask_stride"],
    do_not_specialize_on_alignment=[
        "rewards",
        "values",
        "mask",
        "cu_seqlens",
        "lams",
        "last_values",
    ],
)
def _gae_kernel(
    advantages,  # (B, T) contiguous, out
    returns,  # (B, T) contiguous, out
    rewards,  # (B, T), neighbours in memory along T, as are the next two
    values,  # (B, T)
    mask,  # (B, T)
    cu_seqlens,  # (B + 1,) int64, or unused
    lams,  # (B,), or unused
    last_values,  # (B,), or unused
    tokens,
    rewards_stride,
    values_stride,
    mask_stride,
    gamma: tl.float64,
    lam: tl.float64,
    PACKED: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = advantages.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64)
    gamma = tl.full((), gamma, acc)
    if PER_SEQUENCE:
        decay = gamma * tl.load(lams + sequence)
        later_value = tl.load(last_values + sequence)
    else:
        decay = gamma * tl.full((), lam, acc)
        later_value = tl.zeros((), acc)
    later_advantage = tl.zeros((), acc)
    offsets = tl.arange(0, BLOCK)
    row, start, stop = extent(cu_seqlens, sequence, tokens, PACKED)
    blocks = tl.cdiv(stop - start, BLOCK)
    for done in range(0, blocks):
        token = start + (blocks - 1 - done) * BLOCK + offsets
        inside = token < stop
        keep = tl.load(mask + row * mask_stride + token, mask=inside, other=0) != 0
        reward = tl.load(rewards + row * rewards_stride + token, mask=keep, other=0.0)
        value = tl.load(values + row * values_stride + token, mask=keep, other=0.0).to(acc)

        # The value of the next token that counts: that of the neighbour, or what the neighbour saw.
        neighbour = token + 1
        inside_block = (neighbour < stop) & (offsets + 1 < BLOCK)
        counts = tl.load(mask + row * mask_stride + neighbour, mask=inside_block, other=0) != 0
        next_value = tl.load(values + row * values_stride + neighbour, mask=counts, other=0.0)
        next_value = next_value.to(acc)
        any_counts, next_value = tl.associative_scan(
            (counts.to(tl.int32), next_value), 0, _nearest, reverse=True
        )
        next_value = tl.where(any_counts != 0, next_value, later_value)

        delta = tl.where(keep, reward.to(acc) + gamma * next_value - value, 0.0)
        scale, shift = tl.associative_scan(
            (tl.where(keep, decay, 1.0).to(acc), delta), 0, _compose, reverse=True
        )
        advantage = scale * later_advantage + shift
        place = row * tokens + token
        tl.store(advantages + place, tl.where(keep, advantage, 0.0), mask=inside)
        tl.store(returns + place, tl.where(keep, advantage + value, 0.0), mask=inside)

        first = offsets == 0
        later_advantage = tl.sum(tl.where(first, advantage, 0.0), axis=0)
        later_value = tl.sum(tl.where(first, tl.where(keep, value, next_value), 0.0), axis=0)


@on_their_device
def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    cu_seqlens: torch.Tensor | None = None,
    lams: torch.Tensor | None = None,
    last_values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the scan on (B, T) tensors whose tokens are neighbours in memory; with cu_seqlens
    (B + 1,), on (1, N). lams are used instead of lam, and they and last_values are contiguous (B,).

    Returns advantages and returns (B, T), 0 where the mask is, in the wider dtype of the inputs,
    fp32 at least.
    """
    packed = cu_seqlens is not None
    sequences = rewards.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    acc = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    advantages, returns = (
        torch.empty(rewards.shape, dtype=acc, device=rewards.device) for _ in range(2)
    )
    per_sequence = lams is not None or last_values is not None
    of_sequences = [rewards, rewards]
    if per_sequence:
        of_sequences = [
            torch.full((sequences,), number, dtype=acc, device=rewards.device)
            if x is None
            else x.to(acc)
            for x, number in ((lams, lam), (last_values, 0.0))
        ]
    _gae_kernel[(sequences,)](
        advantages, returns, rewards, values, mask,
        cu_seqlens if packed else rewards, *of_sequences,
        rewards.shape[1], rewards.stride(0), values.stride(0), mask.stride(0), gamma, lam,
        PACKED=packed, PER_SEQUENCE=per_sequence,
        BLOCK=_BLOCK.get(rewards.device.type, _GPU_BLOCK),
    )  # fmt: skip
    return advantages, returns
