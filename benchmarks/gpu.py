"""Everything that needs a GPU, in one command: is it right and fast there, in minutes or in hours.

    python benchmarks/gpu.py --first-light [--seconds 240] [--output DIR]
    python benchmarks/gpu.py [--minutes 8] [--output DIR] [--tests]

The first is for the first minutes on a new card: every operation against fp64, then each kernel
beside the card's own limits. It writes first-light.json. `--device cpu --tiny` runs every line of
it interpreted, on a CPU, but for what is CUDA's own.

The second holds the contests with plain PyTorch and the peers. With --tests it spends half of its
minutes on them, and the rest on the test suite. It writes results.json, results.csv, tables.md and
the pictures (these need matplotlib; `report.py` makes them later from the JSON as well), and
tests.txt. The batches come in the order of what they tell: the central one of every operation, what
compiles first apart from the others, then those that differ from it in one thing, and so on until
the time is over. `--minutes 180` should have time for all. The suite by itself is

    python -m pytest -n 2 --maxschedchunk 1 tests/test_real_sizes.py tests

All need torch, triton and transformers, the tests pytest, and no installation of this package;
peers take part where they can be imported.
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
_CONTESTS_SHARE = 0.5  # of the minutes, if the tests are to run as well
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


def measure(output: Path, device: torch.device, deadline: float) -> None:
    """Run contests until the time is over; the JSON on the disk is complete after each of them."""
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
    """Run the tests for so long, and add to the JSON how they ended."""
    outcome = gpu_tests.run_tests(output, seconds)
    print(f"tests: {outcome}", flush=True)
    if (output / "results.json").exists():
        report = json.loads((output / "results.json").read_text())
        report["machine_info"]["tests"] = outcome
        _write(output, report)
    return outcome


def main() -> int:
    """Read the arguments, and run what they ask for."""
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
    """Check and time everything briefly. Nothing before this may touch the GPU: see sections.py."""
    # Whoever asks in this process whether there is a GPU is not to touch it either.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if arguments.device == "cpu":
        # Before triton is imported: it decides at the decoration of a kernel.
        os.environ["TRITON_INTERPRET"] = "1"
        sys.path.append(str(ROOT / "tests"))
        from support.interpreter import look_up_the_language_once

        look_up_the_language_once()
    from first_light.run import first_light

    return first_light(
        arguments.device, tiny=arguments.tiny, seconds=arguments.seconds, output=arguments.output
    )


def run_contests(arguments: argparse.Namespace) -> int:
    """Measure and report; run the tests if they are asked for."""
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
