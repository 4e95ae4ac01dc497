"""What the demo shows on the terminal, or in a file where its output is piped into one."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .comparison import Comparison
from .preference import Step
from .sampling import Sample
from .sentiment import Estimate

_MIB = 2**20


class Report:
    """Progress bars and tables, and the seconds that each phase took."""

    def __init__(self) -> None:
        """Write to stdout."""
        self.console = Console(highlight=False, markup=False)
        self.seconds: dict[str, float] = {}

    def line(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
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
            task = progress.add_task(name, total=total, note="")

            def advance(count: int, note: str = "") -> None:
                progress.update(task, advance=count, note=note)

            yield advance
        self.seconds[name] = time.perf_counter() - start
        self.line(f"{name:<40} {self.seconds[name]:6.1f} s")

    def step(self, number: int, total: int, step: Step) -> None:
        """Print the figures of about ten steps of a run."""
        if number in (1, total) or number % max(1, round(total / 10)) == 0:
            self.line(f"  step {number:>{len(str(total))}}/{total}  {describe(step)}")

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

    def sentiment(self, before: Estimate, after: Estimate, gain: Estimate, prompts: int) -> None:
        """Print the mean sentiments with their standard errors."""
        table = Table("before", "after", "difference", title="Mean sentiment (VADER, -1 to 1)")
        table.add_row(*(f"{mean:+.3f} ± {error:.3f}" for mean, error in (before, after, gain)))
        table.caption = f"± standard error over {prompts} held-out prompts"
        self.console.print(table)

    def example(self, before: Sample, after: Sample) -> None:
        """Print two completions of one prompt."""
        self.line(f"Prompt: {before.prompt}")
        self.line(f"  before: …{' '.join(before.completion.split())}")
        self.line(f"  after:  …{' '.join(after.completion.split())}")


def describe(step: Step) -> str:
    """Write the figures of a step as one line."""
    return f"loss {step.loss:.3f}  accuracy {step.accuracy:.2f}  margin {step.margin:+.2f}"
