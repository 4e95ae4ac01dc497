"""Token statistics whose loss comes later, and whose gradient is mostly foreseen.

G is the cost of one matmul of tokens × hidden × vocabulary. A trainer may take log-probs out of a
model's forward and make a loss of them afterwards. Where the head is trained, that costs 4G
(RECOMPUTE in `linear_plans.py`): the loss's derivative with respect to each log-prob, its *slope*,
is not known while the logits are there, and the backward makes the logits again.

But often the slopes can be foreseen, up to a factor that all tokens share. Those of a cross-entropy
are all equal, for example. Then the forward finishes the gradient for the foreseen slopes, for 3G
in all. The backward compares the foreseen slopes with the actual ones, and makes the logits again
only of the tokens whose slope is different. So a wrong guess costs time, and never makes a gradient
wrong.

What the forward keeps for the backward, such as the gradient for the foreseen slopes, is used once
and then freed. A second backward through the same graph makes all logits again.

Where nothing is foreseen, the logits of the last block of tokens are kept for the backward, which
would need as much memory for its first block anyway. So a batch of one block costs 3G too.

For the gradient of entropies nothing is kept, since most callers only log them. Where a loss does
need that gradient, the backward makes the logits again.

Used by `fastrlhf/integrations/trl_head.py`; `trl_foresight.py` there makes the guesses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.reference import TokenStats

from .backend import under_transform, wanted_or_detached
from .linear_definition import differentiable_gradients
from .linear_plans import (
    AllStats,
    Needs,
    Workbench,
    put,
    recomputed_gradients,
    room_for_all_tokens,
    room_for_slopes,
    statistics,
)
from .linear_precision import exact
from .linear_problem import LinearProblem
from .linear_rows import Block, Span, even_spans, live_rows
from .linear_statistics import Slopes, Statistics
from .linear_token_stats import (
    in_order_of_tensors,
    keep_problem,
    kept_problem,
    shaped_like_targets,
    token_stats_of,
)

# A function that is given the statistics of a block of tokens, and the places of these tokens in
# the flattened targets. It returns guesses of the slopes (n,) of their log-probs, up to a factor
# that all blocks share.
Foresight = Callable[[Statistics, Tensor], Tensor]

# Slopes that differ by less than this many roundings count as equal.
_SLACK = 16
_LARGEST_GUESS = 1e20


def foreseen_stats(problem: LinearProblem, foresight: Foresight | None) -> TokenStats:
    """Compute `token_stats_of` a problem, at the cost that the module's docstring says.

    Cost: G without gradients, and 2G where hidden states alone need one. Where the head is trained,
    3G if all slopes are as foreseen; without a foresight 4G, but 3G for the tokens of the last
    block. Each token whose slope was foreseen wrongly, or whose entropy has a gradient, costs 3G
    more (2G where the head is frozen). On a GPU, the host waits once in the backward, to learn how
    many such tokens there are.
    """
    not_served = problem.options.part, problem.options.shared, problem.kept
    if under_transform() or any(x is not None for x in not_served):
        return token_stats_of(problem)
    tensors = wanted_or_detached(*problem.tensors())
    all_stats = _ForeseenStats.apply(problem.options, foresight, *tensors)
    return shaped_like_targets(all_stats, problem)


class _LastBlock(NamedTuple):
    """The logits of the last block of tokens, which the backward turns into their gradient."""

    span: Span
    logits: Tensor
    stats: Statistics


class _Foreseen(NamedTuple):
    """The foreseen slopes (N,), and the gradient for them, in the precision of sums."""

    slopes: Tensor
    gradient: list[Tensor | None]  # of hidden states, bias and weights


class _ForeseenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, foresight, *tensors):
        ctx.needs = needs = Needs.of(ctx.needs_input_grad[2:])
        problem = LinearProblem.of(options, tensors)
        order = live_rows(problem.targets.reshape(-1), options.question.ignore_index)
        slope_of_logprob: list[Tensor] = []
        ctx.leftover = None
        with exact(problem.hidden):
            bench = problem.workbench(order)
            spans = even_spans(bench.rows.size, options.chunk)
            if needs.head and foresight is not None:
                all_stats, ctx.leftover = _with_foreseen_gradient(
                    bench, spans, needs, foresight, problem
                )
            elif needs.head:
                all_stats, ctx.leftover = _with_last_block(bench, spans)
            elif needs.hidden:
                all_stats, *slope_of_logprob = _with_slope_of_logprob(bench, spans)
            else:
                all_stats, _ = statistics(bench, spans)
        question = options.question._replace(with_stats=())  # these have no gradient
        problem = problem._replace(options=options._replace(question=question))
        keep_problem(ctx, problem, order, slope_of_logprob)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*all_stats[2:])
        return tuple(all_stats)

    @staticmethod
    def backward(ctx, d_logprob, d_entropy, *_):
        problem, order, slope_of_logprob = kept_problem(ctx)
        if torch.is_grad_enabled() or under_transform(d_logprob, d_entropy):
            totals = differentiable_gradients(problem, ctx.needs, d_logprob, d_entropy)
        else:
            leftover, ctx.leftover = ctx.leftover, None  # it can be used only once
            if d_logprob is None:
                sums = torch.promote_types(problem.options.dtype, torch.float32)
                d_logprob = torch.zeros_like(problem.targets.reshape(-1), dtype=sums)
            slopes = Slopes(d_logprob, d_entropy)
            if slope_of_logprob:
                totals = _from_slope(problem, order, slope_of_logprob[0], slopes)
            elif isinstance(leftover, _Foreseen):
                totals = _from_foreseen(problem, order, ctx.needs, leftover, slopes)
            else:
                totals = _recomputed(problem, order, ctx.needs, slopes, last_block=leftover)
            totals = problem.like_inputs(totals)
        return None, None, *in_order_of_tensors(totals)


def _with_slope_of_logprob(bench: Workbench, spans: list[Span]) -> tuple[Any, ...]:
    """Compute the statistics, and ∂logprob/∂hidden (N, K) of each token, as the plan KEEP_SLOPES
    does, but without the entropy's slope.
    """
    all_stats = room_for_all_tokens(bench)
    slope = room_for_slopes(bench.rows.hidden, alone=True)
    for span in spans:
        block = bench.rows.block(span)
        logits, stats = bench.score(block)
        put(all_stats, block, stats)
        unit = Slopes(torch.ones_like(stats.logprob))
        d_logits = bench.d_logits(block, logits, stats, unit, room=bench.head.room)
        slope[block.place] = bench.head.pull_back(d_logits).to(slope.dtype)
    return all_stats, slope


def _with_last_block(bench: Workbench, spans: list[Span]) -> tuple[AllStats, _LastBlock | None]:
    """Compute the statistics as the forward of RECOMPUTE does, and keep the last block's logits."""
    all_stats, last = room_for_all_tokens(bench), None
    for span in spans:
        block = bench.rows.block(span)
        logits, stats = bench.score(block)
        put(all_stats, block, stats)
        last = _LastBlock(span, logits, stats) if span == spans[-1] else None
        del logits  # before the next block makes its own
    return all_stats, last


def _with_foreseen_gradient(
    bench: Workbench, spans: list[Span], needs: Needs, foresight: Foresight, problem: LinearProblem
) -> tuple[AllStats, _Foreseen]:
    """Compute the statistics, and the gradient for the foreseen slopes: the plan WITH_LOSS, with a
    guess in place of the loss.
    """
    all_stats = room_for_all_tokens(bench)
    slopes = torch.zeros_like(all_stats[0])
    gradients = bench.gradients(needs, bench.head.sums)
    for span in spans:
        block = bench.rows.block(span)
        logits, stats = bench.score(block)
        put(all_stats, block, stats)
        guess = _guess(foresight, stats, block)
        slopes[block.place] = guess
        bench.differentiate(block, logits, stats, Slopes(guess), gradients)
        del logits  # before the next block makes its own
    known = gradients.totals(problem.hidden, problem.bias, problem.weights)
    return all_stats, _Foreseen(slopes, known)


def _guess(foresight: Foresight, stats: Statistics, block: Block) -> Tensor:
    assert isinstance(block.place, Tensor)
    guess = foresight(stats, block.place).to(stats.logprob)
    # A guess that is not finite, or may overflow when multiplied, is dropped: 0 foresees nothing.
    return torch.where(guess.abs() < _LARGEST_GUESS, guess, 0.0)


def _from_slope(
    problem: LinearProblem, order: Tensor, slope: Tensor, slopes: Slopes
) -> list[Tensor | None]:
    """Scale the kept vector of each token by its upstream gradient, and add the gradient of the
    entropies, for which the logits are made again.
    """
    live = problem.targets.reshape(-1) != problem.options.question.ignore_index
    d_hidden = slope * torch.where(live, slopes.logprob, 0.0).unsqueeze(1)
    if slopes.entropy is not None:
        needs = Needs(True, [False] * len(problem.weights), False)
        of_entropy = Slopes(torch.zeros_like(slopes.logprob), slopes.entropy)
        recompute = slopes.entropy[order] != 0
        more = _recomputed(problem, order[recompute], needs, of_entropy)[0]
        assert more is not None
        d_hidden = d_hidden + more.view(d_hidden.shape)
    return [d_hidden.view(problem.hidden.shape)] + [None] * (1 + len(problem.weights))


def _from_foreseen(
    problem: LinearProblem, order: Tensor, needs: Needs, leftover: _Foreseen, slopes: Slopes
) -> list[Tensor | None]:
    """Scale the foreseen gradient by the common factor of the slopes, and correct it for tokens
    whose slope was not foreseen.
    """
    foreseen, actual = leftover.slopes[order], slopes.logprob[order]
    factor = actual.new_zeros(())  # where entropies have a gradient too, nothing foreseen is used
    if slopes.entropy is None:
        factor = _common_factor(foreseen, actual)
    missed = actual - factor * foreseen
    alike = missed.abs() <= _SLACK * torch.finfo(actual.dtype).eps * actual.abs()
    recompute = ~(alike & actual.isfinite())
    if slopes.entropy is not None:
        recompute |= slopes.entropy[order] != 0
    totals = [None if total is None else total.mul_(factor) for total in leftover.gradient]
    rows = order[recompute]
    if not rows.shape[0]:
        return totals
    rest = torch.zeros_like(slopes.logprob).index_copy_(0, rows, missed[recompute])
    again = Slopes(rest, slopes.entropy)
    more = _recomputed(problem, rows, needs, again, hidden_dtype=slopes.logprob.dtype)
    if totals[0] is not None and more[0] is not None:
        # The gradient of a hidden state depends on its token alone. So where the slope was not
        # foreseen, the computed gradient replaces the foreseen one. To add the difference to the
        # latter would lose digits by cancellation.
        d_hidden, of_rest = (x.view(-1, problem.hidden.shape[-1]) for x in (totals[0], more[0]))
        ratio = 1.0 if slopes.entropy is not None else (actual / missed)[recompute].unsqueeze(1)
        d_hidden[rows] = of_rest[rows] * ratio
    others = (
        None if a is None or b is None else a.add_(b)
        for a, b in zip(totals[1:], more[1:], strict=True)
    )
    return [totals[0], *others]


def _common_factor(foreseen: Tensor, actual: Tensor) -> Tensor:
    """Find the factor that makes most foreseen slopes right: the median of the factors that each of
    them would need.
    """
    if not foreseen.numel():
        return actual.new_zeros(())
    factor = torch.where(foreseen != 0, actual / foreseen, torch.nan).nanmedian()
    return torch.where(factor.isfinite(), factor, 0.0)


def _recomputed(
    problem: LinearProblem,
    order: Tensor,
    needs: Needs,
    slopes: Slopes,
    *,
    last_block: _LastBlock | None = None,
    hidden_dtype: torch.dtype | None = None,
) -> list[Tensor | None]:
    """Compute the gradient of some tokens from logits that are made again, except those of the last
    block, if they were kept. The gradient of hidden states has their dtype unless another is given.
    """
    with exact(problem.hidden):
        whole = problem.workbench(order)
        made_again = order[: last_block.span[0]] if last_block else order
        bench = problem.workbench(made_again).with_gradient_alone(slopes)
        gradients = bench.gradients(needs, hidden_dtype)
        spans = even_spans(bench.rows.size, problem.options.chunk)
        recomputed_gradients(bench, spans, slopes, gradients)
        if last_block:
            block = whole.rows.block(last_block.span)
            of_block = slopes.at(block.place)
            bench.differentiate(block, last_block.logits, last_block.stats, of_block, gradients)
        return gradients.totals(problem.hidden, problem.bias, problem.weights)
