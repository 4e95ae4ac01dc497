"""What the kernels give when they compute as a GPU does (`support/gpu_arithmetic.py`): the checks
of first light, on the CPU.
"""

import importlib

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import triton
import triton.language as tl
from support import gpu_arithmetic

import fastrlhf

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is its own arithmetic")

machines, run, sections = (
    importlib.import_module(f"first_light.{name}") for name in ("machine", "run", "sections")
)
MACHINE = machines.make_machine("cpu", tiny=True)
ULP = float(np.finfo(np.float32).eps)
# Sections that launch kernels and compare values.
CHECKS = {
    section.name: section
    for section in run.check_sections(MACHINE, 60.0)
    if not section.name.startswith(("compile", "another device", "offsets", "matmuls", "streams"))
}


@pytest.fixture(params=["first", "last"])
def as_on_a_gpu(request, monkeypatch) -> None:
    gpu_arithmetic.install(monkeypatch.setattr, fuses_last=request.param == "last")


class Found(sections.Reporter):
    """A reporter that keeps what failed, and how many checks there were."""

    def __init__(self) -> None:
        super().__init__(None, {})
        self.checks, self.failed = 0, []

    def check(self, name, verdict) -> None:
        self.checks += 1
        if not verdict.passed:
            self.failed.append((name, verdict))


@pytest.mark.parametrize("name", CHECKS)
def test_the_checks_of_first_light_hold(name, as_on_a_gpu) -> None:
    found = Found()
    CHECKS[name].work(found)
    assert found.checks and not found.failed, found.failed


def test_an_offset_of_logits_costs_lse_its_roundings_alone(as_on_a_gpu) -> None:
    logits, temperature = 1e4 + torch.randn(64, 33), torch.rand(64) + 0.5
    targets = torch.arange(64) % 33
    stats = fastrlhf.token_stats(logits, targets, temperature=temperature, impl="triton")
    exact = (logits.double() / temperature.double()[:, None]).logsumexp(-1)
    assert ((stats.lse.double() - exact) / exact).abs().max() <= ULP


@triton.jit
def _elementary(out, x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a * b - a * b)
    column = (a * b)[:, None] - (a * b)[:, None]
    tl.store(out + SIZE + i[:, None], column)
    tl.store(out + 2 * SIZE + i, a / a)
    tl.store(out + 3 * SIZE + i, tl.exp2(b))
    tl.store(out + 4 * SIZE + i, tl.log(a))
    tl.store(out + 5 * SIZE + i, tl.maximum(a, b))


def elementary(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = torch.empty(6, a.numel(), dtype=a.dtype)
    _elementary[(1,)](out, a, b, a.numel())
    return out


def differs_by_ulps(found: torch.Tensor, exact: torch.Tensor, most: float) -> bool:
    """Whether some numbers are off by more than rounding, and none by more than so many units."""
    error = ((found.double() - exact) / exact).abs().max()
    return 0.51 * ULP < error <= most * ULP


def test_the_arithmetic_is_that_of_a_gpu(as_on_a_gpu) -> None:
    a, b = torch.rand(1024) + 1.5, 8 * torch.randn(1024)
    fused, column, one, power, logarithm, largest = elementary(a, b)
    # What rounding the product lost.
    lost = (a.double() * b.double() - (a * b).double()).float()
    assert torch.equal(fused.abs(), lost.abs()) and lost.any()
    assert torch.equal(column, fused)
    assert differs_by_ulps(one, torch.ones(1024).double(), 2)
    assert differs_by_ulps(power, b.double().exp2(), 2)
    assert differs_by_ulps(logarithm, a.double().log(), 2)
    assert torch.equal(largest, a.maximum(b))


def test_a_maximum_ignores_nan_and_small_powers_are_0(as_on_a_gpu) -> None:
    found = elementary(torch.tensor([torch.nan, 2.0]), torch.tensor([-140.0, torch.nan]))
    assert found[3, 0] == 0.0 and found[5].tolist() == [-140.0, 2.0]


def test_fp64_is_fused_too(as_on_a_gpu) -> None:
    a, b = torch.rand(1024, dtype=torch.float64), torch.randn(1024, dtype=torch.float64)
    assert elementary(a, b)[0].any()


def test_the_interpreter_alone_rounds_each_product() -> None:
    """Else the tests above would show nothing."""
    a, b = torch.rand(1024) + 1.5, torch.randn(1024)
    fused, _, one, *_ = elementary(a, b)
    assert not fused.any() and bool((one == 1).all())
