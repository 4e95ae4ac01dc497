"""Collect the findings of a run in a file that is always complete, and in tables at the end."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from .sections import Outcome, Record

_RESULTS = Path(__file__).resolve().parent.parent / "results"
_PACKAGES = ("triton", "transformers", "trl", "liger-kernel")
_CHARACTERS, _CHECKS_CHARACTERS = 9900, 4300  # of both tables, and of the first at most
_WIDTH = 110
_NAME = 54  # so many last characters of a check's name are shown
_SHOWN_FAILURES, _SHOWN_OUTPUT = 20, 6


class Results:
    """The records of all sections, and how the sections ended."""

    def __init__(self, output: Path | None, options: Record) -> None:
        """Write into a folder, by default one with the card's name, which a section finds out."""
        self._output, self._start = output, time.monotonic()
        self.found: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "options": options,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in _PACKAGES},
            "machine": {}, "rates": {}, "sections": [],
            "checks": [], "timings": [], "launches": [], "notes": [],
        }  # fmt: skip

    @property
    def path(self) -> Path:
        """The path of the JSON file."""
        card = self.found["machine"].get("card", "unknown card")
        folder = self._output or _RESULTS / card.lower().replace(" ", "-")
        return folder / "first-light.json"

    def add(self, section: str, records: list[Record]) -> None:
        """Store records of a section, and print at once what failed."""
        for record in records:
            kind = record.pop("kind")
            if kind in ("machine", "rates"):
                self.found[kind].update(record)
                continue
            kept = self.found["launches" if kind == "launches" else f"{kind}s"]
            kept.append({"section": section} | record)
            if kind == "check" and not record["passed"]:
                print(f"FAILED {_failure(record)}", flush=True)
        self.write()

    def end(self, outcome: Outcome) -> None:
        """Store how a section ended, and print it."""
        self.found["sections"].append(outcome._asdict())
        print(f"{outcome.section}: {outcome.status}, {outcome.seconds:.1f} s", flush=True)
        self.write()

    def write(self) -> None:
        """Replace the file by a complete new one, so that a stopped run leaves a valid file."""
        if self._output is None and not self.found["machine"]:
            return  # the card's name, and so the folder, is not known yet
        self.found["seconds"] = round(time.monotonic() - self._start, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.found, indent=1, allow_nan=False) + "\n")
        os.replace(draft, self.path)

    @property
    def passed(self) -> bool:
        """Whether every check passed and every section came to its end."""
        return all(check["passed"] for check in self.found["checks"]) and all(
            section["status"] == "ok" for section in self.found["sections"]
        )

    def tables(self) -> str:
        """Write checks and timings that fit onto a screen or two. The file has the rest."""
        checks = _fit(checks_table(self.found), _CHECKS_CHARACTERS)
        timings = _fit(timings_table(self.found), _CHARACTERS - len(checks))
        return f"{checks}\n\n{timings}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fit(lines: list[str], characters: int) -> str:
    """Join as many lines as fit, and add how many do not."""
    kept = [line[:_WIDTH].rstrip() for line in lines]
    left_out = 0
    while len("\n".join(kept)) > characters - 40:
        kept.pop()
        left_out += 1
    return "\n".join([*kept, f"... {left_out} more lines: see the file"] if left_out else kept)


def _failure(check: Record) -> str:
    error, budget = (
        "not a number" if x is None else f"{x:.1e}" for x in (check["error"], check["budget"])
    )
    return f"{check['name']}: {error}, not {budget}"


def _share(check: Record) -> float:
    """Return the share of its budget that a check used."""
    if check["error"] is None:
        return math.inf
    return check["error"] / check["budget"] if check["error"] else 0.0


def checks_table(found: dict[str, Any]) -> list[str]:
    """Write a line for each section with checks, and the failures.

    For sections that did not end well, the last lines of their output are added.
    """
    by_section = defaultdict(list)
    for check in found["checks"]:
        by_section[check["section"]].append(check)
    well = sum(section["status"] == "ok" for section in found["sections"])
    lines = [
        f"CHECKS  {well} of {len(found['sections'])} sections came to their end (! did not)",
        f"        {'section':34s} {'passed':>9s}  of its budget, the worst used",
    ]
    for section in found["sections"]:
        checks = by_section[section["section"]]
        if not checks and section["status"] == "ok":
            continue
        passed = sum(check["passed"] for check in checks)
        line = f"{'' if section['status'] == 'ok' else '!':7s} {section['section']:34s} "
        line += f"{passed:4d}/{len(checks):4d}  "
        worst = max((c for c in checks if c["budget"]), key=_share, default=None)
        if worst is not None:
            line += f"{100 * min(_share(worst), 99.99):4.0f}%  {worst['name'][-_NAME:]}"
        lines.append(line)
    failures = [check for check in found["checks"] if not check["passed"]]
    lines += [f"FAILED  {_failure(check)}" for check in failures[:_SHOWN_FAILURES]]
    if len(failures) > _SHOWN_FAILURES:
        lines.append(f"FAILED  and {len(failures) - _SHOWN_FAILURES} more")
    for section in found["sections"]:
        if section["status"] != "ok":
            lines.append(f"!       {section['section']}: {section['status']}")
            lines += [f"        | {line}" for line in section["output"][-_SHOWN_OUTPUT:]]
    return lines


def timings_table(found: dict[str, Any]) -> list[str]:
    """Write the card and its rates, the kernels by size, and a line for each other timing."""
    machine, rates = found["machine"], found["rates"]
    versions = ", ".join(f"{k} {found[k]}" for k in ("torch", "triton", "python"))
    lines = [f"TIMINGS  {machine.get('card')}, driver {machine.get('driver')}, {versions}"]
    if rates:
        copied, flops = rates["copy_bytes_per_second"], rates["matmul_flops_per_second"]
        lines.append(f"copy {copied / 1e12:.3g} TB/s, bf16 matmul {flops / 1e12:.4g} TFLOP/s")
    shown = [timing for timing in found["timings"] if not timing.get("variant")]
    lines += _by_size([timing for timing in shown if "column" in timing])
    lines.append(
        f"{'ms, of the limit, limit':52s} {'ms':>9s} {'':>5s} {'':>9s}  GiB beyond gradients"
    )
    for timing in shown:
        if "column" not in timing:
            limit = "" if timing["floor_ms"] is None else f"{timing['floor_ms']:.3f}"
            figures = f"{_time(timing)} {limit:>9s}  {timing.get('peak_gib', '')}"
            lines.append(f"{timing['name'][:52]:52s} {figures}")
    lines += [f"{note['name']}: {note['text']}" for note in found["notes"]]
    for step in found["launches"]:
        lines += _launches(step)
    return lines


def _time(timing: Record) -> str:
    share = "" if timing["share"] is None else f"{100 * timing['share']:.0f}%"
    return f"{timing['ms']:9.3f} {share:>5s}"


def _by_size(timings: list[Record]) -> list[str]:
    """Write a line for each kernel, with its ms and its share of the limit at each size."""
    columns = list(dict.fromkeys(timing["column"] for timing in timings))
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for timing in timings:
        limit = "" if timing["floor_ms"] is None else f"{timing['floor_ms']:.3f}"
        rows[timing["name"]][timing["column"]] = f"{_time(timing)} {limit:>7s}"
    lines = [f"{'ms, of the limit, limit':23s}" + "".join(f" {column:>23s}" for column in columns)]
    for name, cells in rows.items():
        lines.append(f"{name:23s}" + "".join(f" {cells.get(c, '-'):>23s}" for c in columns))
    return lines if timings else []


def _launches(step: Record) -> list[str]:
    head = f"{step['name']}: {step['count']} kernels, {step['busy_us']:.0f} us, and"
    lines = [f"{head} {step['gaps_us']:.0f} us between them"]
    for kernel in step["kernels"][:12]:
        lines.append(
            f"  {kernel['us']:8.1f} us after {kernel['gap_before_us']:6.1f}  {kernel['name'][:50]}"
        )
    return lines
