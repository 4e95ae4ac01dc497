"""The definition of `gae`.

For sequences in rows it goes backwards step by step. For packed tokens it is a scan by doubling.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .scalars import accumulation_dtype


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns (B, T) of the tokens of the mask, 0 elsewhere: 1506.02438
    Eq. 16. `lam` is a number, or (B,) one for each sequence. `last_values` are the values (B,)
    after the last tokens; None: all are 0.
    """
    dtype = accumulation_dtype(torch.promote_types(rewards.dtype, values.dtype))
    keep = mask != 0
    rewards, values = (torch.where(keep, x, 0.0).to(dtype) for x in (rewards, values))
    nothing = values.new_zeros(values.shape[0])
    after_the_end = nothing if last_values is None else last_values.to(dtype)
    everywhere, *_ = advantages_backwards(
        rewards, values, keep, after_the_end, nothing, gamma=gamma, decay=decay(gamma, lam, dtype)
    )
    advantages = torch.where(keep, everywhere, 0.0)
    return advantages, advantages + values


def decay(gamma: float, lam: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Compute γλ, a number or (B,) one for each sequence."""
    return gamma * lam.to(dtype) if isinstance(lam, Tensor) else gamma * lam


def advantages_backwards(
    rewards: Tensor,
    values: Tensor,
    keep: Tensor,
    next_value: Tensor,
    next_advantage: Tensor,
    *,
    gamma: float | Tensor,
    decay: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute advantages (B, T) of some steps, given the value and advantage (B,) of the token that
    follows the last of them. Also returned are value and advantage of the first token that counts,
    for the steps before these. Where `keep` is False, advantages are garbage.
    """
    backwards = []
    from_the_end = (reversed(x.unbind(1)) for x in (rewards, values, keep))
    for reward, value, counts in zip(*from_the_end, strict=True):
        delta = reward + gamma * next_value - value
        advantage = delta + decay * next_advantage
        # A token that does not count is skipped: for the token before it, the next one is the token
        # after it.
        next_advantage = torch.where(counts, advantage, next_advantage)
        next_value = torch.where(counts, value, next_value)
        backwards.append(advantage)
    everywhere = torch.stack(backwards[::-1], 1) if backwards else torch.zeros_like(values)
    return everywhere, next_value, next_advantage


def packed_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    ids: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what `gae` does for packed sequences, given as vectors (N,) of tokens and the ids of
    their sequences.

    A step computes a token's advantage as an affine function of the next token's advantage, and
    the composition of two affine functions is affine. So by doubling, in log2(N) rounds, each token
    gets the composition of its own step with all that follow in its sequence.
    """
    dtype = accumulation_dtype(torch.promote_types(rewards.dtype, values.dtype))
    keep = mask != 0
    rewards, values = (torch.where(keep, x, 0.0).to(dtype) for x in (rewards, values))
    # For each token, whether it or a later one in its sequence counts, and the value of the first
    # of these that does.
    is_there, nearest = suffix_scan(_nearest, (keep, values), ids)
    follows = torch.nn.functional.pad(ids[1:] == ids[:-1], (0, 1)) if len(ids) else keep
    after_the_end = values.new_zeros(()) if last_values is None else last_values.to(dtype)[ids]
    next_value = torch.where(follows & is_there.roll(-1), nearest.roll(-1), after_the_end)
    delta = torch.where(keep, rewards + gamma * next_value - values, 0.0)
    factor = decay(gamma, lam, dtype)
    factors = factor[ids] if isinstance(factor, Tensor) else delta.new_full((), factor)
    everywhere = suffix_scan(_compose, (torch.where(keep, factors, 1.0), delta), ids)[1]
    advantages = torch.where(keep, everywhere, 0.0)
    return advantages, advantages + values


Pair = tuple[Tensor, Tensor]


def _nearest(near: Pair, far: Pair) -> Pair:
    """Choose, of two pairs (whether a token counts, its value), the nearer one if it counts."""
    return near[0] | far[0], torch.where(near[0], near[1], far[1])


def _compose(near: Pair, far: Pair) -> Pair:
    """Compose two affine functions (factor, offset), of which the far one is applied first."""
    return near[0] * far[0], near[1] + near[0] * far[1]


def suffix_scan(combine: Callable[[Pair, Pair], Pair], pair: Pair, ids: Tensor) -> Pair:
    """Combine each pair of values (N,) with all pairs that follow in its sequence, by doubling:
    after k rounds, each has been combined with 2^k of them, itself included.
    """
    step = 1
    while step < len(ids):
        same = ids[step:] == ids[:-step]
        joined = combine((pair[0][:-step], pair[1][:-step]), (pair[0][step:], pair[1][step:]))
        first, second = (
            torch.cat((torch.where(same, new, old[:-step]), old[-step:]))
            for new, old in zip(joined, pair, strict=True)
        )
        pair = first, second
        step *= 2
    return pair
