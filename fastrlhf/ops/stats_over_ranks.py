"""Statistics of tokens whose logits are spread over ranks, each with a part of the vocabulary.

As a row of logits is cut into splits, and their few numbers give its statistics, so is it cut among
ranks. Each rank reduces its columns to a message of three numbers a token: the largest logit, the
sum of exponentials without the target's, and the target's logit; the entropy and what `with_stats`
names add theirs. One all-gather brings every rank all messages, which it combines in the order of
ranks. So all have the same bits. Nothing of the size of the vocabulary is sent.

The gradient of a rank's logits takes nothing but the statistics. That of a hidden state is the sum
of what all ranks' columns give it, see `head_gradients`.

Dims: N rows, n of them with a target, V columns of this rank, W ranks, P numbers of a message.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.reference import FURTHER_STATS, RowParts, TokenStats

from .backend import backend_of, use_triton, wanted_or_detached
from .checks import wide_integers
from .ranks import gathered, refuse_derivatives_of_ranks, refuse_transforms_of_ranks
from .sharded import LogitsPart
from .token_stats import (
    Question,
    can_overwrite,
    empty_statistics,
    parts_of_rows,
    rows_of,
    shaped_stats,
    take,
)
from .transform import Transform, check_temperatures_on_host, flat_temperature
from .vocabulary_part import IGNORED, VocabularyPart, numbered

# What a part without columns says of a row, in the order of `RowParts`.
_OF_NO_COLUMNS = (-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf, 0.0, 0.0)


def token_stats_over_ranks(
    own: LogitsPart,
    targets: Tensor,
    transform: Transform,
    *,
    ignore_index: int,
    entropy: bool,
    entropy_grad: bool,
    with_stats: tuple[str, ...],
    inplace: bool,
    impl: str,
) -> TokenStats:
    """Compute `token_stats` of checked logits (..., V) whose other columns are on other ranks."""
    refuse_transforms_of_ranks("token_stats")
    targets = wide_integers(targets)
    by_kernels = use_triton(impl, own.logits)
    question = (by_kernels, entropy, *(name in with_stats for name in FURTHER_STATS))
    asked = numbered(question, own.logits.dtype, *transform[1:])
    scored = torch.where(targets == ignore_index, IGNORED, targets)
    part = own.agreed(scored, asked, transform.token_temperature)
    assert part is not None
    own_targets = part.own_targets(targets, ignore_index)
    options = _Options(
        transform, part, entropy, entropy and entropy_grad, with_stats, inplace, impl
    )
    logits = wanted_or_detached(own.logits)[0]
    found = _TokenStatsOverRanks.apply(logits, own_targets, transform.token_temperature, options)
    logprob, row_entropy, lse, _, _, *further = found
    return shaped_stats((logprob, row_entropy, lse, *further), targets.shape, entropy, with_stats)


class _Options(NamedTuple):
    transform: Transform
    part: VocabularyPart
    entropy: bool
    entropy_grad: bool  # the entropy is asked for, and a gradient of it
    with_stats: tuple[str, ...]
    inplace: bool
    impl: str


class _TokenStatsOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, token_temperature, options):
        transform, part, entropy, _, with_stats, _, impl = options
        found = statistics_over_ranks(logits, targets, transform, part, entropy, with_stats, impl)
        logprob, row_entropy, _, peak, log_norm, *further = found
        ctx.save_for_backward(
            logits, targets, token_temperature, logprob, row_entropy, peak, log_norm
        )
        ctx.options = options
        top1, mean_logit, squares = further
        constant = [peak, log_norm, top1, squares]
        constant += [] if options.entropy_grad else [row_entropy]
        constant += [] if "mean_logit" in with_stats else [mean_logit]
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx, d_logprob, d_entropy, d_lse, _peak, _log_norm, _top1, d_mean, _squares):
        refuse_derivatives_of_ranks("token_stats", d_logprob, d_entropy, d_lse, d_mean)
        logits, targets, token_temperature, *stats = ctx.saved_tensors
        options = ctx.options
        if d_mean is not None:  # K2 divides it by the columns that it has
            d_mean = d_mean * (options.part.size / options.part.vocab)
        if d_logprob is None:
            d_logprob = torch.zeros_like(stats[0])
        saved = (logits, targets, *stats, d_logprob, d_entropy, token_temperature)
        saved += (*options.transform[1:], options.impl, d_lse, d_mean)
        if logits.shape[-1] == 0:
            d_logits = torch.zeros_like(logits)
        elif options.inplace and can_overwrite(logits):
            torch.ops.fastrlhf.token_stats_backward_(*saved)
            d_logits = logits.detach()
        else:
            d_logits = torch.ops.fastrlhf.token_stats_backward(*saved)
        return d_logits, None, None, None


def statistics_over_ranks(
    logits: Tensor,
    targets: Tensor,
    transform: Transform,
    part: VocabularyPart,
    entropy: bool,
    with_stats: tuple[str, ...],
    impl: str,
) -> tuple[Tensor, ...]:
    """Compute what `all_statistics` does of logits (..., V) whose other columns are on other ranks;
    without a gradient. The targets are the part's own.
    """
    targets = targets.reshape(-1).contiguous()
    acc = reference.accumulation_dtype(logits.dtype)
    temperature = flat_temperature(transform.token_temperature, transform.temperature, acc)
    per_token = temperature if isinstance(temperature, Tensor) else None
    check_temperatures_on_host(per_token, targets != IGNORED)
    question = Question(
        targets, temperature, transform.softcap, transform.scale, entropy, with_stats
    )
    if use_triton(impl, logits) and targets.numel() > 0:
        return _by_kernels(logits, question, part)
    return _by_formulas(logits, question, part, impl)


def _by_kernels(logits: Tensor, question: Question, part: VocabularyPart) -> tuple[Tensor, ...]:
    from fastrlhf.kernels.token_stats import (
        RowQuestion,
        token_stats_message,
        token_stats_of_messages,
    )

    targets, temperature, softcap, scale, entropy, with_stats = question
    of_rows = RowQuestion(targets, temperature, softcap, scale, IGNORED, entropy, with_stats)
    if part.size:
        message = token_stats_message(rows_of(logits), of_rows)
    else:
        message = _of_no_columns(of_rows.constants, targets, logits)
    *found, mean_logit, squares = token_stats_of_messages(gathered(message, part.group), of_rows)
    if "mean_logit" in with_stats:
        mean_logit = mean_logit / part.vocab
    return *found, mean_logit, squares


def _by_formulas(
    logits: Tensor, question: Question, part: VocabularyPart, impl: str
) -> tuple[Tensor, ...]:
    targets, temperature, _, _, entropy, with_stats = question
    stats = empty_statistics(logits, targets.numel(), entropy, with_stats)
    index = (targets != IGNORED).nonzero().squeeze(1)
    message = _message(logits, question, index, impl)
    messages = iter(gathered(message, part.group).unbind(1))
    nothing = message.new_empty(0)
    of_ranks = RowParts(*(next(messages) if want else nothing for want in question.asked))
    row_temperature = take(temperature, index)
    merged = reference.merged_parts(of_ranks, row_temperature)
    found = reference.statistics_of_parts(merged, part.vocab, row_temperature)
    for whole, some in zip(stats, found, strict=True):
        if whole.numel():
            whole[index] = some
    return stats


def _message(logits: Tensor, question: Question, index: Tensor, impl: str) -> Tensor:
    """This rank's message (P, n) of the rows with a target, whose numbers are given."""
    targets = question.targets
    if logits.shape[-1] == 0:
        constants = [x for x, want in zip(_OF_NO_COLUMNS, question.asked, strict=True) if want]
        return _of_no_columns(constants, index, logits)
    backend = backend_of(impl, logits, logits.numel())
    messages = [
        torch.stack([x for x, want in zip(parts, question.asked, strict=True) if want])
        for parts in parts_of_rows(rows_of(logits), question, targets != IGNORED, backend)
    ]
    return (
        torch.cat(messages, dim=1)
        if messages
        else _of_no_columns([0.0] * sum(question.asked), index, logits)
    )


def _of_no_columns(constants: Iterable[float], rows: Tensor, logits: Tensor) -> Tensor:
    """The message of a part without columns, of so many rows."""
    acc = reference.accumulation_dtype(logits.dtype)
    return torch.stack([logits.new_full(rows.shape, x, dtype=acc) for x in constants])
