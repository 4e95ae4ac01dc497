"""What all tests of runs of recipes have: the device, an interruption, and where a
checkpoint is.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastrlhf.recipes.run import last_checkpoint


@pytest.fixture(autouse=True, scope="module")
def on_the_device_of_the_run() -> Iterator[None]:
    """One thread, as these tensors are too small to share, and no interpreted kernels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
        yield
    torch.set_num_threads(threads)


class Interrupted(Exception):
    """What ends a run in the middle."""


def checkpoint_of(output: Path) -> Path:
    """The one that is there; its name says after which step it was written."""
    (folder,) = output.glob("checkpoint*")
    assert last_checkpoint(output) == folder
    return folder
