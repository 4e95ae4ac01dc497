"""Every public function and class has an example in its docstring, and says there what it prints.

An example is what a reader tries first, so it stands alone: nothing but `torch` and `fastrlhf` is
imported before it. What it prints is the same on any processor: shapes, or few digits.
"""

import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastrlhf
from fastrlhf.ops import backend

EXAMPLE = re.compile(r"^Example:\n((?:    .*\n?|\n)+)\Z", flags=re.M)


def public() -> dict[str, Any]:
    """What users find: everything of fastrlhf, and what the integrations define."""
    found = {name: getattr(fastrlhf, name) for name in fastrlhf.__all__}
    for library in ("transformers", "trl"):
        module = importlib.import_module(f"fastrlhf.integrations.{library}")
        for name, value in vars(module).items():
            of_module = inspect.isfunction(value) and value.__module__ == module.__name__
            if of_module and not name.startswith("_"):
                found[f"{library}.{name}"] = value
    return found


PUBLIC = public()


@pytest.fixture(autouse=True)
def as_in_a_fresh_process() -> Iterator[None]:
    """The seed, the backend and the report of lazy logits as they are at first."""
    chosen = backend._chosen
    torch.manual_seed(0)
    fastrlhf.lazy_report(clear=True)
    yield
    backend._chosen = chosen
    fastrlhf.lazy_report(clear=True)


def test_the_integrations_are_among_what_is_public() -> None:
    patches = {f"{x}.{y}" for x in ("transformers", "trl") for y in ("patch", "unpatch", "patched")}
    assert patches <= PUBLIC.keys() and len(PUBLIC) == len(fastrlhf.__all__) + len(patches)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_prints_what_it_says(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    section = EXAMPLE.search(text)
    assert section, f"{name} has no Example: at the end of its docstring"
    names = {"torch": torch, "fastrlhf": fastrlhf}
    test = doctest.DocTestParser().get_doctest(section[1], names, name, None, None)
    assert test.examples, f"the Example: of {name} has no line that starts with >>>"
    assert "fastrlhf" in section[1]
    said: list[str] = []
    # Own options: those of the module would let a test of another file change them.
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.REPORT_NDIFF)
    runner.run(test, out=said.append, clear_globs=False)
    assert runner.failures == 0, "".join(said)
