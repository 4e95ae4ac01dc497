"""Row work of `softmax_fisher_product` by compiled functions (see `compiled_rows.py`).

The launcher is named as that of `eager_fisher`, which does all of the work where a function cannot
be compiled.

Dims: N rows, of which n count, V columns.
"""

import contextlib

import torch
from torch import Tensor

from fastrlhf import reference

from . import eager_fisher
from .compiled import NotCompiled, RowFunction
from .compiled_rows import added, by_number, chunks, column, into_rows, scaling, sums_in_parts
from .eager_fisher import room_for_product


def _fisher_product(
    out: Tensor,
    logits: Tensor,
    numbers: Tensor,
    tangent: Tensor,
    numbers_of_tangent: Tensor,
    temperature: Tensor | None,
) -> tuple[Tensor, ...]:
    z, u = _sides(logits, numbers, tangent, numbers_of_tangent)
    peak, rows_t = z.amax(-1, keepdim=True), column(temperature)
    sums = sums_in_parts(_fisher_moments, (peak, rows_t), z, u)
    total, moment, _ = (x.unsqueeze(-1) for x in added(sums))
    weight = reference.fisher_weight(z, peak, rows_t)
    out.copy_(reference.fisher_product_of_sums(weight, u, rows_t, total, moment)[0])
    return peak.view(-1), *sums


def _fisher_moments(
    z: Tensor, u: Tensor, peak: Tensor, rows_t: float | Tensor
) -> tuple[Tensor, ...]:
    weight = reference.fisher_weight(z, peak, rows_t)
    moment = reference.fisher_moment(weight, u)
    return weight, moment, moment * reference.where_likely(weight, u)


def _fisher_quadratic(
    logits: Tensor,
    numbers: Tensor,
    tangent: Tensor,
    numbers_of_tangent: Tensor,
    peak: Tensor,
    total: Tensor,
    moment: Tensor,
    temperature: Tensor | None,
) -> tuple[Tensor, ...]:
    z, u = _sides(logits, numbers, tangent, numbers_of_tangent)
    of_rows = peak.unsqueeze(-1), column(temperature), total.unsqueeze(-1), moment.unsqueeze(-1)
    return sums_in_parts(_fisher_squares, of_rows, z, u)


def _fisher_squares(
    z: Tensor,
    u: Tensor,
    peak: Tensor,
    rows_t: float | Tensor,
    total: Tensor,
    moment: Tensor,
) -> tuple[Tensor]:
    weight = reference.fisher_weight(z, peak, rows_t)
    product, centred = reference.fisher_product_of_sums(weight, u, rows_t, total, moment)
    return (product * centred,)


def _sides(
    matrix: Tensor, numbers: Tensor, other: Tensor, numbers_of_other: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulation_dtype(torch.promote_types(matrix.dtype, other.dtype))
    return matrix[numbers].to(dtype), other[numbers_of_other].to(dtype)


_FISHER_PRODUCT = RowFunction(_fisher_product, "NV mv n mv n n")
_FISHER_QUADRATIC = RowFunction(_fisher_quadratic, "mv n mv n n n n n")


def fisher_product(
    logits: Tensor,
    tangent: Tensor,
    mask: Tensor,
    *,
    temperature: float | Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute the product (N, V) in the given dtype, and the quadratic form (N,), both 0 where the
    mask is 0; without a compiler, eagerly.
    """
    product, quadratic = room_for_product(logits, tangent, mask, dtype)
    with contextlib.suppress(NotCompiled):
        for index in chunks(mask, logits.shape[2]):
            quadratic[index] = _write_product(
                product.unsqueeze(0), logits, tangent, index, temperature, quadratic.dtype
            )
        return product, quadratic
    return eager_fisher.fisher_product(
        logits, tangent, mask, temperature=temperature, dtype=dtype
    )  # fmt: skip


def _write_product(
    out_rows: Tensor,
    logits: Tensor,
    tangent: Tensor,
    index: Tensor,
    temperature: float | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Write the products of `reference.fisher_product` of some rows to their places in out_rows,
    and return the quadratic forms (n,).

    A quadratic form is (E[u²] - E[u]²)/T², from the same pass; where too much of that difference
    cancels, a second pass computes it.
    """
    of_pieces: list[Tensor] = []

    def write(out: Tensor, some: Tensor) -> None:
        scaled = scaling(temperature, None, 1.0, some, dtype)
        (z, numbers), (u, numbers_of_u) = (by_number(x, some) for x in (logits, tangent))
        peak, *sums = _FISHER_PRODUCT(out, z, numbers, u, numbers_of_u, scaled.temperature)
        total, moment, squares = added(sums)
        mean = moment / total
        quadratic = squares / total - mean.square()
        # An infinite sum of squares may be an overflow, so that its row takes the second pass.
        sure = (quadratic > mean.square()) & (quadratic != torch.inf)
        unsure = (~sure).nonzero().squeeze(1)
        if scaled.temperature is not None:
            quadratic /= scaled.temperature.square()
        if len(unsure):
            of_rows = (None if x is None else x[unsure] for x in (peak, total, moment, *scaled[:1]))
            exactly = _FISHER_QUADRATIC(z, numbers[unsure], u, numbers_of_u[unsure], *of_rows)
            quadratic[unsure] = added(exactly)[0]
        of_pieces.append(quadratic)

    into_rows(out_rows, index, write)
    return torch.cat(of_pieces)
