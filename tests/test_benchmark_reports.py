"""The reports of the benchmarks: that the tables say what was measured and what was not, and that
the kept tables are those of the kept JSON.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.benchmark_records import BENCHMARKS, TINY, measure, read_csv, record, report

MACHINE = {
    "device": "CPU, 2 cores", "date": "2026-01-01", "python": "3.11", "torch": "2.13", "threads": 2,
    "cuda": None, "copy_bytes_per_second": 3e10, "matmul_flops_per_second": {"float32": 1e11},
}  # fmt: skip


@pytest.fixture
def written(tmp_path) -> Path:
    timed = [
        record("fastrlhf", 32000, 10.0, 0.25), record("eager", 32000, 25.0, 0.1),
        record("quick peer", 32000, 8.0, 0.31),
        record("fastrlhf", 128256, 40.0, 0.0123), record("fastrlhf, in place", 128256, 30.0, 0.02),
        record("quick peer", 128256, 35.0, 0.017),
    ]  # fmt: skip
    result = {
        "machine_info": MACHINE,
        "benchmarks": [{"extra_info": r} for r in timed],
        "not_timed": [record("gpu | peer", 32000)],
    }
    (tmp_path / "results.json").write_text(json.dumps(result))
    report.write(tmp_path / "results.json", tmp_path / "out")
    return tmp_path / "out"


def test_the_csv_is_tidy(written) -> None:
    rows = read_csv(written / "results.csv")
    assert len(rows) == 7
    found = {(row["provider"], row["vocab"]): row for row in rows}
    assert found["quick peer", "32000"]["times_fastrlhf"] == "0.8"
    assert found["eager", "32000"]["median_ms"] == "25.0"
    assert found["gpu | peer", "32000"]["status"] == "needs a GPU"
    assert found["gpu | peer", "32000"]["median_ms"] == ""


def test_the_tables_say_who_is_faster_who_is_missing_and_where_the_limit_is_far(written) -> None:
    text = (written / "tables.md").read_text()
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert ["fastrlhf", "10 (9 to 11)", "1.00", "25%", "12.3"] in lines
    assert ["quick peer", "8 (7.2 to 8.8)", "**0.80**", "31%", "12.3"] in lines
    assert ["eager", "25 (22.5 to 27.5)", "2.50", "10%", "12.3"] in lines
    assert ["gpu / peer", "needs a GPU", "", "", ""] in lines
    summary = text.split("## Summary")[1].split("##")[0]
    assert "10 ms, 12.3 MiB" in summary and "2.50×, 12.3 MiB" in summary
    faster = text.split("## Where a peer is faster")[1].split("##")[0]
    assert faster.count("quick peer") == 2 and "0.80" in faster and "0.88" in faster
    furthest = text.split("## Furthest from the limit")[1].split("##")[0]
    assert "1.2%" in furthest and "128,256" in furthest
    assert "copies at 30 GB/s" in text and "0.1 TFLOP/s" in text and "torch 2.13" in text


def test_the_pictures_are_there(written) -> None:
    pictures = list(written.glob("*.png"))
    assert [path.name for path in pictures] == ["ppo-loss-from-logits.png"]
    assert pictures[0].read_bytes().startswith(b"\x89PNG")


def test_another_json_is_refused_in_a_line(tmp_path) -> None:
    (tmp_path / "other.json").write_text('{"benchmarks": [{"extra_info": {}}]}')
    for name in ("other.json", "missing.json"):
        command = [sys.executable, str(BENCHMARKS / "report.py"), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and "not the JSON of these benchmarks" in done.stderr


def test_no_peer_is_faster_where_none_is() -> None:
    alone = report.with_ratios([record("fastrlhf", 10, 1.0), record("eager", 10, 1.5)])
    assert report.faster_peers(alone) == "Nowhere in this run.\n"


RESULTS = sorted((BENCHMARKS / "results").glob("*/results.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_the_kept_tables_are_those_of_the_kept_json(path, tmp_path) -> None:
    machine, records = report.load(path)
    assert (path.parent / "tables.md").read_text() == report.tables(machine, records)
    report.write_csv(records, tmp_path / "results.csv")
    assert read_csv(path.parent / "results.csv") == read_csv(tmp_path / "results.csv")
    assert {machine["date"], machine["torch"]}.isdisjoint({None, ""}) and "node" not in machine


@pytest.mark.parametrize("name", TINY)
def test_the_table_of_steps_is_written_beside_its_json(name, tmp_path, monkeypatch, capsys) -> None:
    bench, command = TINY[name]
    monkeypatch.setattr(sys, "argv", [*command, "--rounds", "2", "--output", str(tmp_path)])
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(measure, "matmul_rate", lambda device, dtype: 1e9)
    assert bench.main() == 0
    text = (tmp_path / f"{name}.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    kept = json.loads((tmp_path / f"{name}.json").read_text())
    assert text == bench.tables(kept["machine_info"], kept["records"])
    assert {record["trained"].split()[0] for record in kept["records"]} == {"all", "LoRA"}
    rows = [line for line in text.splitlines() if line.startswith("|")]
    in_a_row = 2 if name == "lazy-logits" else 1  # plain and lazy
    assert len(rows) == 2 + len(kept["records"]) / in_a_row


STEPS = [path for name in TINY for path in sorted((BENCHMARKS / "results").glob(f"*/{name}.json"))]


@pytest.mark.parametrize("path", STEPS, ids=lambda path: f"{path.parent.name}, {path.stem}")
def test_the_kept_table_of_steps_is_that_of_the_kept_json(path) -> None:
    kept = json.loads(path.read_text())
    text = TINY[path.stem][0].tables(kept["machine_info"], kept["records"])
    assert path.with_suffix(".md").read_text() == text
