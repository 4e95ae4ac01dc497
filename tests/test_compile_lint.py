"""The machine code of every kernel, compiled without a GPU for the GPUs that people have.

A fresh process compiles, since this one may hold the kernels as the interpreter sees them. By
default it compiles a few launches of every kernel for every GPU, the most for sm_90; with `-m ""`,
as `make test-all` has it, all that the launchers make.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")
# One worker has them all: what is compiled is compiled once.
pytestmark = pytest.mark.xdist_group("compile lint")

SUPPORT = Path(__file__).parent / "support"
# Kernels that go over the vocabulary, and how many numbers of a row each of them stores.
STREAMING = {
    "_token_stats_fwd_kernel": None,
    "_token_stats_bwd_kernel": 0,
    "_policy_loss_kernel": 3,
    "_divergence_fwd_kernel": None,
    "_divergence_sums_kernel": None,
    "_divergence_bwd_kernel": 0,
    "_fisher_kernel": 1,
    "_scale_kernel": 0,
}
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


def start(script: str, *arguments: str) -> subprocess.Popen:
    """Run a script of tests/support/ where the kernels are as the compiler sees them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(SUPPORT.parent), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, str(SUPPORT / script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


# What each of two processes compiles.
SELECTIONS = {
    "few": [("few", "sm_90"), ("fewest", "sm_80", "sm_100", "gfx942")],
    "all": [("all", "sm_80", "sm_90"), ("all", "sm_100", "gfx942")],
}


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.exhaustive)])
def binaries(request) -> dict[str, list[dict]]:
    """Reports on every distinct compilation, by target."""
    processes = [start("lint_kernels.py", *part) for part in SELECTIONS[request.param]]
    reports: dict[str, list[dict]] = {target: [] for target in TARGETS}
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0
        for line in output.splitlines():
            report = json.loads(line)
            reports[report["target"]].append(report)
    return reports


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills(target, binaries) -> None:
    assert {report["kernel"] for report in binaries[target]} == {
        "_token_stats_fwd_kernel",
        "_token_stats_merge_kernel",
        "_token_stats_combine_kernel",
        "_token_stats_bwd_kernel",
        "_preference_loss_fwd_kernel",
        "_preference_loss_bwd_kernel",
        "_policy_loss_kernel",
        "_scale_kernel",
        "_gae_kernel",
        "_divergence_fwd_kernel",
        "_divergence_sums_kernel",
        "_divergence_bwd_kernel",
        "_fisher_kernel",
        "_kept_products_kernel",
        "_weighted_sums_kernel",
        "_kept_stats_fwd_kernel",
        "_kept_stats_bwd_kernel",
    }
    assert [report for report in binaries[target] if report["stack"]] == []


@pytest.mark.parametrize("target", TARGETS)
def test_rows_that_start_at_16_bytes_are_loaded_and_stored_16_bytes_at_a_time(
    target, binaries
) -> None:
    streaming = [
        report
        for report in binaries[target]
        if report["kernel"] in STREAMING and report["vocab"] % 16 == 0
    ]
    assert streaming
    for report in streaming:
        if target == "gfx942" and report["thread_bytes"] == 16:
            continue  # 16 bytes a thread for 32 of them are 8 for the 64 there
        assert report["wide_loads"] >= 1, report
        if report["asserts"] and target == "gfx942":
            continue  # the report of a failed assertion has loads and stores of its own there
        # Loads that are not wide are of one number for each row, not for each column. The kernel of
        # the gradient of token_stats has ten of them, with the slopes of four statistics and a
        # temperature for each row. The numbers of words that are left out are read one by one, in a
        # loop that is unrolled.
        of_words = 10 if report["words_left_out"] else 0
        assert report["loads"] - report["wide_loads"] <= 10 + of_words, report
        of_rows = STREAMING[report["kernel"]]
        if of_rows is not None:
            assert report["stores"] - report["wide_stores"] <= of_rows, report


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_registers_leave_room_for_two_blocks_on_a_multiprocessor(target, binaries) -> None:
    for report in binaries[target]:
        assert report["registers"] * 32 * report["warps"] * 2 <= 65536, report


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_a_thread_overwrites_what_it_has_read_itself(target, binaries) -> None:
    """The gradient may take the place of the logits: what one thread reads, no other overwrites."""
    in_place = ("_token_stats_bwd_kernel", "_policy_loss_kernel")
    found = [report for report in binaries[target] if report["kernel"] in in_place]
    assert len({report["kernel"] for report in found}) == 2
    for report in found:
        assert report["exchanges_after_stores"] == 0, report


def test_an_out_of_range_index_traps_on_the_gpu(binaries) -> None:
    for report in binaries["sm_90"] + binaries["gfx942"]:
        checked = (
            "_token_stats_combine_kernel",
            "_preference_loss_fwd_kernel",
            "_policy_loss_kernel",
            "_kept_stats_fwd_kernel",
        )
        assert report["asserts"] == (report["kernel"] in checked), report


def test_tiles_in_flight_are_copied_asynchronously() -> None:
    process = start("lint_kernels.py", "prefetching", "sm_80", "sm_90", "sm_100")
    output, _ = process.communicate()
    assert process.returncode == 0
    reports = [json.loads(line) for line in output.splitlines()]
    sweeping = [
        "_token_stats_fwd_kernel",
        "_policy_loss_kernel",
        "_divergence_fwd_kernel",
        "_divergence_sums_kernel",
        "_fisher_kernel",
    ]
    for report in reports:
        assert report["stack"] == 0, report
        # A loop over the words that are left out stands in the way.
        sweeps = report["kernel"] in sweeping and not report["words_left_out"]
        assert (report["asynchronous_copies"] > 0) == sweeps, report


def test_predictions_have_a_line_for_every_kernel_and_plan(tmp_path) -> None:
    """Made anew, the tables have the lines that are kept, and the text around them stays."""
    benchmarks = SUPPORT.parent.parent / "benchmarks"
    kept = (benchmarks / "results" / "predictions.md").read_text()
    table = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end of \2 -->)", flags=re.DOTALL)
    copy = tmp_path / "predictions.md"
    copy.write_text(table.sub(r"\1\3", kept))
    process = start(str(benchmarks / "predict.py"), str(copy))
    process.communicate()
    assert process.returncode == 0
    made = copy.read_text()
    assert table.sub("", made) == table.sub("", kept)
    first_columns = re.compile(r"^\| ([^|]+) \|", flags=re.MULTILINE)
    assert first_columns.findall(made) == first_columns.findall(kept)


def test_twenty_batches_and_settings_share_one_compilation_of_a_kernel() -> None:
    process = start("count_compilations.py")
    output, _ = process.communicate()
    assert process.returncode == 0
    counts = json.loads(output)
    # Two vocabularies do not share one: the count can fail.
    assert counts.pop("both vocabularies") == 2
    # Surrogates, dtypes, vocabularies; some words of a teacher; kernels of kept ids.
    assert len(counts) == 24 + 1 + 4
    assert set(counts.values()) == {1}, counts
