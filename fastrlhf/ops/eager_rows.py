"""Which rows the eager backend works on at once: the selected ones, a bounded number at a time.

What is computed from a chunk stays in a CPU's cache, and memory does not depend on the batch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .rows import Index

# Logits of each tensor that are held at once (at least one row).
_CHUNK_LOGITS = 2**20


def chunks(selected: Tensor, vocab: int) -> tuple[Tensor, ...]:
    """Indices of the selected rows (N,), in pieces of a bounded number of logits."""
    return selected.nonzero().squeeze(1).split(max(1, _CHUNK_LOGITS // vocab))


def runs_or_chunks(
    selected: Tensor, rows: Tensor, logits_at_once: int | None = None
) -> Iterator[Index]:
    """Indices of the selected rows of an (outer, inner, V) view, in pieces of so many logits, or of
    as many as `chunks` takes.

    A slice, which needs no copy, where every row of a single outer block is selected.
    """
    size = max(1, (logits_at_once or _CHUNK_LOGITS) // rows.shape[2])
    if rows.shape[0] == 1 and bool(selected.all()):
        yield from (slice(first, first + size) for first in range(0, len(selected), size))
    else:
        index = selected.nonzero().squeeze(1)
        yield from index.split(size) if len(index) else ()


def copied_rows(x: Tensor, index: Tensor) -> Tensor:
    """Copy rows of a (..., V) tensor, numbered as if it were flat, whatever its strides."""
    if x.ndim == 1:
        return x.unsqueeze(0)[index]
    return x[torch.unravel_index(index, x.shape[:-1])]
