"""Log-prob, entropy and log-sum-exp of each token from hidden states, never building the logits."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.reference import TokenStats, accumulation_dtype

from .backend import outside_of_graphs, under_transform, wanted_or_detached
from .kept_ids import Support
from .linear_arguments import (
    LinearProblem,
    checked_problem,
    exact,
    full_logits,
    written_out,
)
from .linear_head import Weight
from .linear_kept import kept_stats_of
from .linear_plans import (
    Kept,
    Needs,
    Plan,
    Slopes,
    choose_plan,
    recomputed_gradients,
    statistics,
    statistics_and_slopes,
)
from .ranks import Group, all_reduced_rows, refuse_derivatives_of_ranks, refuse_transforms_of_ranks
from .row_stats import shaped_stats
from .sharded import head_part, replicated
from .shared_slopes import statistics_and_shared_slopes, times_shared_slopes


def linear_token_stats(
    hidden: Tensor,
    weight: Weight,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    entropy_grad: bool = True,
    with_stats: Iterable[str] = (),
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    group: Group | None = None,
) -> TokenStats:
    """Compute `token_stats` of the logits that a linear head gives, without building them.

    Eager equivalent: `token_stats(F.linear(hidden, weight, bias).float(), targets, ...)`.

    Args:
        hidden: (..., H) bf16, fp16, fp32 or fp64; with rows (U, H).
        weight: (V, H) of the same dtype (any floating dtype under autocast, which decides the dtype
            of the matmuls as for `F.linear`); or a QuantizedWeight, which is frozen.
        targets: (...) integer, aligned with the hidden states that predict them: see
            `shift_targets`.
        bias: (V,) floating, or None.
        temperature, softcap, scale, ignore_index, entropy, entropy_grad, with_stats, support, impl:
            as `token_stats`.
        rows: (...) integer: token i is predicted from `hidden[rows[i]]`, with hidden (U, H) and
            targets of any shape. Where sequences of a tree part, or share a prefix, one hidden
            state predicts several targets, and its logits are made once. Those of ignored tokens
            may be anything. None: each token has a hidden state of its own.
        chunk_size: tokens whose logits are held at a time; None: as many as fill 512 MiB in fp32
            (64 MiB on a CPU), on a GPU a multiple of 128 of them.
        group: torch.distributed ProcessGroup whose ranks share the vocabulary: weight (V/W, H) and
            bias are then this rank's rows of it, parts in the order of ranks and of whatever sizes
            (also 0). All else is the same on every rank, targets are numbers of the whole
            vocabulary. A weight that is a DTensor (Shard(0) over one dimension of its mesh) needs
            no group; hidden may be a DTensor that is replicated.

    Returns:
        TokenStats of (...) tensors in nats, fp32 (fp64 for fp64 hidden states); with with_stats
        FurtherTokenStats, in which `is_top1` is bool. What was not asked for is None.

    `logprob` and `entropy` are differentiable with respect to hidden, weight and bias, twice if
    need be (the second derivative builds the logits, eagerly); the others are not. Under
    `torch.func` (grad, vmap, jvp, ...) and forward-mode differentiation, all of it builds the
    logits.

    Cost, in matmuls of the tokens with a target, G = 2·n·V·H operations (ignored tokens cost none):
    G where nothing needs a gradient; 2G in all where hidden alone does, as with LoRA; 4G where the
    weight does too (3G where it alone does): `linear_loss` needs 3G there. The entropy adds 1G
    where hidden alone needs a gradient, and nothing with entropy_grad=False; what with_stats names
    is read off the logits in the same pass. Where logits are made again, it is of those tokens
    whose upstream gradient is not 0: of 4G, 3G. Memory: chunk_size·V logits; where hidden alone
    needs a gradient, a (..., H) tensor kept for the backward in the dtype of hidden, but fp32 for
    fp16; with that of the entropy two in fp32, since they may cancel; an fp32 (V, H) tensor for the
    gradient of a weight. Logits are fp32, and so are all sums; on CUDA, where inputs are bf16 or
    fp16, the gradient of the logits is rounded to that dtype for its matmuls: in fp16 relative to a
    power of two of each token, so that a small loss loses nothing. These gradients are another
    chunk in 16 bits, and as many chunks as fill 512 MiB where the weight's is asked for. Results
    are the same bits from run to run. On a GPU, the count of tokens with a target is awaited once.

    With rows, G is of the hidden states that predict a target, not of the tokens (of those at two
    temperatures, twice); where hidden alone needs a gradient, an fp32 (U, H) tensor is kept, two
    with the entropy's. With a support there are no such matmuls, whatever needs a gradient: forward
    reads the rows of the weight that tokens keep, ids of tokens that keep one only for the lse;
    backward reads them for the gradient of hidden, and hidden states for that of the weight, where
    an upstream gradient is not 0. Memory: a few numbers for each kept id, and the gradients. With
    either, a GPU is awaited for counts. Under torch.compile, a support runs as it is, and shared
    hidden states cost as much as if each token had its own, as they do under torch.func.

    With a group, statistics are in the same bits on every rank; gradients of weight and bias are
    those of this rank's rows, that of hidden is complete on every rank. Sent are the numbers that
    `token_stats` names, of tokens with a target; and backward one all-reduce of the gradient of
    their hidden states in fp32, where the weight is trained of one chunk while the next is
    computed. The (..., H) tensor that is kept for the backward is fp32. Where each rank computes
    the same loss from the statistics, gradients are right as they are. The second derivative and
    `torch.func` are refused; shared hidden states cost as much as if each token had its own. With a
    support, sent are a number for each kept id forward, and the gradient of the hidden states
    backward. On a GPU, the sizes of the parts are awaited too (not of a DTensor).

    Raises:
        TypeError: hidden, weight or bias that are not floating; hidden and weight of two dtypes;
            targets that are not integer.
        ValueError: shapes or devices that do not match, chunk_size < 1, rows outside [0, U), and as
            `token_stats`.

    The gradient with respect to hidden: g·(w_target - Σ p_v w_v), for the log-prob's upstream g.

    Example:
        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 0.0]], requires_grad=True)
        >>> weight = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])  # of the head, (V, H)
        >>> stats = fastrlhf.linear_token_stats(hidden, weight, torch.tensor([0, 2]), entropy=True)
        >>> stats.logprob.detach(), stats.entropy.detach()
        (tensor([-0.4076, -1.0986]), tensor([0.8324, 1.0986]))
        >>> stats.logprob.sum().backward()
    """
    head = head_part(hidden, [weight], bias, group)
    problem = checked_problem(
        head.hidden, head.weights, replicated("targets", targets), bias=head.bias,
        temperature=temperature, softcap=softcap, scale=scale, ignore_index=ignore_index,
        entropy=entropy, chunk_size=chunk_size, impl=impl, entropy_grad=entropy_grad,
        with_stats=with_stats, part=head.part, support=support, rows=rows,
    )  # fmt: skip
    return token_stats_of(problem)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Weight,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    group: Group | None = None,
) -> Tensor:
    """Compute ln p(target) of each token: `linear_token_stats(...).logprob`, with its arguments,
    cost and errors.

    Eager equivalent: `F.linear(hidden, weight, bias).float().log_softmax(-1).gather(-1,
    targets[..., None])[..., 0]`.

    Example:
        >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
        >>> fastrlhf.linear_token_logprobs(hidden, weight, torch.tensor([0, 2]))
        tensor([-0.4076, -1.0986])
    """
    head = head_part(hidden, [weight], bias, group)
    problem = checked_problem(
        head.hidden, head.weights, replicated("targets", targets), bias=head.bias,
        temperature=temperature, softcap=softcap, scale=scale, ignore_index=ignore_index,
        entropy=False, chunk_size=chunk_size, impl=impl, part=head.part, support=support, rows=rows,
        lse=False,
    )  # fmt: skip
    return token_stats_of(problem).logprob


def token_stats_of(problem: LinearProblem) -> TokenStats:
    """Compute the statistics of a problem whose weight may come in column blocks, or in codes."""
    if problem.kept is not None:
        stats = outside_of_graphs(kept_stats_of)(problem)
        grad = problem.options.entropy_grad
        return reference.public_stats(stats.shaped(problem.targets.shape, entropy_grad=grad))
    over_ranks = problem.options.part is not None
    if over_ranks:
        refuse_transforms_of_ranks("linear_token_stats")
    if under_transform():
        return _definition(problem, problem.hidden, problem.bias, problem.weights)
    apply = _LinearTokenStats.apply
    in_graphs = not over_ranks and problem.options.shared is None
    found = (apply if in_graphs else outside_of_graphs(apply))(
        problem.options,
        *wanted_or_detached(
            problem.hidden, problem.bias, problem.targets, problem.token_temperature,
            *problem.weights,
        ),
    )  # fmt: skip
    return stats_of_found(problem, found)


def stats_of_found(problem: LinearProblem, found: Sequence[Tensor]) -> TokenStats:
    """Give the statistics (N,) of all tokens, as the plans find them, the shape of the targets."""
    options = problem.options
    return shaped_stats(found, problem.targets.shape, options.entropy, options.with_stats)


class _LinearTokenStats(torch.autograd.Function):
    """P0, P1 and P4: statistics whose upstream gradients come later."""

    @staticmethod
    def forward(ctx, options, hidden, bias, targets, token_temperature, *weights):
        wanted = ctx.needs_input_grad
        needs = Needs(wanted[1], list(wanted[5:]), wanted[2])
        plan = choose_plan(needs, loss_known=False)
        problem = LinearProblem(hidden, list(weights), bias, targets, token_temperature, options)
        order = problem.order()
        others: tuple[Tensor, ...]
        with exact(hidden):
            bench = problem.workbench(order)
            spans = bench.rows.spans(options.chunk)
            if plan is Plan.P1 and options.shared is not None:
                found, others = statistics_and_shared_slopes(bench, spans)
            elif plan is Plan.P1:
                found, *slopes = statistics_and_slopes(bench, spans)
                others = tuple(slopes)
            else:
                found, others = statistics(bench, spans)
        ctx.needs, ctx.keeps_slopes = needs, plan is Plan.P1
        # Backward needs nothing but what has a gradient.
        options = options._replace(entropy=options.entropy_grad, with_stats=())
        keep_problem(ctx, problem._replace(options=options), order, others)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*found[1 if not options.entropy_grad else 2 :])
        return found

    @staticmethod
    def backward(ctx, d_logprob, d_entropy, *_):
        problem, order, others = kept_problem(ctx)
        if problem.options.part is not None:
            refuse_derivatives_of_ranks("linear_token_stats", d_logprob, d_entropy)
        if torch.is_grad_enabled() or under_transform(d_logprob, d_entropy):
            d_hidden, d_bias, *d_weights = differentiable_gradients(
                problem, ctx.needs, d_logprob, d_entropy
            )
        elif ctx.keeps_slopes and problem.options.shared is not None:
            if not problem.options.entropy:
                d_entropy = None
            d_hidden = times_shared_slopes(problem, others, d_logprob, d_entropy)
            d_bias, d_weights = None, [None] * len(problem.weights)
        elif ctx.keeps_slopes:
            d_hidden = _times_slopes(problem, order, others, d_logprob, d_entropy)
            d_bias, d_weights = None, [None] * len(problem.weights)
        else:
            d_hidden, d_bias, *d_weights = _recomputed(
                problem, order, ctx.needs, d_logprob, d_entropy, tuple(others)
            )
        return None, d_hidden, d_bias, None, None, *d_weights


def keep_problem(
    ctx: Any, problem: LinearProblem, order: Tensor | None, others: Sequence[Tensor | None]
) -> None:
    """Keep what a backward needs."""
    hidden, weights, bias, targets, token_temperature, ctx.options, _ = problem
    ctx.codes = [None if isinstance(weight, Tensor) else weight for weight in weights]
    dense = [weight if isinstance(weight, Tensor) else None for weight in weights]
    ctx.save_for_backward(hidden, bias, targets, token_temperature, order, *dense, *others)


def kept_problem(ctx: Any) -> tuple[LinearProblem, Any, list[Any]]:
    """Return what was kept: the problem, the order of its rows, and the others."""
    hidden, bias, targets, token_temperature, order, *rest = ctx.saved_tensors
    dense, others = rest[: len(ctx.codes)], rest[len(ctx.codes) :]
    weights = [code or x for code, x in zip(ctx.codes, dense, strict=True)]
    problem = LinearProblem(hidden, weights, bias, targets, token_temperature, ctx.options)
    return problem, order, others


def _times_slopes(
    problem: LinearProblem,
    order: Tensor | None,
    slopes: list[Tensor],
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
) -> Tensor | None:
    """Scale the kept vectors of each token by its upstream gradients."""
    live = problem.targets.reshape(-1) != problem.options.ignore_index
    d_hidden = None
    upstreams = d_logprob, d_entropy if problem.options.entropy else None
    for slope, upstream in zip(slopes, upstreams, strict=True):
        if upstream is not None:
            part = slope * torch.where(live, upstream, 0.0).unsqueeze(1)
            d_hidden = part if d_hidden is None else d_hidden.add_(part)
    if d_hidden is None:
        return None
    if problem.options.part is not None:
        d_hidden = all_reduced_rows(d_hidden, order, problem.options.part.group)
    return d_hidden.to(problem.hidden.dtype).view(problem.hidden.shape)


def _recomputed(
    problem: LinearProblem,
    order: Tensor | None,
    needs: Needs,
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
    kept: Kept,
) -> list[Tensor | None]:
    """Gradients of hidden states, bias and weights from logits that are made again."""
    with exact(problem.hidden):
        if d_logprob is None:
            sums = accumulation_dtype(problem.options.dtype)
            d_logprob = torch.zeros_like(problem.targets.reshape(-1), dtype=sums)
        slopes = Slopes(d_logprob, d_entropy if problem.options.entropy else None)
        bench = problem.workbench(order).with_gradient_alone(slopes)
        gradients = bench.gradients(needs)
        spans = bench.rows.spans(problem.options.chunk)
        recomputed_gradients(bench, spans, slopes, gradients, kept)
        totals = gradients.totals(problem.hidden, problem.bias, problem.weights)
    return [
        None if total is None or x is None else total.to(x.dtype)
        for total, x in zip(totals, (problem.hidden, problem.bias, *problem.weights), strict=True)
    ]


def differentiable_gradients(
    problem: LinearProblem, needs: Needs, d_logprob: Tensor | None, d_entropy: Tensor | None
) -> list[Tensor | None]:
    """Gradients that can themselves be differentiated, or batched: by autograd, through the
    logits.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that a path from one input to another is not walked here.
        hidden = problem.hidden.view_as(problem.hidden)
        bias = None if problem.bias is None else problem.bias.view_as(problem.bias)
        weights = [weight[0 : weight.shape[0]] for weight in problem.weights]
        stats = _definition(problem, hidden, bias, weights)
    outputs = [
        (value, upstream.view(value.shape))
        for value, upstream in ((stats.logprob, d_logprob), (stats.entropy, d_entropy))
        if value is not None and upstream is not None
    ]
    values, upstream = zip(*outputs, strict=True)
    wanted = needs.hidden, needs.bias, *needs.weights
    tensors = (hidden, bias, *weights)
    inputs = [x for x, want in zip(tensors, wanted, strict=True) if want and x is not None]
    found = iter(torch.autograd.grad(values, inputs, upstream, create_graph=again))
    return [next(found) if want else None for want in wanted]


def _definition(
    problem: LinearProblem, hidden: Tensor, bias: Tensor | None, weights: Sequence[Weight]
) -> TokenStats:
    """Compute the statistics by the logits, in what torch.func can differentiate and batch."""
    options, targets = problem.options, problem.targets
    weight = torch.cat([weight[0 : weight.shape[0]] for weight in weights], dim=1)
    live = targets != options.ignore_index
    if options.shared is not None:
        hidden = written_out(hidden, options.shared.row, targets)
    with exact(hidden):
        return reference.token_stats(
            full_logits(hidden, weight, bias, live, options.dtype), targets,
            temperature=problem.temperature, softcap=options.softcap, scale=options.scale,
            ignore_index=options.ignore_index, entropy=options.entropy,
            entropy_grad=options.entropy_grad, with_stats=options.with_stats,
        )  # fmt: skip
