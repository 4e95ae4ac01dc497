"""Peak memory of a piece of work, counted from what the allocator hands out.

On a GPU the caching allocator keeps the count. On the CPU the profiler's trace lists every
allocation and release, those inside custom operators too (a `TorchDispatchMode` sees such an
operator from outside only), and the largest running sum is the peak.
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
    """Run `work` and count the bytes that it held at its peak, beyond what lived before it.

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
    # The profiler's library writes its own starts and stops to stderr at any level below this one.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
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
