"""Report contests of providers through pytest-benchmark.

There is a test for each provider, batch and direction. To be comparable, providers must take turns,
but pytest-benchmark finishes one test before it starts the next. So the first test of a contest
runs the whole contest, and each test then replays the measured times of its provider on a clock
made for this. Selecting tests (`-k`) selects the providers that take part.
"""

import environment
import pytest
import torch
from contest import FORWARD, contest
from shapes import shapes

import fastrlhf

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    # Batches of a training step take this backend; the small batches of the checks must take it
    # too.
    fastrlhf.set_backend("compiled")
_CONTESTS = pytest.StashKey[dict]()
_NOT_TIMED = pytest.StashKey[list]()
_elapsed = 0.0


def replayed() -> float:
    """Read the replay clock, which advances only by measured times."""
    return _elapsed


def _replay(seconds: float) -> None:
    global _elapsed
    _elapsed += seconds


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--stages", type=int, default=2, help="of batches, the most telling first (default: 2)"
    )
    parser.addoption(
        "--seconds", type=float, default=2.0, help="about so many for a contest (default: 2)"
    )


def pytest_configure(config) -> None:
    config.stash[_CONTESTS] = {}
    config.stash[_NOT_TIMED] = []


def pytest_generate_tests(metafunc) -> None:
    """Parametrize a test with all batches, directions and providers of its operation."""
    if "outcome" not in metafunc.fixturenames:
        return
    operation = metafunc.module.OPERATION
    cases = [
        pytest.param(shape, kind, name, id=f"{_title(operation, shape, kind)}-{name}",
                     marks=pytest.mark.benchmark(timer=replayed))
        for stage in range(metafunc.config.getoption("--stages"))
        for shape in shapes(operation.source, DEVICE, stage)
        for kind in operation.kinds(shape)
        for name in operation.entrants(kind)
    ]  # fmt: skip
    metafunc.parametrize(("shape", "kind", "provider"), cases)


def _title(operation, shape, kind) -> str:
    sizes = [shape.sequences, shape.tokens, shape.vocab, shape.width]
    parts = [kind.replace(" ", ""), "x".join(str(size) for size in sizes if size)]
    parts += [f"prompt{100 * shape.prompt:.0f}", str(shape.dtype).removeprefix("torch.")]
    if operation.from_hidden and kind != FORWARD:
        parts.append("trained" if shape.trained else "frozen")
    return "-".join(parts)


@pytest.fixture
def outcome(request, benchmark, shape, kind, provider):
    """Return a function that reports the result of this provider in its contest."""

    def report() -> None:
        operation = request.module.OPERATION
        key = operation.name, shape, kind
        contests = request.config.stash[_CONTESTS]
        if key not in contests:
            names = _selected(request.session.items, key)
            seconds = request.config.getoption("--seconds")
            records = contest(operation, shape, kind, DEVICE, names, seconds)
            contests[key] = {record["provider"]: record for record in records}
        record = contests[key][provider]
        if record["status"] != "ok":
            request.config.stash[_NOT_TIMED].append(record)
            (pytest.fail if provider.startswith("fastrlhf") else pytest.skip)(record["status"])
        times = record.pop("times_ms")
        benchmark.group = f"{operation.name}: {_title(operation, shape, kind)}"
        benchmark.extra_info.update(record)
        rounds = iter(times)
        benchmark.pedantic(
            _replay, setup=lambda: ((next(rounds) * 1e-3,), {}), rounds=len(times), iterations=1
        )

    return report


def _selected(items, key) -> list[str]:
    parameters = [
        (item.module.OPERATION.name, item.callspec.params)
        for item in items
        if hasattr(item.module, "OPERATION")
    ]
    return [p["provider"] for name, p in parameters if (name, p["shape"], p["kind"]) == key]


def pytest_benchmark_generate_machine_info() -> dict:
    dtypes = [torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32]
    return environment.describe(DEVICE, dtypes)


def pytest_benchmark_update_json(config, output_json) -> None:
    """Add the providers that could not be timed, with the reason, and remove what is doubled."""
    output_json["not_timed"] = config.stash[_NOT_TIMED]
    for benchmark in output_json["benchmarks"]:
        benchmark["params"] = None  # they are in the name and in extra_info
        benchmark["stats"].pop("data", None)


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Print the peak memory of each benchmark; the table of times has no column for it."""
    session = getattr(config, "_benchmarksession", None)
    measured = [b for b in session.benchmarks if "peak_mib" in b.extra_info] if session else []
    if measured:
        terminalreporter.section("peak memory beyond the batch, MiB")
    for benchmark in measured:
        terminalreporter.line(f"{benchmark.extra_info['peak_mib']:10.1f}  {benchmark.fullname}")
