"""What a recipe shows on the terminal, or in a file where its output is piped into one."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Report:
    """Progress bars and tables, and the seconds that each phase took."""

    def __init__(self, quiet: bool = False) -> None:
        """Write to stdout, or nowhere."""
        self.console = Console(highlight=False, markup=False, quiet=quiet)
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []  # of each phase that goes on: seconds of the phases in it

    def line(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, soft_wrap=True)

    @contextmanager
    def phase(
        self, name: str, total: int | None = None, done: int = 0
    ) -> Iterator[Callable[..., None]]:
        """Time a phase behind a progress bar, on a terminal; a line with its seconds stays.

        The seconds of a phase inside it count there and not here: each is counted once.

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
    """Write a text without line breaks."""
    return " ".join(text.split())
