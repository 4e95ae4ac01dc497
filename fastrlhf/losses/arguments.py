"""Checks of the arguments that the losses of sequences share."""

import torch
from torch import Tensor

from fastrlhf.losses.ranks import OverRanks
from fastrlhf.ops.checks import (
    check_counts,
    check_floating,
    check_indices_on_host,
    check_integer,
    check_mask,
    check_same_device,
    check_shape,
)
from fastrlhf.ops.layout import layout_of
from fastrlhf.ops.ranks import Group, check_group
from fastrlhf.ops.tracing import being_traced
from fastrlhf.reference import ROWS, Layout


def check_tokens(
    name: str,
    logps: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
) -> Layout:
    """Check numbers of tokens and which of them count, and return how they lie, with a group over
    its ranks.
    """
    check_floating(name, logps)
    check_mask("mask", mask)
    layout = layout_of(name, logps, cu_seqlens, rows="(B, T) with a mask")
    check_shape("mask", mask, tuple(logps.shape), f"the shape of {name}")
    check_same_device("mask", mask, name, logps)
    if (group := check_group(group)) is None:
        return layout
    if logps.ndim == 1:  # on one rank, N may be B
        raise ValueError(
            f"{name}: expected packed tokens (1, N) with a group, for (N,) could be taken for (B,) "
            f"of sequences, got {tuple(logps.shape)}"
        )
    return OverRanks(layout, group)


def check_pairs(
    name: str,
    logps: Tensor,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
) -> Layout:
    """Check sequence log-probs, or with a mask token log-probs, and the indices of pairs into
    them. Returns how the tokens lie, if there are any.
    """
    layout = ROWS if mask is None else check_tokens(name, logps, mask, cu_seqlens, group)
    check_floating(name, logps)
    if mask is None and logps.ndim != 1:
        hint = (
            "; token log-probs (B, T) need a mask, packed ones cu_seqlens"
            if name == "pi_logps"
            else ""
        )
        raise ValueError(f"{name}: expected shape (B,), got {tuple(logps.shape)}{hint}")
    check_pair_indices(name, logps, yw_idxs, yl_idxs, layout)
    return layout


def check_pair_indices(
    name: str,
    tokens: Tensor,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    layout: Layout = ROWS,
    names: tuple[str, str] = ("yw_idxs", "yl_idxs"),
) -> None:
    """Check the indices of pairs, of these names, into the sequences of a tensor."""
    for index_name, index in zip(names, (yw_idxs, yl_idxs), strict=True):
        check_integer(index_name, index)
        if index.ndim != 1:
            raise ValueError(f"{index_name}: expected shape (P,), got {tuple(index.shape)}")
        check_same_device(index_name, index, name, tokens)
        if not being_traced():
            sequences = layout.sequences(tokens)
            check_indices_on_host(index_name, index, sequences, f"sequences of {name}")
    check_shape(names[1], yl_idxs, tuple(yw_idxs.shape), f"the shape of {names[0]}")


def every_token(name: str, logps: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Make a mask of all packed tokens, none of which is padding. Rows need a mask of their own."""
    check_floating(name, logps)
    if cu_seqlens is None:
        raise TypeError("mask: expected a tensor, got NoneType")
    return torch.ones_like(logps, dtype=torch.bool)


def check_lengths(lengths: Tensor | None, logps: Tensor, reason: str) -> None:
    if lengths is None:
        raise ValueError(f"lengths: expected a tensor of shape (B,), or a mask: {reason}")
    check_counts("lengths", lengths)
    check_shape("lengths", lengths, (logps.shape[0],), "one for each sequence")
    check_same_device("lengths", lengths, "log-probs", logps)
