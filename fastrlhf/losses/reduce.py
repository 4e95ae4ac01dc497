"""Reduce the losses of tokens to one number: the weight that each token has in it.

The policy loss (`policy_arguments.py`), `value.py` and `process_reward.py` take their weights and
means from here.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

from typing import Literal

import torch
from torch import Tensor

from fastrlhf.ops.checks import check_one_of, check_positive, check_real
from fastrlhf.reference import ROWS, Layout

Reduction = Literal["token-mean", "sequence-mean", "sequence-sum", "constant", "none"]
REDUCTIONS = ("token-mean", "sequence-mean", "sequence-sum", "constant")


def check_reduction(
    reduction: str, normalizer: float | Tensor | None, *, may_be_none: bool = False
) -> float | Tensor | None:
    """Return the normalizer, a number as float. Raise unless the reduction exists and the
    normalizer is a positive number, or 0-d tensor; "none", where it may be, has none.
    """
    check_one_of("reduction", reduction, (*REDUCTIONS, *(("none",) if may_be_none else ())))
    if reduction == "none" and normalizer is not None:
        raise ValueError("normalizer: expected None for reduction 'none', which divides nothing")
    if normalizer is None:
        if reduction == "constant":
            raise ValueError(
                "normalizer: expected a number for reduction 'constant' (such as sequences times "
                "the longest completion allowed), got None"
            )
        return None
    if not isinstance(normalizer, Tensor):
        return check_positive("normalizer", normalizer)
    check_real("normalizer", normalizer)
    if normalizer.ndim != 0:
        raise ValueError(
            f"normalizer: expected a number or a 0-d tensor, got {tuple(normalizer.shape)}"
        )
    return normalizer


def token_weights(
    mask: Tensor,
    reduction: str,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
    layout: Layout = ROWS,
) -> Tensor:
    """Give each token of the mask its weight in the reduced loss; 0 outside of the mask."""
    if reduction == "none":
        return mask.to(dtype)
    if isinstance(normalizer, Tensor):
        denominator = normalizer.detach().to(mask.device, dtype)
    elif normalizer is None and reduction == "token-mean":
        denominator = layout.total(mask).to(dtype).clamp(min=1)
    else:
        # Filled on the device, which a copy of the number would have to wait for.
        number = max(layout.sequences(mask), 1) if normalizer is None else normalizer
        denominator = mask.new_full((), number, dtype=dtype)
    if reduction == "sequence-mean":
        lengths = layout.counts(mask).to(dtype).clamp(min=1)
        denominator = layout.spread(denominator * lengths)
    return torch.where(mask, 1 / denominator, 0.0)


def masked_mean(x: Tensor, mask: Tensor, layout: Layout = ROWS) -> Tensor:
    """Average over the mask, whatever lies outside; 0 where the mask is empty."""
    return layout.total(torch.where(mask, x, 0.0)) / layout.total(mask).clamp(min=1)
