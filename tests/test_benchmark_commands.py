"""The commands of the benchmarks, from pytest to the report and on a GPU."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.benchmark_records import (
    BENCHMARKS,
    BOTH,
    CPU,
    batch,
    gpu,
    gpu_tests,
    measure,
    operation,
    read_csv,
)

median_of_runs = importlib.import_module("median_of_runs").median_of_runs


def test_from_pytest_to_the_report(tmp_path) -> None:
    results = tmp_path / "results.json"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
        str(BENCHMARKS / "bench_preference_loss.py"), str(BENCHMARKS / "bench_token_stats.py"),
        "-k", "(64x512 or 8x64x32000-prompt50-bfloat16) and forward+backward and not compile",
        f"--benchmark-json={results}",
    ]  # fmt: skip
    # A worker of the suite that runs this is not one of the benchmarks', which have none; and
    # nobody times interpreted kernels.
    foreign = ("PYTEST_XDIST", "TRITON_INTERPRET")
    alone = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    done = subprocess.run(command, cwd=BENCHMARKS.parent, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "peak memory beyond the batch" in done.stdout
    command = [sys.executable, str(BENCHMARKS / "report.py"), str(results)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "results.csv")
    assert {row["provider"] for row in rows} == {
        "fastrlhf", "fastrlhf, in place", "eager", "TRL selective_log_softmax",
        "Liger cross-entropy",
    }  # fmt: skip
    statuses = {row["provider"]: row["status"] for row in rows}
    assert statuses.pop("Liger cross-entropy") == "needs a GPU"
    assert set(statuses.values()) == {"ok"}
    # pytest-benchmark's own figures are those of the contest.
    for benchmark in json.loads(results.read_text())["benchmarks"]:
        assert benchmark["stats"]["median"] * 1e3 == pytest.approx(
            benchmark["extra_info"]["median_ms"]
        )
    assert "node" not in json.loads(results.read_text())["machine_info"]
    assert (tmp_path / "tables.md").exists() and list(tmp_path.glob("*.png"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_of_several_processes_each_contest_is_kept_whole() -> None:
    def run(*contests: tuple[float, float]) -> dict:
        timed = [
            {"group": str(i), "extra_info": {"provider": provider, "group": i, "median_ms": x}}
            for i, times in enumerate(contests)
            for provider, x in zip(("fastrlhf", "eager"), times, strict=True)
        ]
        skipped = [{"provider": "cut-cross-entropy", "status": "needs a GPU"}]
        return {"machine_info": {"device": "cpu"}, "benchmarks": timed, "not_timed": skipped}

    # Ratios of 3, 0.5 and 1; then of 1, 2 and 4.
    runs = [run((3.0, 1.0), (1.0, 1.0)), run((1.0, 2.0), (2.0, 1.0)), run((9.0, 9.0), (4.0, 1.0))]
    found = median_of_runs(runs)
    assert [b["extra_info"]["median_ms"] for b in found["benchmarks"]] == [9.0, 9.0, 2.0, 1.0]
    assert found["not_timed"] == runs[0]["not_timed"]
    assert found["machine_info"] == {"device": "cpu", "processes": 3}


def test_the_gpu_command_says_when_there_is_none() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "no GPU here: nothing measured\n"


def test_the_gpu_command_runs_the_tests_that_a_gpu_matters_to(tmp_path, monkeypatch) -> None:
    files = [Path(name) for name in gpu_tests.test_files()]
    assert len(set(files)) == len(files) and all(path.is_file() for path in files)
    assert files[0].name == "test_real_sizes.py"
    everything = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    left_out = everything - {path.stem for path in files}
    for start in gpu_tests._WITHOUT_GPU:
        named = {name for name in everything if name.startswith(f"test_{start}")}
        assert named and named <= left_out
        left_out -= named
    assert not left_out
    (tmp_path / "test_a.py").write_text("def test_right():\n    pass\n")
    monkeypatch.setattr(gpu_tests, "test_files", lambda: [str(tmp_path / "test_a.py")])
    outcome = gpu_tests.run_tests(tmp_path, 60.0)
    assert outcome.startswith("passed (1 passed in ")
    (tmp_path / "test_a.py").write_text("def test_wrong():\n    assert 0\n")
    assert gpu_tests.run_tests(tmp_path, 60.0).startswith("failed (1 failed in ")


@pytest.mark.parametrize("tests", [False, True])
def test_the_gpu_command_spends_its_minutes_on_contests_unless_asked(
    tests, tmp_path, monkeypatch
) -> None:
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Card")
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: 100.0))
    monkeypatch.setattr(gpu, "write_report", lambda output: calls.append("report"))
    monkeypatch.setattr(gpu_tests, "run_tests", lambda output, left: f"failed after {left}")

    def measure_until(output, device, deadline) -> None:
        calls.append(deadline)
        (output / "results.json").write_text('{"machine_info": {}}')

    monkeypatch.setattr(gpu, "measure", measure_until)
    arguments = SimpleNamespace(minutes=10.0, output=tmp_path, tests=tests)
    assert gpu.run_contests(arguments) == tests
    assert calls == [100.0 + (300.0 if tests else 580.0), "report"]
    machine = json.loads((tmp_path / "results.json").read_text())["machine_info"]
    assert machine == ({"tests": "failed after 580.0"} if tests else {})


def test_the_gpu_command_keeps_what_it_has_when_time_is_over(tmp_path, monkeypatch) -> None:
    """Its contests, on the CPU and with small batches."""
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(measure, "matmul_rate", lambda device, dtype: 1e9)
    of = operation("preference_loss")
    lost = replace(of, name="lost", source="unheard of")
    names = ["fastrlhf", "eager"]
    plan = [
        gpu.Contest(of, batch.Shape(4, 8), BOTH, names, compiles=False),
        gpu.Contest(of, batch.Shape(4, 8), BOTH, ["torch.compile"], compiles=True),
        gpu.Contest(lost, batch.Shape(4, 8), BOTH, names, compiles=False),
        gpu.Contest(of, batch.Shape(8, 8), BOTH, names, compiles=False),
    ]
    monkeypatch.setattr(gpu, "plan", lambda device: iter(plan))
    clock = iter([0.0, 0.0, 0.0, 51.0])
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    gpu.measure(tmp_path, CPU, deadline=50.0)
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["machine_info"]["contests"] == "2 of 4"
    timed = {b["extra_info"]["provider"] for b in result["benchmarks"]}
    assert timed == {"fastrlhf", "eager"}
    assert {r["operation"] for r in result["not_timed"]} == {"lost"}
    gpu.write_report(tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "Tests: not run. Contests: 2 of 4." in text
