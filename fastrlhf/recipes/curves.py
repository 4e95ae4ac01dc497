"""Draw the curves of a training run, and the sentiment before and after it."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .preference import Step
from .sentiment import Estimate

_BEFORE, _AFTER = "#8a8f98", "#2b6cb0"


def save_curves(
    path: Path, steps: Sequence[Step], steps_per_pass: int, before: Estimate, after: Estimate
) -> None:
    """Write a PNG of loss, accuracy and margin by step, and of the two sentiments.

    Dashed lines stand where the same pairs come again: from there on the curves tell how well the
    model remembers them, and only the sentiment tells what it learned.
    """
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, margin, sentiment = figure.subplots(2, 2).flat
    _curve(loss, "DPO loss", [step.loss for step in steps], steps_per_pass)
    loss.set_ylim(bottom=0)
    _curve(accuracy, "Reward accuracy", [step.accuracy for step in steps], steps_per_pass)
    accuracy.set_ylim(0, 1.05)
    _curve(margin, "Reward margin", [step.margin for step in steps], steps_per_pass)
    _bars(sentiment, before, after)
    figure.savefig(path, dpi=150)


def _curve(axes: Axes, title: str, values: Sequence[float], steps_per_pass: int) -> None:
    axes.plot(range(1, len(values) + 1), values, color=_AFTER, marker=".")
    for last in range(steps_per_pass, len(values), steps_per_pass):
        axes.axvline(last + 0.5, color=_BEFORE, linestyle="--", linewidth=1)
    axes.set_title(title)
    axes.set_xlabel("step (dashed: the next pass over the pairs)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)


def _bars(axes: Axes, before: Estimate, after: Estimate) -> None:
    means = [before.mean, after.mean]
    errors = [before.standard_error, after.standard_error]
    bars = axes.bar(
        ["before", "after"], means, yerr=errors, color=[_BEFORE, _AFTER], capsize=6, width=0.5
    )
    labels = [f"{mean:.3f} ± {error:.3f}" for mean, error in zip(means, errors, strict=True)]
    axes.bar_label(bars, labels=labels, padding=4)
    axes.margins(y=0.2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_title("Sentiment on held-out prompts (VADER)")
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
