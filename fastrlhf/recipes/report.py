"""What a recipe shows on the terminal, or in a file where its output is piped into one."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .comparison import Comparison
from .sampling import Sample
from .sentiment import Estimate

_MIB = 2**20


class Report:
    """Progress bars and tables, and the seconds that each phase took."""

    def __init__(self, quiet: bool = False) -> None:
        """Write to stdout, or nowhere."""
        self.console = Console(highlight=False, markup=False, quiet=quiet)
        self.seconds: dict[str, float] = {}

    def line(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, soft_wrap=True)

    @contextmanager
    def phase(
        self, name: str, total: int | None = None, done: int = 0
    ) -> Iterator[Callable[..., None]]:
        """Time a phase behind a progress bar, on a terminal; a line with its seconds stays.

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
        with Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as progress:
            task = progress.add_task(name, total=total, completed=done, note="")

            def advance(count: int, note: str = "") -> None:
                progress.update(task, advance=count, note=note)

            yield advance
        self.seconds[name] = time.perf_counter() - start
        self.line(f"{name:<40} {self.seconds[name]:6.1f} s")

    def step(self, number: int, total: int, figures: str) -> None:
        """Print the figures of about ten steps of a run."""
        if number in (1, total) or number % max(1, round(total / 10)) == 0:
            self.line(f"  step {number:>{len(str(total))}}/{total}  {figures}")

    def comparison(self, figures: Comparison) -> None:
        """Print both losses, how far they are apart, and their memory."""
        size = (
            f"Loss and gradient from {figures.dtype} hidden states {figures.shape},\n"
            f"whose logits over {figures.vocabulary} tokens take "
            f"{figures.logits_bytes / _MIB:.1f} MiB"
        )
        table = Table("", "fused", "plain", "", title=size)
        table.add_row(
            "DPO loss",
            f"{figures.fused_loss:.7f}",
            f"{figures.plain_loss:.7f}",
            f"difference {figures.loss_difference:.1e}",
        )
        table.add_row(
            "largest gradient",
            f"{figures.fused_gradient:.3e}",
            f"{figures.plain_gradient:.3e}",
            f"largest difference {figures.gradient_difference:.1e}",
        )
        table.add_row(
            "peak memory",
            f"{figures.fused_bytes / _MIB:.1f} MiB",
            f"{figures.plain_bytes / _MIB:.1f} MiB",
            f"{figures.plain_bytes / figures.fused_bytes:.2f} times less",
        )
        self.console.print(table)

    def outcome(self, title: str, rows: Mapping[str, Sequence[Estimate]], prompts: int) -> None:
        """Print means before and after, and their difference, with their standard errors."""
        table = Table("", "before", "after", "difference", title=title)
        for name, estimates in rows.items():
            table.add_row(name, *(f"{mean:+.3f} ± {error:.3f}" for mean, error in estimates))
        table.caption = f"± standard error over {prompts} held-out prompts"
        self.console.print(table)

    def example(self, before: Sample, after: Sample) -> None:
        """Print two completions of one prompt."""
        self.line(f"Prompt: {before.prompt}")
        self.line(f"  before: …{one_line(before.completion)}")
        self.line(f"  after:  …{one_line(after.completion)}")


def one_line(text: str) -> str:
    """Write a text without line breaks."""
    return " ".join(text.split())
