"""Whether other tiles, warps or tiles in flight than the default would be faster on this card.

What can be chosen is a table of the library, `SHAPES` in its `kernels/launch.py`. The shapes that
are tried are compiled side by side beforehand, by processes that launch each once on a few rows;
Triton's cache on the disk then has them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .kernel_times import copy_seconds
from .kernel_work import Logits
from .machine import Machine
from .sections import Reporter, describe

_TABLE = "fastrlhf.kernels.launch"
# The kernel's name in the table, and the work that shows it.
TRIED = {
    "token_stats": "K1 statistics",
    "token_stats_backward": "K2 gradient",
    "policy_loss": "K3 policy loss",
    "divergence": "KL forward",
}
_WARPS, _THREAD_BYTES, _STAGES = (4, 8, 16), (16, 32), (1, 3, 4)
_CLOSE = 1e-2  # results in bf16, that were added up in another order


def _variants(machine: Machine) -> list[Any]:
    from fastrlhf.kernels.launch import TileShape

    shapes = itertools.product(_WARPS, _THREAD_BYTES, _STAGES)
    return [TileShape(*shape) for shape in shapes][: machine.sizes.variants]


@contextlib.contextmanager
def _shape(kernel: str, shape: Any) -> Iterator[None]:
    """Launch a kernel in another shape for a while."""
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
        return  # said where they would have been timed
    work = Logits(machine, machine.sizes.few_rows, machine.sizes.timed[0][1]).works()[TRIED[kernel]]
    for variant in _variants(machine):
        # What does not compile is reported where it would have been timed.
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
        work = works[name]
        floor = copy_seconds(report, work.passes * logits.pass_bytes)
        default, expected = machine.seconds(work.run), work.run()
        times = {}
        for variant in _variants(machine):
            title = f"{name}: {_text(variant)}"
            try:
                with _shape(kernel, variant):
                    found = work.run()
                    if (error := _distance(found, expected)) <= _CLOSE:
                        times[variant] = machine.seconds(work.run, rounds=5)
                        report.timing(title, times[variant], floor, variant=True)
                    else:
                        report.note(title, f"wrong: off by {error:.1e}")
            except Exception as error:
                report.note(title, describe(error))
        report.timing(f"{name}: default", default, floor)
        if times:
            best = min(times, key=times.__getitem__)
            report.timing(f"{name}: best, {_text(best)}", times[best], floor)


def _text(shape: Any) -> str:
    return f"{shape.warps} warps, {shape.thread_bytes} B, {shape.stages} in flight"


def _distance(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest relative difference of the results, a piece at a time for the sake of memory."""
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    largest = 0.0
    for x, y in zip(found, expected, strict=True):
        squares = [
            torch.stack([(a.float() - b.float()).square().sum(), b.float().square().sum()])
            for a, b in zip(x.split(256), y.split(256), strict=True)
        ]
        if squares:
            error, size = torch.stack(squares).sum(0).tolist()
            # Not max(), which may pass over NaN.
            share = (error / size) ** 0.5 if size else error
            largest = share if not share <= largest else largest
    return largest
