"""What each process of a group computes from its part of a batch, for test_losses_over_ranks.py."""

from inspect import signature
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
    return selections(group, parts[dist.get_rank(group)], calls)


def selections(group: Any, part: Arguments, calls: list[tuple[str, Arguments]]) -> list[Tensor]:
    """Call functions, each of which takes of the tensors those that it has names for."""
    found = []
    for function, options in calls:
        call = getattr(fastrlhf, function)
        named = {name: x for name, x in part.items() if name in signature(call).parameters}
        found.append(call(**named, **options, group=group))
    return found
