"""Describe the software and hardware with which figures were measured."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import measure
import torch

_PACKAGES = ("triton", "transformers", "peft", "trl", "liger-kernel", "cut-cross-entropy")


def describe(device: torch.device, dtypes: list[torch.dtype]) -> dict[str, Any]:
    """Return versions, the device, and its measured rates of copies and matmuls in the dtypes."""
    gpu = device.type == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "system": platform.system(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU, {os.cpu_count()} cores",
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in _PACKAGES},
        "copy_bytes_per_second": measure.copy_bandwidth(device),
        "matmul_flops_per_second": {
            str(dtype).removeprefix("torch."): measure.matmul_rate(device, dtype)
            for dtype in dtypes
        },
    }


def publish(figures: dict[str, Any]) -> None:
    """Write figures of the CPU as JSON, with the environment in which they were measured.

    They go to standard output, and to the file that the command line names.
    """
    record = {"environment": describe(torch.device("cpu"), [torch.float32]), **figures}
    text = json.dumps(record, indent=1) + "\n"
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)
    print(text)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
