"""The rows that the eager backend works on: the selected ones, a bounded number at a time.

What is computed from a chunk stays in a CPU's cache, and memory does not depend on the batch.
"""

import torch
from torch import Tensor

# Logits of each tensor that are held at once.
_CHUNK_LOGITS = 2**20


def chunks(selected: Tensor, vocab: int) -> tuple[Tensor, ...]:
    """Indices of the selected rows (N,), in pieces of a bounded number of logits."""
    return selected.nonzero().squeeze(1).split(max(1, _CHUNK_LOGITS // vocab))


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Copy rows of a (..., V) tensor, numbered as if it were flat, whatever its strides."""
    if x.ndim == 1:
        return x.unsqueeze(0)[rows]
    return x[torch.unravel_index(rows, x.shape[:-1])]


def of_rows(value: float | Tensor, rows: Tensor) -> float | Tensor:
    """Take what belongs to the rows, if it is not the same for all."""
    return value[rows] if isinstance(value, Tensor) else value
