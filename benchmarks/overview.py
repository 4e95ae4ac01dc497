"""Draw the picture of the README: losses at their central batch, beside their peers.

    python benchmarks/overview.py [RESULTS.json] [--output overview.svg]

reads the same results as `report.py`. Times are of forward and backward together. If a peer has
several providers (such as the two ways in TRL to compute log-probs), the fastest is shown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import report

RESULTS = Path(__file__).parent / "results" / "cpu"
SHOWN = (
    "cross-entropy from hidden states",
    "DPO loss from hidden states",
    "GRPO loss from hidden states",
    "KL from hidden states",
    "DPO loss from logits",
    "PPO loss from logits",
    "KL from logits",
)
PEERS = {"fastrlhf": "#1f5fbf", "eager": "#8c8c8c", "torch.compile": "#c0392b", "TRL": "#7d4fb0",
         "Liger": "#d98c2b", "F.linear_cross_entropy": "#3c8f5a"}  # fmt: skip
MEASURES = {"time, ms": "median_ms", "peak memory, MiB": "peak_mib"}


def chosen(records: list[report.Record]) -> dict[str, dict[str, report.Record]]:
    """Choose a record for each operation and peer; from hidden states, with a trained head."""
    found: dict[str, dict[str, report.Record]] = {}
    for operation in SHOWN:
        held = [
            r for r in records
            if r["operation"] == operation and r["central"] and r["kind"] == report.BOTH
            and r["head"] in ("", "trained") and r["status"] == "ok"
        ]  # fmt: skip
        found[operation] = {}
        for peer in PEERS:
            theirs = [r for r in held if _is_of(r["provider"], peer)]
            if theirs:
                found[operation][peer] = min(theirs, key=lambda r: r["median_ms"])
    return found


def _is_of(provider: str, peer: str) -> bool:
    return provider == peer if peer == report.OURS else provider.split(" ")[0] == peer


def dot(record: report.Record, measure: str) -> str:
    """Return the id of a dot in the file, which tells the record that it shows."""
    return f"{record['operation']}: {record['provider']} {measure} {record[measure]:.4g}"


def picture(records: list[report.Record]) -> Any:
    """Draw time and memory side by side, with a row for each operation and a dot for each peer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    rows = chosen(records)
    for axis, (label, measure) in zip(panels, MEASURES.items(), strict=True):
        for y, found in enumerate(rows.values()):
            values = [record[measure] for record in found.values()]
            axis.plot([min(values), max(values)], [y, y], color="#dddddd", linewidth=2, zorder=1)
            for peer, record in found.items():
                axis.scatter(
                    record[measure], y, s=70 if peer == report.OURS else 36, color=PEERS[peer],
                    zorder=2, label=peer, gid=dot(record, measure),
                )  # fmt: skip
        axis.set_xlim(0)
        axis.set_xlabel(label)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color="#eeeeee")
    panels[0].set_yticks(range(len(rows)), list(rows))
    panels[0].invert_yaxis()
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    names = [peer for peer in PEERS if peer in handles]
    figure.legend([handles[n] for n in names], names, loc="outside upper center", ncols=len(names),
                  frameon=False)  # fmt: skip
    return figure


def draw(results: Path, output: Path) -> None:
    """Read results and draw them; the same results give the same file."""
    import matplotlib

    _, records = report.load(results)
    with matplotlib.rc_context({"svg.hashsalt": "overview"}):  # otherwise ids would be random
        picture(records).savefig(output, metadata={"Date": None} if output.suffix == ".svg" else {})


def main() -> None:
    """Run the command: read the results and draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS / "results.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "overview.svg")
    arguments = parser.parse_args()
    draw(arguments.results, arguments.output)


if __name__ == "__main__":
    main()
