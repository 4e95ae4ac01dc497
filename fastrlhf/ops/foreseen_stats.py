"""Token statistics whose loss comes later, and whose gradient is mostly foreseen.

A trainer that takes log-probs out of a model's forward, and makes a loss of them afterwards, needs
4G where the head is trained: the loss's derivative with respect to each log-prob, its *slope*, is
not known while the logits are there, and backward makes them again. But often the slopes can be
foreseen, up to a factor that all tokens share: those of a cross-entropy are equal. Then the forward
finishes the gradient for the foreseen slopes, 3G in all; backward compares them with what has come,
and makes the logits again of those tokens alone whose slope is another. So a wrong guess costs
time, never a wrong gradient.

Where nothing is foreseen, the logits of the last block of tokens are kept for backward, which is in
need of as much memory for its first block anyway: a batch of one block costs 3G too.

Entropies are treated likewise: nothing is kept for their gradient, which a log has no use for.
Where a loss asks for it after all, backward makes the logits again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.reference import TokenStats

from .backend import under_transform
from .linear_arguments import LinearProblem, exact, wanted_or_detached
from .linear_plans import (
    Found,
    Needs,
    Slopes,
    Statistics,
    Workbench,
    put,
    recomputed_gradients,
    room_for_all_tokens,
    room_for_slopes,
    statistics,
)
from .linear_rows import Block, Span, even_spans, live_rows
from .linear_token_stats import (
    differentiable_gradients,
    keep_problem,
    kept_problem,
    stats_of_found,
    token_stats_of,
)

# From the statistics of a block of tokens, and where in the flattened targets they stand: slopes
# (n,) of the log-probs, up to a factor that all blocks share.
Foresight = Callable[[Statistics, Tensor], Tensor]

# Slopes that differ by less than a few roundings are equal.
_SLACK = 16


def foreseen_stats(problem: LinearProblem, foresight: Foresight | None) -> TokenStats:
    """Compute `token_stats_of` a problem, at the cost that the module's docstring says.

    Cost: G without gradients, 2G for hidden states alone, and where the head is trained 3G with a
    foresight that comes true, else 4G, less G for the tokens of the last block. Each token whose
    slope is another than was foreseen, or whose entropy has a gradient, costs 3G more (2G where the
    head is frozen). On a GPU, backward waits once for how many those are.
    """
    if under_transform():
        return token_stats_of(problem)
    found = _ForeseenStats.apply(
        problem.options,
        foresight,
        *wanted_or_detached(
            problem.hidden, problem.bias, problem.targets, problem.token_temperature,
            *problem.weights,
        ),
    )  # fmt: skip
    return stats_of_found(problem, found)


class _Kept(NamedTuple):
    """The logits of a block of the tokens, which backward turns into their gradient."""

    span: Span
    logits: Tensor
    stats: Statistics


class _ForeseenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, foresight, hidden, bias, targets, token_temperature, *weights):
        wanted = ctx.needs_input_grad
        ctx.needs = needs = Needs(wanted[2], list(wanted[6:]), wanted[3])
        problem = LinearProblem(hidden, list(weights), bias, targets, token_temperature, options)
        order = live_rows(targets.reshape(-1), options.ignore_index)
        known: list[Tensor | None] = []
        ctx.last_block = None
        with exact(hidden):
            bench = problem.workbench(order)
            spans = even_spans(bench.rows.size, options.chunk)
            if needs.head and foresight is not None:
                found, *known = _with_foreseen_gradient(bench, spans, needs, foresight, problem)
            elif needs.head:
                found, ctx.last_block = _with_last_block(bench, spans)
            elif needs.hidden:
                found, *known = _with_slope_of_logprob(bench, spans)
            else:
                found = statistics(bench, spans)
        # Backward needs nothing but what may have a gradient.
        problem = problem._replace(options=options._replace(with_stats=()))
        keep_problem(ctx, problem, order, known)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*found[2:])
        return tuple(found)

    @staticmethod
    def backward(ctx, d_logprob, d_entropy, *_):
        problem, order, known = kept_problem(ctx)
        if torch.is_grad_enabled() or under_transform(d_logprob, d_entropy):
            totals = differentiable_gradients(problem, ctx.needs, d_logprob, d_entropy)
        else:
            kept, ctx.last_block = ctx.last_block, None  # its logits serve once
            d_logprob, totals = _times_known(problem, order, ctx.needs, known, d_logprob)
            slopes = Slopes(d_logprob, d_entropy)
            totals = _plus_the_rest(problem, order, ctx.needs, totals, slopes, kept)
        d_hidden, d_bias, *d_weights = totals
        return None, None, d_hidden, d_bias, None, None, *d_weights


def _times_known(
    problem: LinearProblem,
    order: Tensor,
    needs: Needs,
    known: list[Tensor],
    d_logprob: Tensor | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """The slopes (N,) of which the forward knew nothing, 0 for the others; and the gradient for
    those.
    """
    if d_logprob is None:
        sums = torch.promote_types(problem.options.dtype, torch.float32)
        d_logprob = torch.zeros_like(problem.targets.reshape(-1), dtype=sums)
    if not known:
        return d_logprob, [None] * (2 + len(problem.weights))
    if needs.head:
        return _times_foreseen(problem, order, known, d_logprob)
    d_hidden = _times_slope(problem, known[0], d_logprob)
    return torch.zeros_like(d_logprob), [d_hidden] + [None] * (1 + len(problem.weights))


def _with_slope_of_logprob(bench: Workbench, spans: list[Span]) -> tuple[Any, ...]:
    """Statistics, and ∂logprob/∂hidden (N, K) of each token: P1, but for the entropy's."""
    found = room_for_all_tokens(bench)
    slope = room_for_slopes(bench.rows.hidden, alone=True)
    for span in spans:
        block = bench.rows.block(span)
        logits, stats = bench.score(block)
        put(found, block, stats)
        unit = Slopes(torch.ones_like(stats.logprob))
        dz = bench.d_logits(block, logits, stats, unit, room=bench.head.room)
        slope[block.place] = bench.head.pull_back(dz).to(slope.dtype)
    return found, slope


def _with_last_block(bench: Workbench, spans: list[Span]) -> tuple[Found, _Kept | None]:
    """Statistics, and what is left of the last block: the forward of P4, but for that."""
    found, kept = room_for_all_tokens(bench), None
    for span in spans:
        block = bench.rows.block(span)
        logits, stats = bench.score(block)
        put(found, block, stats)
        kept = _Kept(span, logits, stats) if span == spans[-1] else None
        del logits  # before the next block makes its own
    return found, kept


def _with_foreseen_gradient(
    bench: Workbench, spans: list[Span], needs: Needs, foresight: Foresight, problem: LinearProblem
) -> tuple[Any, ...]:
    """Statistics, the foreseen slopes (N,), and the gradient for them: P2 with a guess."""
    found = room_for_all_tokens(bench)
    slopes = torch.zeros_like(found[0])
    gradients = bench.gradients(needs, bench.head.sums)
    for span in spans:
        block = bench.rows.block(span)
        logits, stats = bench.score(block)
        put(found, block, stats)
        guess = _guess(foresight, stats, block)
        slopes[block.place] = guess
        bench.differentiate(block, logits, stats, Slopes(guess), gradients)
        del logits  # before the next block makes its own
    known = gradients.totals(problem.hidden, problem.bias, problem.weights)
    return found, slopes, *known


def _guess(foresight: Foresight, stats: Statistics, block: Block) -> Tensor:
    assert isinstance(block.place, Tensor)
    guess = foresight(stats, block.place).to(stats.logprob)
    return torch.where(guess.isfinite(), guess, 0.0)


def _times_slope(problem: LinearProblem, slope: Tensor, d_logprob: Tensor) -> Tensor:
    """Scale the kept vector of each token by its upstream gradient."""
    live = problem.targets.reshape(-1) != problem.options.ignore_index
    d_hidden = slope * torch.where(live, d_logprob, 0.0).unsqueeze(1)
    return d_hidden.to(problem.hidden.dtype).view(problem.hidden.shape)


def _times_foreseen(
    problem: LinearProblem, order: Tensor, known: list[Tensor], d_logprob: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """The slopes that were not foreseen (N,), 0 where they were; and the gradient for those.

    The factor that makes most tokens right is the median of what each would need.
    """
    foreseen, *of_foreseen = known
    guess, came = foreseen[order], d_logprob[order]
    used = guess != 0
    ratios = torch.where(used, came / guess, torch.nan)
    factor = ratios.nanmedian() if ratios.numel() else d_logprob.new_zeros(())
    factor = torch.where(factor.isfinite(), factor, 0.0)
    missed = came - factor * guess
    slack = _SLACK * torch.finfo(came.dtype).eps * came.abs()
    missed = torch.where(missed.abs() <= slack, 0.0, missed)
    inputs = problem.hidden, problem.bias, *problem.weights
    totals: list[Tensor | None] = [
        None if total is None or x is None else (total * factor).to(x.dtype)
        for total, x in zip(of_foreseen, inputs, strict=True)
    ]
    return torch.zeros_like(d_logprob).index_copy_(0, order, missed), totals


def _plus_the_rest(
    problem: LinearProblem,
    order: Tensor,
    needs: Needs,
    totals: list[Tensor | None],
    slopes: Slopes,
    kept: _Kept | None,
) -> list[Tensor | None]:
    """Add the gradient for slopes (N,) of which the forward knew nothing."""
    due = slopes.logprob[order] != 0
    if slopes.entropy is not None:
        due |= slopes.entropy[order] != 0
    wanted = needs.hidden, needs.bias, *needs.weights
    known = all(total is not None or not want for total, want in zip(totals, wanted, strict=True))
    if known and not bool(due.any()):
        return totals
    more = _made_again(problem, order, due, needs, slopes, kept)
    return [
        b if a is None else a if b is None else a + b for a, b in zip(totals, more, strict=True)
    ]


def _made_again(
    problem: LinearProblem,
    order: Tensor,
    due: Tensor,
    needs: Needs,
    slopes: Slopes,
    kept: _Kept | None,
) -> list[Tensor | None]:
    """The gradient from logits that are made again for the tokens that are due, but for those that
    were kept.
    """
    with exact(problem.hidden):
        bench = problem.workbench(order)
        gradients = bench.gradients(needs)
        if not bool(due.all()):
            bench, kept = bench._replace(rows=bench.rows._replace(order=order[due])), None
        spans = even_spans(bench.rows.size, problem.options.chunk)
        recomputed_gradients(bench, spans[:-1] if kept else spans, slopes, gradients)
        if kept:
            block = bench.rows.block(kept.span)
            of_block = slopes.at(block.place)
            bench.differentiate(block, kept.logits, kept.stats, of_block, gradients)
        totals = gradients.totals(problem.hidden, problem.bias, problem.weights)
    inputs = problem.hidden, problem.bias, *problem.weights
    return [
        None if total is None or x is None else total.to(x.dtype)
        for total, x in zip(totals, inputs, strict=True)
    ]
