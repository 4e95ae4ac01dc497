"""Runs that consist of runs: what is finished is read, and what was interrupted goes on."""

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from .metrics import read_metrics
from .run import (
    check_same_device,
    check_same_options,
    checkpoints,
    is_first_process,
    last_checkpoint,
)
from .settings import RunOptions

T = TypeVar("T", bound=RunOptions)


def begin_anew(parts: Iterable[str | Path]) -> None:
    """Forget what a former run of these parts, each in its folder, found and left to resume."""
    if not is_first_process():
        return
    for part in map(Path, parts):
        (part / "metrics.json").unlink(missing_ok=True)
        for checkpoint in checkpoints(part):
            shutil.rmtree(checkpoint)


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
        check_same_device(found["device"], options, folder)
        return found
    (folder / "metrics.json").unlink(missing_ok=True)
    unfinished = resume and last_checkpoint(folder) is not None
    return train(dataclasses.replace(options, resume=unfinished))
