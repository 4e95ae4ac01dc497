"""Advantages from several rewards, each compared with the same reward of the others of its group.

It uses `samples.py`, as `groups.py` does, which has the advantages from a single reward.

Dims: B samples, R rewards of each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrlhf.losses.samples import (
    batch_deviation,
    check_batch_is_finite,
    check_groups,
    counting,
    in_groups,
    kept,
    of_all_ranks,
)
from fastrlhf.ops.checks import (
    check_finite,
    check_positive,
    check_real,
    check_same_device,
    check_shape,
)
from fastrlhf.ops.ranks import Group, check_group
from fastrlhf.reference import accumulation_dtype


@torch.no_grad()
def gdpo_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    weights: Tensor | Sequence[float] | None = None,
    eps: float = 1e-4,
    valid: Tensor | None = None,
    group: Group | None = None,
) -> Tensor:
    """Compute the advantage of each sequence from several rewards, none of which drowns another.

    A sum of rewards, standardised, is the same for all that add up to it. Here each reward is
    standardised in its group before they are added up.

    Eager equivalent, μ_r and σ_r of reward r in its group, σ of the batch, n - 1 below both::

        sums = Σ_r weights_r · (R_r - μ_r) / (σ_r + eps)
        advantages = sums / (σ(sums) + eps)

    The mean of the sums over the batch, which the paper subtracts, is 0.

    Args:
        rewards: (B, R) floating, integer or bool.
        groups: (B,) integer, the same for the samples of one prompt; in any order, of any sizes.
        weights: (R,) of the rewards, a tensor or numbers; None: 1 each.
        eps: positive (1e-4 in TRL, 1e-6 in verl for what is of groups).
        valid: (B, R) bool or 0/1: a reward with 0, which can be anything (a function that does not
            score this sample), adds nothing and is in no mean; a sample with none gets 0, and is
            not of the batch. Or (B,), of all rewards of a sample. None: all are.
        group: torch.distributed group whose ranks have parts of the batch, see `group_advantages`.

    Returns:
        (B,) fp32 (fp64 for fp64 rewards), not differentiable. Exactly 0 where every reward is the
        same in the whole group, and for a group of one. Over ranks, in the same bits as for one
        process.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; on the CPU, rewards that
            count and are not finite, which would make the batch NaN; a wrong group.

    Source: 2601.05242 (GDPO) §3.

    Example:
        >>> rewards = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 9.0]])  # two of each answer
        >>> fastrlhf.gdpo_advantages(rewards, torch.tensor([0, 0, 0]))
        tensor([ 0.1228, -1.0557,  0.9329])
    """
    check_real("rewards", rewards)
    if rewards.ndim != 2:
        raise ValueError(f"rewards: expected shape (B, R), got {tuple(rewards.shape)}")
    check_groups(groups, rewards)
    dtype, eps = accumulation_dtype(rewards.dtype), check_positive("eps", eps)
    factors = _weights(weights, rewards, dtype)
    check_group(group)
    if isinstance(valid, Tensor) and valid.ndim == 1:
        valid = counting(valid, rewards[:, :1].squeeze(1)).unsqueeze(1).expand(rewards.shape)
    counts = counting(valid, rewards)
    parts = rewards.to(dtype), groups.long(), counts.to(torch.uint8)
    (rewards, groups, counts), this_rank = of_all_ranks(parts, group)
    counts = counts != 0
    rewards = kept(rewards, counts)
    check_batch_is_finite(rewards, "a batch that is standardised")
    total = rewards.new_zeros(rewards.shape[:1])
    for column, counted, weight in zip(rewards.unbind(1), counts.unbind(1), factors, strict=True):
        samples, places = in_groups(column, groups, counted, counted)
        total = total + weight * (samples.centred() / (samples.deviation() + eps))[places]
    return (total / (batch_deviation(total, counts.any(1)) + eps))[this_rank]


def _weights(
    weights: Tensor | Sequence[float] | None, rewards: Tensor, dtype: torch.dtype
) -> Tensor:
    """(R,) on the device of the rewards."""
    number = rewards.shape[1]
    if weights is None:
        return rewards.new_ones(number, dtype=dtype)
    if isinstance(weights, Tensor):
        check_real("weights", weights)
        check_shape("weights", weights, (number,), "one for each reward")
        check_same_device("weights", weights, "rewards", rewards)
        return weights.to(dtype)
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(
            f"weights: expected a tensor, numbers or None, got {type(weights).__name__}"
        )
    if len(weights) != number:
        raise ValueError(f"weights: expected {number}, one for each reward, got {len(weights)}")
    given = [check_finite("weights", x) for x in weights]
    return torch.tensor(given, dtype=dtype, device=rewards.device)
