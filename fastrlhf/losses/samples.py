"""Samples in order of their groups, and what each takes from the others of its own.

`groups.py`, `gdpo.py` and `pf_ppo.py` check and order their samples with it; `advantage_kinds.py`
has the formulas on the result.

Dims: B samples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_like
from fastrlhf.losses.segments import segment_sums, suffix_scan
from fastrlhf.ops.checks import (
    check_integer,
    check_mask,
    check_same_device,
    check_shape,
    known_on_host,
)
from fastrlhf.ops.ranks import Group, concatenated
from fastrlhf.reference import accumulation_dtype


class Samples(NamedTuple):
    """All samples, those of a group next to each other, and first among them those that count."""

    raw: Tensor  # (B,) rewards, 0 of what does not count
    # (B,) the same minus the first of its group, so that rounding leaves no trace of equal rewards
    rewards: Tensor
    ids: Tensor  # (B,) of groups
    counts: Tensor  # (B,) bool
    lengths: Tensor  # (B,) tokens of each, or whatever else it may be weighted by
    k: int  # samples of one draw, if there is one

    def sums(self, x: Tensor) -> Tensor:
        """Give each sample the sum over those of its group that count."""
        return segment_sums(torch.where(self.counts, x, 0.0), self.ids)

    def largest(self, x: Tensor) -> Tensor:
        """Give each sample the maximum over those of its group that count."""
        x = torch.where(self.counts, x, -torch.inf)
        after = suffix_scan(torch.maximum, x, self.ids)
        before = suffix_scan(torch.maximum, x.flip(0), self.ids.flip(0)).flip(0)
        return torch.maximum(after, before)

    def number(self) -> Tensor:
        """Give each sample the number of those of its group that count, at least 1."""
        return self.sums(torch.ones_like(self.rewards)).clamp(min=1)

    def centred(self) -> Tensor:
        """Rewards minus the mean of the group."""
        mean = self.sums(self.rewards) / self.number()
        return torch.where(self.counts, self.rewards - mean, 0.0)

    def deviation(self) -> Tensor:
        """Give each sample the sample standard deviation of its group."""
        squares = self.sums(self.centred().square())
        return (squares / (self.number() - 1).clamp(min=1)).sqrt()


def in_groups(
    rewards: Tensor,
    groups: Tensor,
    counts: Tensor,
    lengths: Tensor,
    k: int | None = None,
) -> tuple[Samples, Tensor]:
    """Put samples in order of their groups. Returns them, and where each of the given ones is."""
    # Samples that count come first in their group.
    order = torch.logical_not(counts).to(torch.uint8).argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    ids, counts = groups[order], counts[order]
    values = torch.where(counts, rewards[order], 0.0)
    relative = torch.where(counts, values - values[torch.searchsorted(ids, ids)], 0.0)
    return Samples(values, relative, ids, counts, lengths[order], k or 1), order.argsort()


def of_all_ranks(parts: Sequence[Tensor], group: Group | None) -> tuple[Sequence[Tensor], slice]:
    """Join tensors of all ranks along their first dimension, and say which part is this rank's."""
    return (parts, slice(None)) if group is None else concatenated(parts, group)


def batch_deviation(x: Tensor, counts: Tensor) -> Tensor:
    """Sample standard deviation of all that count, 0-d."""
    number = counts.sum().clamp(min=1)
    mean = torch.where(counts, x, 0.0).sum() / number
    squares = torch.where(counts, x - mean, 0.0).square().sum()
    return (squares / (number - 1).clamp(min=1)).sqrt()


def check_groups(groups: Tensor, rewards: Tensor) -> None:
    """Check which group each sample of (B,) or (B, R) rewards is in."""
    check_integer("groups", groups)
    check_shape("groups", groups, (rewards.shape[0],), "one for each sample of rewards")
    check_same_device("groups", groups, "rewards", rewards)


def counting(valid: Tensor | None, rewards: Tensor, name: str = "rewards") -> Tensor:
    """Check and return which rewards count."""
    if valid is None:
        return torch.ones_like(rewards, dtype=torch.bool)
    check_mask("valid", valid)
    check_like("valid", valid, name, rewards)
    return valid != 0


def kept(rewards: Tensor, counts: Tensor) -> Tensor:
    """Return rewards in the dtype of the results, 0 where they do not count."""
    return torch.where(counts, rewards.to(accumulation_dtype(rewards.dtype)), 0.0)


def check_batch_is_finite(rewards: Tensor, reason: str, name: str = "rewards") -> None:
    """Raise ValueError, on the CPU, for a reward that would spoil the whole batch."""
    if known_on_host(rewards) and not rewards.isfinite().all():
        worst = rewards[~rewards.isfinite()][0].item()
        raise ValueError(
            f"{name}: expected finite numbers for {reason}, got {worst}; leave such samples out "
            "with `valid`"
        )
