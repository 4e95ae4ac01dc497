"""Logits of kept ids (see `kept_ids.py`) from hidden states.

Such a logit is the product of a token's hidden state with one row of the head's weight. In the
backward, the gradient of a hidden state is a weighted sum of the rows that its token keeps, and the
gradient of a row of the weight is a weighted sum of the hidden states whose tokens keep it.
`weighted_rows.py` adds up both, in an order that depends on the sum alone, so that it has the same
bits in each run and in each batch. Rows whose factor is exactly 0 are not read.

Dims: M kept ids of all tokens, U hidden states, K their width, V vocabulary.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.reference import accumulation_dtype, row_sums

from . import compiled_kept
from .add_at import add_at
from .backend import backend_of, under_transform
from .compiled import NotCompiled
from .linear_head import Weight
from .weighted_rows import (
    add_weighted_rows,
    by_kernel,
    rows_at_a_time,
    rows_of_weight,
    sorted_sums,
)


class KeptRows(NamedTuple):
    """The pairs of a hidden state and a row of the weight whose product is a logit."""

    state: Tensor  # (M,) numbers of hidden states
    ids: Tensor  # (M,) numbers of rows of the weight
    wanted: Tensor  # (M,) bool: whether the logit is used; if not, it is 0 and nothing is read
    # Rows of the weight are rounded to this dtype: that of a matmul of all logits in place of this,
    # which autocast may decide.
    operands: torch.dtype


def kept_logits(
    hidden: Tensor, weights: list[Weight], bias: Tensor | None, rows: KeptRows, impl: str
) -> Tensor:
    """Multiply hidden states (U, K) by the kept rows of a weight, which comes in column blocks.
    Returns (M,) in fp32 or fp64, 0 for logits that are not wanted.
    """
    if under_transform(hidden):
        return _definition(hidden, weights, bias, rows)
    return _KeptLogits.apply(hidden, bias, rows, impl, *weights)


class _KeptLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, bias, rows, impl, *weights):
        ctx.rows, ctx.impl = rows, impl
        ctx.codes = [None if isinstance(weight, Tensor) else weight for weight in weights]
        dense = [weight if isinstance(weight, Tensor) else None for weight in weights]
        ctx.save_for_backward(hidden, bias, *dense)
        return _products(hidden, list(weights), bias, rows, impl)

    @staticmethod
    def backward(ctx, d_logits):
        hidden, bias, *dense = ctx.saved_tensors
        weights = [code or x for code, x in zip(ctx.codes, dense, strict=True)]
        wanted = ctx.needs_input_grad
        wants = (wanted[0], wanted[1], *wanted[4:])
        if torch.is_grad_enabled() or under_transform(d_logits):
            gradients = _differentiable_gradients(hidden, bias, weights, ctx.rows, d_logits, wants)
        else:
            gradients = _gradients(hidden, bias, weights, ctx.rows, d_logits, wants, ctx.impl)
        d_hidden, d_bias, *d_weights = gradients
        return d_hidden, d_bias, None, None, *d_weights


def _products(
    hidden: Tensor, weights: list[Weight], bias: Tensor | None, rows: KeptRows, impl: str
) -> Tensor:
    dtype = accumulation_dtype(hidden.dtype)
    logits = torch.zeros(rows.ids.shape, dtype=dtype, device=hidden.device)
    first = 0
    for weight in weights:
        block = hidden[:, first : first + weight.shape[1]]
        first += weight.shape[1]
        if isinstance(weight, Tensor) and by_kernel(weight, rows.ids.numel(), impl):
            from fastrlhf.kernels.kept_ids import add_kept_products

            add_kept_products(
                logits, block, weight, rows.state, rows.ids, rows.wanted, operands=rows.operands
            )
            continue
        wanted = rows.wanted.nonzero().squeeze(1)
        for some, products in _products_of(block, weight, rows, wanted, impl):
            logits[some] += products
    if bias is not None and len(bias):
        logits += torch.where(rows.wanted, bias[rows.ids], 0.0)
    return logits


def _products_of(
    hidden: Tensor, weight: Weight, rows: KeptRows, wanted: Tensor, impl: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the numbers of some wanted pairs and their products, a bounded number at a time."""
    backend = backend_of(impl, hidden, wanted.numel() * hidden.shape[1])
    compiled = backend == "compiled" and isinstance(weight, Tensor) and wanted.numel() > 0
    # Where rows are to be rounded to another dtype first, the compiler would leave that out.
    if compiled and weight.dtype == rows.operands:
        assert isinstance(weight, Tensor)
        with contextlib.suppress(NotCompiled):
            yield wanted, compiled_kept.dots(hidden, rows.state[wanted], weight, rows.ids[wanted])
            return
    dtype = accumulation_dtype(hidden.dtype)
    for some in wanted.split(rows_at_a_time(hidden)) if wanted.numel() else ():
        ours = hidden[rows.state[some]].to(dtype)
        theirs = rows_of_weight(weight, rows.ids[some]).to(rows.operands).to(dtype)
        yield some, row_sums(ours.mul_(theirs)).view(-1)


def _gradients(
    hidden: Tensor,
    bias: Tensor | None,
    weights: list[Weight],
    rows: KeptRows,
    d_logits: Tensor,
    wants: tuple[bool, ...],
    impl: str,
) -> list[Tensor | None]:
    """Gradients of hidden states, bias and weights; None for those that are not wanted."""
    d_logits = torch.where(rows.wanted, d_logits, 0.0).contiguous()
    gradients: list[Tensor | None] = [None, None]
    if wants[0]:
        d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        by_state, gradients[0] = sorted_sums(rows.state, rows.ids, len(hidden)), d_hidden
    if wants[1]:
        assert bias is not None
        totals = d_logits.new_zeros(bias.shape)
        if len(bias):  # where ranks share the vocabulary, one may have no row of it
            add_at(totals, rows.ids, d_logits)
        gradients[1] = totals.to(bias.dtype)
    by_id = None
    first = 0
    for weight, wanted in zip(weights, wants[2:], strict=True):
        columns = slice(first, first + weight.shape[1])
        first = columns.stop
        if wants[0]:
            add_weighted_rows(
                d_hidden[:, columns], d_logits, weight, by_state, impl, operands=rows.operands
            )
        gradients.append(None)
        if wanted:
            assert isinstance(weight, Tensor)
            if by_id is None:
                by_id = sorted_sums(rows.ids, rows.state, len(weight))
            d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
            ours = hidden[:, columns]
            add_weighted_rows(d_weight, d_logits, ours, by_id, impl, operands=hidden.dtype)
            gradients[-1] = d_weight
    return gradients


def _definition(
    hidden: Tensor, weights: list[Weight], bias: Tensor | None, rows: KeptRows
) -> Tensor:
    """Compute the logits in plain PyTorch, which torch.func can differentiate and batch."""
    dtype = accumulation_dtype(hidden.dtype)
    kept = torch.cat([rows_of_weight(weight, rows.ids) for weight in weights], dim=1)
    kept = kept.to(rows.operands).to(dtype)
    ours = torch.where(rows.wanted.unsqueeze(1), hidden[rows.state], 0.0).to(dtype)
    logits = (ours * kept).sum(-1)
    return logits if bias is None else logits + torch.where(rows.wanted, bias[rows.ids], 0.0)


def _differentiable_gradients(
    hidden: Tensor,
    bias: Tensor | None,
    weights: list[Any],
    rows: KeptRows,
    d_logits: Tensor,
    wants: tuple[bool, ...],
) -> list[Tensor | None]:
    """Compute the gradients by autograd, so that they can be differentiated again, or batched."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Gradients are taken with respect to views of the inputs: where one input was computed from
        # another, autograd stops at the view and does not follow that path.
        inputs = [x.view_as(x) if isinstance(x, Tensor) else x for x in (hidden, bias, *weights)]
        logits = _definition(inputs[0], inputs[2:], inputs[1], rows)
    leaves = [x for x, want in zip(inputs, wants, strict=True) if want]
    gradients = iter(torch.autograd.grad(logits, leaves, d_logits, create_graph=again))
    return [next(gradients) if want else None for want in wants]
