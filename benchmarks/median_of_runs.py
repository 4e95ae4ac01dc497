"""Make one result of the same benchmarks run in several processes.

    python benchmarks/median_of_runs.py RUN.json RUN.json RUN.json --output RESULTS.json

A process has its share of luck: where its memory lies, what else the machine does meanwhile. Of
each contest, in which providers take turns and so share their luck, one run is kept whole: that in
which this library did as well beside the best of the others as in the median run.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

Report = dict[str, Any]
Contest = list[dict[str, Any]]  # the benchmarks of one, a provider each

OURS = "fastrlhf"


def median_of_runs(reports: list[Report]) -> Report:
    """Choose a run of each contest; what describes the machine is that of the first."""
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
    """Our time over that of the fastest other."""
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
    """Read the runs, and write what was chosen of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in arguments.runs]
    arguments.output.write_text(json.dumps(median_of_runs(reports), indent=1) + "\n")


if __name__ == "__main__":
    main()
