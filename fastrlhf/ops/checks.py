"""Checks of a single argument, whatever it is for: each error names the argument, what was expected
and what came.

Checks of arguments that belong together are next to what takes them: logits with their targets in
`logits_arguments.py`, hidden states with a head in `linear_arguments.py`, tokens with a mask and
pairs of sequences in `fastrlhf.losses.arguments`, what policy losses take in
`fastrlhf.losses.policy_arguments`.
"""

import math
from collections.abc import Iterable
from numbers import Integral, Real

import torch
from torch import Tensor

from .backend import is_batched
from .tracing import being_traced

FLOATING_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def known_on_host(*tensors: Tensor) -> bool:
    """Whether looking at what tensors hold is free: on the CPU, and not while a graph is traced or
    torch.func.vmap hides it. On a GPU it would wait for the device.
    """
    if being_traced() or is_batched(*tensors):
        return False
    return all(x.device.type == "cpu" for x in tensors)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a tensor of bf16, fp16, fp32 or fp64."""
    _check_dtype(name, tensor, FLOATING_DTYPES, "floating (bfloat16, float16, float32 or float64)")


def check_integer(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a tensor of integers."""
    _check_dtype(name, tensor, INTEGER_DTYPES, "integer")


def check_real(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a tensor of numbers: a reward of 0 or 1 may be a bool."""
    _check_dtype(name, tensor, (torch.bool, *INTEGER_DTYPES, *FLOATING_DTYPES), "real")


def check_mask(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is boolean or numeric, ValueError unless it holds 0 and 1.

    What it holds is looked at on the CPU only. An additive mask of 0 and -inf, or weights of
    tokens, would otherwise pass for a mask, and mean something else.
    """
    _check_dtype(name, tensor, (torch.bool, *INTEGER_DTYPES, *FLOATING_DTYPES), "boolean or 0/1")
    if tensor.dtype != torch.bool and known_on_host(tensor):
        other = (tensor != 0) & (tensor != 1)
        if other.any():
            worst = tensor[other][0].item()
            raise ValueError(f"{name}: expected a mask of 0 and 1, got {worst}")


def check_counts(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is numeric, and ValueError, on the CPU, for what is not a
    whole number of at least 0.
    """
    _check_dtype(name, tensor, (*INTEGER_DTYPES, *FLOATING_DTYPES), "numeric")
    if known_on_host(tensor):
        counts = tensor.double()
        wrong = ~((counts >= 0) & (counts < math.inf) & (counts == counts.floor()))
        if wrong.any():
            worst = tensor[wrong][0].item()
            raise ValueError(f"{name}: expected whole numbers of at least 0, got {worst}")


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


def check_at_least(name: str, value: float, least: float) -> float:
    """Return a number as float. Raise TypeError for anything else, ValueError below `least`."""
    number = _number(name, value)
    if not number >= least:
        raise ValueError(f"{name}: expected a number of at least {least}, got {value}")
    return number


def check_between(name: str, value: float, least: float, most: float) -> float:
    """Return a number as float. Raise TypeError for anything else, ValueError outside of [least,
    most].
    """
    number = _number(name, value)
    if not least <= number <= most:
        raise ValueError(f"{name}: expected a number in [{least}, {most}], got {value}")
    return number


def check_positive(name: str, value: float) -> float:
    """Return a number as float. Raise TypeError for anything else, ValueError unless it is positive
    and finite.
    """
    number = _number(name, value)
    # Compared, since math.isfinite takes no number that the compiler keeps symbolic.
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, got {value}")
    return number


def check_finite(name: str, value: float) -> float:
    """Return a number as float. Raise TypeError for anything else, ValueError unless it is
    finite.
    """
    number = _number(name, value)
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return number


def check_whole(name: str, value: int, least: int | None = None) -> int:
    """Return a whole number as int. Raise TypeError for anything else, ValueError below `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return int(value)


def check_ignore_index(value: int) -> int:
    """Return the index as int. Raise TypeError for anything else, ValueError beyond int64."""
    index = check_whole("ignore_index", value)
    if not -(2**63) <= index < 2**63:
        raise ValueError(f"ignore_index: expected what int64 holds, got {value}")
    return index


def check_bool(name: str, value: bool) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_one_of(name: str, value: str, known: Iterable[str]) -> None:
    """Raise TypeError unless `value` is a string, ValueError unless it is one of those known."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {type(value).__name__}")
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def check_names(name: str, given: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the known names that are given. Raise TypeError for what is not an iterable
    of names (a string, whose letters would pass for some), ValueError for any that is not known.
    """
    listed = ", ".join(map(repr, known))
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name}: expected a tuple of some of {listed}, got {given!r}")
    names = tuple(given)
    for wrong in names:
        if wrong not in known:
            raise ValueError(f"{name}: expected some of {listed}, got {wrong!r}")
    return tuple(x for x in known if x in names)


def check_indices_on_host(name: str, index: Tensor, size: int, what: str) -> None:
    """Raise ValueError for an index outside [0, size), on the CPU only: elsewhere it would
    synchronise.
    """
    if not known_on_host(index) or index.numel() == 0:
        return
    index = wide_integers(index)
    outside = (index < 0) | (index >= size)
    if outside.any():
        worst = index[outside][0].item()
        raise ValueError(f"{name}: expected indices in [0, {size}) ({what}), got {worst}")


# Devices on which an assertion costs no synchronisation; others have none.
_ASSERTING_DEVICES = ("cpu", "cuda")


def assert_on_device(holds: Tensor, message: str) -> None:
    """Assert what is only known on a device, without waiting for it, where the device can."""
    if holds.device.type in _ASSERTING_DEVICES:
        torch._assert_async(holds, f"fastrlhf: {message}")


def wide_integers(index: Tensor) -> Tensor:
    """Widen integers, in fewer bits of which a sentinel or the size of a vocabulary would wrap."""
    return index.long()


def token_contiguous(x: Tensor) -> Tensor:
    """Return (B, T) itself where tokens are neighbours, as in a slice of sequences or positions."""
    return x if x.stride(-1) == 1 and x.stride(0) >= 0 else x.contiguous()


def _number(name: str, value: float) -> float:
    # Numbers of numpy are Real; the compiler's own pass for int and float.
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that a float holds") from None


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is one, neither sparse nor nested."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind_of = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense tensor, got {kind_of}")


def _check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...], kind: str) -> None:
    check_dense(name, tensor)
    if tensor.dtype not in allowed:
        raise TypeError(f"{name}: expected a {kind} tensor, got {tensor.dtype}")
