"""Combine the results of benchmarks that ran in several processes into one result.

    python benchmarks/median_of_runs.py RUN.json RUN.json RUN.json --output RESULTS.json

The times of a process depend on chance: on where its memory lies, and on what else the machine does
meanwhile. Within a contest providers take turns, so chance affects them alike. Therefore one run of
each contest is kept whole: the run in which the ratio of this library's time to that of the fastest
other provider is the median of the runs.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

Report = dict[str, Any]
Contest = list[dict[str, Any]]  # the benchmarks of one contest, one for each provider

OURS = "fastrlhf"


def median_of_runs(reports: list[Report]) -> Report:
    """Choose a run of each contest. The description of the machine is that of the first run."""
    runs_of: dict[str, list[Contest]] = defaultdict(list)
    for report in reports:
        of_report: dict[str, Contest] = defaultdict(list)
        for benchmark in report["benchmarks"]:
            of_report[benchmark["group"]].append(benchmark)
        for group, contest in of_report.items():
            runs_of[group].append(contest)
    chosen = [
        benchmark
        for runs in runs_of.values()
        for benchmark in sorted(runs, key=_beside_the_best)[len(runs) // 2]
    ]
    of_records = {_who(record): record for report in reports for record in report["not_timed"]}
    timed = {_who(benchmark["extra_info"]) for benchmark in chosen}
    machine = reports[0]["machine_info"] | {"processes": len(reports)}
    not_timed = [record for who, record in of_records.items() if who not in timed]
    return reports[0] | {"machine_info": machine, "benchmarks": chosen, "not_timed": not_timed}


def _beside_the_best(contest: Contest) -> float:
    """Return the ratio of this library's time to that of the fastest other provider."""
    times = {b["extra_info"]["provider"]: b["extra_info"]["median_ms"] for b in contest}
    others = [time for name, time in times.items() if not name.startswith(OURS)]
    return times[OURS] / min(others) if others else times[OURS]


_MEASURED = (
    "status", "median_ms", "p20_ms", "p80_ms", "rounds", "limit_ms", "fraction_of_limit",
    "times_plan_limit", "peak_mib", "times_ms",
)  # fmt: skip


def _who(record: dict[str, Any]) -> str:
    described = {key: value for key, value in record.items() if key not in _MEASURED}
    return json.dumps(described, sort_keys=True)


def main() -> None:
    """Run the command: read the runs and write the chosen contests."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in arguments.runs]
    arguments.output.write_text(json.dumps(median_of_runs(reports), indent=1) + "\n")


if __name__ == "__main__":
    main()
