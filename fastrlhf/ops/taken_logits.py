"""Logits of kept ids out of a tensor of all logits, whose gradient is 0 everywhere else.

Dims: N tokens, M kept ids of all of them, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from fastrlhf.reference import TokenStats, accumulation_dtype

from .backend import outside_of_graphs, under_transform
from .kept_ids import KeptIds, Support, checked_support
from .kept_stats import KeptQuestion, KeptStats, kept_stats
from .token_stats import can_overwrite, check_values_on_host, rows_of
from .transform import Transform


def kept_token_stats(
    logits: Tensor,
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
    """Compute `token_stats` over kept ids."""
    stats = kept_stats_of_logits(
        logits, targets, support, transform, ignore_index=ignore_index, entropy=entropy,
        with_stats=with_stats, inplace=inplace, impl=impl,
    )  # fmt: skip
    return stats.shaped(targets.shape, entropy_grad=entropy_grad)


def kept_stats_of_logits(*arguments: Any, **options: Any) -> KeptStats:
    """Compute statistics of which the lse and the mean logit are differentiable too: see `_stats`.

    What tokens keep must be looked at, which cannot be compiled.
    """
    return outside_of_graphs(_stats)(*arguments, **options)


def _stats(
    logits: Tensor,
    targets: Tensor,
    support: Support,
    transform: Transform,
    *,
    ignore_index: int,
    entropy: bool,
    with_stats: tuple[str, ...],
    impl: str,
    inplace: bool = False,
) -> KeptStats:
    vocab, transform = logits.shape[-1], transform.flat(logits.dtype)
    check_values_on_host(targets.reshape(-1), transform.of_rows, vocab, ignore_index)
    kept = checked_support(support, targets, vocab, ignore_index)
    question = KeptQuestion(transform, entropy, with_stats, impl)
    if under_transform(logits):
        taken = _definition(logits, kept, kept.live)
    else:
        taken = _TakenLogits.apply(logits, kept, kept.live, inplace)
    return kept_stats(taken, kept, question)


class _TakenLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, kept, wanted, inplace):
        ctx.kept, ctx.wanted, ctx.inplace = kept, wanted, inplace
        ctx.save_for_backward(logits)
        return _taken(logits, kept, wanted)

    @staticmethod
    def backward(ctx, d_taken):
        (logits,) = ctx.saved_tensors
        kept, wanted = ctx.kept, ctx.wanted
        if torch.is_grad_enabled() or under_transform(d_taken):
            with torch.enable_grad():
                view = logits.view_as(logits)
                taken = _definition(view, kept, wanted)
            again = torch.is_grad_enabled()
            d_logits = torch.autograd.grad(taken, view, d_taken, create_graph=again)[0]
            return d_logits, None, None, None
        if ctx.inplace and can_overwrite(logits):
            d_logits = logits.zero_()
        else:
            d_logits = torch.zeros_like(logits, memory_format=torch.contiguous_format)
        rows = rows_of(d_logits)
        # Each id of a token is there once; of an ignored one perhaps several times, all with 0.
        place = _place(kept, rows)
        rows.index_put_(place, torch.where(wanted, d_taken, 0.0).to(rows.dtype))
        return d_logits.detach(), None, None, None


def _place(kept: KeptIds, rows: Tensor) -> tuple[Tensor, ...]:
    """Where in logits (outer, inner, V) the kept ids are."""
    inner = max(1, rows.shape[1])
    return kept.token // inner, kept.token % inner, kept.ids


def _taken(logits: Tensor, kept: KeptIds, wanted: Tensor) -> Tensor:
    dtype = accumulation_dtype(logits.dtype)
    if not len(kept.ids):
        return logits.new_zeros(0, dtype=dtype)
    rows = rows_of(logits)
    return torch.where(wanted, rows[_place(kept, rows)].to(dtype), 0.0)


def _definition(logits: Tensor, kept: KeptIds, wanted: Tensor) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1])
    taken = rows[kept.token, kept.ids].to(accumulation_dtype(logits.dtype))
    return torch.where(wanted, taken, 0.0)
