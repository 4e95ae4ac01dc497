"""The definition of `gae`: backwards over the steps of rows, by doubling over packed tokens.

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
    Eq. 16. λ may be (B,), and so may be the values after the end, which are 0 otherwise.
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
    """Compute γλ, of all sequences or of each (B,)."""
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
    """Compute advantages (B, T), garbage where `keep` is not, from the value and advantage (B,) of
    the token that follows; and those of the first token, for what comes before it.
    """
    found = []
    from_the_end = (reversed(x.unbind(1)) for x in (rewards, values, keep))
    for reward, value, counts in zip(*from_the_end, strict=True):
        delta = reward + gamma * next_value - value
        advantage = delta + decay * next_advantage
        # A token that does not count is passed over: what follows it follows the one before it.
        next_advantage = torch.where(counts, advantage, next_advantage)
        next_value = torch.where(counts, value, next_value)
        found.append(advantage)
    everywhere = torch.stack(found[::-1], 1) if found else torch.zeros_like(values)
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
    """Compute what `gae` does of sequences that follow each other, from vectors (N,) of tokens and
    the ids of their sequences.

    The recurrence is affine in the advantage of the next token, and so are compositions of such
    steps: in log2(N) of them each token has composed all that follow in its sequence.
    """
    dtype = accumulation_dtype(torch.promote_types(rewards.dtype, values.dtype))
    keep = mask != 0
    rewards, values = (torch.where(keep, x, 0.0).to(dtype) for x in (rewards, values))
    # Of the nearest token that counts, from each on; of one that does not, what follows it.
    found, nearest = suffix_scan(_nearest, (keep, values), ids)
    follows = torch.nn.functional.pad(ids[1:] == ids[:-1], (0, 1)) if len(ids) else keep
    after_the_end = values.new_zeros(()) if last_values is None else last_values.to(dtype)[ids]
    next_value = torch.where(follows & found.roll(-1), nearest.roll(-1), after_the_end)
    delta = torch.where(keep, rewards + gamma * next_value - values, 0.0)
    factor = decay(gamma, lam, dtype)
    factors = factor[ids] if isinstance(factor, Tensor) else delta.new_full((), factor)
    everywhere = suffix_scan(_compose, (torch.where(keep, factors, 1.0), delta), ids)[1]
    advantages = torch.where(keep, everywhere, 0.0)
    return advantages, advantages + values


Pair = tuple[Tensor, Tensor]


def _nearest(near: Pair, far: Pair) -> Pair:
    """Of two values, that of the token nearer to the start, if it counts."""
    return near[0] | far[0], torch.where(near[0], near[1], far[1])


def _compose(near: Pair, far: Pair) -> Pair:
    """Apply the far one of two affine functions first."""
    return near[0] * far[0], near[1] + near[0] * far[1]


def suffix_scan(combine: Callable[[Pair, Pair], Pair], pair: Pair, ids: Tensor) -> Pair:
    """Combine each pair of values (N,) with those that follow in its sequence, by doubling: after
    k steps each has combined 2^k.
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
