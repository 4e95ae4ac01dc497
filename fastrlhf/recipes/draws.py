"""Choose the items that a step of training takes, and the minibatches of its updates."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def draw(items: Sequence[T], step: int, count: int, seed: int) -> list[T]:
    """Take `count` items for a step.

    Over the steps, all items are drawn once in random order, then all again in another order, and
    so on. The result depends only on the arguments, so a resumed run continues where it stopped.
    """
    drawn = []
    for number in range(step * count, (step + 1) * count):
        passes, place = divmod(number, len(items))
        # Each pass over the items has its own seed. The factor keeps runs with neighbouring seeds
        # from using the same ones.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + passes)
        drawn.append(items[int(torch.randperm(len(items), generator=generator)[place])])
    return drawn


def minibatches(data: dict[str, Tensor], count: int) -> Iterator[dict[str, Tensor]]:
    """Cut the sequences, in random order, into `count` parts of about the same size."""
    rows = torch.randperm(len(data["input_ids"]))
    for part in rows.tensor_split(min(count, len(rows))):
        yield {name: value[part] for name, value in data.items()}
