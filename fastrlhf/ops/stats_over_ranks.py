"""Statistics of tokens whose logits are spread over ranks, each with a part of the vocabulary.

A kernel may cut a row of logits into splits, each of which gives a few numbers (`RowParts`), from
which the statistics of the row are computed. In the same way a row is cut among ranks here. Each
rank reduces its columns to a message of three numbers a token: the largest logit, the sum of
exponentials without the target's, and the target's logit. The entropy and the statistics of
`with_stats` add numbers of their own. One all-gather brings all messages to every rank, which
combines them in the order of ranks, so that all have the same bits. Nothing of the size of the
vocabulary is sent.

Given the statistics, the gradient of a rank's logits needs nothing from other ranks. The gradient
of a hidden state is a sum over the columns of all ranks, see `head_gradients`.

Dims: N rows, n of them with a target, V columns of this rank, W ranks, P numbers of a message.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.reference import FURTHER_STATS, RowParts, RowStats, TokenStats

from . import compiled_token_stats, eager_token_stats
from .backend import backend_of, use_triton, wanted_or_detached
from .checks import wide_integers
from .ranks import gathered, refuse_derivatives_of_ranks, refuse_transforms_of_ranks
from .row_stats import Question, ignored_rows, put_stats, shaped_stats
from .rows import can_overwrite, of_rows, rows_of
from .sharded import LogitsPart
from .transform import Transform, check_temperatures_on_host, flat_temperature
from .vocabulary_part import IGNORED, VocabularyPart, numbered

# The message of a rank without columns about a row, in the order of `RowParts`.
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
    stats = RowStats(
        *_TokenStatsOverRanks.apply(logits, own_targets, transform.token_temperature, options)
    )
    return shaped_stats(stats.of_tokens, targets.shape, entropy, with_stats)


class _Options(NamedTuple):
    transform: Transform
    part: VocabularyPart
    entropy: bool
    entropy_grad: bool  # whether the entropy and its gradient are both asked for
    with_stats: tuple[str, ...]
    inplace: bool
    impl: str


class _TokenStatsOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, token_temperature, options):
        transform, part, entropy, _, with_stats, _, impl = options
        stats = statistics_over_ranks(logits, targets, transform, part, entropy, with_stats, impl)
        ctx.save_for_backward(
            logits, targets, token_temperature, stats.logprob, stats.entropy, stats.peak,
            stats.log_norm,
        )  # fmt: skip
        ctx.options = options
        constant = [stats.peak, stats.log_norm, stats.is_top1, stats.log_sum_sq_probs]
        constant += [] if options.entropy_grad else [stats.entropy]
        constant += [] if "mean_logit" in with_stats else [stats.mean_logit]
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        return tuple(stats)

    @staticmethod
    def backward(ctx, *d_stats):
        d = RowStats(*d_stats)
        d_logprob, d_mean = d.logprob, d.mean_logit
        refuse_derivatives_of_ranks("token_stats", d_logprob, d.entropy, d.lse, d_mean)
        logits, targets, token_temperature, *stats = ctx.saved_tensors
        options = ctx.options
        if d_mean is not None:  # the row work divides it by the number of columns that it has here
            d_mean = d_mean * (options.part.size / options.part.vocab)
        if d_logprob is None:
            d_logprob = torch.zeros_like(stats[0])
        saved = (logits, targets, *stats, d_logprob, d.entropy, token_temperature)
        saved += (*options.transform[1:], options.impl, d.lse, d_mean)
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
) -> RowStats:
    """Compute what `all_statistics` does, for logits (..., V) whose other columns are on other
    ranks; without a gradient. Targets are numbered from the part's first column.
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


def _by_kernels(logits: Tensor, question: Question, part: VocabularyPart) -> RowStats:
    from fastrlhf.kernels.token_stats import (
        RowQuestion,
        token_stats_message,
        token_stats_of_messages,
    )

    targets, temperature, softcap, scale, entropy, with_stats = question
    of_kernel = RowQuestion(targets, temperature, softcap, scale, IGNORED, entropy, with_stats)
    if part.size:
        message = token_stats_message(rows_of(logits), of_kernel)
    else:
        message = _of_no_columns(of_kernel.constants, targets, logits)
    stats = RowStats(*token_stats_of_messages(gathered(message, part.group), of_kernel))
    if "mean_logit" not in with_stats:
        return stats
    return stats._replace(mean_logit=stats.mean_logit / part.vocab)


def _by_formulas(logits: Tensor, question: Question, part: VocabularyPart, impl: str) -> RowStats:
    targets, temperature, _, _, entropy, with_stats = question
    stats = ignored_rows(logits, targets.numel(), entropy, with_stats)
    index = (targets != IGNORED).nonzero().squeeze(1)
    message = _message(logits, question, index, impl)
    messages = iter(gathered(message, part.group).unbind(1))
    nothing = message.new_empty(0)
    of_ranks = RowParts(*(next(messages) if want else nothing for want in question.asked))
    row_temperature = of_rows(temperature, index)
    merged = reference.merged_parts(of_ranks, row_temperature)
    put_stats(stats, index, reference.statistics_of_parts(merged, part.vocab, row_temperature))
    return stats


def _message(logits: Tensor, question: Question, index: Tensor, impl: str) -> Tensor:
    """Make this rank's message (P, n) about the rows with a target, whose numbers are given."""
    targets = question.targets
    if logits.shape[-1] == 0:
        constants = [x for x, want in zip(_OF_NO_COLUMNS, question.asked, strict=True) if want]
        return _of_no_columns(constants, index, logits)
    compiled = backend_of(impl, logits, logits.numel()) == "compiled"
    row_parts = (compiled_token_stats if compiled else eager_token_stats).row_parts
    messages = [
        torch.stack([x for x, want in zip(parts, question.asked, strict=True) if want])
        for parts in row_parts(rows_of(logits), question, targets != IGNORED)
    ]
    return (
        torch.cat(messages, dim=1)
        if messages
        else _of_no_columns([0.0] * sum(question.asked), index, logits)
    )


def _of_no_columns(constants: Iterable[float], rows: Tensor, logits: Tensor) -> Tensor:
    """Make the message of a rank without columns about these rows."""
    acc = reference.accumulation_dtype(logits.dtype)
    return torch.stack([logits.new_full(rows.shape, x, dtype=acc) for x in constants])
