"""Weighted sums of rows of a matrix, for the gradients of the logits of kept ids.

Each row of the result is a sum of factor·row, whose rows are given by their numbers in the matrix.
The terms of a sum are added in an order that depends on this sum alone, without atomics, so that it
has the same bits in each run and in each batch.

Dims: M rows that are added up, K their width.
"""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from . import compiled_kept
from .add_at import add_at
from .backend import backend_of
from .compiled import NotCompiled
from .linear_head import QuantizedWeight, Weight

# How many elements of rows are gathered at a time.
_GATHERED = {"cpu": 2**21}
_GPU_GATHERED = 2**26


class SortedSums(NamedTuple):
    """M pairs of a row of the source and the row of the result that it is added to."""

    order: Tensor  # (M,) numbers of the pairs, sorted stably by the row of the result
    into: Tensor  # (M,) the row of the result of each pair, in the order given
    source: Tensor  # (M,) the row of the source of each pair, in the order given
    size: int  # rows of the result

    @property
    def bounds(self) -> Tensor:
        """Return where in `order` the pairs of each row of the result begin, and where those of the
        last one end: (size + 1,).
        """
        every = torch.arange(self.size + 1, device=self.into.device)
        return torch.searchsorted(self.into[self.order], every)


def sorted_sums(into: Tensor, source: Tensor, size: int) -> SortedSums:
    return SortedSums(into.argsort(stable=True), into, source, size)


def add_weighted_rows(
    out: Tensor,
    factors: Tensor,
    source: Weight,
    sums: SortedSums,
    impl: str,
    *,
    operands: torch.dtype,
) -> None:
    """Write the sums of factor·row, over the pairs of each row, into `out` (size, K) of zeros. A
    sum is rounded once. Pairs whose factor (of factors (M,)) is 0 cost nothing. Rows of the source
    are first rounded to `operands`, the dtype that a matmul would have in place of this; those of a
    quantized source are dequantized, a few at a time.
    """
    if isinstance(source, Tensor) and by_kernel(source, len(factors), impl):
        from fastrlhf.kernels.kept_ids import sum_weighted_rows

        sum_weighted_rows(
            out, factors, source, sums.order, sums.bounds, sums.source, operands=operands
        )  # fmt: skip
        return
    order = sums.order[factors[sums.order] != 0]
    # `total` has only the rows that something is added to, in the precision of sums.
    rows, place = sums.into[order].unique_consecutive(return_inverse=True)
    total = factors.new_zeros((len(rows), out.shape[1]))
    backend = backend_of(impl, out, order.numel() * out.shape[1])
    at_a_time = rows_at_a_time(out)
    for first in range(0, len(order), at_a_time):
        some = order[first : first + at_a_time]
        products = _weighted_rows(source, sums.source[some], factors[some], operands, backend)
        add_at(total, place[first : first + at_a_time], products)
    out[rows] = total.to(out.dtype)


def _weighted_rows(
    source: Weight, numbers: Tensor, factors: Tensor, operands: torch.dtype, backend: str
) -> Tensor:
    # Where rows are to be rounded to another dtype first, the compiler would leave that out.
    if backend == "compiled" and isinstance(source, Tensor) and source.dtype == operands:
        with contextlib.suppress(NotCompiled):
            return compiled_kept.weighted(source, numbers, factors)
    rows = rows_of_weight(source, numbers).to(operands)
    return rows.to(factors.dtype).mul(factors.unsqueeze(1))


def by_kernel(source: Tensor, pairs: int, impl: str) -> bool:
    """Whether a Triton kernel does the work, for so many pairs."""
    return pairs > 0 and backend_of(impl, source, pairs * source.shape[1]) == "triton"


def rows_at_a_time(matrix: Tensor) -> int:
    numbers = _GATHERED.get(matrix.device.type, _GPU_GATHERED)
    return max(1, numbers // max(1, matrix.shape[1]))


def rows_of_weight(weight: Weight, ids: Tensor) -> Tensor:
    return weight.rows_at(ids) if isinstance(weight, QuantizedWeight) else weight[ids]
