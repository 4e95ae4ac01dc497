"""Heads whose weight is a DTensor, which tensor parallelism cuts along the vocabulary.

Hooks around such a head (torch's `ColwiseParallel`) give it hidden states as a DTensor and expect a
DTensor back; transformers replaces the head's forward by one that does the same inside. The work
that is done in place of the head takes plain tensors, and this rank's rows of the weight.

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
    """Return three things: the hidden states as a plain tensor, whole on every rank; the head's own
    forward, made to take such a tensor; and a function that turns an output (..., V) into the form
    in which the head would have returned it.
    """
    if not is_dtensor(hidden):
        return hidden, head_forward, lambda made: made
    from torch.distributed.tensor import DTensor, Replicate

    mesh = hidden.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    # Every rank computes the same from its copy, so that its gradients are the same too.
    whole = hidden.redistribute(placements=everywhere).to_local(grad_placements=everywhere)

    def as_dtensor(x: Tensor) -> Any:
        return DTensor.from_local(x, mesh, everywhere, run_check=False)

    return whole, lambda x: head_forward(as_dtensor(x)), as_dtensor


def this_ranks(x: Any) -> Tensor:
    """Return this rank's part of a DTensor, differentiably; another tensor as it is."""
    return x.to_local() if is_dtensor(x) else x


def own_columns(logits: Any, part: VocabularyPart | None) -> Tensor:
    """Return this rank's columns of logits (..., V) of a tensor parallel head, which may have
    returned all columns, a DTensor, or this rank's columns only.
    """
    if is_dtensor(logits):
        logits = logits.full_tensor()
    if part is None or logits.shape[-1] != part.vocab:
        return logits
    return logits[..., part.columns]


def of_all_ranks(made: Any, part: VocabularyPart | None) -> Tensor:
    """Return all columns of what a model made of (..., V) numbers, of which it may have returned
    only this rank's columns.
    """
    if is_dtensor(made):
        return made.full_tensor()
    if part is None or made.shape[-1] == part.vocab or made.shape[-1] != part.size:
        return made
    (columns,), _ = concatenated([made.movedim(-1, 0).contiguous()], part.group)
    return torch.movedim(columns, 0, -1)


def rows_of_rank(x: Tensor, part: VocabularyPart) -> Tensor:
    """Take this rank's rows of a (V, r) tensor that every rank has. The gradient of the tensor is
    complete on every rank.
    """
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
