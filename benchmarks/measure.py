"""Time and memory of pieces of work that take turns, and what the device itself can do."""

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

# Larger than the last cache of any GPU: written between timed runs, so that each finds its inputs
# in memory.
_FLUSH_BYTES = 2**28
# About half a millisecond, for which the GPU waits while the host launches: in a training step the
# host is ahead as well.
_HEAD_START_CYCLES = 1_000_000


class Stopwatch:
    """Times work on a device: with events and cold caches on a GPU, by the clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        """Reserve what the flushing of the caches needs."""
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
    """Work to time, and what is done after each run of it and around it, which is not timed."""

    work: Work
    after: Work
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext


def take_turns(
    turns: Mapping[str, Turn], device: torch.device, seconds: float, rounds: tuple[int, int]
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Time each piece of work once a round, starting with another one each round.

    The first round, which is not kept, says how many of them fit into `seconds`, within the two
    bounds of `rounds`.

    Returns:
        Seconds of each, and the errors of those that failed, which are out from then on.
    """
    stopwatch = Stopwatch(device)
    times: dict[str, list[float]] = {name: [] for name in turns}
    errors: dict[str, Exception] = {}

    def play(order: list[str]) -> None:
        for name in order:
            try:
                with turns[name].around():
                    times[name].append(stopwatch.seconds(turns[name].work))
            except Exception as error:  # whatever a provider raises is its outcome
                # Not its frames: they hold tensors.
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
    """The 20th, the 50th and the 80th of 100."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], statistics.median(times), fifths[3]


def _median_seconds(work: Work, device: torch.device) -> float:
    times, _ = take_turns({"": Turn(work, lambda: None)}, device, 1.0, (5, 15))
    return statistics.median(times[""])


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy on this very device reads and writes."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**28, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device)


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matmul on this very device."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _median_seconds(lambda: torch.mm(a, b, out=out), device)
