"""Choose the device of a run.

The choice depends on the option `--device`, on the environment variables of accelerate, and on the
devices of this machine. Only CUDA devices and the CPU are accepted: other devices have random
generators whose state a checkpoint would not store.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from accelerate.utils import parse_flag_from_env

from .settings import OptionError

_DEVICE = "ACCELERATE_TORCH_DEVICE"


def kind_of_device(device: str) -> str:
    """Tell whether the option `--device` means the CPU or CUDA.

    "auto" means the device that accelerate's variables name; without these, a GPU if there is one.

    Raises:
        ValueError: the option means another kind of device, or a device that does not exist here.
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
    """Set the variable that tells accelerate its device, and restore it afterwards.

    With several processes nothing is set: accelerate gives each process a device by its number.
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
    """Restore the random state of the CPU and of a device when the context ends."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
