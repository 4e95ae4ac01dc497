"""Try other launch shapes than the default: tiles, warps and tiles in flight.

The shapes are those of the table `SHAPES` in the library's `kernels/launch.py`. Before the timings,
parallel processes launch each shape once on a few rows, so that Triton's cache on the disk has its
code.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

from .accuracy import IN_ANOTHER_ORDER, distance
from .kernel_times import copy_seconds
from .kernel_work import KernelWork, Logits
from .machine import Machine
from .sections import Reporter

_TABLE = "fastrlhf.kernels.launch"
# The kernel's name in the table, and the launch in `kernel_work.py` that is timed for it.
TRIED = {
    "token_stats": "K1 statistics",
    "token_stats_backward": "K2 gradient",
    "policy_loss": "K3 policy loss",
    "divergence": "KL forward",
}
_WARPS, _THREAD_BYTES, _STAGES = (4, 8, 16), (16, 32), (1, 3, 4)


def _variants(machine: Machine) -> list[Any]:
    from fastrlhf.kernels.launch import TileShape

    shapes = itertools.product(_WARPS, _THREAD_BYTES, _STAGES)
    return [TileShape(*shape) for shape in shapes][: machine.sizes.variants]


@contextlib.contextmanager
def _shape(kernel: str, shape: Any) -> Iterator[None]:
    """Change the launch shape of a kernel within a context."""
    from fastrlhf.kernels.launch import SHAPES

    default = SHAPES[kernel]
    SHAPES[kernel] = shape
    try:
        yield
    finally:
        SHAPES[kernel] = default


def compile_variants(report: Reporter, machine: Machine, kernel: str) -> None:
    """Launch a kernel once in every shape, on a few rows."""
    if importlib.util.find_spec(_TABLE) is None:
        return  # `time_variants` reports this
    work = Logits(machine, machine.sizes.few_rows, machine.sizes.timed[0][1]).works()[TRIED[kernel]]
    for variant in _variants(machine):
        # `time_variants` reports shapes that do not compile.
        with contextlib.suppress(Exception), _shape(kernel, variant):
            work.run()


def time_variants(report: Reporter, machine: Machine) -> None:
    """Time every shape of each kernel, and report the best beside the default."""
    if importlib.util.find_spec(_TABLE) is None:
        report.note("launch shapes", f"there is no {_TABLE}")
        return
    logits = Logits(machine, *machine.sizes.timed[0])
    works = logits.works()
    for kernel, name in TRIED.items():
        _time_variants_of(report, machine, kernel, name, works[name], logits.pass_bytes)


def _time_variants_of(
    report: Reporter, machine: Machine, kernel: str, name: str, work: KernelWork, pass_bytes: int
) -> None:
    floor = copy_seconds(report, work.passes * pass_bytes)
    default, expected = machine.seconds(work.run), work.run()
    times = {}

    def time(variant: Any, title: str) -> None:
        with _shape(kernel, variant):
            if (error := distance(work.run(), expected)) <= IN_ANOTHER_ORDER:
                times[variant] = machine.seconds(work.run, rounds=5)
                report.timing(title, times[variant], floor, variant=True)
            else:
                report.note(title, f"wrong: off by {error:.1e}")

    for variant in _variants(machine):
        title = f"{name}: {_text(variant)}"
        report.attempt(title, partial(time, variant, title))
    report.timing(f"{name}: default", default, floor)
    if times:
        best = min(times, key=times.__getitem__)
        report.timing(f"{name}: best, {_text(best)}", times[best], floor)


def _text(shape: Any) -> str:
    return f"{shape.warps} warps, {shape.thread_bytes} B, {shape.stages} in flight"
