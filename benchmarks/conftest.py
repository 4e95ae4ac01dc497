"""What the benchmarks share: the device, and a checked provider or the reason why there is none."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def timed(benchmark, device):
    """Time a function, waiting for the device, and return the fixture to add figures to."""

    def run(function) -> None:
        def waited() -> None:
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(waited, rounds=10, warmup_rounds=2, iterations=1)

    run.extra_info = benchmark.extra_info
    return run


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Print the peak memory of each benchmark, which the table of times has no column for."""
    session = getattr(config, "_benchmarksession", None)
    measured = [b for b in session.benchmarks if "peak MiB" in b.extra_info] if session else []
    if measured:
        terminalreporter.section("peak memory beyond the inputs, MiB")
    for benchmark in measured:
        terminalreporter.line(f"{benchmark.extra_info['peak MiB']:10.1f}  {benchmark.name}")
