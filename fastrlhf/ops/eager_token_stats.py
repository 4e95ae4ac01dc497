"""Row work of `token_stats` in eager PyTorch.

The launchers have the names, arguments and results of those in `kernels/token_stats.py`. Each
applies the closed forms of `fastrlhf.reference` to a bounded number of rows at a time, since a
formula holds several numbers in fp32 for each logit. `logits_at_once` is that bound, which
`token_stats.py` chooses.

Dims: N rows, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.reference import RowParts, RowStats

from .checks import assert_on_device
from .eager_rows import runs_or_chunks
from .row_stats import Question, ignored_rows, put_stats
from .rows import of_rows, put_rows, take_rows, zero_inactive


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
    """Compute the statistics of rows (outer, inner, V), N > 0."""
    assert_targets_on_device(targets, rows.shape[2], ignore_index)
    question = Question(targets, temperature, softcap, scale, entropy, tuple(with_stats))
    stats = ignored_rows(rows, len(targets), entropy, with_stats)
    for index in runs_or_chunks(targets != ignore_index, rows, logits_at_once):
        some, options = question.of_rows(index)
        statistics = reference.token_stats_forward(take_rows(rows, index), some, **options)
        put_stats(stats, index, statistics)
    return stats


def assert_targets_on_device(targets: Tensor, vocab: int, ignore_index: int) -> None:
    """Let a GPU assert that targets are in the vocabulary, as the kernel does. On a CPU they are
    checked before, with a better error.
    """
    if targets.device.type != "cpu":
        known = (targets >= 0) & (targets < vocab) | (targets == ignore_index)
        assert_on_device(known.all(), "a target is outside [0, vocabulary)")


def row_parts(rows: Tensor, question: Question, selected: Tensor) -> Iterator[RowParts]:
    """Compute the parts of selected rows whose other columns are on other ranks, some rows at a
    time.
    """
    for index in runs_or_chunks(selected, rows):
        targets, options = question.of_rows(index)
        yield reference.row_parts(take_rows(rows, index), targets, **options)


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
    """Write the gradient of rows (outer, inner, V) into d_rows, which may be these rows. `stats`
    are logprob, entropy, peak and log_norm, (N,) as are the upstream gradients.
    """
    upstream = d_logprob, d_entropy, d_lse, d_mean
    active = rows_with_gradient(stats, upstream)
    with zeros_elsewhere(d_rows, rows, active):
        write_gradients(
            d_rows, rows, active, targets, stats, upstream, temperature=temperature,
            softcap=softcap, scale=scale, logits_at_once=logits_at_once,
        )  # fmt: skip


# The gradients of log-prob, entropy, lse and mean logit that come from upstream.
Upstream = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def rows_with_gradient(stats: tuple[Tensor, ...], upstream: Upstream) -> Tensor:
    """Tell which rows (N,) may have a gradient other than 0: those with an upstream gradient that
    is not 0, and with a distribution.
    """
    d_logprob, *others = upstream
    _, _, peak, _ = stats
    active = d_logprob != 0
    for slope in others:
        if slope is not None:
            active |= slope != 0
    # A row without a distribution has the peak -inf, and no gradient, as in the kernel.
    active &= peak != -torch.inf
    return active


@contextmanager
def zeros_elsewhere(d_rows: Tensor, rows: Tensor, active: Tensor) -> Iterator[None]:
    """Put zeros into all rows but the active ones. If d_rows are the logits themselves, that is
    done after the active rows are written, since it would destroy logits before; otherwise before,
    where `zero_inactive` may write all of the memory in one pass.
    """
    in_place = d_rows is rows
    if not in_place:
        zero_inactive(d_rows, active)
    yield
    if in_place:
        put_rows(d_rows, (~active).nonzero().squeeze(1), 0.0)


def write_gradients(
    d_rows: Tensor,
    rows: Tensor,
    selected: Tensor,
    targets: Tensor,
    stats: tuple[Tensor, ...],
    upstream: Upstream,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
    logits_at_once: int,
) -> None:
    """Write the gradients of the selected rows, and nothing else."""
    d_logprob, *others = upstream
    for index in runs_or_chunks(selected, rows, logits_at_once):
        gradient = reference.token_stats_backward(
            take_rows(rows, index), targets[index],
            tuple(value[index] if value.numel() else value for value in stats),
            d_logprob[index], *(None if slope is None else slope[index] for slope in others),
            temperature=of_rows(temperature, index), softcap=softcap, scale=scale,
        )  # fmt: skip
        put_rows(d_rows, index, gradient.to(d_rows.dtype))
