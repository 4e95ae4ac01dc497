"""How kernels are launched: on the device of their tensors, and on tiles of which shape."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="needs triton")

from support import lint_kernels
from triton.runtime.interpreter import InterpretedFunction

from fastrlhf.kernels import launch

LAUNCHES = {
    "token statistics": lambda: lint_kernels.launch_token_stats(32, torch.bfloat16, True),
    "policy loss": lambda: lint_kernels.launch_policy_loss(32, torch.bfloat16, "clip", "k3", True),
    "divergence": lambda: lint_kernels.launch_divergence(32, torch.bfloat16, None, False),
    "fisher": lambda: lint_kernels.launch_fisher(32, torch.bfloat16, False),
    "preference": lambda: lint_kernels.launch_preference_loss("sigmoid", torch.float32, True),
    "scan": lambda: lint_kernels.launch_scan(torch.float32),
}


@pytest.fixture
def launched_on(monkeypatch) -> list[tuple[str, int | None]]:
    """The kernels that are launched on tensors of the second GPU, and the current device then."""
    launched: list[tuple[str, int | None]] = []
    current: list[int | None] = [None]

    class Guard:
        def __init__(self, index: int | None):
            self.index = index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *error: object) -> None:
            current.pop()

    def run(kernel, *arguments, grid, warmup, **options) -> None:
        launched.append((kernel.fn.__name__, current[-1]))

    def on_second_gpu(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda:1")

    monkeypatch.setattr(torch.accelerator, "device_index", Guard)
    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(lint_kernels, "meta", on_second_gpu)
    return launched


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_kernel_is_launched_on_the_device_of_its_tensors(name, launched_on) -> None:
    with FakeTensorMode():
        LAUNCHES[name]()
    assert launched_on
    assert {device for _, device in launched_on} == {1}, launched_on


def test_a_row_is_cut_by_its_vocabulary_and_dtype(monkeypatch) -> None:
    for kernel in launch.SHAPES:
        plan = launch.row_plan(kernel, 128256, torch.bfloat16)
        assert plan.tile == 4096 and plan.warps == 8
        shape = launch.TileShape(warps=16, thread_bytes=16, stages=3)
        monkeypatch.setitem(launch.SHAPES, kernel, shape)
        plan = launch.row_plan(kernel, 128256, torch.bfloat16)
        assert (plan.tile, plan.warps) == (4096, 16)
        assert plan.sweep_options()["STAGES"] == 3
