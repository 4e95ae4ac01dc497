"""Log-prob, entropy and log-sum-exp of each token from logits, with their gradient.

A call is checked (`logits_arguments`) and reaches one of two forward operators, with or without
further statistics. That views the logits as rows (`rows`) and calls the launcher of a backend: of
`kernels/token_stats.py`, `compiled_token_stats` or `eager_token_stats`, which bear the same names
and take the same arguments. Backward is the same way, by one of three operators, which write the
gradient to where they make room, to where they are told, or over the logits.

They are operators so that `torch.compile` keeps them whole. What it, autograd and the launchers are
given is named once, in `_Inputs` and `_Upstream`.

Dims: N rows, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.reference import FURTHER_STATS, RowStats, TokenStats

from . import compiled_token_stats, eager_token_stats
from .backend import backend_of, check_impl, outside_of_graphs, under_transform
from .checks import check_bool, check_ignore_index, check_names
from .kept_ids import Support
from .logits_arguments import check_values_on_host, checked_logits
from .ranks import Group
from .row_stats import ignored_rows, shaped_stats
from .rows import can_overwrite, flat_rows
from .sharded import logits_part, replicated
from .stats_over_ranks import token_stats_over_ranks
from .taken_logits import kept_token_stats
from .transform import TRANSFORM, Transform

# Logits that the eager backend holds in fp32 at once (at least one row): 4 MiB stay in a CPU's
# cache. `eager_rows` has the bound of the other operations: each can be tuned without the other.
_EAGER_CHUNK_LOGITS = 2**20


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    entropy_grad: bool = True,
    with_stats: Iterable[str] = (),
    inplace_backward: bool = False,
    support: Support | None = None,
    impl: str = "auto",
    group: Group | None = None,
) -> TokenStats:
    """Compute the log-prob of each target, and the entropy and log-sum-exp of its distribution.

    Eager equivalent, with z = softcap·tanh(scale·logits / softcap) / temperature (no tanh without
    softcap)::

        log_p = z.float().log_softmax(-1)
        logprob = log_p.gather(-1, targets[..., None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        is_top1 = z.argmax(-1) == targets
        mean_logit = z.mean(-1)
        log_sum_sq_probs = (2 * log_p).logsumexp(-1)

    Args:
        logits: (..., V) bf16, fp16, fp32 or fp64, any strides. -inf is legal and means probability
            0; with a softcap it is capped like any other logit, to -softcap.
        targets: (...) integer, aligned with the logits that predict them: see `shift_targets`.
        temperature: positive number, or a (...) tensor with one for each token (one that
            broadcasts to it will do, of as many dimensions); for targets (B, T) also (B,), one for
            each sequence. Not differentiable.
        softcap: cap of the logits (Gemma), positive; None for none.
        scale: factor of the logits before the cap (Cohere, Granite), positive.
        ignore_index: rows with this target are not read: their statistics are 0, their gradient
            exactly 0, whatever they hold.
        entropy: also compute the entropy.
        entropy_grad: False gives the entropy without a gradient, whose backward then costs nothing.
        with_stats: names of what else to compute in the same pass over the logits, any of
            "is_top1", "mean_logit" and "log_sum_sq_probs": see `FurtherTokenStats`.
        inplace_backward: let the backward overwrite the logits with their gradient, where their
            memory does not overlap itself. Autograd then refuses any later use of a graph that
            saved the logits.
        support: ids (M,) and offsets (N + 1,), int32 or int64, of the N tokens flattened: token i
            keeps `ids[offsets[i]:offsets[i + 1]]`, and its distribution is over these ids alone, as
            that of a sampler with top-p or top-k is. Each once, in any order, the target among
            them; tokens that are ignored may keep anything. The entropy, and all else, is then that
            of the kept ids; for that of the whole vocabulary, call again without. Where a token
            keeps one id, its log-prob is exactly 0, without gradient, whatever the logit.
        impl: "triton" (kernels, on a GPU; on CPU tensors under TRITON_INTERPRET=1), "compiled" (the
            formulas as PyTorch's compiler builds them: seconds at the first use, see `warm_up`),
            "eager", or "auto": Triton on a GPU; on a CPU compiled, where there is a C++ compiler
            and the logits are 2^22 numbers or more; else eager. `set_backend` and the environment
            variable FASTRLHF_BACKEND say what "auto" stands for. What cannot be compiled runs
            eagerly.
        group: torch.distributed ProcessGroup whose ranks share the vocabulary: logits are then this
            rank's columns (..., V/W) of it, parts in the order of ranks and of whatever sizes (also
            0). All else is the same on every rank, targets are numbers of the whole vocabulary.
            Logits that are a DTensor (Shard(-1) over one dimension of its mesh) need no group.

    Returns:
        TokenStats of (...) tensors in nats, fp32 (fp64 for fp64 logits); with with_stats
        FurtherTokenStats, in which `is_top1` is bool. What was not asked for is None. A row of
        nothing but -inf has log-prob and lse -inf, entropy 0, and no gradient.

    `logprob` and `entropy` are differentiable with respect to the logits, twice if need be (the
    second derivative runs eagerly and builds tensors of the size of the logits); the others are
    not. Under `torch.func` (grad, vmap, jvp, ...) and forward-mode differentiation, all of it runs
    so.

    The kernels read the logits once forward; backward they read them and write the gradient once.
    Nothing else of that size is allocated but the gradient, and not even that with
    inplace_backward. With a support, kept logits alone are read, and the gradient is 0 elsewhere.
    The eager backend also holds a few chunks of 4 MiB in fp32; the compiled one 2^22 numbers of
    what it computes if more than the log-prob is asked for. A row has the same bits whatever batch
    surrounds it, on one backend: "auto" may choose another for another size. The log-prob is
    accurate where the probability is nearly 1, and so is ln Σ p².

    With a group, statistics are those of the whole vocabulary, in the same bits on every rank, and
    the gradient is that of this rank's columns. One all-gather brings 12 bytes a token from each
    rank (16 with the entropy, 8 more for is_top1 and 4 for each of the others; twice that in fp64),
    after one of 48 bytes in all, by which ranks learn who has which columns and whether all ask the
    same of the same tokens. With a support, a number for each kept id instead of those of tokens.
    Backward sends nothing. Each rank computes the same loss from the statistics; the gradient is
    then right as it is, and not to be added up over ranks.

    Raises:
        TypeError: logits that are not floating (or fp8), targets that are not integer.
        ValueError: shapes or devices that do not match, a support that does not fit (a target that
            is not kept, an id twice), an empty vocabulary, a temperature, softcap or scale that is
            not positive, a temperature that requires a gradient, a target outside [0, V) that is
            not ignore_index, an unknown name in with_stats. What tensors hold is checked here on
            the CPU; on a GPU, by an assertion in the kernel.

    The gradient: dz = g·(e_target - p) - h·p⊙(ln p + H), for upstream g of the log-prob and h of
    the entropy H.

    Source: a definition; the log-likelihood, entropy and log-partition function of a categorical
    distribution whose natural parameters are the logits.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> stats = fastrlhf.token_stats(logits, torch.tensor([0, 2]), entropy=True)
        >>> stats.logprob.detach(), stats.entropy.detach()
        (tensor([-0.4076, -1.0986]), tensor([0.8324, 1.0986]))
        >>> stats.logprob.sum().backward()
    """
    return reference.public_stats(
        differentiable_stats(
            logits, targets, temperature=temperature, softcap=softcap, scale=scale,
            ignore_index=ignore_index, entropy=entropy, entropy_grad=entropy_grad,
            with_stats=with_stats, inplace_backward=inplace_backward, support=support, impl=impl,
            group=group,
        )
    )  # fmt: skip


def differentiable_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    entropy_grad: bool = True,
    with_stats: Iterable[str] = (),
    inplace_backward: bool = False,
    support: Support | None = None,
    impl: str = "auto",
    group: Group | None = None,
) -> TokenStats:
    """Compute what `token_stats` does, with a gradient of the lse and of the mean logit too: for
    this library's own losses.
    """
    own = logits_part(logits, group)
    logits, targets, shared = own.logits, replicated("targets", targets), own.group is not None
    transform = checked_logits(logits, targets, temperature, softcap, scale, may_be_empty=shared)
    ignore_index = check_ignore_index(ignore_index)
    check_bool("entropy", entropy)
    check_bool("entropy_grad", entropy_grad)
    with_stats = check_names("with_stats", with_stats, FURTHER_STATS)
    check_bool("inplace_backward", inplace_backward)
    check_impl(impl)
    # A DTensor has a version of its own, which would not tell that its memory was overwritten.
    inplace = inplace_backward and not own.of_dtensor
    wanted: dict[str, Any] = {
        "ignore_index": ignore_index, "entropy": entropy, "entropy_grad": entropy_grad,
        "with_stats": with_stats,
    }  # fmt: skip
    if support is not None:
        return kept_token_stats(
            own, targets, transform, support, **wanted, inplace=inplace, impl=impl
        )  # fmt: skip
    if shared:
        return outside_of_graphs(token_stats_over_ranks)(
            own, targets, transform, **wanted, inplace=inplace, impl=impl
        )
    if under_transform():
        return _definition(logits, targets, transform, **wanted)
    stats = all_statistics(
        logits, targets, transform, ignore_index, entropy, with_stats, inplace, impl
    )
    if not entropy_grad:
        stats = stats._replace(entropy=stats.entropy.detach())
    return shaped_stats(stats.of_tokens, targets.shape, entropy, with_stats)


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    support: Support | None = None,
    impl: str = "auto",
    group: Group | None = None,
) -> Tensor:
    """Compute ln p(target) of each token: `token_stats(...).logprob`, with its arguments.

    Eager equivalent: `logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]`.

    Returns:
        (...) in nats, fp32 (fp64 for fp64 logits), differentiable as `logprob` is there.

    Raises:
        TypeError, ValueError: as `token_stats`.

    Source: as `token_stats`.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
        >>> fastrlhf.token_logprobs(logits, torch.tensor([0, 2]))
        tensor([-0.4076, -1.0986])
        >>> fastrlhf.token_logprobs(logits, torch.tensor([0, -100]), temperature=0.5)
        tensor([-0.1429,  0.0000])
    """
    return token_stats(
        logits,
        targets,
        temperature=temperature,
        softcap=softcap,
        scale=scale,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        support=support,
        impl=impl,
        group=group,
    ).logprob


def _definition(
    logits: Tensor,
    targets: Tensor,
    transform: Transform,
    *,
    ignore_index: int,
    **wanted: Any,
) -> TokenStats:
    """Compute the statistics by what torch.func can differentiate and batch."""
    row_temperature = transform.of_rows
    check_values_on_host(targets, row_temperature, logits.shape[-1], ignore_index)
    return reference.differentiable_stats(
        logits, targets, temperature=row_temperature, softcap=transform.softcap,
        scale=transform.scale, ignore_index=ignore_index, **wanted,
    )  # fmt: skip


def all_statistics(
    logits: Tensor,
    targets: Tensor,
    transform: Transform,
    ignore_index: int,
    entropy: bool,
    with_stats: tuple[str, ...],
    inplace_backward: bool,
    impl: str,
) -> RowStats:
    """Call the forward operator: statistics (N,), empty if not asked for."""
    arguments = (logits, targets, *transform, ignore_index, entropy, inplace_backward, impl)
    if with_stats:
        return RowStats(*_forward_with(*arguments, with_stats))
    return RowStats(*_forward(*arguments), *(logits.new_empty(0),) * len(FURTHER_STATS))


class _Launchers(NamedTuple):
    """Who does the row work, whatever the backend."""

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., None]


def _launchers(backend: str) -> _Launchers:
    """Choose the backend."""
    if backend == "triton":
        from fastrlhf.kernels.token_stats import token_stats_backward, token_stats_forward

        return _Launchers(token_stats_forward, token_stats_backward)
    row_work = compiled_token_stats if backend == "compiled" else eager_token_stats
    return _Launchers(
        partial(row_work.token_stats_forward, logits_at_once=_EAGER_CHUNK_LOGITS),
        partial(row_work.token_stats_backward, logits_at_once=_EAGER_CHUNK_LOGITS),
    )


class _Inputs(NamedTuple):
    """What the forward operators are given, in the order of their schema."""

    logits: Tensor
    targets: Tensor
    token_temperature: Tensor | None
    temperature: float
    softcap: float | None
    scale: float
    ignore_index: int
    entropy: bool
    inplace_backward: bool
    impl: str
    with_stats: Sequence[str] = ()

    def room(self) -> RowStats:
        """Make statistics of the right shapes: for tracing, and where there are no tokens."""
        return ignored_rows(self.logits, self.targets.numel(), self.entropy, self.with_stats)


_INPUTS = (
    f"Tensor logits, Tensor targets, {TRANSFORM}, int ignore_index, bool entropy, "
    "bool inplace_backward, str impl"
)
_STATS = "Tensor, Tensor, Tensor, Tensor, Tensor"  # of `RowStats`, the first five
_FURTHER = "Tensor, Tensor, Tensor"


@torch.library.custom_op(
    "fastrlhf::token_stats", mutates_args=(), schema=f"({_INPUTS}) -> ({_STATS})"
)
def _forward(*inputs):
    return _statistics(_Inputs(*inputs))[:5]


@_forward.register_fake
def _forward_fake(*inputs):
    return _Inputs(*inputs).room()[:5]


@torch.library.custom_op(
    "fastrlhf::token_stats_with", mutates_args=(),
    schema=f"({_INPUTS}, str[] with_stats) -> ({_STATS}, {_FURTHER})",
)  # fmt: skip
def _forward_with(*inputs):
    return tuple(_statistics(_Inputs(*inputs)))


@_forward_with.register_fake
def _forward_with_fake(*inputs):
    return tuple(_Inputs(*inputs).room())


def _statistics(given: _Inputs) -> RowStats:
    backend = backend_of(given.impl, given.logits, given.logits.numel())
    rows, targets, temperature = flat_rows(
        given.logits, given.targets, given.token_temperature, given.temperature
    )
    check_values_on_host(targets, temperature, rows.shape[2], given.ignore_index)
    if targets.numel() == 0:
        return given.room()
    stats = _launchers(backend).forward(
        rows, targets, temperature=temperature, softcap=given.softcap, scale=given.scale,
        ignore_index=given.ignore_index, entropy=given.entropy, with_stats=given.with_stats,
    )  # fmt: skip
    return RowStats(*stats)


class _Upstream(NamedTuple):
    """What the backward operators are given beside logits, in the order of their schema: what the
    forward gave, the gradients of that, and the transform of the logits.
    """

    targets: Tensor
    logprob: Tensor
    entropy: Tensor
    peak: Tensor
    log_norm: Tensor
    d_logprob: Tensor
    d_entropy: Tensor | None
    token_temperature: Tensor | None
    temperature: float
    softcap: float | None
    scale: float
    impl: str
    d_lse: Tensor | None = None
    d_mean: Tensor | None = None

    @property
    def stats(self) -> tuple[Tensor, ...]:
        return self.logprob, self.entropy, self.peak, self.log_norm

    @property
    def slopes(self) -> tuple[Tensor | None, ...]:
        """The gradients of the statistics, contiguous, as kernels take them."""
        slopes = self.d_logprob, self.d_entropy, self.d_lse, self.d_mean
        return tuple(None if x is None else x.contiguous() for x in slopes)


_UPSTREAM = (
    "Tensor targets, Tensor logprob, Tensor entropy, Tensor peak, Tensor log_norm, "
    f"Tensor d_logprob, Tensor? d_entropy, {TRANSFORM}, str impl, "
    "Tensor? d_lse=None, Tensor? d_mean=None"
)


@torch.library.custom_op(
    "fastrlhf::token_stats_backward", mutates_args=(),
    schema=f"(Tensor logits, {_UPSTREAM}) -> Tensor",
)  # fmt: skip
def _backward(logits, *upstream):
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(d_logits, logits, _Upstream(*upstream))
    return d_logits


@_backward.register_fake
def _backward_fake(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "fastrlhf::token_stats_backward_into", mutates_args={"d_logits"},
    schema=f"(Tensor(a!) d_logits, Tensor logits, {_UPSTREAM}) -> ()",
)  # fmt: skip
def _backward_into(d_logits, logits, *upstream):
    _write_gradient(d_logits, logits, _Upstream(*upstream))


@torch.library.custom_op(
    "fastrlhf::token_stats_backward_", mutates_args={"logits"},
    schema=f"(Tensor(a!) logits, {_UPSTREAM}) -> ()",
)  # fmt: skip
def _backward_inplace(logits, *upstream):
    _write_gradient(logits, logits, _Upstream(*upstream))


def _write_gradient(d_logits: Tensor, logits: Tensor, given: _Upstream) -> None:
    """Write the gradient into all of d_logits (..., V), of any floating dtype and with rows at any
    distance; it may be the logits themselves.
    """
    rows, targets, temperature = flat_rows(
        logits, given.targets, given.token_temperature, given.temperature
    )
    d_rows = rows if d_logits is logits else d_logits.view(rows.shape)
    if targets.numel() == 0:
        return
    _launchers(backend_of(given.impl, logits, logits.numel())).backward(
        d_rows, rows, targets, given.stats, *given.slopes, temperature=temperature,
        softcap=given.softcap, scale=given.scale,
    )  # fmt: skip


def _named(of_stats: Sequence[Any]) -> RowStats:
    """Name what there is of each statistic that an operator returns: None of the others."""
    return RowStats(*of_stats, *(None,) * (len(RowStats._fields) - len(of_stats)))


def _setup_context(ctx, inputs, output):
    given, stats = _Inputs(*inputs), _named(output)
    ctx.save_for_backward(
        given.logits, given.targets, given.token_temperature,
        stats.logprob, stats.entropy, stats.peak, stats.log_norm,
    )  # fmt: skip
    ctx.options, ctx.inputs = given[3:], len(inputs)
    # So that an entropy whose gradient nobody asks for costs none.
    ctx.set_materialize_grads(False)


def _autograd(ctx, *d_stats):
    logits, targets, token_temperature, logprob, entropy, peak, log_norm = ctx.saved_tensors
    given = _Inputs(logits, targets, token_temperature, *ctx.options)
    d = _named(d_stats)
    d_logprob = torch.zeros_like(logprob) if d.logprob is None else d.logprob
    d_entropy = d.entropy if given.entropy else None
    d_mean = d.mean_logit if "mean_logit" in given.with_stats else None
    if torch.is_grad_enabled() or under_transform(d_logprob, d_entropy, d.lse, d_mean):
        # The gradient is itself to be differentiated (create_graph), or one of many at once
        # (is_grads_batched): take it by autograd.
        d_logits = _gradient_by_autograd(given, (d_logprob, d_entropy, d.lse, d_mean))
    else:
        upstream = _Upstream(
            targets, logprob, entropy, peak, log_norm, d_logprob, d_entropy, token_temperature,
            given.temperature, given.softcap, given.scale, given.impl, d.lse, d_mean,
        )  # fmt: skip
        if given.inplace_backward and can_overwrite(logits):
            _backward_inplace(logits, *upstream)
            d_logits = logits.detach()
        else:
            d_logits = _backward(logits, *upstream)
    return d_logits, *(None,) * (ctx.inputs - 1)


def _gradient_by_autograd(given: _Inputs, upstream: tuple[Tensor | None, ...]) -> Tensor:
    """Differentiate the definition, given gradients of log-prob, entropy, lse and mean logit."""
    _, d_entropy, _, d_mean = upstream
    transform = Transform(*given[2:6])
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        stats = reference.differentiable_stats(
            given.logits, given.targets, temperature=transform.of_rows, softcap=transform.softcap,
            scale=transform.scale, ignore_index=given.ignore_index,
            entropy=d_entropy is not None, with_stats=() if d_mean is None else ("mean_logit",),
        )  # fmt: skip
    outputs = (stats.logprob, stats.entropy, stats.lse, stats.mean_logit)
    pairs = [
        (x, d.view(given.targets.shape))
        for x, d in zip(outputs, upstream, strict=True)
        if x is not None and d is not None
    ]
    graded, slopes = zip(*pairs, strict=True)
    return torch.autograd.grad(graded, given.logits, slopes, create_graph=again)[0]


for _operator in (_forward, _forward_with):
    _operator.register_autograd(_autograd, setup_context=_setup_context)
