"""Arguments of the operations from logits (..., V), checked before anything is computed.

What tensors hold is checked where that costs no synchronisation: on the CPU.

Used by `token_stats.py`, `divergence.py`, `fisher.py`, `topk_divergence.py` and `policy_loss.py`;
`linear_arguments.py` is its counterpart for hidden states.
"""

import torch
from torch import Tensor

from .backend import is_batched
from .checks import (
    check_floating,
    check_indices_on_host,
    check_integer,
    check_mask,
    check_same_device,
    check_shape,
)
from .tracing import being_traced
from .transform import Transform, check_temperatures_on_host, checked_transform


def check_logits(logits: Tensor, *, may_be_empty: bool = False) -> None:
    """Check that logits are (..., V). Where ranks share the vocabulary, one of them may have
    nothing of it.

    Raises:
        ValueError: another shape.
    """
    if logits.ndim == 0 or (logits.shape[-1] == 0 and not may_be_empty):
        raise ValueError(f"logits: expected shape (..., V) with V > 0, got {tuple(logits.shape)}")


def checked_logits(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
    *,
    may_be_empty: bool = False,
) -> Transform:
    """Check logits (..., V), their targets (...) and how they are transformed. Where ranks share
    the vocabulary, one of them may have nothing of it.

    Raises:
        TypeError, ValueError: an argument that does not fit, by its public name.
    """
    check_floating("logits", logits)
    check_logits(logits, may_be_empty=may_be_empty)
    check_integer("targets", targets)
    check_shape("targets", targets, tuple(logits.shape[:-1]), "logits without the vocabulary")
    check_same_device("targets", targets, "logits", logits)
    return checked_transform(temperature, softcap, scale, targets)


def checked_rows(mask: Tensor | None, logits: Tensor, name: str) -> Tensor:
    """Check a mask of the rows of (..., V), or make one that selects all of them."""
    shape = tuple(logits.shape[:-1])
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=logits.device)
    check_mask("mask", mask)
    check_shape("mask", mask, shape, f"{name} without the last dimension")
    check_same_device("mask", mask, name, logits)
    return mask != 0


def check_values_on_host(
    targets: Tensor, temperature: float | Tensor, vocab: int, ignore_index: int
) -> None:
    """Check what targets and temperatures (N,) hold, where that costs no synchronisation."""
    per_token = temperature if isinstance(temperature, Tensor) else None
    unknown = being_traced() or is_batched(targets, per_token)
    if targets.device.type != "cpu" or unknown:
        return
    live = targets != ignore_index
    check_indices_on_host("targets", targets[live], vocab, f"or ignore_index {ignore_index}")
    check_temperatures_on_host(per_token, live)
