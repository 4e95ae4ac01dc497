"""Checks of arguments that several losses share: tokens with their mask, and pairs of sequences.

What a single argument has to be, whatever it is for (a dtype, a range, a mask of 0 and 1), is
checked by `fastrlhf.ops.checks`. What policy losses alone take is in `policy_arguments.py`, what
operations on hidden states take in `fastrlhf.ops.linear_arguments`.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed, P pairs.
"""

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


def check_like(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Check that a tensor has the shape of another one, and lies where that does."""
    check_shape(name, x, tuple(like.shape), f"the shape of {like_name}")
    check_same_device(name, x, like_name, like)


def check_tokens(
    name: str,
    logps: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
) -> Layout:
    """Check numbers of tokens, (B, T) or packed, and the mask of those that count.

    Returns how the tokens lie: in rows or packed, and with a group spread over its ranks.
    """
    check_floating(name, logps)
    check_mask("mask", mask)
    layout = layout_of(name, logps, cu_seqlens, rows="(B, T) with a mask")
    check_like("mask", mask, name, logps)
    if (group := check_group(group)) is None:
        return layout
    if logps.ndim == 1:  # on one rank, N may happen to be B
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
    """Check log-probs of sequences, (B,), or with a mask of tokens, and indices of pairs into the
    sequences. Returns how the tokens lie.
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
    """Check the indices of pairs, of these names, into the sequences of a tensor called `name`."""
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
    """Make a mask of all packed tokens, none of which is padding.

    Raises:
        TypeError: tokens in rows, whose padding only a mask can tell.
    """
    check_floating(name, logps)
    if cu_seqlens is None:
        raise TypeError("mask: expected a tensor, got NoneType")
    return torch.ones_like(logps, dtype=torch.bool)


def check_lengths(lengths: Tensor | None, logps: Tensor, reason: str) -> None:
    """Check the numbers of tokens (B,) that a loss of log-probs (B,) needs for a reason."""
    if lengths is None:
        raise ValueError(f"lengths: expected a tensor of shape (B,), or a mask: {reason}")
    check_counts("lengths", lengths)
    check_shape("lengths", lengths, (logps.shape[0],), "one for each sequence")
    check_same_device("lengths", lengths, "log-probs", logps)


def check_generator(generator: torch.Generator | None, name: str, tensor: Tensor) -> None:
    """Check a generator of random numbers, if there is one, for a tensor called `name`."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: expected a torch.Generator or None, got {type(generator).__name__}"
        )
    if generator.device.type != tensor.device.type:
        raise ValueError(
            f"generator: expected on {tensor.device}, the device of {name}, got {generator.device}"
        )
