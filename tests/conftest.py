"""Where the tests run: real kernels on a GPU if there is one, else interpreted on the CPU."""

import gc
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
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
from support.rank_pool import RankPool  # noqa: E402

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    from support.interpreter import look_up_the_language_once

    look_up_the_language_once()


@pytest.hookimpl(tryfirst=True)  # before the marks are read
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep down the time that PyTorch's compiler takes, longer than tests take what it makes.

    One worker runs what a file has for the compiled backend, and the files that have a further part
    of the same tests, since each worker would compile for itself.
    Where a test has each transform of logits in each dtype, `make test` takes all dtypes and all
    transforms, and `make test-all` every pair.
    """
    stems = {item.path.stem for item in items}
    for item in items:
        chosen = getattr(item, "callspec", None) and item.callspec.params
        if not chosen or "compiled" not in chosen.values():
            continue
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(f"{first_of(item.path.stem, stems)}, compiled"))
        dtypes = chosen.get("dtypes", (chosen.get("dtype"),))
        if chosen.get("kind") in ("plain", "scaled", "capped") and {*dtypes} != {torch.float32}:
            item.add_marker(pytest.mark.exhaustive)


def first_of(stem: str, stems: set[str]) -> str:
    """The file that a file continues: `test_divergence` for `test_divergence_hostile`."""
    return min((other for other in stems if f"{stem}_".startswith(f"{other}_")), key=len)


def pytest_collection_finish() -> None:
    """Trainers and compilers have Python look for garbage time and again: not among the modules and
    the tests themselves, some millions of objects, which takes most of a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which impl="triton" runs the kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Four processes that talk by gloo, for all files that ask for them, since they take seconds to
    start, which they do at the first call.
    """
    with RankPool() as pool:
        yield pool


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
