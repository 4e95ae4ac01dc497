"""Everything that needs a GPU, in one command: the tests on real kernels, then the benchmarks.

    python benchmarks/gpu.py [--minutes 8] [--output DIR] [--skip-tests]

It needs torch, triton, transformers and pytest, and no installation of this package; peers take
part where they can be imported. What it writes: tests.txt, results.json, results.csv, tables.md and
the pictures (these need matplotlib; `report.py` makes them later from the JSON as well).

The batches come in the order of what they tell: the central one of every operation, what compiles
first apart from the others, then those that differ from it in one thing, and so on until the time
is over. `--minutes 180` should have time for all.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# These look at files, at the compiler or at recipes on the CPU, which a GPU changes nothing about.
_WITHOUT_GPU = ("compile_lint", "packaging", "imports", "readme", "demo", "trpo_learns",
                "benchmarks", "trl_parity")  # fmt: skip
_TESTS_FIRST = ("real_sizes", "token_stats", "logits_policy_loss", "divergence", "fisher")
_TESTS_SHARE = 0.5  # of the minutes, at most
_REPORT_SECONDS = 20
_COMPILE_SECONDS = 60  # what must be left for a contest of what compiles first
# The files of the benchmarks, the most telling first.
_OPERATIONS = ("token_stats", "logits_policy_loss", "linear_dpo_loss", "linear_policy_loss",
               "linear_token_stats", "linear_loss", "divergence", "linear_divergence", "dpo_loss",
               "fisher", "preference_loss", "gae")  # fmt: skip


def make_importable(folder: str) -> None:
    """Let the package be imported without the root of the repository, by the tests too."""
    Path(folder, "fastrlhf").symlink_to(ROOT / "fastrlhf")
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


def run_tests(output: Path, seconds: float) -> str:
    """Run the suite for so long at most, into a file; return how it ended."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *test_files()]
    if importlib.util.find_spec("xdist"):
        # The workers compile kernels side by side, and share the GPU and what they compiled.
        workers = str(min(8, os.cpu_count() or 1))
        command += ["-p", "xdist.plugin", "-n", workers, "--dist", "load"]
    # Other plugins of the machine could warn, and warnings are errors here.
    quiet = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    with (output / "tests.txt").open("w") as log:
        tests = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ | quiet,
            start_new_session=True,
        )  # fmt: skip
        try:
            outcome = "passed" if tests.wait(timeout=seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            stop(tests)
            outcome = f"cut off after {seconds:.0f} s"
    lines = (output / "tests.txt").read_text().split("\n")
    summary = next((line for line in reversed(lines) if line.strip()), "")
    return f"{outcome} ({summary.strip('= ')})"


def test_files() -> list[str]:
    """Return the files of the tests that a GPU matters to, the most telling first."""
    names = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    rest = sorted(names - {*_TESTS_FIRST, *_WITHOUT_GPU})
    return [str(ROOT / "tests" / f"test_{name}.py") for name in (*_TESTS_FIRST, *rest)]


def stop(tests: subprocess.Popen) -> None:
    """Let pytest say what failed so far, then end it with all of its workers."""
    tests.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        tests.wait(timeout=15)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(tests.pid, signal.SIGKILL)
    tests.wait()


class Contest(NamedTuple):
    """What is timed together."""

    operation: Any
    shape: Any
    kind: str
    names: list[str]
    compiles: bool


def plan(device: torch.device) -> Iterator[Contest]:
    """The most telling contests first.

    What takes long to compile has contests of its own, at the central batches alone.
    """
    from contest import BOTH
    from shapes import shapes, stages

    operations = [importlib.import_module(f"bench_{name}").OPERATION for name in _OPERATIONS]
    rounds = [(0, False), (0, True), *((stage, False) for stage in range(1, stages(device)))]
    for (stage, compiles), operation in itertools.product(rounds, operations):
        for shape in shapes(operation.source, device, stage):
            for kind in operation.kinds(shape):
                names = [
                    name
                    for name in operation.entrants(kind)
                    if operation.providers[name].compiles == compiles
                ]
                if names and (not compiles or kind == BOTH or not operation.differentiable):
                    yield Contest(operation, shape, kind, names, compiles)


def measure(output: Path, device: torch.device, tests: str, deadline: float) -> None:
    """Run contests until the time is over; the JSON on the disk is complete after each of them."""
    from contest import contest, failed
    from environment import describe

    machine = describe(device, [torch.bfloat16]) | {"tests": tests}
    report: dict[str, Any] = {"machine_info": machine, "benchmarks": [], "not_timed": []}
    contests, held = list(plan(device)), 0
    for operation, shape, kind, names, compiles in contests:
        left = deadline - time.monotonic()
        if left < 0:
            break
        if compiles and left < _COMPILE_SECONDS:
            continue
        try:
            records = contest(operation, shape, kind, device, names, seconds=1.0)
        except Exception as error:  # the batch itself does not fit, or the GPU is lost
            records = failed(operation, shape, kind, device, names, error)
        for record in records:
            timed = record["status"] == "ok"
            outcome = f"{record['median_ms']:9.3f} ms" if timed else record["status"]
            print(f"{operation.name}, {kind}, {shape}: {record['provider']}: {outcome}", flush=True)
            if timed:
                report["benchmarks"].append({"extra_info": record})
            else:
                report["not_timed"].append(record)
        held += 1
        machine["contests"] = f"{held} of {len(contests)}"
        (output / "results.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> int:
    """Read the arguments, test, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it (default: 8)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<name of the GPU>")
    parser.add_argument("--skip-tests", action="store_true")
    arguments = parser.parse_args()
    start, seconds = time.monotonic(), 60 * arguments.minutes
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return 1
    device = torch.device("cuda")
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    output = arguments.output or HERE / "results" / name
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        make_importable(folder)
        tests = "not run" if arguments.skip_tests else run_tests(output, _TESTS_SHARE * seconds)
        print(f"tests: {tests}", flush=True)
        measure(output, device, tests, start + seconds - _REPORT_SECONDS)
    write_report(output)
    return 0 if tests.startswith(("passed", "not run")) else 1


def write_report(output: Path) -> None:
    """Make of the JSON what the machine's packages allow."""
    results = output / "results.json"
    print(results)
    try:
        import report
    except ImportError as error:
        print(f"no tables: {error}; elsewhere: python benchmarks/report.py {results}")
        return
    for path in report.write(results, output):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
