"""Which device a run has, by its option, the variables of accelerate, and what this machine has.

A CUDA device or the CPU: others have random generators of their own, which a checkpoint would not
hold.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from accelerate.utils import parse_flag_from_env

from .settings import OptionError

_DEVICE = "ACCELERATE_TORCH_DEVICE"


def kind_of_device(device: str) -> str:
    """Tell whether an option means the CPU or CUDA; auto is what accelerate was told, or a GPU
    where there is one.

    Raises:
        ValueError: it means another kind, or a device that is not there.
    """
    if device == "auto":
        if parse_flag_from_env("ACCELERATE_USE_CPU"):
            return "cpu"
        device = os.environ.get(_DEVICE) or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise OptionError(
            f"argument --device: expected auto, cpu, cuda, cuda:1 or the like, got {device!r}"
        )
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"argument --device: there is no {device} here")
    return wanted.type


@contextmanager
def device_for_accelerate(device: str) -> Iterator[None]:
    """Tell accelerate which device to take, and nobody after it.

    Several processes take one each, as it numbers them.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and device not in ("auto", "cpu", "cuda"):
        raise OptionError(
            f"argument --device: expected auto, cpu or cuda for each process, got {device}"
        )
    before = os.environ.get(_DEVICE)
    if device != "auto" and not several:
        os.environ[_DEVICE] = device
    try:
        yield
    finally:
        os.environ.pop(_DEVICE, None)
        if before is not None:
            os.environ[_DEVICE] = before


def kept_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Leave the random numbers of the CPU and of a device as they were before."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
