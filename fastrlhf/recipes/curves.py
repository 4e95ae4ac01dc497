"""Draw the picture of a run: `curves.png`.

It shows the run's curves, the sentiment and one text before and after training, and the memory that
fused log-probs save.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .comparison import LogprobMemory
from .report import one_line
from .sampling import Sample

if TYPE_CHECKING:
    from .evaluation import Comparison

_BEFORE, _AFTER = "#8a8f98", "#2b6cb0"
_MIB = 2**20


class Panel(NamedTuple):
    """A curve of a picture: its title, and the name of the figure that it shows for each step."""

    title: str
    figure: str
    limits: tuple[float, float] | None = None


def save_picture(
    path: Path,
    title: str,
    panels: Sequence[Panel],
    history: Sequence[Mapping[str, float]],
    sentiment: "Comparison",
    memory: LogprobMemory,
    texts: tuple[Sample, Sample],
) -> None:
    """Write a PNG: the curves, and below them the sentiment, the memory and the two texts."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 1, height_ratios=[1.1, 1])
    curves = grid[0].subgridspec(1, len(panels))
    for place, panel in enumerate(panels):
        _curve(figure.add_subplot(curves[place]), panel, history)
    outcome = grid[1].subgridspec(1, 3, width_ratios=[1, 1, 1.6])
    _sentiment(figure.add_subplot(outcome[0]), sentiment)
    _memory(figure.add_subplot(outcome[1]), memory)
    _texts(figure.add_subplot(outcome[2]), *texts)
    figure.savefig(path, dpi=120)


def save_curves(
    path: Path, title: str, panels: Sequence[Panel], history: Sequence[Mapping[str, float]]
) -> None:
    """Write a PNG of the curves alone."""
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for place, panel in enumerate(panels, start=1):
        _curve(figure.add_subplot(1, len(panels), place), panel, history)
    figure.savefig(path, dpi=120)


def _curve(axes: Axes, panel: Panel, history: Sequence[Mapping[str, float]]) -> None:
    values = [point[panel.figure] for point in history]
    axes.plot(range(1, len(values) + 1), values, color=_AFTER, marker=".")
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.limits:
        axes.set_ylim(*panel.limits)
    plain(axes)


def _sentiment(axes: Axes, sentiment: "Comparison") -> None:
    pair = [sentiment.before, sentiment.after]
    bars = axes.bar(
        ["before", "after"],
        [one.mean for one in pair],
        yerr=[one.standard_error for one in pair],
        color=[_BEFORE, _AFTER],
        capsize=6,
        width=0.5,
    )
    for bar, one in zip(bars, pair, strict=True):
        top = max(0.0, one.mean + one.standard_error)
        place = (bar.get_x() + bar.get_width() / 2, top)
        text = f"{one.mean:.3f} ± {one.standard_error:.3f}"
        axes.annotate(text, place, (0, 5), textcoords="offset points", ha="center")
    axes.margins(y=0.2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_title("Sentiment on held-out prompts (VADER)")
    plain(axes)


def _memory(axes: Axes, memory: LogprobMemory) -> None:
    sizes = [memory.plain_bytes / _MIB, memory.fused_bytes / _MIB]
    bars = axes.bar(["plain", "fused"], sizes, color=[_BEFORE, _AFTER], width=0.5)
    axes.bar_label(bars, labels=[f"{size:.1f} MiB" for size in sizes], padding=4)
    axes.margins(y=0.2)
    axes.set_title(f"Peak memory of the log-probs\nand gradient of {memory.tokens} tokens")
    plain(axes)


def _texts(axes: Axes, before: Sample, after: Sample) -> None:
    lines = [f"“{before.prompt}”"]
    for when, sample in (("before", before), ("after", after)):
        lines.append(fill(f"{when}: …{one_line(sample.completion)}", width=58))
    # matplotlib would read a dollar sign as the beginning of a formula.
    axes.text(0, 0.95, "\n\n".join(lines).replace("$", r"\$"), va="top", wrap=True)
    axes.set_title("A held-out prompt")
    axes.axis("off")


def plain(axes: Axes) -> None:
    """Remove the parts of a chart's frame that do not help to read it."""
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
