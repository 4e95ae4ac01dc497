"""Check and time everything that needs a GPU in one command, in minutes or in hours.

    python benchmarks/gpu.py --first-light [--seconds 240] [--output DIR]
    python benchmarks/gpu.py [--minutes 8] [--output DIR] [--tests]

The first form is for the first minutes on a new card. It compares every operation with fp64, then
times each kernel beside the card's own limits, and writes first-light.json. `--device cpu --tiny`
runs all of it interpreted on a CPU, except for the lines that call CUDA itself.

The second form holds the contests with plain PyTorch and the peers. With --tests it spends half of
its minutes on them, and the rest on the test suite. It writes results.json, results.csv, tables.md,
the pictures (these need matplotlib; `report.py` can make them later from the JSON) and tests.txt.
The most telling batches come first: the central batch of every operation, then batches that differ
from it in one property, and so on until the time is over. Providers that compile first have
contests of their own. `--minutes 180` should be enough for all. The suite by itself is

    python -m pytest -n 2 --maxschedchunk 1 tests/test_real_sizes.py tests

All of these need torch, triton and transformers, and the tests need pytest. This package need not
be installed. Peers take part if they can be imported.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gpu_tests
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
_CONTESTS_SHARE = 0.5  # share of the minutes, if the tests run too
_REPORT_SECONDS = 20
_COMPILE_SECONDS = 60  # a contest of providers that compile needs so many left
# The files of the benchmarks; the most telling come first.
_OPERATIONS = ("token_stats", "logits_policy_loss", "linear_dpo_loss", "linear_policy_loss",
               "linear_token_stats", "linear_loss", "divergence", "linear_divergence", "dpo_loss",
               "fisher", "preference_loss", "gae")  # fmt: skip


def make_importable(folder: str) -> None:
    """Make the package importable, also in the tests, without the repository's root on the path."""
    Path(folder, "fastrlhf").symlink_to(ROOT / "fastrlhf")
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


class Contest(NamedTuple):
    """One contest: the providers that are timed together."""

    operation: Any
    shape: Any
    kind: str
    names: list[str]
    compiles: bool


def plan(device: torch.device) -> Iterator[Contest]:
    """Yield the contests, the most telling first.

    Providers that take long to compile have contests of their own, only at the central batches.
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


def measure(output: Path, device: torch.device, deadline: float) -> None:
    """Run contests until the time is over. After each of them a complete JSON file is written."""
    from contest import contest, failed
    from environment import describe

    machine = describe(device, [torch.bfloat16])
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
        _write(output, report)


def _write(output: Path, report: dict[str, Any]) -> None:
    (output / "results.json").write_text(json.dumps(report, indent=1) + "\n")


def add_tests(output: Path, seconds: float) -> str:
    """Run the tests for at most `seconds`, and add their outcome to the JSON file."""
    outcome = gpu_tests.run_tests(output, seconds)
    print(f"tests: {outcome}", flush=True)
    if (output / "results.json").exists():
        report = json.loads((output / "results.json").read_text())
        report["machine_info"]["tests"] = outcome
        _write(output, report)
    return outcome


def main() -> int:
    """Run the command: first light or the contests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<name of the GPU>")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it (default: 8)")
    parser.add_argument("--tests", action="store_true", help="run the tests too, after the timings")
    first = parser.add_argument_group("first light")
    first.add_argument("--first-light", action="store_true", help="checks and timings in minutes")
    first.add_argument("--seconds", type=float, default=240.0, help="for all of it (default: 240)")
    first.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: interpreted")
    first.add_argument("--tiny", action="store_true", help="in tiny shapes, for an interpreter")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not (arguments.first_light and arguments.tiny):
        parser.error("--device cpu is for --first-light --tiny")
    with tempfile.TemporaryDirectory() as folder:
        make_importable(folder)
        return run_first_light(arguments) if arguments.first_light else run_contests(arguments)


def run_first_light(arguments: argparse.Namespace) -> int:
    """Check and time everything briefly.

    Nothing may touch the GPU before this, because sections are forked processes: see sections.py.
    """
    # Asking in this process whether there is a GPU must not touch the GPU either.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if arguments.device == "cpu":
        # This must be set before triton is imported, which reads it when it decorates a kernel.
        os.environ["TRITON_INTERPRET"] = "1"
        sys.path.append(str(ROOT / "tests"))
        from support.interpreter import look_up_the_language_once

        look_up_the_language_once()
    from first_light.run import first_light

    return first_light(
        arguments.device, tiny=arguments.tiny, seconds=arguments.seconds, output=arguments.output
    )


def run_contests(arguments: argparse.Namespace) -> int:
    """Run the contests, run the tests if asked to, and write the report."""
    start, seconds = time.monotonic(), 60 * arguments.minutes
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return 1
    device = torch.device("cuda")
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    output = arguments.output or HERE / "results" / name
    output.mkdir(parents=True, exist_ok=True)
    end = start + seconds - _REPORT_SECONDS
    measure(output, device, start + _CONTESTS_SHARE * seconds if arguments.tests else end)
    outcome = add_tests(output, end - time.monotonic()) if arguments.tests else "passed"
    write_report(output)
    return 0 if outcome.startswith("passed") else 1


def write_report(output: Path) -> None:
    """Write the parts of the report for which packages are installed, from the JSON file."""
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
