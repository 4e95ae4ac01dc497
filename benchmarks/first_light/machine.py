"""Everything that needs CUDA, and a substitute for machines without a GPU.

All calls of first light to CUDA itself are methods of `Cuda`. `Interpreted` has the same methods
for a CPU on which the kernels are interpreted. So the lines of `Cuda` are the only lines of first
light that cannot run without a GPU.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import measure
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastrlhf.recipes.memory import peak_memory

from .sizes import REAL, TINY, Sizes

Work = Callable[[], Any]

# Error that a correct result may have if the plain formula happens to be exact: some fp32
# roundings.
_ROUNDINGS = 32 * torch.finfo(torch.float32).eps


class Launch(NamedTuple):
    """A kernel's launch in the profiler's trace; times are in microseconds."""

    name: str
    start: float
    end: float


class Cuda:
    """The calls of first light to CUDA, on a GPU."""

    device = torch.device("cuda")
    jobs = 8  # processes that share the GPU while nothing is timed

    def __init__(self, sizes: Sizes) -> None:
        """Do not touch the GPU yet: the process that forks sections must have no CUDA context."""
        self.sizes = sizes

    def describe(self) -> dict[str, Any]:
        """Describe the card and its software."""
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = None
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            driver = subprocess.check_output(query, text=True, timeout=5).split("\n")[0].strip()
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "card": torch.cuda.get_device_name(),
            "driver": driver,
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }

    def slack(self, dtype: torch.dtype) -> float:
        """Relative error allowed beyond the plain formula's: a few roundings of fp32."""
        return _ROUNDINGS

    def seconds(self, work: Work, rounds: int = 7) -> float:
        """Return the median time of work with cold caches, after two runs that do not count."""
        stopwatch = measure.Stopwatch(self.device)
        for _ in range(2):
            work()
        return statistics.median(stopwatch.seconds(work) for _ in range(rounds))

    def peak_bytes(self, work: Work) -> tuple[Any, int]:
        """Return the result of some work, and its peak memory in bytes."""
        return peak_memory(work, self.device)

    def add_product(self, out: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
        """Compute `out = beta·out + a @ b`, in fp32 from 16 bits, as the linear operations do."""
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)

    @contextlib.contextmanager
    def forbid_waiting(self) -> Iterator[None]:
        """Raise an error if the host would wait for the GPU."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def on_a_side_stream(self, work: Callable[[], Tensor]) -> Tensor:
        """Do some work on a stream of its own, after the work of the current stream."""
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            found = work()
        current.wait_stream(side)
        torch.cuda.synchronize()
        return found

    def replayed(self, work: Callable[[], Tensor]) -> Tensor:
        """Capture some work in a CUDA graph, and return the result of a replay."""
        self.on_a_side_stream(work)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = work()
        found.zero_()
        graph.replay()
        torch.cuda.synchronize()
        return found

    def another_device(self) -> torch.device | None:
        """Return a device that is not the current one, if there is one."""
        return torch.device("cuda", 1) if torch.cuda.device_count() > 1 else None

    def launches(self, work: Work) -> list[Launch]:
        """Return every kernel that some work launches, in the order in which they ran."""
        torch.cuda.synchronize()
        with _profile(ProfilerActivity.CPU, ProfilerActivity.CUDA) as profiler:
            work()
            torch.cuda.synchronize()
        return _launches(
            event
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        )


class Interpreted:
    """The same calls on a CPU, where Triton's interpreter runs the kernels."""

    device = torch.device("cpu")
    jobs = 2

    def __init__(self, sizes: Sizes) -> None:
        """Store the sizes of inputs."""
        self.sizes = sizes

    def describe(self) -> dict[str, Any]:
        """Return a description which says that there is no card."""
        return {"card": "interpreted", "driver": None, "cuda": None}

    def slack(self, dtype: torch.dtype) -> float:
        """Relative error allowed beyond the plain formula's.

        The interpreter truncates to bf16 where a GPU rounds. This doubles the error, so one eps of
        the dtype is allowed.
        """
        return _ROUNDINGS + (torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0)

    def seconds(self, work: Work, rounds: int = 1) -> float:
        """Time one run by the clock without warm-up: times of the interpreter mean nothing."""
        return measure.Stopwatch(self.device).seconds(work)

    def peak_bytes(self, work: Work) -> tuple[Any, int]:
        """Return the result of work and 0 bytes: the interpreter's memory is of no interest."""
        return work(), 0

    def add_product(self, out: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
        """Multiply in fp32, without the argument `out_dtype`, which only CUDA has."""
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta)

    def forbid_waiting(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: on a CPU there is nothing to wait for."""
        return contextlib.nullcontext()

    def on_a_side_stream(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the work directly: a CPU has only one stream."""
        return work()

    def replayed(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the work directly: a CPU has no graphs."""
        return work()

    def another_device(self) -> torch.device | None:
        """Return the CPU itself, so that the check runs."""
        return self.device

    def launches(self, work: Work) -> list[Launch]:
        """Return every operator of this library that the work calls."""
        with _profile(ProfilerActivity.CPU) as profiler:
            work()
        return _launches(e for e in profiler.events() if e.name.startswith("fastrlhf::"))


Machine = Cuda | Interpreted


def _profile(*activities: ProfilerActivity) -> profile:
    # PyTorch 2.11 warns unless it is to keep the events of all cycles, of which there is one.
    return profile(activities=activities, acc_events=True)


def _launches(events: Iterator[Any]) -> list[Launch]:
    found = [Launch(e.name, e.time_range.start, e.time_range.end) for e in events]
    return sorted(found, key=lambda launch: launch.start)


def make_machine(device: str, *, tiny: bool) -> Machine:
    """Return the machine of a device: a GPU, or a CPU as its substitute."""
    return (Cuda if device == "cuda" else Interpreted)(TINY if tiny else REAL)
