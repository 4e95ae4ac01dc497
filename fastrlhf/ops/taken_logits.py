"""Statistics over kept ids (see `kept_ids.py`) from a tensor of all logits.

The logits of the kept ids are taken out of it, `kept_stats.py` does the rest, and the gradient of
all other logits is 0.

Dims: N tokens, M kept ids of all of them, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.reference import TokenStats, accumulation_dtype

from .backend import outside_of_graphs, under_transform, use_triton
from .checks import wide_integers
from .kept_ids import Support, checked_support, of_part, said_with_support
from .kept_stats import KeptQuestion, KeptStats, kept_stats
from .logits_arguments import check_values_on_host
from .ranks import refuse_transforms_of_ranks, sum_over_ranks
from .rows import can_overwrite, rows_of
from .sharded import LogitsPart
from .transform import Transform
from .vocabulary_part import IGNORED, VocabularyPart, numbered


def kept_token_stats(
    own: LogitsPart,
    targets: Tensor,
    transform: Transform,
    support: Support,
    *,
    ignore_index: int,
    entropy: bool,
    entropy_grad: bool,
    with_stats: tuple[str, ...],
    inplace: bool,
    impl: str,
) -> TokenStats:
    """Compute `token_stats` over the ids that tokens keep."""
    question = KeptQuestion(transform.flat(own.logits.dtype), entropy, with_stats, impl)
    stats = kept_stats_of_logits(
        own, targets, support, question, ignore_index=ignore_index, inplace=inplace
    )
    return stats.shaped(targets.shape, entropy_grad=entropy_grad)


def kept_stats_of_logits(*arguments: Any, **options: Any) -> KeptStats:
    """Compute the statistics, of which the lse and the mean logit are differentiable too. `_stats`
    has the arguments.

    It runs outside of compiled graphs, because its course depends on which ids tokens keep.
    """
    return outside_of_graphs(_stats)(*arguments, **options)


def _stats(
    own: LogitsPart,
    targets: Tensor,
    support: Support,
    question: KeptQuestion,
    *,
    ignore_index: int,
    inplace: bool = False,
) -> KeptStats:
    logits = own.logits
    part = _agreed(own, targets, support, question, ignore_index)
    vocab = logits.shape[-1] if part is None else part.vocab
    if isinstance(vocab, int):
        temperature = question.transform.of_rows
        check_values_on_host(targets.reshape(-1), temperature, vocab, ignore_index)
    kept = checked_support(support, targets, vocab, ignore_index)
    ids, here = of_part(kept, part)
    pairs = _Taken(kept.token, ids, kept.live if here is None else kept.live & here)
    if under_transform(logits):
        taken = _definition(logits, pairs)
    else:
        taken = _TakenLogits.apply(logits, pairs, inplace)
    # Where ranks share the vocabulary, each has the logits of its own ids, and 0 for all others, so
    # that their sum over ranks is the logits of all ids.
    return kept_stats(sum_over_ranks(taken, own.group), kept, question)


def _agreed(
    own: LogitsPart, targets: Tensor, support: Support, question: KeptQuestion, ignore_index: int
) -> VocabularyPart | None:
    """Check that all ranks ask the same, and return which part of the vocabulary this rank has."""
    if own.group is None:
        return None
    refuse_transforms_of_ranks("token_stats")
    by_kernels, transform = use_triton(question.impl, own.logits), question.transform
    asked = numbered((by_kernels, *question.asked), own.logits.dtype, *transform[1:])
    targets = wide_integers(targets)
    scored = torch.where(targets == ignore_index, IGNORED, targets)
    scored = said_with_support(scored, support, targets.numel())
    part = own.agreed(scored, asked, transform.token_temperature)
    assert part is not None
    part.own_targets(targets, ignore_index)  # checks that they lie in the whole vocabulary
    return part


class _Taken(NamedTuple):
    """Which logits are taken: the row and the column of each, and whether it is looked at."""

    token: Tensor  # (M,)
    ids: Tensor  # (M,)
    wanted: Tensor  # (M,) bool


class _TakenLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, pairs, inplace):
        ctx.pairs, ctx.inplace = pairs, inplace
        ctx.save_for_backward(logits)
        return _taken(logits, pairs)

    @staticmethod
    def backward(ctx, d_taken):
        (logits,) = ctx.saved_tensors
        pairs = ctx.pairs
        if torch.is_grad_enabled() or under_transform(d_taken):
            with torch.enable_grad():
                view = logits.view_as(logits)
                taken = _definition(view, pairs)
            again = torch.is_grad_enabled()
            d_logits = torch.autograd.grad(taken, view, d_taken, create_graph=again)[0]
            return d_logits, None, None
        if ctx.inplace and can_overwrite(logits):
            d_logits = logits.zero_()
        else:
            d_logits = torch.zeros_like(logits, memory_format=torch.contiguous_format)
        if logits.shape[-1]:  # where ranks share the vocabulary, one may have no column of it
            rows = rows_of(d_logits)
            values = torch.where(pairs.wanted, d_taken, 0.0).to(rows.dtype)
            # The places of wanted logits differ from each other, since a token keeps an id once.
            # Logits that are not wanted may share a place, and add 0 to it.
            rows.index_put_(_place(pairs, rows), values, accumulate=True)
        return d_logits.detach(), None, None


def _place(pairs: _Taken, rows: Tensor) -> tuple[Tensor, ...]:
    """Return the indices at which the taken logits stand in logits (outer, inner, V)."""
    inner = max(1, rows.shape[1])
    return pairs.token // inner, pairs.token % inner, pairs.ids


def _taken(logits: Tensor, pairs: _Taken) -> Tensor:
    dtype = accumulation_dtype(logits.dtype)
    if logits.numel() == 0:
        return logits.new_zeros(pairs.ids.shape, dtype=dtype)
    rows = rows_of(logits)
    return torch.where(pairs.wanted, rows[_place(pairs, rows)].to(dtype), 0.0)


def _definition(logits: Tensor, pairs: _Taken) -> Tensor:
    dtype = accumulation_dtype(logits.dtype)
    if logits.numel() == 0:
        return logits.sum(dtype=dtype) + logits.new_zeros(pairs.ids.shape, dtype=dtype)
    taken = logits.reshape(-1, logits.shape[-1])[pairs.token, pairs.ids]
    return torch.where(pairs.wanted, taken.to(dtype), 0.0)
