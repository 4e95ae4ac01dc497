"""Targets aligned with the logits that predict them.

The targets go into `token_stats.py`, and into all operations that are made of it.
"""

import torch
from torch import Tensor

from .checks import check_ignore_index, check_integer, check_mask, check_same_device, check_shape
from .layout import layout_of

# Marks the tokens that a mask hides. One of -100 that the mask wants is an error, not one of these.
MASKED_OUT = -(2**31)


def shift_targets(
    input_ids: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Shift token ids by one, so that they line up with the logits of a causal language model.

    Eager equivalent: `targets[:, t] = input_ids[:, t + 1] if mask[:, t + 1] else ignore_index`, and
    `targets[:, -1] = ignore_index`, since nothing is known to follow the last token. The shape
    stays, so that the model's logits are used whole, without a slice.

    Args:
        input_ids: (..., T) integer.
        mask: (..., T) bool or 0/1, the tokens to score (those of the completion, not of the prompt
            or the padding); None for all.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last, of
            input_ids (N,) or (1, N): the last token of each predicts nothing.
        ignore_index: what marks a position without a target.

    Returns:
        (..., T) int64 targets; `targets != ignore_index` is the mask of their log-probs. Integers,
        so not differentiable.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit.

    Source: a definition; prediction of the next token.

    Example:
        >>> input_ids = torch.tensor([[5, 6, 7, 8]])
        >>> fastrlhf.shift_targets(input_ids)
        tensor([[   6,    7,    8, -100]])
        >>> fastrlhf.shift_targets(input_ids, mask=torch.tensor([[0, 0, 1, 1]]))
        tensor([[-100,    7,    8, -100]])
    """
    check_integer("input_ids", input_ids)
    if input_ids.ndim == 0:
        raise ValueError("input_ids: expected shape (..., T), got ()")
    ignore_index = check_ignore_index(ignore_index)
    targets = input_ids.long()
    if mask is not None:
        check_mask("mask", mask)
        check_shape("mask", mask, tuple(input_ids.shape), "the shape of input_ids")
        check_same_device("mask", mask, "input_ids", input_ids)
        # Not `mask != 0`, which torch.compile (2.13) inverts here in code for AVX2.
        targets = torch.where(mask.bool(), targets, ignore_index)
    shifted = torch.full_like(targets, ignore_index)
    following = targets[..., 1:]
    if cu_seqlens is not None:
        ids = layout_of("input_ids", input_ids, cu_seqlens).ids(input_ids)
        following = torch.where(ids[..., 1:] == ids[..., :-1], following, ignore_index)
    shifted[..., :-1] = following
    return shifted
