"""Compiled functions of rows that are given by their numbers in a matrix.

`kept_logits.py` takes their products from here, and `weighted_rows.py` rows times factors.

Dims: M pairs of rows, K their width.
"""

from collections.abc import Iterator

from torch import Tensor

from fastrlhf.reference import accumulation_dtype

from .compiled import RowFunction
from .compiled_rows import added, sums_in_parts


def _dots(matrix: Tensor, numbers: Tensor, other: Tensor, others: Tensor) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(matrix.dtype)
    return sums_in_parts(_product, (), matrix[numbers].to(dtype), other[others].to(dtype))


def _product(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    yield a * b


def _weighted(matrix: Tensor, numbers: Tensor, factors: Tensor) -> tuple[Tensor, ...]:
    return (matrix[numbers].to(factors.dtype) * factors.unsqueeze(1),)


_DOTS = RowFunction(_dots, "mv n mv n")
_WEIGHTED = RowFunction(_weighted, "mv n n")


def dots(matrix: Tensor, numbers: Tensor, other: Tensor, others: Tensor) -> Tensor:
    """Multiply M rows of one matrix (., K) by as many of another: (M,).

    Raises:
        NotCompiled: there is no compiled function.
    """
    return added(_DOTS(_rows(matrix), numbers, _rows(other), others))[0]


def weighted(matrix: Tensor, numbers: Tensor, factors: Tensor) -> Tensor:
    """Multiply M rows of a matrix (., K) by a factor each: (M, K) in the factors' dtype.

    Raises:
        NotCompiled: there is no compiled function.
    """
    return _WEIGHTED(_rows(matrix), numbers, factors)[0]


def _rows(matrix: Tensor) -> Tensor:
    """Copy a matrix whose rows have gaps between their numbers, which compiled code cannot read."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
