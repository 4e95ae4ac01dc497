"""The question about rows of logits, and room for the answer.

The forward of `token_stats` fills a `RowStats`, on whatever backend it runs. Where ranks share a
vocabulary, it is put together from a `RowParts` of each rank, whose fields `Question.asked` names.

Dims: N rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.reference import FURTHER_STATS, RowStats, TokenStats

from .rows import Index, of_rows


class Question(NamedTuple):
    """Which statistics of rows of logits are wanted, of which targets, after which transform."""

    targets: Tensor  # (N,) numbers of columns, or outside of those that are there
    temperature: float | Tensor  # of all rows, or (N,)
    softcap: float | None
    scale: float
    entropy: bool
    with_stats: tuple[str, ...]

    @property
    def asked(self) -> tuple[bool, ...]:
        """Which fields of `RowParts` the answer takes."""
        return True, True, True, self.entropy, *(name in self.with_stats for name in FURTHER_STATS)

    def of_rows(self, index: Index) -> tuple[Tensor, dict[str, Any]]:
        """Targets and options of some rows, as the formulas of `reference` take them."""
        options = self._asdict() | {"temperature": of_rows(self.temperature, index)}
        del options["targets"]
        return self.targets[index], options


def ignored_rows(
    logits: Tensor, rows: int, entropy: bool, with_stats: Sequence[str] = ()
) -> RowStats:
    """Make the statistics of rows that are ignored, which others then overwrite: 0, and a peak of
    -inf, which says that there is no distribution. Those that are not asked for are empty.
    """
    acc = reference.accumulation_dtype(logits.dtype)
    logprob, lse, log_norm = (logits.new_zeros(rows, dtype=acc) for _ in range(3))
    peak = logits.new_full((rows,), -torch.inf, dtype=acc)
    row_entropy = logits.new_zeros(rows if entropy else 0, dtype=acc)
    further = (
        logits.new_zeros(
            rows if name in with_stats else 0, dtype=torch.bool if name == "is_top1" else acc
        )
        for name in FURTHER_STATS
    )
    return RowStats(logprob, row_entropy, lse, peak, log_norm, *further)


def put_stats(stats: RowStats, index: Index, some: RowStats) -> None:
    """Write the statistics of some rows to where they belong, as far as they are asked for."""
    for whole, part in zip(stats, some, strict=True):
        if whole.numel():
            whole[index] = part


def shaped_stats(
    stats: Sequence[Tensor], shape: torch.Size, entropy: bool, with_stats: tuple[str, ...]
) -> TokenStats:
    """Give the fields (N,) of `FurtherTokenStats` the shape of the targets; None to what was not
    asked for.
    """
    logprob, row_entropy, lse, *others = stats
    further = {
        name: x.view(shape)
        for name, x in zip(FURTHER_STATS, others, strict=True)
        if name in with_stats
    }
    row_entropy_or_none = row_entropy.view(shape) if entropy else None
    return reference.stats_tuple(logprob.view(shape), row_entropy_or_none, lse.view(shape), further)
