"""Make one result of the same benchmarks run in several processes.

    python benchmarks/median_of_runs.py RUN.json RUN.json RUN.json --output RESULTS.json

A process has its share of luck: where its memory lies, what else the machine does meanwhile. Each
benchmark gets the figures of the run in which its time was the median; of an even number of runs,
the slower of the two. Who could not be timed in every run is not timed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Report = dict[str, Any]


def median_of_runs(reports: list[Report]) -> Report:
    """Choose from each benchmark's runs; what describes the machine is that of the first."""
    runs = [{b["fullname"]: b for b in report["benchmarks"]} for report in reports]
    names = [name for name in runs[0] if all(name in run for run in runs)]
    chosen = [
        sorted((run[name] for run in runs), key=lambda b: b["extra_info"]["median_ms"])[
            len(runs) // 2
        ]
        for name in names
    ]
    of_records = {_who(record): record for report in reports for record in report["not_timed"]}
    machine = reports[0]["machine_info"] | {"processes": len(reports)}
    not_timed = list(of_records.values())
    return reports[0] | {"machine_info": machine, "benchmarks": chosen, "not_timed": not_timed}


def _who(record: dict[str, Any]) -> str:
    described = {key: value for key, value in record.items() if key != "status"}
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
