"""Log-prob, entropy and log-sum-exp of each token from hidden states, never building the logits.

From top to bottom: the public functions put their keywords into a `LinearProblem`
(`linear_problem.py`). An autograd Function chooses a plan (`linear_plans.py` says what each costs),
and runs it block by block. Its backward scales what the forward kept, or makes the logits again.
Where the loss is known beforehand, `linear_loss.py` is cheaper; where its gradient can be guessed,
`foreseen_stats.py` is.

Dims: N tokens, K width of the hidden states.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.reference import TokenStats, accumulation_dtype

from .backend import outside_of_graphs, under_transform, wanted_or_detached
from .kept_ids import Support
from .linear_arguments import checked_problem
from .linear_definition import differentiable_gradients, stats_by_logits
from .linear_head import Weight
from .linear_kept import kept_stats_of
from .linear_plans import (
    Needs,
    Plan,
    choose_plan,
    recomputed_gradients,
    statistics,
    statistics_and_slopes,
)
from .linear_precision import exact
from .linear_problem import LinearInputs, LinearProblem
from .linear_question import TokenQuestion
from .linear_statistics import Slopes
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
            state predicts several targets, and its logits are made once. Rows of ignored tokens may
            be anything. None: each token has a hidden state of its own.
        chunk_size: tokens whose logits are held at a time; None: as many as fill 512 MiB in fp32
            (64 MiB on a CPU), on a GPU a multiple of 128 of them.
        group: torch.distributed ProcessGroup whose ranks share the vocabulary: weight (V/W, H) and
            bias are then this rank's rows of it. Parts are in the order of ranks and may have any
            sizes (also 0). All other arguments are the same on every rank, and targets are numbered
            in the whole vocabulary. A weight that is a DTensor (Shard(0) over one dimension of its
            mesh) needs no group; hidden may be a DTensor that is replicated.

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
    where hidden alone needs a gradient, and nothing with entropy_grad=False. The statistics of
    with_stats are computed from the logits in the same pass. Where the weight needs a gradient, the
    backward, which takes 3 of the 4G, does its work only for tokens whose upstream gradient is not
    0. Results are the same bits from run to run. On a GPU, the host waits once, for the number of
    tokens with a target.

    Memory: chunk_size·V logits. Where hidden alone needs a gradient, a (..., H) tensor is kept for
    the backward, in the dtype of hidden, but fp32 for fp16; with the entropy's gradient there are
    two, in fp32, since they may cancel. Where the weight needs a gradient, an fp32 (V, H) tensor.
    Logits and all sums are fp32. On CUDA, where inputs are bf16 or fp16, the gradient of the logits
    is rounded to that dtype for its matmuls; in fp16 it is held relative to a power of two for each
    token, so that small gradients are not lost. These gradients take another chunk in 16 bits, or
    as many chunks as fill 512 MiB where the weight needs a gradient.

    With rows, G counts the hidden states that predict a target, not the tokens (a hidden state at
    two temperatures counts twice). Where hidden alone needs a gradient, an fp32 (U, H) tensor is
    kept, two with the entropy's gradient. With a support there are no matmuls over the vocabulary,
    whatever needs a gradient. The forward reads the rows of the weight that tokens keep; the row of
    a token that keeps one id is read only for the lse. Where an upstream gradient is not 0, the
    backward reads these rows for the gradient of hidden, and hidden states for that of the weight.
    Memory: a few numbers for each kept id, and the gradients. With rows or a support, the host
    waits for counts on a GPU. Under torch.compile, a support runs outside of the graph, and shared
    hidden states cost as much as if each token had its own, as they do under torch.func.

    With a group, statistics are the same bits on every rank. Gradients of weight and bias are those
    of this rank's rows; that of hidden is complete on every rank. The forward sends the numbers
    that `token_stats` names, of tokens with a target. The backward sends the gradient of their
    hidden states in fp32, in one all-reduce, or where the weight is trained in one for each chunk
    while the next chunk is computed. The (..., H) tensor that is kept for the backward is fp32. If
    each rank computes the same loss from the statistics, its gradients need no correction. The
    second derivative and `torch.func` are refused; shared hidden states cost as much as if each
    token had its own. With a support, the forward sends a number for each kept id, and the backward
    the gradient of the hidden states. On a GPU, the host waits for the sizes of the parts too, but
    not for those of a DTensor.

    Raises:
        TypeError: hidden, weight or bias that are not floating; hidden and weight of two dtypes;
            targets that are not integer.
        ValueError: shapes or devices that do not match, chunk_size < 1, rows outside [0, U), and as
            `token_stats`.

    The gradient with respect to hidden: g·(w_target - Σ p_v w_v), for the log-prob's upstream g.

    Source: as `token_stats`.

    Example:
        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 0.0]], requires_grad=True)
        >>> weight = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])  # of the head, (V, H)
        >>> stats = fastrlhf.linear_token_stats(hidden, weight, torch.tensor([0, 2]), entropy=True)
        >>> stats.logprob.detach(), stats.entropy.detach()
        (tensor([-0.4076, -1.0986]), tensor([0.8324, 1.0986]))
        >>> stats.logprob.sum().backward()
    """
    head = head_part(hidden, [weight], bias, group)
    inputs = LinearInputs(
        *head[:3], temperature, softcap, scale, chunk_size, impl, part=head.part, support=support,
        rows=rows,
    )  # fmt: skip
    question = TokenQuestion(
        ignore_index, entropy=entropy, entropy_grad=entropy_grad, with_stats=with_stats
    )
    return token_stats_of(checked_problem(inputs, replicated("targets", targets), question))


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
    """Compute ln p(target) of each token: `linear_token_stats(...).logprob`, with its arguments
    and cost.

    Eager equivalent: `F.linear(hidden, weight, bias).float().log_softmax(-1).gather(-1,
    targets[..., None])[..., 0]`.

    Returns:
        (...) in nats, fp32 (fp64 for fp64 hidden states), differentiable as `logprob` is there.

    Raises:
        TypeError, ValueError: as `linear_token_stats`.

    Source: as `token_stats`.

    Example:
        >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
        >>> fastrlhf.linear_token_logprobs(hidden, weight, torch.tensor([0, 2]))
        tensor([-0.4076, -1.0986])
    """
    head = head_part(hidden, [weight], bias, group)
    inputs = LinearInputs(
        *head[:3], temperature, softcap, scale, chunk_size, impl, part=head.part, support=support,
        rows=rows,
    )  # fmt: skip
    question = TokenQuestion(ignore_index, lse=False)
    problem = checked_problem(inputs, replicated("targets", targets), question)
    return token_stats_of(problem).logprob


def token_stats_of(problem: LinearProblem) -> TokenStats:
    """Compute the statistics of a problem, whose weight may come in column blocks, or quantized."""
    if problem.kept is not None:
        stats = outside_of_graphs(kept_stats_of)(problem)
        grad = problem.options.question.entropy_grad
        return reference.public_stats(stats.shaped(problem.targets.shape, entropy_grad=grad))
    over_ranks = problem.options.part is not None
    if over_ranks:
        refuse_transforms_of_ranks("linear_token_stats")
    if under_transform():
        return stats_by_logits(problem, problem.hidden, problem.bias, problem.weights)
    apply = _LinearTokenStats.apply
    if over_ranks or problem.options.shared is not None:
        apply = outside_of_graphs(apply)
    all_stats = apply(problem.options, *wanted_or_detached(*problem.tensors()))
    return shaped_like_targets(all_stats, problem)


def shaped_like_targets(all_stats: Sequence[Tensor], problem: LinearProblem) -> TokenStats:
    """Give the statistics (N,) of all tokens, which the plans return, the shape of the targets."""
    question = problem.options.question
    return shaped_stats(all_stats, problem.targets.shape, question.entropy, question.with_stats)


class _LinearTokenStats(torch.autograd.Function):
    """Statistics whose upstream gradients come later: one of the plans READ_ONLY, KEEP_SLOPES and
    RECOMPUTE of `linear_plans.py`.
    """

    @staticmethod
    def forward(ctx, options, *tensors):
        ctx.needs = needs = Needs.of(ctx.needs_input_grad[1:])
        plan = choose_plan(needs, loss_known=False)
        problem = LinearProblem.of(options, tensors)
        order = problem.order()
        kept: tuple[Tensor, ...]
        with exact(problem.hidden):
            bench = problem.workbench(order)
            spans = bench.rows.spans(options.chunk)
            if plan is not Plan.KEEP_SLOPES:
                all_stats, kept = statistics(bench, spans)
            elif options.shared is not None:
                all_stats, kept = statistics_and_shared_slopes(bench, spans)
            else:
                all_stats, *slopes = statistics_and_slopes(bench, spans)
                kept = tuple(slopes)
        ctx.keeps_slopes = plan is Plan.KEEP_SLOPES
        options = options._replace(question=options.question.of_gradient)
        keep_problem(ctx, problem._replace(options=options), order, kept)
        ctx.set_materialize_grads(False)
        entropy_grad = options.question.entropy
        ctx.mark_non_differentiable(*all_stats[2 if entropy_grad else 1 :])
        return all_stats

    @staticmethod
    def backward(ctx, d_logprob, d_entropy, *_):
        problem, order, kept = kept_problem(ctx)
        options = problem.options
        if options.part is not None:
            refuse_derivatives_of_ranks("linear_token_stats", d_logprob, d_entropy)
        if torch.is_grad_enabled() or under_transform(d_logprob, d_entropy):
            gradients = differentiable_gradients(problem, ctx.needs, d_logprob, d_entropy)
        else:
            if not options.question.entropy:
                d_entropy = None
            if not ctx.keeps_slopes:
                gradients = _recomputed(problem, order, ctx.needs, d_logprob, d_entropy, kept)
            else:
                if options.shared is not None:
                    d_hidden = times_shared_slopes(problem, kept, d_logprob, d_entropy)
                else:
                    d_hidden = _times_slopes(problem, order, kept, d_logprob, d_entropy)
                gradients = [d_hidden, None, *(None for _ in problem.weights)]
        return None, *in_order_of_tensors(gradients)


def in_order_of_tensors(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Put gradients of hidden states, bias and weights into the order of `LinearProblem.tensors`,
    with None for targets and temperatures.
    """
    d_hidden, d_bias, *d_weights = gradients
    return d_hidden, d_bias, None, None, *d_weights


def keep_problem(
    ctx: Any, problem: LinearProblem, order: Tensor | None, more: Sequence[Tensor | None]
) -> None:
    """Keep what the backward needs: the problem, the order of its rows, and more tensors."""
    ctx.options, tensors = problem.options, problem.tensors()
    ctx.codes = [None if isinstance(x, Tensor) else x for x in tensors]  # of quantized weights
    dense = [x if isinstance(x, Tensor) else None for x in tensors]
    ctx.save_for_backward(order, *dense, *more)


def kept_problem(ctx: Any) -> tuple[LinearProblem, Any, list[Any]]:
    """Return what `keep_problem` kept: the problem, the order of its rows, and more tensors."""
    order, *rest = ctx.saved_tensors
    dense, more = rest[: len(ctx.codes)], rest[len(ctx.codes) :]
    tensors = [code or x for code, x in zip(ctx.codes, dense, strict=True)]
    return LinearProblem.of(ctx.options, tensors), order, more


def _times_slopes(
    problem: LinearProblem,
    order: Tensor | None,
    slopes: list[Tensor],
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
) -> Tensor | None:
    """Scale each token's kept vectors by its upstream gradients: the backward of KEEP_SLOPES."""
    live = problem.targets.reshape(-1) != problem.options.question.ignore_index
    d_hidden = None
    for slope, upstream in zip(slopes, (d_logprob, d_entropy), strict=True):
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
    kept: Sequence[Tensor],
) -> list[Tensor | None]:
    """Compute the gradients of hidden states, bias and weights from logits that are made again: the
    backward of RECOMPUTE.
    """
    with exact(problem.hidden):
        if d_logprob is None:
            sums = accumulation_dtype(problem.options.dtype)
            d_logprob = torch.zeros_like(problem.targets.reshape(-1), dtype=sums)
        slopes = Slopes(d_logprob, d_entropy)
        bench = problem.workbench(order).with_gradient_alone(slopes)
        gradients = bench.gradients(needs)
        spans = bench.rows.spans(problem.options.chunk)
        recomputed_gradients(bench, spans, slopes, gradients, tuple(kept))
        totals = gradients.totals(problem.hidden, problem.bias, problem.weights)
    return problem.like_inputs(totals)
