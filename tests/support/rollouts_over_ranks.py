"""What each process of a group computes from its part of a batch, for test_rollout_correction.py
and test_selection.py.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor

import fastrlhf

from .losses_over_ranks import Arguments, part_of


def corrections_of_part(
    group: Any,
    arguments: Arguments,
    calls: list[tuple[str, Arguments]],
    owner: Tensor,
    packed: bool,
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Call functions, one after the other, on this rank's part of the tokens."""
    part = part_of(arguments, owner, dist.get_rank(group), packed)
    return [
        getattr(fastrlhf, function)(**part, **options, group=group) for function, options in calls
    ]


def selections_of_part(
    group: Any, parts: list[Arguments], calls: list[tuple[str, Arguments]]
) -> list[Tensor]:
    """Call functions on the tensors of this rank, of which each takes those it has names for."""
    part = parts[dist.get_rank(group)]
    names = {"top_entropy_mask": ("entropy", "mask")}
    return [
        getattr(fastrlhf, function)(
            **{k: part[k] for k in names.get(function, ("logprobs", "advantages", "mask"))},
            **options, group=group,
        )
        for function, options in calls
    ]  # fmt: skip
