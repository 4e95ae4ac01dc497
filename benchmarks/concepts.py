"""Draw the pictures of docs/concepts/ from the results of the benchmarks.

    python benchmarks/concepts.py [--output docs/pictures]

The same figures give the same files, because the files contain no date and no random ids.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
OURS, PLAIN, THIRD = "#1f5fbf", "#8c8c8c", "#d98c2b"
MIB = 2**20


def figures(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def bars(axis: Axes, rows: dict[str, dict[str, float]], colors: dict[str, str], unit: str) -> None:
    """Draw a row for each name, with a bar and its number for each series."""
    height = 0.8 / len(colors)
    for y, values in enumerate(rows.values()):
        for i, (name, color) in enumerate(colors.items()):
            value = values[name]
            axis.barh(y + i * height, value, height, color=color, label=name if y == 0 else None)
            axis.text(value, y + i * height, f" {value:.3g}", va="center", fontsize=7)
    axis.set_yticks([y + height * (len(colors) - 1) / 2 for y in range(len(rows))], list(rows))
    axis.invert_yaxis()
    axis.set_xlabel(unit)
    handles, names = axis.get_legend_handles_labels()
    axis.figure.legend(
        handles, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize=8
    )


def trained(record: dict[str, Any]) -> str:
    return {"all": "all trained"}.get(record["trained"], "LoRA")


def matmuls() -> Figure:
    """Draw the number of head matmuls in a step of TRL's trainers, with prompts skipped."""
    rows: dict[str, dict[str, float]] = {}
    for record in figures("trainer")["records"]:
        name = f"{record['loss']}, {trained(record)}"
        rows.setdefault(name, {})[record["provider"]] = record["head_matmuls"]
    figure, axis = new(5.5, 3.4)
    colors = {"TRL, prompts skipped": PLAIN, "patched": OURS}
    bars(axis, rows, colors, "matmuls of the head in a step, G")
    return figure


def memory() -> Figure:
    """Draw the peak memory of loops in plain PyTorch, unchanged and with lazy logits."""
    rows: dict[str, dict[str, float]] = {}
    for record in figures("lazy-logits")["records"]:
        if record["dtype"] == "float32":
            name = f"{record['loss']}; {trained(record)}"
            rows.setdefault(name, {})[record["provider"]] = record["peak_mib"]
    figure, axis = new(7.5, 6)
    bars(axis, rows, {"plain": PLAIN, "lazy_logits": OURS}, "peak beyond model and batch, MiB")
    return figure


def fewer() -> Figure:
    """Draw the time against the share of tokens with a gradient, and that of matmuls alone."""
    figure, axis = new(6, 3.4)
    cases = figures("fewer-rows")["cases"]
    for head, color, factor, cost in (
        ("trained", OURS, 2, "1 + 2f"),
        ("frozen", THIRD, 1, "1 + f"),
    ):
        held = [c for c in cases if c["head"] == head and c["states_per_token"] == 1]
        shares = [case["live_share"] for case in held]
        taken = [case["figures"]["no gradient, no matmul"]["milliseconds"] for case in held]
        axis.plot(shares, taken, "o-", color=color, label=f"head {head}")
        (whole,) = (time for time, share in zip(taken, shares, strict=True) if share == 1)
        floor = [whole * (1 + factor * share) / (1 + factor) for share in shares]
        axis.plot(shares, floor, ":", color=color, label=f"in proportion to {cost}")
    axis.set_xlabel("share f of the tokens that have a gradient")
    axis.set_ylabel("forward + backward, ms")
    axis.set_ylim(0)
    axis.legend(frameon=False, fontsize=8)
    return figure


def tails() -> Figure:
    """Draw errors of log-probs near 0, and of KL penalties of a policy near its reference."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    measured = figures("numerics")
    for axis, key, label in zip(
        figure.subplots(1, 2),
        ("log-prob of a target that leads by", "k3 of a log-ratio of"),
        ("log-prob: nats by which the target leads", "k3: log-ratio of policy and reference"),
        strict=True,
    ):
        for name, errors in measured[key]["errors"].items():
            ours = name.startswith("fastrlhf")
            axis.plot(
                measured[key]["nats"],
                [max(error, 1e-9) for error in errors],
                ":" if "bfloat16" in name else "-",
                color=OURS if ours else PLAIN,
                label=name,
            )
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("relative error")
    figure.axes[1].set_xscale("log")
    figure.axes[1].invert_xaxis()
    return figure


def new(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


PICTURES: dict[str, Callable[[], Figure]] = {
    "matmuls": matmuls,
    "memory": memory,
    "fewer": fewer,
    "tails": tails,
}


def draw(name: str, folder: Path) -> None:
    """Write NAME.svg, with text stored as text and with ids that do not change between runs."""
    with rc_context({"svg.hashsalt": "concepts", "svg.fonttype": "none"}):
        PICTURES[name]().savefig(folder / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures")
    folder = parser.parse_args().output
    for name in PICTURES:
        draw(name, folder)


if __name__ == "__main__":
    main()
