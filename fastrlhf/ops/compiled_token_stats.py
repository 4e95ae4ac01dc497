"""Row work of `token_stats` by compiled functions (see `compiled_rows.py`).

The launchers are named as those of `eager_token_stats`, which do the work where a function cannot
be compiled, and what is left of it where the compiler is turned off in the middle.

Dims: N rows, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from fastrlhf import reference
from fastrlhf.reference import RowParts, RowStats

from . import compiled_rows, eager_token_stats
from .compiled import NotCompiled
from .compiled_rows import added, by_number, chunks, columns_of, scaling, where_they_are
from .eager_token_stats import Upstream, rows_with_gradient, zeros_elsewhere
from .row_stats import Question, ignored_rows, put_stats
from .rows import of_rows


def token_stats_forward(
    rows: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    entropy: bool,
    with_stats: Sequence[str] = (),
    logits_at_once: int,
) -> RowStats:
    """Compute the statistics of rows (outer, inner, V), N > 0; without a compiler, eagerly."""
    eager_token_stats.assert_targets_on_device(targets, rows.shape[2], ignore_index)
    question = Question(targets, temperature, softcap, scale, entropy, tuple(with_stats))
    stats = ignored_rows(rows, len(targets), entropy, with_stats)
    with contextlib.suppress(NotCompiled):
        for index in _chunks(targets != ignore_index, rows, question):
            parts = _row_parts(rows, index, question)
            row_temperature = of_rows(temperature, index)
            statistics = reference.statistics_of_parts(parts, rows.shape[2], row_temperature)
            put_stats(stats, index, statistics)
        return stats
    return eager_token_stats.token_stats_forward(
        rows, targets, temperature=temperature, softcap=softcap, scale=scale,
        ignore_index=ignore_index, entropy=entropy, with_stats=with_stats,
        logits_at_once=logits_at_once,
    )  # fmt: skip


def row_parts(rows: Tensor, question: Question, selected: Tensor) -> Iterator[RowParts]:
    """Compute the parts of selected rows whose other columns are on other ranks."""
    with contextlib.suppress(NotCompiled):
        parts = [_row_parts(rows, index, question) for index in _chunks(selected, rows, question)]
        yield from parts
        return
    yield from eager_token_stats.row_parts(rows, question, selected)


def _chunks(selected: Tensor, rows: Tensor, question: Question) -> tuple[Tensor, ...]:
    # With these, more than one loop reads a number for each logit, and the function may hold it.
    held = question.entropy or bool(question.with_stats) or question.softcap is not None
    return chunks(selected, rows.shape[2], held=held)


def _row_parts(rows: Tensor, index: Tensor, question: Question) -> RowParts:
    """Compute `reference.row_parts` of some rows of an (outer, inner, V) view."""
    targets, temperature, softcap, scale, entropy, with_stats = question
    scaled = scaling(temperature, softcap, scale, index, reference.accumulation_dtype(rows.dtype))
    peak, target, before, *sums = compiled_rows.ROW_PARTS(
        *by_number(rows, index), targets[index], columns_of(rows), *scaled,
        entropy=entropy, with_stats=with_stats,
    )  # fmt: skip
    return reference.named_parts(peak, target, before, added(sums), entropy, with_stats)


def token_stats_backward(
    d_rows: Tensor,
    rows: Tensor,
    targets: Tensor,
    stats: tuple[Tensor, ...],
    d_logprob: Tensor,
    d_entropy: Tensor | None,
    d_lse: Tensor | None = None,
    d_mean: Tensor | None = None,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
    logits_at_once: int,
) -> None:
    """Write the gradient of rows (outer, inner, V) into d_rows, which may be these rows. Rows that
    are left when the compiler is turned off are done eagerly.
    """
    upstream = d_logprob, d_entropy, d_lse, d_mean
    transform: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "scale": scale}
    active = rows_with_gradient(stats, upstream)
    with zeros_elsewhere(d_rows, rows, active):
        missing = _write_gradients(d_rows, rows, active, targets, stats, upstream, transform)
        eager_token_stats.write_gradients(
            d_rows, rows, missing, targets, stats, upstream, **transform,
            logits_at_once=logits_at_once,
        )  # fmt: skip


def _write_gradients(
    d_rows: Tensor,
    rows: Tensor,
    active: Tensor,
    targets: Tensor,
    stats: tuple[Tensor, ...],
    upstream: Upstream,
    transform: dict[str, Any],
) -> Tensor:
    """Write the gradients of active rows by compiled functions, and tell which of them (N,) are
    still missing because there was no compiled function.
    """
    logprob, entropy, peak, log_norm = stats
    slopes = reference.row_slopes(logprob, *upstream, columns=rows.shape[2])
    of_gradient = (None if slopes.entropy is None else entropy, peak, log_norm, *slopes)
    columns = columns_of(rows)

    def write(out: Tensor, places: Tensor, where: tuple[Tensor, Tensor], some: Tensor) -> None:
        of_some = (None if x is None else x[some] for x in of_gradient)
        scaled = scaling(**transform, index=some, dtype=peak.dtype)
        compiled_rows.LOGITS_GRADIENT(
            out, places, *where, targets[some], columns, *of_some, *scaled
        )  # fmt: skip

    missing = active.clone()
    with contextlib.suppress(NotCompiled):
        for index in chunks(active, rows.shape[2]):
            where_they_are(d_rows, rows, index, write)
            missing[index] = False
    return missing
