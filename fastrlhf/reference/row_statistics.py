"""The numbers of `token_stats` in closed form, as the kernels compute them, for a few rows.

Each run of columns of a row is reduced to `RowParts`. The parts of all runs are merged, and give
`RowStats`. That is how splits of a row are put together, and the columns of ranks that share a
vocabulary. Backends without kernels run these formulas; their gradient is in `row_gradient`.

Dims: N rows, V vocabulary, W runs of columns.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .effective_logits import capped_logits, divide_, exp_of_sums, finite_base, row_sums
from .scalars import accumulation_dtype


class RowParts(NamedTuple):
    """The numbers to which some columns of rows of logits are reduced, (N,) each. The statistics of
    the rows are put together from the parts of all splits of a row, or of all ranks that share a
    vocabulary. Parts that were not asked for are empty.
    """

    peak: Tensor  # the largest logit before the temperature, as are all logits here
    rest: Tensor  # Σ e^(z - peak) over all columns but the target, z divided by the temperature
    target: Tensor  # the target's logit; -inf if it is in none of the columns
    moment: Tensor  # Σ e^(z - peak)·(z - peak) over the columns of `rest`
    before: Tensor  # the peak if a column before the target's has it, else any smaller number
    total: Tensor  # Σ of all logits
    squares: Tensor  # Σ e^2(z - peak) over the columns of `rest`


class RowStats(NamedTuple):
    """Statistics of rows of logits, and what their gradient needs in addition, each (N,). The
    entropy and the last three are empty unless asked for.
    """

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    # The largest logit before the temperature, and lse - peak / temperature. They are kept apart,
    # because their sum loses accuracy for large logits.
    peak: Tensor
    log_norm: Tensor
    is_top1: Tensor
    mean_logit: Tensor
    log_sum_sq_probs: Tensor

    @property
    def of_tokens(self) -> tuple[Tensor, ...]:
        """The fields of `FurtherTokenStats`, in their order."""
        return self.logprob, self.entropy, self.lse, *self[5:]


def token_stats_forward(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
    entropy: bool,
    with_stats: Iterable[str] = (),
) -> RowStats:
    """Compute the statistics of (N, V) logits, none of whose rows is ignored."""
    with_stats = tuple(with_stats)
    parts = row_parts(
        logits, targets, temperature=temperature, softcap=softcap, scale=scale, entropy=entropy,
        with_stats=with_stats,
    )  # fmt: skip
    return statistics_of_parts(parts, logits.shape[-1], temperature)


def row_parts(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | Tensor | None,
    scale: float | Tensor,
    entropy: bool,
    with_stats: tuple[str, ...] = (),
) -> RowParts:
    """Compute the parts of rows (N, V), V > 0, whose targets may lie outside of these columns:
    below 0 in earlier ones, from V on in later ones.
    """
    index = targets.long().unsqueeze(-1)
    rows_t = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    capped = capped_logits(logits.to(accumulation_dtype(logits.dtype)), softcap, scale)
    peak = capped.amax(-1, keepdim=True)
    terms = row_terms(capped, None, peak, index, rows_t, entropy=entropy, with_stats=with_stats)
    sums = [row_sums(x).view(-1) for x in terms]
    target, before = target_parts(capped, peak, index, with_stats)
    return named_parts(peak.view(-1), target, before, sums, entropy, with_stats)


def row_terms(
    capped: Tensor,
    columns: Tensor | None,
    peak: Tensor,
    index: Tensor,
    rows_t: float | Tensor,
    *,
    entropy: bool,
    with_stats: tuple[str, ...],
) -> Iterator[Tensor]:
    """Yield the terms (..., V) of each sum in `RowParts`, one sum after the other, of columns of
    rows whose peaks, targets and temperatures are (..., 1). `columns`: see `with_target`.
    """
    if "mean_logit" in with_stats:
        yield capped
    shifted = divide_(capped - finite_base(peak), rows_t)
    # The sum leaves out the target, so that log-probs stay accurate where p(target) → 1: see
    # kernels/token_stats.py.
    weight = with_target(exp_of_sums(shifted), index, torch.zeros_like(peak), columns)
    yield weight
    if "log_sum_sq_probs" in with_stats:
        yield weight.square()
    if entropy:
        # e^-inf·(-inf) counts as 0: a finite number in place of the exponent makes the product 0.
        yield weight.mul_(shifted.clamp_(min=torch.finfo(shifted.dtype).min))


def target_parts(
    capped: Tensor, peak: Tensor, index: Tensor, with_stats: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Compute `target` and `before` of `RowParts` from rows (N, V), their peaks and targets
    (N, 1).
    """
    here, place = (index >= 0) & (index < capped.shape[-1]), index.clamp(0, capped.shape[-1] - 1)
    target = torch.where(here, capped.gather(-1, place), -torch.inf).view(-1)
    if "is_top1" not in with_stats:
        return target, target.new_empty(0)
    earlier = capped.argmax(-1, keepdim=True) < index
    return target, torch.where(earlier, peak, -torch.inf).view(-1)


def named_parts(
    peak: Tensor,
    target: Tensor,
    before: Tensor,
    sums: list[Tensor],
    entropy: bool,
    with_stats: tuple[str, ...],
) -> RowParts:
    """Give names to the sums (N,) of what `row_terms` computes."""
    of_terms, nothing = iter(sums), peak.new_empty(0)
    total = next(of_terms) if "mean_logit" in with_stats else nothing
    rest = next(of_terms)
    squares = next(of_terms) if "log_sum_sq_probs" in with_stats else nothing
    moment = next(of_terms) if entropy else nothing
    return RowParts(peak, rest, target, moment, before, total, squares)


def with_target(rows: Tensor, index: Tensor, value: Tensor, columns: Tensor | None) -> Tensor:
    """Put a value (N, 1) where the target (N, 1) of rows (N, V) is, if it is in these columns.

    Without `columns` this is done in place. Compiled code gives `columns`, the numbers (V,) int32
    of the columns, and compares these with the targets, as part of one loop with what is before and
    after. The numbers are given because the compiler would compute them one by one.
    """
    if columns is not None:
        here_or_nowhere = index.clamp(-1, torch.iinfo(columns.dtype).max).to(columns.dtype)
        return torch.where(columns == here_or_nowhere, value, rows)
    here, place = (index >= 0) & (index < rows.shape[-1]), index.clamp(0, rows.shape[-1] - 1)
    return rows.scatter_(-1, place, torch.where(here, value, rows.gather(-1, place)))


def merged_peaks(peaks: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Compute the peaks (N,) of rows from those (W, N) of their runs of columns. Also return (W, N)
    (run's peak - row's peak) / temperature: e to that power times a run's sum of e^(z - run's peak)
    is its sum of e^(z - row's peak).
    """
    peak = peaks.amax(0)
    return peak, (peaks - finite_base(peak)) / temperature


def merged_parts(parts: RowParts, temperature: float | Tensor) -> RowParts:
    """Merge the parts (W, N) of W runs of columns, in their order, into those of all columns."""
    peak, shift = merged_peaks(parts.peak, temperature)
    fade = shift.exp()
    held = parts.target != -torch.inf  # NaN included
    target = torch.where(held, parts.target, 0.0).sum(0)
    moment, before, total, squares = parts[3:]
    if moment.numel():
        # Where a run's sums count as 0 (an empty run has peak -inf), 0·inf must not make them NaN.
        moment = moment + parts.rest * torch.where(fade > 0, shift, 0.0)
        moment = torch.where(fade > 0, moment * fade, fade).sum(0)
    return RowParts(
        peak, (parts.rest * fade).sum(0), torch.where(held.any(0), target, -torch.inf), moment,
        before.amax(0) if before.numel() else before[:0].view(-1),
        total.sum(0) if total.numel() else total[:0].view(-1),
        (squares * fade.square()).sum(0) if squares.numel() else squares[:0].view(-1),
    )  # fmt: skip


def statistics_of_parts(
    parts: RowParts, vocab: int | Tensor, temperature: float | Tensor
) -> RowStats:
    """Compute what `token_stats_forward` returns from the parts of whole rows, V columns each."""
    peak, rest, target, moment, before, total, squares = parts
    empty, base = peak == -torch.inf, finite_base(peak)
    target_shifted = divide_(target - base, temperature)
    target_weight = target_shifted.exp()
    logprob = F.logsigmoid(target_shifted - rest.log())
    norm = rest + target_weight
    log_norm = norm.log()
    lse = base / temperature + log_norm
    is_top1 = peak.new_empty(0, dtype=torch.bool)
    row_entropy, mean_logit, log_squares = (peak.new_empty(0) for _ in range(3))
    if before.numel():
        is_top1 = (target == peak) & ~(before == peak) & ~log_norm.isnan() & ~empty
    if total.numel():
        mean_logit = total / vocab / temperature
    if squares.numel():
        log_squares = _log_sum_squares(squares, target_weight, logprob, log_norm)
        log_squares = torch.where(empty, 0.0, log_squares)
    if moment.numel():
        moment = moment + torch.where(target_weight > 0, target_weight * target_shifted, 0.0)
        row_entropy = torch.where(empty, 0.0, log_norm - moment / norm)
    logprob = torch.where(empty, -torch.inf, logprob)
    return RowStats(
        logprob, row_entropy, lse, peak, log_norm, is_top1, mean_logit, log_squares
    )  # fmt: skip


def _log_sum_squares(
    squares: Tensor, target_weight: Tensor, logprob: Tensor, log_norm: Tensor
) -> Tensor:
    """Compute ln Σ p², given Σ e^2(z - peak) without the target's term, the target's e^(z - peak)
    and ln p, and the ln of the sum of all e^(z - peak).

    Where the target's weight is that of the peak or nearly, it is computed from the log-prob, which
    is accurate where p → 1.
    """
    square = target_weight.square()
    heavy = square > 0.25
    of_heavy = 2 * logprob + torch.log1p(squares / torch.where(heavy, square, 1.0))
    return torch.where(heavy, of_heavy, (squares + square).log() - 2 * log_norm)
