"""Checks of the arguments that the losses of sequences share."""

import torch
from torch import Tensor

from fastrlhf.ops.checks import (
    check_counts,
    check_floating,
    check_indices_on_host,
    check_integer,
    check_mask,
    check_same_device,
    check_shape,
)


def check_tokens(name: str, logps: Tensor, mask: Tensor) -> None:
    check_floating(name, logps)
    check_mask("mask", mask)
    if logps.ndim != 2:
        raise ValueError(f"{name}: expected shape (B, T) with a mask, got {tuple(logps.shape)}")
    check_shape("mask", mask, tuple(logps.shape), f"the shape of {name}")
    check_same_device("mask", mask, name, logps)


def check_pairs(
    name: str, logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, mask: Tensor | None
) -> None:
    """Check sequence log-probs, or with a mask token log-probs, and the indices of pairs into
    them.
    """
    if mask is not None:
        check_tokens(name, logps, mask)
    check_floating(name, logps)
    if mask is None and logps.ndim != 1:
        hint = "; token log-probs (B, T) need a mask" if name == "pi_logps" else ""
        raise ValueError(f"{name}: expected shape (B,), got {tuple(logps.shape)}{hint}")
    check_pair_indices(name, logps, yw_idxs, yl_idxs)


def check_pair_indices(name: str, sequences: Tensor, yw_idxs: Tensor, yl_idxs: Tensor) -> None:
    """Check the indices of pairs into the first dimension of a tensor."""
    for index_name, index in (("yw_idxs", yw_idxs), ("yl_idxs", yl_idxs)):
        check_integer(index_name, index)
        if index.ndim != 1:
            raise ValueError(f"{index_name}: expected shape (P,), got {tuple(index.shape)}")
        check_same_device(index_name, index, name, sequences)
        if not torch.compiler.is_compiling():
            check_indices_on_host(index_name, index, sequences.shape[0], f"sequences of {name}")
    check_shape("yl_idxs", yl_idxs, tuple(yw_idxs.shape), "the shape of yw_idxs")


def check_lengths(lengths: Tensor | None, logps: Tensor, reason: str) -> None:
    if lengths is None:
        raise ValueError(f"lengths: expected a tensor of shape (B,), or a mask: {reason}")
    check_counts("lengths", lengths)
    check_shape("lengths", lengths, (logps.shape[0],), "one for each sequence")
    check_same_device("lengths", lengths, "log-probs", logps)
