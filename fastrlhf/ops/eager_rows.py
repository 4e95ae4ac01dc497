"""The eager backend works on the rows that count, in chunks of a bounded number of logits.

What is computed from a chunk stays in a CPU's cache, and memory does not grow with the batch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .rows import Index

# How many logits of each tensor a chunk has (at least one row).
_CHUNK_LOGITS = 2**20


def chunks(selected: Tensor, vocab: int) -> tuple[Tensor, ...]:
    """Return the indices of the selected rows (N,), in pieces of a bounded number of logits."""
    return selected.nonzero().squeeze(1).split(max(1, _CHUNK_LOGITS // vocab))


def runs_or_chunks(
    selected: Tensor, rows: Tensor, logits_at_once: int | None = None
) -> Iterator[Index]:
    """Yield indices of the selected rows of an (outer, inner, V) view, in pieces of so many logits;
    None: of as many as `chunks` takes.

    An index is a slice, for which no row is copied, where there is one outer block and all of its
    rows are selected.
    """
    size = max(1, (logits_at_once or _CHUNK_LOGITS) // rows.shape[2])
    if rows.shape[0] == 1 and bool(selected.all()):
        yield from (slice(first, first + size) for first in range(0, len(selected), size))
    else:
        index = selected.nonzero().squeeze(1)
        yield from index.split(size) if len(index) else ()


def copied_rows(x: Tensor, index: Tensor) -> Tensor:
    """Copy rows of a (..., V) tensor of any strides; rows are numbered as if it were (N, V)."""
    if x.ndim == 1:
        return x.unsqueeze(0)[index]
    return x[torch.unravel_index(index, x.shape[:-1])]
