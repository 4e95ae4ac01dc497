"""Resume a run that consists of runs of other recipes, as `pipeline` and `frontier` do.

The figures of a finished part are read from its `metrics.json`; an interrupted part continues from
its checkpoint.
"""

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
    """Remove the figures and checkpoints that a former run left in the folders of these parts."""
    if not is_first_process():
        return
    for part in map(Path, parts):
        (part / "metrics.json").unlink(missing_ok=True)
        for checkpoint in checkpoints(part):
            shutil.rmtree(checkpoint)


def finished_or_run(
    train: Callable[[T], dict[str, Any]], options: T, resume: bool
) -> dict[str, Any]:
    """Run a recipe, or with `resume` use what a former run of it left in its folder.

    With `resume`, a `metrics.json` of the same options is returned without running; otherwise the
    run starts from its checkpoint if there is one.

    Raises:
        ValueError: the former run had other options or another kind of device.
    """
    folder = Path(options.output)
    metrics = read_metrics(folder) if resume else None
    if metrics is not None:
        check_same_options(metrics["options"], options, folder)
        check_same_device(metrics["device"], options, folder)
        return metrics
    (folder / "metrics.json").unlink(missing_ok=True)
    unfinished = resume and last_checkpoint(folder) is not None
    return train(dataclasses.replace(options, resume=unfinished))
