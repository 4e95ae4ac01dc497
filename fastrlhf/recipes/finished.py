"""Runs that consist of runs: what is finished is read, and what was interrupted goes on."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .run import FREE_TO_CHANGE
from .settings import RunOptions

T = TypeVar("T", bound=RunOptions)


def finished_or_run(
    train: Callable[[T], dict[str, Any]], options: T, resume: bool
) -> dict[str, Any]:
    """Run a recipe; with `resume`, read its `metrics.json` if there is one of these options, or
    start from its checkpoint if there is one.

    Raises:
        ValueError: what is there is of other options.
    """
    folder = Path(options.output)
    file = folder / "metrics.json"
    if resume and file.exists():
        metrics: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _check_same(metrics["options"], options, file)
        return metrics
    if not resume:
        file.unlink(missing_ok=True)
    unfinished = resume and (folder / "checkpoint").exists()
    return train(dataclasses.replace(options, resume=unfinished))


def write_metrics(folder: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Write the `metrics.json` of the whole, and return what it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(metrics, indent=2, default=str, ensure_ascii=False)
    (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
    return metrics


def _check_same(stored: dict[str, Any], options: RunOptions, file: Path) -> None:
    own = dataclasses.asdict(options)
    for name, value in stored.items():
        if name not in FREE_TO_CHANGE and own.get(name) != value:
            raise ValueError(
                f"--resume: {file} has {name}={value}, this run {name}={own.get(name)}"
            )
