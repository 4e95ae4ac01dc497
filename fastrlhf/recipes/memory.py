"""Measure the peak memory of a piece of work from the allocations of its tensors.

On a GPU the caching allocator keeps the count. On the CPU the profiler's trace lists every
allocation and release, and the largest running sum of these is the peak. The trace includes
allocations inside custom operators; a `TorchDispatchMode` would see only their inputs and outputs.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def peak_memory(work: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """Run `work` and count the bytes that it held at its peak, beyond the memory in use before it.

    Args:
        work: a function without arguments, whose tensors all lie on `device`.
        device: a CUDA device or the CPU.

    Returns:
        What `work` returned, and the number of bytes.
    """
    return _cuda_peak(work, device) if device.type == "cuda" else _cpu_peak(work)


def _cuda_peak(work: Callable[[], T], device: torch.device) -> tuple[T, int]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = work()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(work: Callable[[], T]) -> tuple[T, int]:
    # At any lower level, the profiler's library reports its own starts and stops on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # PyTorch 2.11 warns unless it is to keep the events of all cycles, of which there is one.
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        result = work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    ]
    live = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        live += change
        peak = max(peak, live)
    return result, peak
