"""Time pieces of work that take turns, and measure the rates of the device itself."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

Work = Callable[[], object]

# So many bytes are written between timed runs. They are more than the last cache of any GPU holds,
# so that each run has to read its inputs from memory.
_FLUSH_BYTES = 2**28
# The GPU waits for about half a millisecond while the host launches kernels. So the host is ahead
# of the GPU, as it is in a training step.
_HEAD_START_CYCLES = 1_000_000


class Stopwatch:
    """Time work on a device: with events and cold caches on a GPU, with the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        """Allocate the memory that is written to flush the caches."""
        self._flush = None
        if device.type == "cuda":
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def seconds(self, work: Work) -> float:
        """Run the work once."""
        if self._flush is None:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START_CYCLES)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


class Turn(NamedTuple):
    """Work to time, with untimed work `after` each run and a context `around` it."""

    work: Work
    after: Work
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext


def take_turns(
    turns: Mapping[str, Turn], device: torch.device, seconds: float, rounds: tuple[int, int]
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Time each piece of work once in every round. Each round starts with another piece.

    The times of the first round are not kept: they tell how many rounds fit into `seconds`. The
    number of rounds stays within the two bounds of `rounds`.

    Returns:
        The seconds of each piece, and the errors of pieces that failed. A piece that fails takes no
        part in later rounds.
    """
    stopwatch = Stopwatch(device)
    times: dict[str, list[float]] = {name: [] for name in turns}
    errors: dict[str, Exception] = {}

    def play(order: list[str]) -> None:
        for name in order:
            try:
                with turns[name].around():
                    times[name].append(stopwatch.seconds(turns[name].work))
            except Exception as error:  # any exception becomes the provider's result
                # The traceback is dropped, because its frames hold tensors.
                errors[name] = error.with_traceback(None)
                del times[name]
            turns[name].after()

    start = time.perf_counter()
    play(list(times))
    affordable = seconds / (time.perf_counter() - start)
    for i in range(int(min(max(affordable, rounds[0]), rounds[1]))):
        names = list(times)
        first = i % max(len(names), 1)
        play(names[first:] + names[:first])
    return {name: measured[1:] for name, measured in times.items()}, errors


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], statistics.median(times), fifths[3]


def _median_seconds(work: Work, device: torch.device) -> float:
    times, _ = take_turns({"": Turn(work, lambda: None)}, device, 1.0, (5, 15))
    return statistics.median(times[""])


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Measure how many bytes per second a copy reads and writes on this device."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**28, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device)


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations per second of a large matmul on this device."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _median_seconds(lambda: torch.mm(a, b, out=out), device)
