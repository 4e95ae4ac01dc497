"""Runs that consist of runs: what is finished is read, and what was interrupted goes on."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .metrics import read_metrics
from .run import check_same_options, last_checkpoint
from .settings import RunOptions

T = TypeVar("T", bound=RunOptions)


def begin_anew(folder: Path) -> None:
    """Forget what the parts of a former run in this folder found."""
    for file in folder.glob("*/metrics.json"):
        file.unlink(missing_ok=True)


def finished_or_run(
    train: Callable[[T], dict[str, Any]], options: T, resume: bool
) -> dict[str, Any]:
    """Run a recipe; with `resume`, read its `metrics.json` if there is one of these options, or
    start from its checkpoint if there is one.

    Raises:
        ValueError: what is there is of other options.
    """
    folder = Path(options.output)
    found = read_metrics(folder) if resume else None
    if found is not None:
        check_same_options(found["options"], options, folder)
        return found
    (folder / "metrics.json").unlink(missing_ok=True)
    unfinished = resume and last_checkpoint(folder) is not None
    return train(dataclasses.replace(options, resume=unfinished))
