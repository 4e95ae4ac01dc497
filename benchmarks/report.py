"""Turn the JSON of a run into a CSV, tables and plots.

    python benchmarks/report.py RESULTS.json [--output DIR]

reads the file that `pytest benchmarks --benchmark-json=RESULTS.json` or `python benchmarks/gpu.py`
wrote. It writes results.csv (a row for each provider, batch and direction), tables.md, and a
picture for each operation: time, peak memory and the achieved part of the limit, against the
vocabulary and the number of tokens.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Record = dict[str, Any]

FORWARD, BOTH = "forward", "forward + backward"
OURS = "fastrlhf"
_BATCH = ("operation", "dtype", "head", "prompt", "sequences", "tokens", "vocab", "width")


def load(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Read the machine and the records, including those of providers that could not be timed."""
    report = json.loads(path.read_text())
    timed = [benchmark["extra_info"] for benchmark in report["benchmarks"]]
    records = with_ratios(timed + report.get("not_timed", []))
    return report["machine_info"], sorted(records, key=_contest)


def _batch(record: Record) -> tuple:
    return tuple(record[key] for key in _BATCH)


def _contest(record: Record) -> tuple:
    return (*_batch(record), record["kind"])


def with_ratios(records: list[Record]) -> list[Record]:
    """Add to each record its time as a multiple of the time of this library's default."""
    ours = {_contest(r): r for r in records if r["provider"] == OURS and r["status"] == "ok"}
    result = []
    for record in records:
        base = ours.get(_contest(record))
        if base and record["status"] == "ok":
            record = record | {"times_fastrlhf": record["median_ms"] / base["median_ms"]}
        result.append(record)
    return result


def write_csv(records: list[Record], path: Path) -> None:
    """Write one row for each record, with columns in the order in which they first occur."""
    columns = dict.fromkeys(key for record in records for key in record if key != "times_ms")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({k: _rounded(v) for k, v in record.items()} for record in records)


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


# Tables.


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Write a table in Markdown."""
    table = Table(box=box.MARKDOWN)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(cell.replace("|", "/") for cell in row))
    text = io.StringIO()
    Console(file=text, width=1000, markup=False, highlight=False).print(table)
    return "\n".join(line.strip() for line in text.getvalue().splitlines() if line.strip()) + "\n"


def tables(machine: dict[str, Any], records: list[Record]) -> str:
    """Write the environment of the measurements and all tables.

    They include the cases in which this library does worst.
    """
    parts = [
        f"# Benchmarks: {machine['device']}\n",
        measured_with(machine),
        _READING if records and records[0]["device"] == "cuda" else _READING + _READING_CPU,
        "## Summary\n",
        summary(records),
        "## Where a peer is faster\n",
        faster_peers(records),
        "## Furthest from the limit\n",
        furthest(records),
    ]
    for operation, of_operation in groupby(records, key=lambda r: r["operation"]):
        parts.append(f"## {operation[:1].upper()}{operation[1:]}\n")
        for _, batch in groupby(of_operation, key=_batch):
            batch = list(batch)
            parts += [f"**{title(batch[0])}**\n", batch_table(batch)]
    return "\n".join(parts)


_READING = """\
Medians, with the 20th and the 80th percentile, of rounds in which the providers take turns.
"Times fastrlhf" compares with the first row; in bold, another provider is faster. Memory is the
peak beyond the batch and its parameters, gradients included. "Of the limit" is the time that the
bytes or the matmuls which the operation needs at least would take at this device's measured rates,
over the time taken. Random logits are flat beside a trained model's, which is the hardest case for
cut-cross-entropy: it skips what has next to no probability.
"""
_READING_CPU = "On a CPU only the figures within a table compare: time went by between tables.\n"


def measured_with(machine: dict[str, Any]) -> str:
    versions = ("python", "torch", "cuda", "triton", "transformers", "peft", "trl", "liger-kernel",
                "cut-cross-entropy")  # fmt: skip
    found = ", ".join(f"{name} {machine[name]}" for name in versions if machine.get(name))
    rates = ", ".join(
        f"{dtype} matmuls at {rate / 1e12:.3g} TFLOP/s"
        for dtype, rate in machine["matmul_flops_per_second"].items()
    )
    copies = machine["copy_bytes_per_second"] / 1e9
    threads = f", {machine['threads']} threads" if not machine.get("cuda") else ""
    text = (
        f"{machine['date']}; {found}{threads}. Measured limits: copies at {copies:.4g} GB/s (read "
        f"and written), {rates}."
    )
    if "processes" in machine:
        text += f" Each table is from the median one of {machine['processes']} processes."
    if "contests" in machine:
        text += f" Tests: {machine.get('tests', 'not run')}. Contests: {machine['contests']}."
    return text + "\n"


def title(record: Record) -> str:
    """Describe the batch of a record in words."""
    parts = [f"{record['sequences']} × {record['tokens']} tokens, {record['prompt']:.0%} prompt"]
    if record["vocab"]:
        parts.append(f"vocabulary {record['vocab']:,}")
    if record["width"]:
        parts += [f"width {record['width']}", f"head {record['head']}"]
    return ", ".join([*parts, record["dtype"]])


def batch_table(batch: list[Record]) -> str:
    """Write a row for each provider, with forward beside forward + backward."""
    kinds = [kind for kind in (FORWARD, BOTH) if any(r["kind"] == kind for r in batch)]
    columns = ["provider"]
    for kind in kinds:
        columns += [f"{kind}, ms", f"times {OURS}", "of the limit", "peak MiB"]
    rows = []
    for provider in dict.fromkeys(r["provider"] for r in sorted(batch, key=_ours_first)):
        row = [provider]
        for kind in kinds:
            found = [r for r in batch if (r["provider"], r["kind"]) == (provider, kind)]
            row += _cells(found[0]) if found else [""] * 4
        rows.append(row)
    return markdown(columns, rows)


def _ours_first(record: Record) -> bool:
    return not record["provider"].startswith(OURS)


def _cells(record: Record) -> list[str]:
    if record["status"] != "ok":
        return [record["status"], "", "", ""]
    low, median, high = (_digits(record[key]) for key in ("p20_ms", "median_ms", "p80_ms"))
    return [
        f"{median} ({low} to {high})",
        _ratio(record),
        _percent(record["fraction_of_limit"]),
        f"{record['peak_mib']:.1f}",
    ]


def _digits(value: float) -> str:
    """Write a number with three significant digits and no exponent."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _percent(part: float) -> str:
    return f"{100 * part:.2g}%" if part < 0.1 else f"{part:.0%}"


def _ratio(record: Record) -> str:
    if "times_fastrlhf" not in record:
        return ""
    text = f"{record['times_fastrlhf']:.2f}"
    return f"**{text}**" if float(text) < 1 and _ours_first(record) else text


_FAMILIES = (
    "eager",
    "torch.compile",
    "TRL",
    "Liger",
    "F.linear_cross_entropy",
    "cut-cross-entropy",
)


def summary(records: list[Record]) -> str:
    """Write a row for each operation at its central batch: our result and the best of each peer."""
    with_backward = {r["operation"] for r in records if r["kind"] == BOTH}
    central = [
        r
        for r in records
        if r["central"] and r["kind"] == (BOTH if r["operation"] in with_backward else FORWARD)
    ]
    rows = []
    for _, contest in groupby(central, key=_contest):
        batch = list(contest)
        ours = [r for r in batch if r["provider"] == OURS and r["status"] == "ok"]
        if ours:
            own = f"{_digits(ours[0]['median_ms'])} ms, {_mib(ours[0])}"
            rows.append([_name(ours[0]), own, *(_best(batch, family) for family in _FAMILIES)])
    return markdown(["operation", OURS, *_FAMILIES], rows)


def _name(record: Record) -> str:
    parts = [record["operation"]]
    parts += [f"head {record['head']}"] if record["head"] else []
    parts += ["forward alone"] if record["kind"] == FORWARD else []
    return ", ".join(parts)


def _best(batch: list[Record], family: str) -> str:
    """Write the time of a family's fastest provider, as a multiple of ours, and its memory."""
    members = [r for r in batch if r["provider"].startswith(family)]
    timed = [r for r in members if r["status"] == "ok"]
    if not timed:
        return members[0]["status"] if members else ""
    best = min(timed, key=lambda r: r["median_ms"])
    return f"{_ratio(best)}×, {_mib(best)}"


def _mib(record: Record) -> str:
    return f"{_digits(record['peak_mib'])} MiB"


def faster_peers(records: list[Record]) -> str:
    """Write every provider that took less time than this library's default."""
    rows = [
        [r["operation"], r["kind"], title(r), r["provider"], f"{r['times_fastrlhf']:.2f}"]
        for r in records
        if _ours_first(r) and r.get("times_fastrlhf", 1.0) < 1
    ]
    if not rows:
        return "Nowhere in this run.\n"
    return markdown(["operation", "direction", "batch", "peer", f"times {OURS}"], rows)


def furthest(records: list[Record], count: int = 3) -> str:
    """Write the operations in which this library's default achieves the least of the limit.

    Operations without a vocabulary are left out: their limit is nanoseconds, and their cost is in
    the launches.
    """
    worst: dict[tuple, Record] = {}
    for record in records:
        if record["provider"] != OURS or record["status"] != "ok" or not record["vocab"]:
            continue
        key = record["operation"], record["kind"]
        if key not in worst or record["fraction_of_limit"] < worst[key]["fraction_of_limit"]:
            worst[key] = record
    rows = [
        [r["operation"], r["kind"], title(r), _percent(r["fraction_of_limit"])]
        for r in sorted(worst.values(), key=lambda r: r["fraction_of_limit"])[:count]
    ]
    return markdown(["operation", "direction", "batch", "of the limit"], rows)


# Plots.

_PANELS: dict[str, tuple[str, Callable[[Record], float]]] = {
    "time, ms": ("log", lambda r: r["median_ms"]),
    "peak memory, MiB": ("log", lambda r: r["peak_mib"]),
    "part of the limit": ("linear", lambda r: r["fraction_of_limit"]),
}


def write_plots(records: list[Record], folder: Path) -> list[Path]:
    """Write a picture for each operation, with separate pictures for frozen and trained heads."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return []
    written = []
    for operation in dict.fromkeys(r["operation"] for r in records):
        timed = [r for r in records if r["operation"] == operation and r["status"] == "ok"]
        kind = BOTH if any(r["kind"] == BOTH for r in timed) else FORWARD
        for head in dict.fromkeys(r["head"] for r in timed if r["kind"] == kind):
            shown = [r for r in timed if (r["kind"], r["head"]) == (kind, head)]
            name = f"{operation} {head}".strip().lower().replace(" ", "-") + ".png"
            figure = Figure(layout="constrained")
            figure.suptitle(f"{operation}, {kind}" + (f", head {head}" if head else ""))
            _draw(figure, shown)
            figure.savefig(folder / name, dpi=80)
            written.append(folder / name)
    return written


def _draw(figure: Any, records: list[Record]) -> None:
    """Draw a row of panels for each property in which batches vary, a line for each provider."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axes_of = [x for x in ("vocab", "rows") if len({r[x] for r in records}) > 1] or ["rows"]
    figure.set_size_inches(13, 4 * len(axes_of))
    grid = figure.subplots(len(axes_of), len(_PANELS), squeeze=False)
    providers = list(dict.fromkeys(r["provider"] for r in records))
    for x, panels in zip(axes_of, grid, strict=True):
        shown = _varying(records, x)
        for axis, (label, (scale, value)) in zip(panels, _PANELS.items(), strict=True):
            for i, provider in enumerate(providers):
                line = sorted((r for r in shown if r["provider"] == provider), key=lambda r: r[x])
                axis.plot(
                    [r[x] for r in line], [value(r) for r in line], label=provider,
                    color=f"C{i}", marker="o", linewidth=2.5 if provider == OURS else 1.2,
                )  # fmt: skip
            axis.set(xlabel={"vocab": "vocabulary", "rows": "tokens"}[x], ylabel=label)
            axis.set(xscale="log", yscale=scale)
            axis.set_xticks(sorted({r[x] for r in shown}), minor=False)
            axis.set_xticklabels([f"{v:,}" for v in sorted({r[x] for r in shown})])
            if scale == "linear":
                axis.set_ylim(bottom=0)
            else:
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)


def _varying(records: list[Record], x: str) -> list[Record]:
    """Return the records of batches that differ from the central one only in the property x."""
    fixed = [k for k in ("dtype", "prompt", "rows", "vocab", "width") if k != x]
    center = next((r for r in records if r["central"]), records[0])
    return [r for r in records if all(r[k] == center[k] for k in fixed)]


def write(source: Path, folder: Path) -> list[Path]:
    """Write the CSV, tables and pictures of a run's JSON file into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    machine, records = load(source)
    write_csv(records, folder / "results.csv")
    (folder / "tables.md").write_text(tables(machine, records))
    return [folder / "results.csv", folder / "tables.md", *write_plots(records, folder)]


def main() -> None:
    """Run the command, and print the names of the files that were written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the JSON of a run")
    parser.add_argument("--output", type=Path, help="default: the folder of the JSON")
    arguments = parser.parse_args()
    try:
        written = write(arguments.results, arguments.output or arguments.results.parent)
    except (OSError, ValueError, TypeError, KeyError) as error:
        parser.error(f"{arguments.results}: not the JSON of these benchmarks: {error!r}")
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
