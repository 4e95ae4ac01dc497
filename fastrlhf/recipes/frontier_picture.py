"""Draw reward against KL, a line for each method and setting."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .curves import plain

_COLORS = {
    "SFT": "black",
    "best of n": "#8a8f98",
    "DPO": "#2b6cb0",
    "PPO": "#c05621",
    "GRPO": "#2f855a",
    "TRPO": "#805ad5",
}


def save_frontier(path: Path, lines: Sequence[dict[str, Any]], model: str, prompts: int) -> None:
    """Write the PNG: a line for each cell, through its points in the order of training."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    start = lines[0]["points"][0]
    axes.errorbar(
        0, start["reward"], start["reward_error"], fmt="s", color="black", label="SFT model"
    )
    shades: dict[str, int] = {}
    for line in lines:
        shades[line["method"]] = shades.get(line["method"], -1) + 1
        _line(axes, line, start, ("-", "--", ":", "-.")[shades[line["method"]] % 4])
    axes.set_title(f"Reward against KL to the SFT model, {model}")
    axes.set_xlabel(
        "KL(policy ‖ SFT model), nats a text, exact at each token; best of n: its bound"
    )
    axes.set_ylabel(f"VADER on {prompts} held-out prompts, ± standard error")
    axes.legend(loc="lower right")
    plain(axes)
    figure.savefig(path, dpi=120)


def _line(axes: Axes, line: dict[str, Any], start: dict[str, float], style: str) -> None:
    points = line["points"]
    if line["method"] != "best of n":
        points = [{**start, "kl": 0.0, "kl_error": 0.0}, *points]
    axes.errorbar(
        [point["kl"] for point in points],
        [point["reward"] for point in points],
        yerr=[point["reward_error"] for point in points],
        xerr=[point["kl_error"] for point in points],
        color=_COLORS[line["method"]],
        linestyle=style,
        marker="o",
        markersize=4,
        elinewidth=0.8,
        capsize=2,
        label=f"{line['method']}, {line['setting']}",
    )
