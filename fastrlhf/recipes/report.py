"""Print the progress and results of a recipe to a terminal, or to a file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Report:
    """Progress bars and tables, and the seconds that each phase took."""

    def __init__(self, quiet: bool = False) -> None:
        """Write to stdout, or nowhere if `quiet`."""
        self.console = Console(highlight=False, markup=False, quiet=quiet)
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []  # per open phase: seconds of phases inside it

    def line(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, soft_wrap=True)

    @contextmanager
    def phase(
        self, name: str, total: int | None = None, done: int = 0
    ) -> Iterator[Callable[..., None]]:
        """Time a phase, and print a line with its seconds when it ends.

        On a terminal a progress bar shows meanwhile. The seconds of a phase that runs inside this
        one count for the inner phase only, so that each second is counted once.

        Yields:
            `advance(count, note="")`, which moves the bar and writes a note beside it.
        """
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        start = time.perf_counter()
        self._inside.append(0.0)
        with Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as progress:
            task = progress.add_task(name, total=total, completed=done, note="")

            def advance(count: int, note: str = "") -> None:
                progress.update(task, advance=count, note=note)

            try:
                yield advance
            finally:
                whole = time.perf_counter() - start
                self.seconds[name] = whole - self._inside.pop()
                if self._inside:
                    self._inside[-1] += whole
        self.line(f"{name:<40} {self.seconds[name]:6.1f} s")

    def step(self, number: int, total: int, figures: str) -> None:
        """Print the figures of about ten steps of a run."""
        if number in (1, total) or number % max(1, round(total / 10)) == 0:
            self.line(f"  step {number:>{len(str(total))}}/{total}  {figures}")


def one_line(text: str) -> str:
    """Replace line breaks and runs of spaces by single spaces."""
    return " ".join(text.split())
