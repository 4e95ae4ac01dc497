"""Where the tests run: real kernels on a GPU if there is one, else interpreted on the CPU."""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent

if not torch.cuda.is_available():
    # Before triton is imported: it decides at the decoration of a kernel.
    os.environ["TRITON_INTERPRET"] = "1"

if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    # What torch.compile keeps on disk does not tell processors apart: code for another one, as
    # ATEN_CPU_CAPABILITY makes it, would be taken and crash. Workers inherit this folder.
    _compiled = tempfile.TemporaryDirectory(prefix="fastrlhf-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name

# The root holds kernels/, which must not pass for Hugging Face's package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

if importlib.util.find_spec("fastrlhf") is None:
    # Not installed: a folder with a link to the package stands in for an installation.
    _links = tempfile.TemporaryDirectory()
    Path(_links.name, "fastrlhf").symlink_to(ROOT / "fastrlhf")
    sys.path.append(_links.name)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [_links.name, os.environ.get("PYTHONPATH")])
    )

import pytest  # noqa: E402

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    from support.interpreter import look_up_the_language_once

    look_up_the_language_once()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which impl="triton" runs the kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
