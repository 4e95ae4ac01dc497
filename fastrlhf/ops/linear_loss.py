"""A user's own loss on token statistics from hidden states, with the fewest vocabulary matmuls.

The loss is computed while the logits of a chunk of tokens are there, so that its gradient can be
finished from them at once. With G for one matmul of tokens × hidden × vocabulary, that costs 3G
where the head is trained, and 2G where it is frozen; `linear_plans.py` says why. The losses of
`fastrlhf/losses/` come here through a `Scorer` (`scorer.py`). All of them end in `loss_of`.

Dims: N tokens, n tokens of a chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import outside_of_graphs, refuse_second_derivative, refuse_transforms
from .checks import check_dense, check_integer, check_same_device, check_shape
from .kept_ids import Support
from .linear_arguments import checked_problem
from .linear_head import Weight
from .linear_kept import kept_stats_of
from .linear_loss_plans import loss_alone, loss_and_gradients, whole
from .linear_plans import Needs, Plan, choose_plan
from .linear_precision import exact
from .linear_problem import LinearInputs, LinearProblem
from .linear_question import TokenQuestion
from .linear_rows import Span, live_rows, order_by_group, pack_groups, states_of_groups
from .linear_statistics import Slopes, Statistics
from .ranks import Group
from .sharded import head_part, replicated


class ChunkStats(NamedTuple):
    """The statistics of n tokens that a loss is given at a time, and the groups of the tokens.

    Source: as `token_stats`.

    Example:
        >>> def z_loss(stats: fastrlhf.ChunkStats):
        ...     return 1e-4 * stats.lse.square().sum() - stats.logprob.sum()
        >>> hidden, weight, targets = torch.ones(3, 4), torch.zeros(8, 4), torch.tensor([0, 1, 2])
        >>> loss, _ = fastrlhf.linear_loss(z_loss, hidden, weight, targets)
        >>> loss
        tensor(6.2396)
    """

    logprob: Tensor  # (n,)
    entropy: Tensor | None  # (n,), None unless asked for
    lse: Tensor  # (n,), differentiable here
    groups: Tensor | None  # (n,) ids, as given
    # Statistics for this library's own losses, as in `FurtherTokenStats`: each (n,), None unless
    # asked for.
    mean_logit: Tensor | None = None  # differentiable here, as the lse
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


LossFunction = Callable[..., Tensor | tuple[Tensor, dict[str, Tensor]]]


def linear_loss(
    loss_fn: LossFunction,
    hidden: Tensor,
    weight: Weight,
    targets: Tensor,
    *side_inputs: Tensor,
    groups: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    group: Group | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a loss that is a sum over chunks of tokens, and its gradient with it.

    Eager equivalent, where one chunk holds all tokens::

        stats = linear_token_stats(hidden, weight, targets, ...)
        live = targets != ignore_index  # in the order of `groups`, if given
        loss, aux = loss_fn(ChunkStats(stats.logprob[live], ...), *(x[live] for x in side_inputs))

    Args:
        loss_fn: `loss_fn(stats, *side_chunk)` returns the 0-d loss of a chunk, or the loss and a
            dict of 0-d or 1-d tensors. It is ordinary PyTorch on vectors `stats.logprob`,
            `stats.entropy`, `stats.lse` and `stats.groups` of the chunk's n tokens, and may depend
            on the first three: `1e-4 * stats.lse.square().sum()` is PaLM's z-loss. The losses of
            all chunks are added up: a mean has to divide by a count of its own. Called once for
            each chunk; tokens that are ignored never reach it, and if all are, it is not called.
        hidden, weight, targets, bias, temperature, softcap, scale, ignore_index, entropy, support,
            rows, chunk_size, impl, group: as `linear_token_stats`. Where ranks share the
            vocabulary, loss_fn is given the same on every rank, and must return the same. With rows
            and no groups, tokens reach it in the order of their rows; with a support and no
            chunk_size, all in one chunk.
        side_inputs: (...) tensors, cut into chunks like the tokens.
        groups: (...) integer ids. The tokens of a group reach loss_fn together and in their order,
            groups in ascending order, wherever in memory they are; None: each token stands alone.
            Whole groups are packed into chunks of chunk_size tokens; a larger group makes a chunk
            of its own, in the same memory.

    Returns:
        loss: 0-d, fp32 (fp64 for fp64 hidden states).
        aux: the entries of loss_fn's dict, detached; 1-d ones concatenated, 0-d ones added up.

    The loss is differentiable, once, with respect to hidden, weight and bias; and with respect to
    side inputs and whatever else loss_fn uses, which runs without autocast. Whatever scale backward
    gets is applied to the gradients that were computed with the loss.

    Cost, in matmuls G of the tokens with a target: G without gradients, 2G for hidden or the head
    alone, 3G for both; G more for the tokens of groups larger than chunk_size. Where the loss of a
    chunk does not depend on at least one token in eight (its derivative is 0), these tokens cost
    only the first G. Memory: chunk_size·V logits, on CUDA their gradient in 16 bits as with
    `linear_token_stats`, and from forward to backward a gradient of hidden and of weight in fp32.
    On a GPU, the host waits once for the counts of tokens and groups, and once in each chunk for
    the count of tokens with a gradient. Under torch.compile it runs outside of the graph;
    `torch.func` transforms are refused.

    Raises:
        TypeError, ValueError: as `linear_token_stats`; groups or side inputs that do not fit; a
            loss_fn that returns anything else.

    Source: a definition; the loss is the function that is given.

    Example:
        >>> def loss_fn(stats, weights):
        ...     return -(stats.logprob * weights).sum(), {"tokens": torch.tensor(len(weights))}
        >>> hidden, weight = torch.ones(3, 4, requires_grad=True), torch.zeros(8, 4)
        >>> targets, weights = torch.tensor([0, 1, -100]), torch.tensor([1.0, 0.5, 0.0])
        >>> loss, metrics = fastrlhf.linear_loss(loss_fn, hidden, weight, targets, weights)
        >>> loss.backward()
        >>> loss.detach(), metrics
        (tensor(3.1192), {'tokens': tensor(2)})
    """
    refuse_transforms("linear_loss", "linear_token_stats and a loss of it")
    head = head_part(hidden, [weight], bias, group)
    inputs = LinearInputs(
        *head[:3], temperature, softcap, scale, chunk_size, impl, part=head.part, support=support,
        rows=rows,
    )  # fmt: skip
    question = TokenQuestion(ignore_index, entropy=entropy)
    problem = checked_problem(inputs, replicated("targets", targets), question)
    return loss_of(problem, loss_fn, side_inputs, groups)


def loss_of(
    problem: LinearProblem,
    loss_fn: LossFunction,
    side_inputs: tuple[Tensor, ...],
    groups: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of a problem, whose weight may come in column blocks, or quantized."""
    shape, hidden = tuple(problem.targets.shape), problem.hidden
    named = {f"side_inputs[{i}]": x for i, x in enumerate(side_inputs)}
    for name, x in named.items():
        check_dense(name, x)
    if groups is not None:
        check_integer("groups", groups)
        named["groups"] = groups
    for name, x in named.items():
        check_shape(name, x, shape, "the shape of targets")
        check_same_device(name, x, "hidden", hidden)
    compute = _loss_and_known_gradient if problem.kept is None else _loss_of_kept_ids
    return outside_of_graphs(compute)(problem, loss_fn, side_inputs, groups)


def _loss_of_kept_ids(
    problem: LinearProblem,
    loss_fn: LossFunction,
    side_inputs: tuple[Tensor, ...],
    groups: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss over kept ids. Their logits are few, so that they are made all at once, and
    autograd does the gradient.
    """
    order, segments = _segments(problem, groups)
    chunks = _ChunkLosses(loss_fn, order, side_inputs, groups, with_slopes=False)
    stats = kept_stats_of(problem)
    for spans in segments:
        index = order[slice(*whole(spans))]
        chunk: dict[str, Any] = {
            name: None if x is None else x[index] for name, x in stats._asdict().items()
        }
        with exact(problem.hidden):
            chunks.show(index, ChunkStats(**chunk, groups=None))
    # The sum of no numbers is a 0 with a graph, so that the loss has one even without any token.
    return chunks.total(stats.logprob[:0].sum())


def _loss_and_known_gradient(
    problem: LinearProblem,
    loss_fn: LossFunction,
    side_inputs: tuple[Tensor, ...],
    groups: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, whose gradient is computed with it and handed to autograd as known."""
    inputs = (problem.hidden, problem.bias, *problem.weights)
    grad = torch.is_grad_enabled()
    wanted = [grad and x is not None and x.requires_grad for x in inputs]
    needs = Needs(wanted[0], wanted[2:], wanted[1])
    plan = choose_plan(needs, loss_known=True)
    order, segments = _segments(problem, groups)
    chunks = _ChunkLosses(
        loss_fn, order, side_inputs, groups, with_slopes=plan is not Plan.READ_ONLY
    )
    with torch.no_grad(), exact(problem.hidden):
        bench = problem.workbench(order)
        # fp32, since the scale of the loss is not known: fp16 could lose small gradients.
        gradients = bench.gradients(needs, bench.head.sums)
        if plan is Plan.READ_ONLY:
            loss_alone(bench, segments, chunks)
        else:
            loss_and_gradients(bench, segments, chunks, gradients)
        known = gradients.totals(problem.hidden, problem.bias, problem.weights)
    loss, aux = chunks.total(bench.rows.hidden.new_zeros((), dtype=bench.head.sums))
    if plan is Plan.READ_ONLY:
        return loss, aux
    return _WithKnownGradient.apply(loss, known, *inputs), aux


def _segments(problem: LinearProblem, groups: Tensor | None) -> tuple[Tensor, list[list[Span]]]:
    """Order the live tokens, and cut them into segments. The loss sees a whole segment at once. A
    segment consists of spans, whose logits are held one span at a time: a single span, unless a
    group is too large for that.
    """
    chunk = problem.options.chunk
    if groups is None:
        rows = problem.workbench(problem.order()).rows
        assert rows.order is not None
        return rows.order, [[span] for span in rows.spans(chunk)]
    order = live_rows(problem.targets.reshape(-1), problem.options.question.ignore_index)
    order, sizes = order_by_group(order, groups.reshape(-1))
    shared = problem.options.shared
    states = None if shared is None else states_of_groups(shared.state[order], sizes)
    return order, list(pack_groups(sizes, chunk, states))


class _ChunkLosses:
    """Calls a loss on one chunk after the other. A call returns the loss's derivatives with respect
    to the statistics; the values of the loss are kept for `total`.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        order: Tensor,
        side_inputs: tuple[Tensor, ...],
        groups: Tensor | None,
        with_slopes: bool,
    ):
        if order.shape[0] and not callable(loss_fn):
            raise TypeError(f"loss_fn: expected a function, got {type(loss_fn).__name__}")
        self.loss_fn, self.order, self.with_slopes = loss_fn, order, with_slopes
        self.side_inputs = [x.reshape(-1) for x in side_inputs]
        self.groups = None if groups is None else groups.reshape(-1)
        self.grad = torch.is_grad_enabled()
        self.losses: list[Tensor] = []
        self.aux: list[dict[str, Tensor]] = []

    def __call__(self, span: Span, given: Statistics) -> Slopes:
        index = self.order[slice(*span)]
        logprob, entropy, lse, mean_logit = (
            x.detach().requires_grad_(self.with_slopes) if x.numel() else None
            for x in (given.logprob, given.entropy, given.lse, given.mean_logit)
        )
        others = (x if x.numel() else None for x in (given.is_top1, given.log_sum_sq_probs))
        assert logprob is not None and lse is not None
        stats = ChunkStats(logprob, entropy, lse, None, mean_logit, *others)
        return self._slopes(self.show(index, stats), stats)

    def show(self, index: Tensor, stats: ChunkStats) -> Tensor:
        """Call the loss on some tokens, given their statistics."""
        groups = None if self.groups is None else self.groups[index]
        with torch.set_grad_enabled(self.grad):
            sides = (x[index] for x in self.side_inputs)
            result = self.loss_fn(stats._replace(groups=groups), *sides)
            loss, aux = check_loss(result, self.aux[0] if self.aux else None)
        self.losses.append(loss)
        self.aux.append({name: value.detach() for name, value in aux.items()})
        return loss

    def _slopes(self, loss: Tensor, stats: ChunkStats) -> Slopes:
        """Differentiate a chunk's loss with respect to its statistics. The graph is retained for
        the gradients of side inputs and whatever else the loss depends on.
        """
        zeros = torch.zeros_like(stats.logprob)
        if not (self.with_slopes and loss.requires_grad):
            return Slopes(zeros)
        leaves = (stats.logprob, stats.entropy, stats.lse, stats.mean_logit)
        there = [x for x in leaves if x is not None]
        slopes = iter(torch.autograd.grad(loss, there, retain_graph=True, allow_unused=True))
        g, *others = (None if x is None else next(slopes) for x in leaves)
        return Slopes(zeros if g is None else g, *others)

    def total(self, zero: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Add up the losses, and collect the aux entries."""
        loss = sum((loss.to(zero.dtype) for loss in self.losses), start=zero)
        names = self.aux[0] if self.aux else {}
        parts = {name: [aux[name] for aux in self.aux] for name in names}
        return loss, {
            name: torch.cat(values) if values[0].ndim else torch.stack(values).sum(0)
            for name, values in parts.items()
        }


def check_loss(
    result: Any, first_aux: dict[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the dict that a loss_fn returned.

    Raises:
        ValueError: it returned anything else, or a dict with other entries than for the first
            chunk.
    """
    loss, *rest = result if isinstance(result, tuple) and result else (result,)
    aux, more = rest[0] if rest else {}, rest[1:]
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        got = f"{loss.dtype} {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss)
        raise ValueError(f"loss_fn: expected a 0-d floating loss (a sum over tokens), got {got}")
    if not isinstance(aux, dict) or more:
        got = f"{2 + len(more)} values" if more else type(aux)
        raise ValueError(f"loss_fn: expected a dict after the loss, and nothing else, got {got}")
    for name, value in aux.items():
        if not isinstance(value, Tensor) or value.ndim > 1:
            raise ValueError(f"loss_fn: expected 0-d or 1-d tensors in its dict, {name!r} is none")
    first = aux if first_aux is None else first_aux
    kinds = [{name: value.ndim for name, value in x.items()} for x in (aux, first)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"loss_fn: expected the same entries from every chunk, got {kinds[0]} (names and "
            f"dimensions) after {kinds[1]}"
        )
    return loss, aux


class _WithKnownGradient(torch.autograd.Function):
    """A loss, and its gradients with respect to the inputs, which are known already.

    The whole loss passes through this function. So every second derivative runs through its
    backward, which refuses it: the graph lacks the path through the statistics, and the second
    derivative would be wrong without it.
    """

    @staticmethod
    def forward(ctx, loss, known, *inputs):
        ctx.save_for_backward(*known)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx, d_loss):
        refuse_second_derivative("linear_loss", "linear_token_stats")
        refuse_transforms("linear_loss's backward", "linear_token_stats", d_loss)
        scaled = [
            None if known is None else (known * d_loss).to(dtype)
            for known, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return d_loss, None, *scaled
