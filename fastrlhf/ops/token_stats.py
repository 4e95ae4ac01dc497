"""Log-prob, entropy and log-sum-exp of each token from logits, with their gradient.

Opaque operators carry it, so that `torch.compile` keeps them whole: the forward, with or without
further statistics, the backward, and the backward that overwrites the logits. Each runs the Triton
kernels or, for a bounded number of rows at a time, the closed forms of `fastrlhf.reference`.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.reference import FURTHER_STATS, RowParts, TokenStats

from . import compiled_rows
from .backend import (
    backend_of,
    check_impl,
    is_batched,
    outside_of_graphs,
    under_transform,
)
from .checks import (
    assert_on_device,
    check_bool,
    check_floating,
    check_ignore_index,
    check_indices_on_host,
    check_integer,
    check_names,
    check_same_device,
    check_shape,
    wide_integers,
)
from .compiled import NotCompiled
from .kept_ids import Support
from .ranks import Group
from .row_spans import few_spans
from .sharded import logits_part, replicated
from .tracing import being_traced
from .transform import (
    Transform,
    check_temperatures_on_host,
    checked_transform,
    flat_temperature,
)

# Logits that the eager backend holds in fp32 at once (at least one row): 4 MiB stay in a CPU's
# cache.
_EAGER_CHUNK_LOGITS = 2**20

# Spans of rows are zeroed one by one where they are no more than this.
_FEW_SPANS = 256


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
    if support is not None:
        return _over_kept_ids(
            own, targets, transform, support, ignore_index=ignore_index, entropy=entropy,
            entropy_grad=entropy_grad, with_stats=with_stats, inplace=inplace, impl=impl,
        )  # fmt: skip
    if shared:
        from .stats_over_ranks import token_stats_over_ranks  # which imports this module

        return outside_of_graphs(token_stats_over_ranks)(
            own, targets, transform, ignore_index=ignore_index, entropy=entropy,
            entropy_grad=entropy_grad, with_stats=with_stats, inplace=inplace, impl=impl,
        )  # fmt: skip
    if under_transform():
        return _definition(
            logits, targets, transform, ignore_index, entropy, entropy_grad, with_stats
        )
    logprob, row_entropy, lse, _, _, *further = all_statistics(
        logits, targets, transform, ignore_index, entropy, with_stats, inplace_backward, impl
    )
    if not entropy_grad:
        row_entropy = row_entropy.detach()
    found = (logprob, row_entropy, lse, *further)
    return shaped_stats(found, targets.shape, entropy, with_stats)


def _over_kept_ids(*arguments: Any, **options: Any) -> TokenStats:
    from .taken_logits import kept_token_stats  # which imports this module

    return kept_token_stats(*arguments, **options)


def all_statistics(
    logits: Tensor,
    targets: Tensor,
    transform: Transform,
    ignore_index: int,
    entropy: bool,
    with_stats: tuple[str, ...],
    inplace_backward: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    """Call the forward operator: logprob, entropy, lse, peak, log_norm and what `with_stats` may
    name, each (N,); empty if not asked for.
    """
    arguments = (logits, targets, *transform, ignore_index, entropy, inplace_backward, impl)
    if with_stats:
        return _forward_with(*arguments, with_stats)
    found = _forward(*arguments)
    return *found, *(logits.new_empty(0),) * len(FURTHER_STATS)


def shaped_stats(
    found: Sequence[Tensor], shape: torch.Size, entropy: bool, with_stats: tuple[str, ...]
) -> TokenStats:
    """Give the fields of `TokenStats`, each (N,), their shape; None to what was not asked for."""
    logprob, row_entropy, lse, *others = found
    further = {
        name: x.view(shape)
        for name, x in zip(FURTHER_STATS, others, strict=True)
        if name in with_stats
    }
    row_entropy_or_none = row_entropy.view(shape) if entropy else None
    return reference.stats_tuple(logprob.view(shape), row_entropy_or_none, lse.view(shape), further)


def _definition(
    logits: Tensor,
    targets: Tensor,
    transform: Transform,
    ignore_index: int,
    entropy: bool,
    entropy_grad: bool,
    with_stats: tuple[str, ...],
) -> TokenStats:
    """Compute the statistics by what torch.func can differentiate and batch."""
    row_temperature = transform.of_rows
    check_values_on_host(targets, row_temperature, logits.shape[-1], ignore_index)
    return reference.differentiable_stats(
        logits, targets, temperature=row_temperature, softcap=transform.softcap,
        scale=transform.scale, ignore_index=ignore_index, entropy=entropy,
        entropy_grad=entropy_grad, with_stats=with_stats,
    )  # fmt: skip


def checked_logits(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
    *,
    may_be_empty: bool = False,
) -> Transform:
    """Check logits (..., V), their targets (...) and how they are transformed. Where ranks share
    the vocabulary, one of them may have nothing of it.

    Raises:
        TypeError, ValueError: an argument that does not fit, by its public name.
    """
    check_floating("logits", logits)
    if logits.ndim == 0 or (logits.shape[-1] == 0 and not may_be_empty):
        raise ValueError(f"logits: expected shape (..., V) with V > 0, got {tuple(logits.shape)}")
    check_integer("targets", targets)
    check_shape("targets", targets, tuple(logits.shape[:-1]), "logits without the vocabulary")
    check_same_device("targets", targets, "logits", logits)
    return checked_transform(temperature, softcap, scale, targets)


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
    """Compute ln p(target) of each token: `token_stats(...).logprob`, with its arguments and
    errors.

    Eager equivalent: `logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]`.

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


def _statistics(
    logits: Tensor,
    targets: Tensor,
    token_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    entropy: bool,
    inplace_backward: bool,
    impl: str,
    with_stats: Sequence[str] = (),
) -> tuple[Tensor, ...]:
    backend = backend_of(impl, logits, logits.numel())
    rows, targets, row_temperature = flat_rows(logits, targets, token_temperature, temperature)
    check_values_on_host(targets, row_temperature, logits.shape[-1], ignore_index)
    if targets.numel() == 0:
        return empty_statistics(logits, 0, entropy, with_stats)
    if backend == "triton":
        from fastrlhf.kernels.token_stats import token_stats_forward

        return token_stats_forward(
            rows,
            targets,
            temperature=row_temperature,
            softcap=softcap,
            scale=scale,
            ignore_index=ignore_index,
            entropy=entropy,
            with_stats=with_stats,
        )
    stats = empty_statistics(logits, targets.numel(), entropy, with_stats)
    if targets.device.type != "cpu":  # as the kernel does
        known = (targets >= 0) & (targets < logits.shape[-1]) | (targets == ignore_index)
        assert_on_device(known.all(), "a target is outside [0, vocabulary)")
    question = Question(targets, row_temperature, softcap, scale, entropy, tuple(with_stats))
    for index, found in _statistics_of_rows(rows, question, targets != ignore_index, backend):
        for whole, part in zip(stats, found, strict=True):
            if whole.numel():
                whole[index] = part
    return stats


Index = Tensor | slice  # of some rows


class Question(NamedTuple):
    """What is asked of rows of logits."""

    targets: Tensor  # (N,) numbers of columns, or outside of those that are there
    temperature: float | Tensor  # of all, or (N,)
    softcap: float | None
    scale: float
    entropy: bool
    with_stats: tuple[str, ...]

    @property
    def asked(self) -> tuple[bool, ...]:
        """Which fields of `RowParts` the answer takes."""
        return True, True, True, self.entropy, *(name in self.with_stats for name in FURTHER_STATS)

    @property
    def held(self) -> bool:
        """Whether a compiled function may have to hold a number for each logit: what more than one
        loop takes.
        """
        return self.entropy or bool(self.with_stats) or self.softcap is not None

    def of_rows(self, index: Index) -> tuple[Tensor, dict[str, Any]]:
        """Targets and options of some rows, as the formulas take them."""
        options = self._asdict() | {"temperature": take(self.temperature, index)}
        del options["targets"]
        return self.targets[index], options


def _statistics_of_rows(
    rows: Tensor, question: Question, selected: Tensor, backend: str
) -> Iterator[tuple[Index, tuple[Tensor, ...]]]:
    """Compute the statistics of the selected rows of an (outer, inner, V) view, some at a time."""
    if backend == "compiled":
        with contextlib.suppress(NotCompiled):
            for index in compiled_rows.chunks(selected, rows.shape[2], held=question.held):
                parts = compiled_rows.row_parts(rows, index, *question)
                temperature = take(question.temperature, index)
                yield index, reference.statistics_of_parts(parts, rows.shape[2], temperature)
            return
    for some in eager_chunks(selected, rows):
        targets, options = question.of_rows(some)
        yield some, reference.token_stats_forward(take_rows(rows, some), targets, **options)


def parts_of_rows(
    rows: Tensor, question: Question, selected: Tensor, backend: str
) -> Iterator[RowParts]:
    """Compute, of columns of the selected rows, what `_statistics_of_rows` finishes."""
    if backend == "compiled":
        with contextlib.suppress(NotCompiled):
            chunks = compiled_rows.chunks(selected, rows.shape[2], held=question.held)
            yield from [compiled_rows.row_parts(rows, index, *question) for index in chunks]
            return
    for some in eager_chunks(selected, rows):
        targets, options = question.of_rows(some)
        yield reference.row_parts(take_rows(rows, some), targets, **options)


def empty_statistics(
    logits: Tensor, rows: int, entropy: bool, with_stats: Sequence[str] = ()
) -> tuple[Tensor, ...]:
    """Statistics of ignored rows: logprob, entropy, lse, peak, log_norm and the further ones; peak
    -inf marks no distribution.
    """
    acc = reference.accumulation_dtype(logits.dtype)
    logprob, lse, log_norm = (logits.new_zeros(rows, dtype=acc) for _ in range(3))
    peak = logits.new_full((rows,), -torch.inf, dtype=acc)
    row_entropy = logits.new_zeros(rows if entropy else 0, dtype=acc)
    further = (
        logits.new_zeros(
            rows if name in with_stats else 0, dtype=torch.bool if name == "is_top1" else acc
        )
        for name in FURTHER_STATS
    )
    return logprob, row_entropy, lse, peak, log_norm, *further


_OPTIONS = (
    "Tensor logits, Tensor targets, Tensor? token_temperature, float temperature, "
    "float? softcap, float scale, int ignore_index, bool entropy, bool inplace_backward, str impl"
)
_FIVE = "Tensor, Tensor, Tensor, Tensor, Tensor"


@torch.library.custom_op(
    "fastrlhf::token_stats", mutates_args=(), schema=f"({_OPTIONS}) -> ({_FIVE})"
)
def _forward(*arguments):
    return _statistics(*arguments)[:5]


@_forward.register_fake
def _forward_fake(logits, targets, *options):
    return empty_statistics(logits, targets.numel(), options[5])[:5]


@torch.library.custom_op(
    "fastrlhf::token_stats_with", mutates_args=(),
    schema=f"({_OPTIONS}, str[] with_stats) -> ({_FIVE}, Tensor, Tensor, Tensor)",
)  # fmt: skip
def _forward_with(*arguments):
    return _statistics(*arguments)


@_forward_with.register_fake
def _forward_with_fake(logits, targets, *options):
    return empty_statistics(logits, targets.numel(), options[5], options[-1])


def _write_gradient(
    d_logits: Tensor,
    logits: Tensor,
    targets: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    peak: Tensor,
    log_norm: Tensor,
    d_logprob: Tensor,
    d_entropy: Tensor | None,
    token_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
    impl: str,
    d_lse: Tensor | None = None,
    d_mean: Tensor | None = None,
) -> None:
    """Write the gradient into all of d_logits (..., V), of any floating dtype and with rows at any
    distance; it may be the logits themselves.
    """
    stats = (logprob, entropy, peak, log_norm)
    rows, targets, row_temperature = flat_rows(logits, targets, token_temperature, temperature)
    d_rows = rows if d_logits is logits else d_logits.view(rows.shape)
    d_logprob = d_logprob.contiguous()
    others = tuple(None if x is None else x.contiguous() for x in (d_entropy, d_lse, d_mean))
    if targets.numel() == 0:
        return
    backend = backend_of(impl, logits, logits.numel())
    if backend == "triton":
        from fastrlhf.kernels.token_stats import token_stats_backward

        token_stats_backward(
            d_rows,
            rows,
            targets,
            stats,
            d_logprob,
            *others,
            temperature=row_temperature,
            softcap=softcap,
            scale=scale,
        )
        return
    active = d_logprob != 0
    for slope in others:
        if slope is not None:
            active |= slope != 0
    # As in the kernel: the peak of a row without a distribution is -inf.
    active &= peak != -torch.inf
    in_place = d_logits is logits
    if not in_place:
        zero_inactive(d_rows, active)
    options: dict[str, Any] = {
        "temperature": row_temperature, "softcap": softcap, "scale": scale
    }  # fmt: skip
    left = active
    if backend == "compiled":
        upstream = d_logprob, *others
        left = _left_by_compiled(d_rows, rows, targets, stats, upstream, active, options)
    for index in eager_chunks(left, rows):
        gradient = reference.token_stats_backward(
            take_rows(rows, index), targets[index],
            tuple(value[index] if value.numel() else value for value in stats),
            d_logprob[index], *(None if slope is None else slope[index] for slope in others),
            **options | {"temperature": take(row_temperature, index)},
        )  # fmt: skip
        _put_rows(d_rows, index, gradient.to(d_rows.dtype))
    if in_place:
        _put_rows(d_rows, (~active).nonzero().squeeze(1), 0.0)


def _left_by_compiled(
    d_rows: Tensor,
    rows: Tensor,
    targets: Tensor,
    stats: tuple[Tensor, ...],
    upstream: tuple[Any, ...],
    active: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """Write the gradients of active rows while functions are compiled; return which are left."""
    logprob, entropy, peak, log_norm = stats
    slopes = reference.row_slopes(logprob, *upstream, columns=rows.shape[2])
    of_rows = (None if slopes.entropy is None else entropy, peak, log_norm)
    left = active.clone()
    with contextlib.suppress(NotCompiled):
        for index in compiled_rows.chunks(active, rows.shape[2]):
            compiled_rows.write_gradient(d_rows, rows, index, targets, of_rows, slopes, **options)
            left[index] = False
    return left


# Of three operators, each of which writes the gradient elsewhere.
_ARGUMENTS = (
    "Tensor targets, Tensor logprob, Tensor entropy, Tensor peak, Tensor log_norm, "
    "Tensor d_logprob, Tensor? d_entropy, Tensor? token_temperature, float temperature, "
    "float? softcap, float scale, str impl, Tensor? d_lse=None, Tensor? d_mean=None"
)


@torch.library.custom_op(
    "fastrlhf::token_stats_backward", mutates_args=(),
    schema=f"(Tensor logits, {_ARGUMENTS}) -> Tensor",
)  # fmt: skip
def _backward(logits, *arguments):
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(d_logits, logits, *arguments)
    return d_logits


@_backward.register_fake
def _backward_fake(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "fastrlhf::token_stats_backward_into", mutates_args={"d_logits"},
    schema=f"(Tensor(a!) d_logits, Tensor logits, {_ARGUMENTS}) -> ()",
)  # fmt: skip
def _backward_into(d_logits, logits, *arguments):
    _write_gradient(d_logits, logits, *arguments)


@torch.library.custom_op(
    "fastrlhf::token_stats_backward_", mutates_args={"logits"},
    schema=f"(Tensor(a!) logits, {_ARGUMENTS}) -> ()",
)  # fmt: skip
def _backward_inplace(logits, *arguments):
    _write_gradient(logits, logits, *arguments)


def _setup_context(ctx, inputs, output):
    logits, targets, token_temperature, *options = inputs
    logprob, entropy, _, peak, log_norm, *_ = output
    ctx.save_for_backward(logits, targets, token_temperature, logprob, entropy, peak, log_norm)
    ctx.options, ctx.inputs = options[:7], len(inputs)
    ctx.with_mean = len(options) > 7 and "mean_logit" in options[7]
    # So that an entropy whose gradient nobody asks for costs none.
    ctx.set_materialize_grads(False)


def _autograd(ctx, d_logprob, d_entropy, d_lse, _peak, _log_norm, *d_further):
    logits, targets, token_temperature, *stats = ctx.saved_tensors
    temperature, softcap, scale, ignore_index, entropy, inplace, impl = ctx.options
    d_mean = d_further[1] if d_further and ctx.with_mean else None
    if not entropy:
        d_entropy = None
    if d_logprob is None:
        d_logprob = torch.zeros_like(stats[0])
    upstream = (d_logprob, d_entropy, d_lse, d_mean)
    if torch.is_grad_enabled() or under_transform(*upstream):
        # The gradient is itself to be differentiated (create_graph), or one of many at once
        # (is_grads_batched): take it by autograd.
        row_temperature = temperature if token_temperature is None else token_temperature
        transform = {"temperature": row_temperature, "softcap": softcap, "scale": scale}
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            found = reference.differentiable_stats(
                logits, targets, ignore_index=ignore_index, entropy=d_entropy is not None,
                with_stats=() if d_mean is None else ("mean_logit",), **transform,
            )  # fmt: skip
        outputs = (found.logprob, found.entropy, found.lse, found.mean_logit)
        given = [
            (x, d.view(targets.shape))
            for x, d in zip(outputs, upstream, strict=True)
            if x is not None and d is not None
        ]
        graded, slopes = zip(*given, strict=True)
        (d_logits,) = torch.autograd.grad(graded, logits, slopes, create_graph=again)
    else:
        arguments = (logits, targets, *stats, d_logprob, d_entropy, token_temperature)
        arguments += (temperature, softcap, scale, impl, d_lse, d_mean)
        if inplace and can_overwrite(logits):
            _backward_inplace(*arguments)
            d_logits = logits.detach()
        else:
            d_logits = _backward(*arguments)
    return d_logits, *(None for _ in range(ctx.inputs - 1))


for _operator in (_forward, _forward_with):
    _operator.register_autograd(_autograd, setup_context=_setup_context)


def flat_rows(
    logits: Tensor, targets: Tensor, token_temperature: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Logits as (outer, inner, V), targets and temperatures as contiguous (N,)."""
    targets = wide_integers(targets).reshape(-1).contiguous()
    acc = reference.accumulation_dtype(logits.dtype)
    return rows_of(logits), targets, flat_temperature(token_temperature, temperature, acc)


def rows_of(logits: Tensor) -> Tensor:
    """View logits as (outer, inner, V), copied if their strides do not allow it."""
    rows = _row_view(logits)
    return logits.contiguous().view(1, -1, logits.shape[-1]) if rows is None else rows


def _row_view(logits: Tensor) -> Tensor | None:
    """View logits as (outer, inner, V) without a copy: whole, or a slice of the positions of each
    sequence.
    """
    vocab = logits.shape[-1]
    if logits.numel() == 0:
        return logits.new_empty(1, 0, vocab)
    for shape in ((1, -1, vocab), (-1, logits.shape[-2] if logits.ndim > 1 else 1, vocab)):
        try:
            return logits.view(shape)
        except RuntimeError:  # the strides do not allow it
            continue
    return None


def can_overwrite(logits: Tensor) -> bool:
    """Whether each logit has a memory cell of its own, reachable without a copy."""
    rows = _row_view(logits)
    if rows is None:
        return False
    span = 1
    for stride, size in sorted(zip(rows.stride(), rows.shape, strict=True)):
        if size > 1 and stride < span:
            return False
        span = max(span, stride * (size - 1) + span)
    return True


def check_values_on_host(
    targets: Tensor, temperature: float | Tensor, vocab: int, ignore_index: int
) -> None:
    """Check what the tensors hold, where that costs no synchronisation."""
    per_token = temperature if isinstance(temperature, Tensor) else None
    unknown = being_traced() or is_batched(targets, per_token)
    if targets.device.type != "cpu" or unknown:
        return
    live = targets != ignore_index
    check_indices_on_host("targets", targets[live], vocab, f"or ignore_index {ignore_index}")
    check_temperatures_on_host(per_token, live)


def eager_chunks(selected: Tensor, rows: Tensor) -> Iterator[Index]:
    """Indices of the selected rows of an (outer, inner, V) view, in pieces of a bounded number of
    logits.

    A slice, which needs no copy, where every row of a single outer block is selected.
    """
    size = max(1, _EAGER_CHUNK_LOGITS // rows.shape[2])
    if rows.shape[0] == 1 and bool(selected.all()):
        yield from (slice(first, first + size) for first in range(0, len(selected), size))
    else:
        found = selected.nonzero().squeeze(1)
        yield from found.split(size) if len(found) else ()


def take_rows(rows: Tensor, index: Index) -> Tensor:
    """Take some rows of an (outer, inner, V) view: a view if they are a slice, else a copy."""
    if isinstance(index, slice):
        return rows[0, index]
    if rows.shape[0] == 1:
        # Several times faster than indexing, which does the rows one after the other.
        return rows[0].gather(0, index.unsqueeze(1).expand(-1, rows.shape[2]))
    return rows[index // rows.shape[1], index % rows.shape[1]]


def zero_inactive(rows: Tensor, active: Tensor) -> None:
    """Put zeros into the rows (N, V), or (outer, inner, V), that are not active.

    All rows are zeroed, for the active ones to be written afterwards, where the others are many
    spans, or rows have no single stride (outer > 1).
    """
    inactive = (~active).nonzero().squeeze(1)
    spans = few_spans(inactive, _FEW_SPANS)
    if spans is None or (spans and rows.ndim == 3 and rows.shape[0] > 1):
        rows.zero_()
        return
    for first, last in spans:
        rows[..., first:last, :].zero_()


def _put_rows(rows: Tensor, index: Index, values: Tensor | float) -> None:
    if isinstance(index, slice):
        rows[0, index] = values
    else:
        rows[index // rows.shape[1], index % rows.shape[1]] = values


def take(value: float | Tensor, index: Index) -> float | Tensor:
    return value[index] if isinstance(value, Tensor) else value
