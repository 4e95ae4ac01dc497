"""Everything that needs a GPU, in one command: the tests on real kernels, then the benchmarks.

    python benchmarks/gpu.py [--minutes 8] [--output DIR] [--skip-tests]

It needs torch, triton, transformers and pytest, and no installation of this package; peers take
part where they can be imported. What it writes: tests.txt, results.json, results.csv, tables.md and
the pictures (these need matplotlib; `report.py` makes them later from the JSON as well).

The batches come in the order of what they tell: the central one of every operation, then those that
differ from it in one thing, and so on until the time is over. `--minutes 60` has time for all.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# These look at files, at the compiler or at recipes on the CPU, which a GPU changes nothing about.
_WITHOUT_GPU = ("compile_lint", "packaging", "imports", "readme", "demo", "trpo_learns",
                "benchmarks", "trl_parity")  # fmt: skip
_TESTS_SHARE = 0.5  # of the minutes, at most
_REPORT_SECONDS = 20


def make_importable(folder: str) -> None:
    """Let the package be imported without the root of the repository, by the tests too."""
    Path(folder, "fastrlhf").symlink_to(ROOT / "fastrlhf")
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


def run_tests(output: Path, seconds: float) -> str:
    """Run the suite for so long at most, into a file; return how it ended."""
    ignored = [f"--ignore={ROOT}/tests/test_{name}.py" for name in _WITHOUT_GPU]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *ignored]
    if importlib.util.find_spec("xdist"):
        # The workers compile kernels side by side, and share the GPU and what they compiled.
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadfile"]
    with (output / "tests.txt").open("w") as log:
        try:
            status = subprocess.run(
                [*command, str(ROOT / "tests")], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"cut off after {seconds:.0f} s"
    return "passed" if status == 0 else f"failed, exit status {status}"


def plan(device: torch.device) -> Iterator[tuple[Any, Any, str]]:
    """Operations, batches and directions, the most telling first."""
    from shapes import shapes, stages

    modules = sorted(path.stem for path in HERE.glob("bench_*.py") if path.stem != "bench_trpo")
    operations = [importlib.import_module(name).OPERATION for name in modules]
    for stage in range(stages(device)):
        for operation in operations:
            for shape in shapes(operation.source, device, stage):
                for kind in operation.kinds(shape):
                    yield operation, shape, kind


def entrants(operation: Any, shape: Any, kind: str, device: torch.device) -> list[str]:
    """Who takes part: what takes long to compile only where it tells most."""
    from contest import BOTH
    from shapes import shapes

    central = kind == BOTH and shape in shapes(operation.source, device, 0)
    return [
        name
        for name in operation.entrants(kind)
        if central or not operation.providers[name].compiles
    ]


def measure(output: Path, device: torch.device, tests: str, deadline: float) -> None:
    """Run contests until the time is over; the JSON on the disk is complete after each of them."""
    from contest import contest, failed
    from environment import describe

    machine = describe(device, [torch.bfloat16]) | {"tests": tests}
    report: dict[str, Any] = {"machine_info": machine, "benchmarks": [], "not_timed": []}
    contests = list(plan(device))
    for done, (operation, shape, kind) in enumerate(contests):
        if time.monotonic() > deadline:
            break
        names = entrants(operation, shape, kind, device)
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
        machine["contests"] = f"{done + 1} of {len(contests)}"
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
    return 0 if tests in ("passed", "not run") else 1


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
