"""Heads whose weight is a DTensor, which tensor parallelism cuts along the vocabulary.

Hooks around such a head (torch's `ColwiseParallel`) hand it hidden states as a DTensor and expect
one back; transformers puts a forward in its place that does the same within. The work in place of
the head is done on plain tensors, of the rows of the weight that a rank has.

Dims: B sequences, T tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrlhf.ops.ranks import concatenated
from fastrlhf.ops.sharded import is_dtensor
from fastrlhf.ops.vocabulary_part import VocabularyPart


def plain_tensors(
    hidden: Any, head_forward: Callable[..., Any]
) -> tuple[Tensor, Callable[..., Any], Callable[[Tensor], Any]]:
    """Return hidden states as a plain tensor that is whole on every rank, a head's own forward that
    takes such ones, and a function that gives an output (..., V) the form in which the head would
    have returned it.
    """
    if not is_dtensor(hidden):
        return hidden, head_forward, lambda made: made
    from torch.distributed.tensor import DTensor, Replicate

    mesh = hidden.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    # Every rank makes the same of its copy, so that the gradients are the same too.
    whole = hidden.redistribute(placements=everywhere).to_local(grad_placements=everywhere)

    def as_dtensor(x: Tensor) -> Any:
        return DTensor.from_local(x, mesh, everywhere, run_check=False)

    return whole, lambda x: head_forward(as_dtensor(x)), as_dtensor


def this_ranks(x: Any) -> Tensor:
    """What this rank has of a tensor, differentiably."""
    return x.to_local() if is_dtensor(x) else x


def own_columns(logits: Any, part: VocabularyPart | None) -> Tensor:
    """This rank's columns of logits (..., V) that a tensor parallel head made: whole, a DTensor, or
    this rank's only.
    """
    if is_dtensor(logits):
        logits = logits.full_tensor()
    if part is None or logits.shape[-1] != part.vocab:
        return logits
    return logits[..., part.columns]


def of_all_ranks(made: Any, part: VocabularyPart | None) -> Tensor:
    """What a model made of (..., V) numbers, of which it may return only this rank's columns."""
    if is_dtensor(made):
        return made.full_tensor()
    if part is None or made.shape[-1] == part.vocab or made.shape[-1] != part.size:
        return made
    (columns,), _ = concatenated([made.movedim(-1, 0).contiguous()], part.group)
    return torch.movedim(columns, 0, -1)


def rows_of_rank(x: Tensor, part: VocabularyPart) -> Tensor:
    """This rank's rows of a (V, r) that every rank has, whose gradient is complete on each."""
    return _RowsOfRank.apply(x, part)


class _RowsOfRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, part):
        ctx.group = part.group
        return x[part.columns].clone()

    @staticmethod
    def backward(ctx, d_rows):
        (d_x,), _ = concatenated([d_rows.contiguous()], ctx.group)
        return d_x, None
