"""Row work of `softmax_fisher_product` in eager PyTorch.

The launcher has the name and arguments of that in `kernels/fisher.py`, and works on a bounded
number of rows at a time.

Dims: N rows, V vocabulary.
"""

import torch
from torch import Tensor

from fastrlhf import reference

from .eager_rows import chunks, copied_rows
from .rows import of_rows, zero_inactive


def fisher_product(
    logits: Tensor,
    tangent: Tensor,
    mask: Tensor,
    *,
    temperature: float | Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute the product (N, V) in the given dtype, and the quadratic form (N,), of logits and
    tangent (outer, inner, V); 0 where the mask is 0.
    """
    product, quadratic = room_for_product(logits, tangent, mask, dtype)
    for index in chunks(mask, logits.shape[2]):
        of_chunk, quadratic[index] = reference.fisher_product(
            copied_rows(logits, index), copied_rows(tangent, index), None,
            temperature=of_rows(temperature, index),
        )  # fmt: skip
        product[index] = of_chunk.to(dtype)
    return product, quadratic


def room_for_product(
    logits: Tensor, tangent: Tensor, mask: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Make tensors for the product and the quadratic form, with zeros where the mask is 0."""
    acc = reference.accumulation_dtype(torch.promote_types(logits.dtype, tangent.dtype))
    product = torch.empty(mask.numel(), logits.shape[2], dtype=dtype, device=mask.device)
    zero_inactive(product, mask)
    return product, torch.zeros(mask.numel(), dtype=acc, device=mask.device)
