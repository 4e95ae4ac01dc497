"""The definition of `softmax_fisher_product`, and the sums from which it is computed.

Dims: V vocabulary, ... any leading shape.
"""

import torch
from torch import Tensor

from .distributions import of_live_rows
from .effective_logits import column_of, divided, exp_of_sums, finite_base, is_one, row_sums
from .scalars import accumulation_dtype


def fisher_product(
    logits: Tensor, tangent: Tensor, mask: Tensor | None, *, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Compute p⊙(u - E_p[u])/T² (..., V) and Var_p(u)/T² (...), 0 where the mask is 0."""
    dtype = accumulation_dtype(torch.promote_types(logits.dtype, tangent.dtype))
    rows_t = column_of(temperature, dtype)
    z, u = (of_live_rows(x, mask).to(dtype) for x in (logits, tangent))
    peak = z.detach().amax(-1, keepdim=True)
    weight = fisher_weight(z, peak, rows_t)
    total, moment = row_sums(weight), row_sums(fisher_moment(weight, u))
    product, centred = fisher_product_of_sums(weight, u, rows_t, total, moment)
    return product, row_sums(product * centred).squeeze(-1)


def fisher_weight(z: Tensor, peak: Tensor, rows_t: float | Tensor) -> Tensor:
    """Compute e^((z - peak)/T) of columns (..., V) of rows whose peaks and temperatures are
    (..., 1).
    """
    return exp_of_sums(divided(z - finite_base(peak), rows_t))


def fisher_moment(weight: Tensor, u: Tensor) -> Tensor:
    """Compute the terms whose sum, divided by the sum of weights, is E_p[u]."""
    return weight * where_likely(weight, u)


def fisher_product_of_sums(
    weight: Tensor, u: Tensor, rows_t: float | Tensor, total: Tensor, moment: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the product (..., V) and u - E_p[u], given the sums (..., 1) of weights and moments.
    The quadratic form is the sum over a row of the one times the other.
    """
    share = 1 / torch.where(total == 0, 1.0, total)
    centred = where_likely(weight, u) - moment * share
    product = weight * share * centred
    product = product if is_one(rows_t) else product / rows_t**2
    return product, centred


def where_likely(weight: Tensor, u: Tensor) -> Tensor:
    """Return u, but 0 for words of probability 0, which add nothing whatever their tangent is."""
    return torch.where(weight == 0, 0.0, u)
