"""Checks of arguments: each error names the argument, what was expected and what came."""

import math

import torch
from torch import Tensor

from .backend import is_batched

FLOATING_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a tensor of bf16, fp16, fp32 or fp64."""
    _check_dtype(name, tensor, FLOATING_DTYPES, "floating (bfloat16, float16, float32 or float64)")


def check_integer(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a tensor of integers."""
    _check_dtype(name, tensor, INTEGER_DTYPES, "integer")


def check_mask(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is boolean, or numeric and meant as 0/1."""
    allowed = (torch.bool, *INTEGER_DTYPES, *FLOATING_DTYPES)
    _check_dtype(name, tensor, allowed, "boolean or 0/1")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], like: str) -> None:
    """Raise ValueError unless `tensor` has the shape `expected`, which `like` puts into words."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name}: expected shape {tuple(expected)} ({like}), got {tuple(tensor.shape)}"
        )


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors lie on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: expected on {other.device}, the device of {other_name}, got {tensor.device}"
        )


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise TypeError unless `value` is a number, ValueError unless it is `least` or more."""
    _check_is_number(name, value)
    if not value >= least:
        raise ValueError(f"{name}: expected a number of at least {least}, got {value}")


def check_between(name: str, value: float, least: float, most: float) -> None:
    """Raise TypeError unless `value` is a number, ValueError unless it is in [least, most]."""
    _check_is_number(name, value)
    if not least <= value <= most:
        raise ValueError(f"{name}: expected a number in [{least}, {most}], got {value}")


def check_positive(name: str, value: float) -> None:
    """Raise TypeError unless `value` is a number, ValueError unless it is positive and finite."""
    _check_is_number(name, value)
    # Compared, since math.isfinite takes no number that the compiler keeps symbolic.
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, got {value}")


def check_finite(name: str, value: float) -> None:
    """Raise TypeError unless `value` is a number, ValueError unless it is finite."""
    _check_is_number(name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_indices_on_host(name: str, index: Tensor, size: int, what: str) -> None:
    """Raise ValueError for an index outside [0, size), on the CPU only: elsewhere it would
    synchronise.
    """
    if index.device.type != "cpu" or index.numel() == 0 or is_batched(index):
        return
    index = wide_integers(index)
    outside = (index < 0) | (index >= size)
    if outside.any():
        worst = index[outside][0].item()
        raise ValueError(f"{name}: expected indices in [0, {size}) ({what}), got {worst}")


def wide_integers(index: Tensor) -> Tensor:
    """Widen small integers, in which a sentinel or the size of a vocabulary would wrap around."""
    return index if index.dtype in (torch.int64, torch.int32) else index.long()


def token_contiguous(x: Tensor) -> Tensor:
    """Return (B, T) itself where tokens are neighbours, as in a slice of sequences or positions."""
    return x if x.stride(-1) == 1 and x.stride(0) >= 0 else x.contiguous()


def _check_is_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def _check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...], kind: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in allowed:
        raise TypeError(f"{name}: expected a {kind} tensor, got {tensor.dtype}")
