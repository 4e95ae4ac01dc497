"""Which items a step of training takes, and an update of it."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def draw(items: Sequence[T], step: int, count: int, seed: int) -> list[T]:
    """Take the items of a step: all of them in random order, then in another one, and so on.

    They depend on nothing but the arguments, so a resumed run goes on where it was.
    """
    drawn = []
    for number in range(step * count, (step + 1) * count):
        passes, place = divmod(number, len(items))
        # A seed of its own for each pass: runs with neighbouring seeds share none.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + passes)
        drawn.append(items[int(torch.randperm(len(items), generator=generator)[place])])
    return drawn


def minibatches(data: dict[str, Tensor], count: int) -> Iterator[dict[str, Tensor]]:
    """Cut the sequences, in random order, into parts of about the same size."""
    rows = torch.randperm(len(data["input_ids"]))
    for part in rows.tensor_split(min(count, len(rows))):
        yield {name: value[part] for name, value in data.items()}
