"""Exact divergences of two distributions over the vocabulary, from logits.

Forward and backward are operators that view both sides as rows (`rows`) and call the launcher of a
backend: of `kernels/divergence.py`, `compiled_divergence` or `eager_divergence`. Where ranks share
the vocabulary, `divergence_over_ranks` takes over; from hidden states, `linear_divergence` comes
here with a block of logits at a time.

Dims: N rows, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf import reference

from . import compiled_divergence, eager_divergence
from .backend import backend_of, check_impl, outside_of_graphs, under_transform
from .checks import (
    check_between,
    check_floating,
    check_one_of,
    check_same_device,
    check_shape,
)
from .eager_divergence import no_divergence, wider
from .logits_arguments import check_logits, checked_rows
from .ranks import Group
from .rows import rows_of
from .sharded import logits_part, same_part
from .transform import (
    TRANSFORM,
    Transform,
    check_temperatures_on_host,
    checked_transform,
    flat_temperature,
)

DIRECTIONS = ("reverse", "forward", "jsd")


class Measure(NamedTuple):
    """A divergence of π and ref as one of p and q."""

    swapped: bool  # p is ref
    share: float | None  # of q in a mixture; None: KL(p‖q)


def checked_measure(direction: str, beta: float) -> Measure:
    """Read a direction and the weight of the reference in the mixture of a JSD.

    Raises:
        TypeError, ValueError: an unknown direction, a beta outside of [0, 1].
    """
    check_one_of("direction", direction, DIRECTIONS)
    beta = check_between("beta", beta, 0, 1)
    if direction == "jsd" and 0 < beta < 1:
        return Measure(swapped=False, share=beta)
    forward = direction == "forward" or (direction == "jsd" and beta == 0)
    return Measure(swapped=forward, share=None)


def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    direction: str = "reverse",
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    beta: float = 0.5,
    softcap: float | None = None,
    scale: float = 1.0,
    impl: str = "auto",
    group: Group | None = None,
) -> Tensor:
    """Compute the divergence of two distributions over the whole vocabulary, token by token.

    Eager equivalent, with log_p and log_q the log-softmax of logits and ref_logits / temperature::

        reverse, KL(π‖ref): (log_p.exp() * (log_p - log_q)).sum(-1)
        forward, KL(ref‖π): (log_q.exp() * (log_q - log_p)).sum(-1)
        jsd: beta * KL(ref‖m) + (1 - beta) * KL(π‖m), m = beta * q + (1 - beta) * p

    Args:
        logits: (..., V) of the policy π, bf16, fp16, fp32 or fp64, any strides.
        ref_logits: (..., V) of the reference, floating, of any dtype.
        direction: "reverse", "forward" or "jsd", see above.
        mask: (...) bool or 0/1; where it is 0 nothing is read, and value and gradient are 0. None:
            everything counts.
        temperature: of both sides, a positive number, or a tensor of one for each token or
            sequence, as that of `token_stats`.
        beta: weight of the reference in the mixture of the jsd. 0 and 1 stand for the forward and
            the reverse KL, in the direction of which the jsd then leads.
        softcap, scale: of the logits of both sides, as `token_stats`.
        impl: as `token_stats`.
        group: as `token_stats`; both sides are cut alike. DTensors need none.

    Returns:
        (...) in nats, fp32 (fp64 if a side is). -inf logits have probability 0: KL(p‖q) is inf
        where q is 0 and p is not, and terms where p is 0 are 0. (A probability that is 0 in the
        dtype of the result counts as 0.) A row of nothing but -inf has no distribution: where p is
        one, or for the jsd either side, the value is 0; the gradient is 0 where either side is one.

    Differentiable with respect to logits and ref_logits, twice if need be (the second derivative
    runs eagerly and builds tensors of the size of the logits). Under `torch.func` (grad, vmap, jvp,
    ...) and forward-mode differentiation, all of it runs so.

    Of two nearly equal distributions too, the value has few wrong places, and none is negative:
    each token adds q - p + p·ln(p/q), not p·ln(p/q), whose sum would cancel.

    The kernel reads both logits twice forward, the second time from the cache as far as the rows in
    flight fit there, and once for each side that needs a gradient, which is all that is allocated.

    Where ranks share the vocabulary, values are in the same bits on every rank, and gradients those
    of this rank's columns. Two all-gathers bring 28 bytes a token from each rank (32 for the jsd,
    twice that in fp64), after one as `token_stats` has; backward sends nothing. The second
    derivative and `torch.func` are refused.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; an option out of range.

    Source: the jsd 2306.13649 Eq. 1 (GKD).

    Example:
        >>> logits, ref_logits = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
        >>> fastrlhf.kl_divergence(logits, ref_logits)
        tensor([0.3642])
        >>> fastrlhf.kl_divergence(logits, ref_logits, direction="jsd", beta=0.5)
        tensor([0.0874])
    """
    own = logits_part(logits, group)
    logits, ref_logits = own.logits, same_part("ref_logits", ref_logits, own.part)
    shared = own.group is not None
    check_floating("logits", logits)
    check_floating("ref_logits", ref_logits)
    check_logits(logits, may_be_empty=shared)
    check_shape("ref_logits", ref_logits, tuple(logits.shape), "the shape of logits")
    check_same_device("ref_logits", ref_logits, "logits", logits)
    mask = checked_rows(mask, logits, "logits")
    transform = checked_transform(temperature, softcap, scale, mask)
    measure = checked_measure(direction, beta)
    check_impl(impl)
    if shared:
        from .divergence_over_ranks import kl_divergence_over_ranks  # which imports this module

        return outside_of_graphs(kl_divergence_over_ranks)(
            own, ref_logits, mask, transform, measure, impl
        )
    if under_transform():
        return definition(logits, ref_logits, mask, transform, measure)
    sides = (ref_logits, logits) if measure.swapped else (logits, ref_logits)
    values, _ = _forward(*sides, mask, *transform, measure.share, impl)
    return values.view(mask.shape)


def definition(
    logits: Tensor, ref_logits: Tensor, mask: Tensor, transform: Transform, measure: Measure
) -> Tensor:
    """Compute the divergence by what torch.func can differentiate and batch."""
    check_temperatures_on_host(transform.token_temperature, mask)
    sides = (ref_logits, logits) if measure.swapped else (logits, ref_logits)
    return reference.divergence(
        *sides, mask, share=measure.share, temperature=transform.of_rows,
        softcap=transform.softcap, scale=transform.scale,
    )  # fmt: skip


class _Launchers(NamedTuple):
    """Who does the row work, whatever the backend: of logits (outer, inner, V), and a mask (N,)."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., None]


def _launchers(backend: str) -> _Launchers:
    """Choose the backend."""
    if backend == "triton":
        from fastrlhf.kernels.divergence import divergence_backward, divergence_forward

        return _Launchers(divergence_forward, divergence_backward)
    row_work = compiled_divergence if backend == "compiled" else eager_divergence
    return _Launchers(row_work.divergence_forward, row_work.divergence_backward)


class _Inputs(NamedTuple):
    """What the forward operator is given, in the order of its schema."""

    logits_p: Tensor
    logits_q: Tensor
    mask: Tensor
    token_temperature: Tensor | None
    temperature: float
    softcap: float | None
    scale: float
    share: float | None
    impl: str

    @property
    def transform(self) -> Transform:
        return Transform(self.token_temperature, self.temperature, self.softcap, self.scale)


@torch.library.custom_op(
    "fastrlhf::divergence", mutates_args=(),
    schema=f"(Tensor logits_p, Tensor logits_q, Tensor mask, {TRANSFORM}, float? share, str impl) "
    "-> (Tensor, Tensor)",
)  # fmt: skip
def _forward(*inputs):
    given = _Inputs(*inputs)
    logits_p, logits_q, mask = given[:3]
    backend = backend_of(given.impl, logits_p, logits_p.numel())
    check_temperatures_on_host(given.token_temperature, mask)
    if mask.numel() == 0:
        return no_divergence(logits_p, logits_q, mask)
    temperature = flat_temperature(
        given.token_temperature, given.temperature, wider(logits_p, logits_q)
    )
    return _launchers(backend).forward(
        rows_of(logits_p), rows_of(logits_q), mask.reshape(-1).contiguous(), share=given.share,
        temperature=temperature, softcap=given.softcap, scale=given.scale,
    )  # fmt: skip


@_forward.register_fake
def _forward_fake(*inputs):
    given = _Inputs(*inputs)
    values = torch.empty(
        given.mask.numel(), dtype=wider(given.logits_p, given.logits_q), device=given.mask.device
    )
    return values, values.new_empty(len(reference.DivergenceStats._fields), given.mask.numel())


class _Side(NamedTuple):
    """What the backward operator is given after the statistics, in the order of its schema."""

    d_values: Tensor
    token_temperature: Tensor | None
    temperature: float
    softcap: float | None
    scale: float
    share: float | None
    of_p: bool  # the gradient is that of p
    impl: str
    dtype: torch.dtype | None = None  # of the gradient; None: that of the side

    def room(self, logits_p: Tensor, logits_q: Tensor) -> Tensor:
        own = logits_p if self.of_p else logits_q
        return torch.empty(own.shape, dtype=self.dtype or own.dtype, device=own.device)


@torch.library.custom_op(
    "fastrlhf::divergence_backward", mutates_args=(),
    schema="(Tensor logits_p, Tensor logits_q, Tensor mask, Tensor stats, Tensor d_values, "
    f"{TRANSFORM}, float? share, bool of_p, str impl, ScalarType? dtype=None) -> Tensor",
)  # fmt: skip
def _backward(logits_p, logits_q, mask, stats, *side):
    asked = _Side(*side)
    d_own = asked.room(logits_p, logits_q)
    divergence_backward_into(
        d_own, logits_p, logits_q, mask, stats, asked.d_values, Transform(*asked[1:5]),
        asked.share, asked.of_p, asked.impl,
    )  # fmt: skip
    return d_own


@_backward.register_fake
def _backward_fake(logits_p, logits_q, mask, stats, *side):
    return _Side(*side).room(logits_p, logits_q)


def divergence_backward_into(
    d_own: Tensor,
    logits_p: Tensor,
    logits_q: Tensor,
    mask: Tensor,
    stats: Tensor,
    d_values: Tensor,
    transform: Transform,
    share: float | None,
    of_p: bool,
    impl: str,
) -> None:
    """Write the gradient with respect to one side into d_own (..., V), whose rows can start
    anywhere, from the statistics (6, N) of the forward operator.
    """
    if d_own.numel() == 0:
        return
    own, other = (logits_p, logits_q) if of_p else (logits_q, logits_p)
    temperature = flat_temperature(
        transform.token_temperature, transform.temperature, d_values.dtype
    )
    _launchers(backend_of(impl, own, own.numel())).backward(
        d_own.view(-1, d_own.shape[-1]), rows_of(own), rows_of(other),
        mask.reshape(-1).contiguous(), stats, d_values, of_p=of_p, share=share,
        temperature=temperature, softcap=transform.softcap, scale=transform.scale,
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    given = _Inputs(*inputs)
    ctx.save_for_backward(
        given.logits_p, given.logits_q, given.mask, given.token_temperature, output[1]
    )
    ctx.options = given.temperature, given.softcap, given.scale, given.share, given.impl


def _autograd(ctx, d_values, _):
    logits_p, logits_q, mask, token_temperature, stats = ctx.saved_tensors
    temperature, softcap, scale, share, impl = ctx.options
    wanted = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled() or under_transform(d_values):
        # The gradient is itself to be differentiated (create_graph), or one of many at once
        # (is_grads_batched): take it by autograd, with respect to views, so that a path from one
        # side to the other is not walked here.
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            sides = logits_p.view_as(logits_p), logits_q.view_as(logits_q)
            value = reference.divergence(
                sides[0], sides[1], mask, share=share, softcap=softcap, scale=scale,
                temperature=temperature if token_temperature is None else token_temperature,
            )  # fmt: skip
        inputs = [x for x, want in zip(sides, wanted, strict=True) if want]
        upstream = d_values.view(value.shape)
        graded = iter(torch.autograd.grad(value, inputs, upstream, create_graph=again))
        gradients = [next(graded) if want else None for want in wanted]
    else:
        transform = (token_temperature, temperature, softcap, scale)
        gradients = [
            _backward(logits_p, logits_q, mask, stats, d_values, *transform, share, of_p, impl)
            if want
            else None
            for want, of_p in zip(wanted, (True, False), strict=True)
        ]
    return *gradients, *(None,) * (len(_Inputs._fields) - 2)


_forward.register_autograd(_autograd, setup_context=_setup_context)
