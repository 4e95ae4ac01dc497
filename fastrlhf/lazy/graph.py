"""The graph of lazy logits.

The logits of a call stand in PyTorch's graph where the head's output would: behind the hidden
states and the head's parameters. What is computed of them, a few numbers for each token, is
computed in a graph of its own (see `source`). In PyTorch's graph, the gradient of these numbers
passes back to the logits as a `LazyGradient` (see `gradient`), through whatever wrappers and users
put between. The functions below are the nodes of that graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .gradient import (
    Computed,
    Gone,
    Heads,
    LazyGradient,
    Term,
    Terms,
    dense,
    is_last,
    parted,
    still_there,
)

if TYPE_CHECKING:
    from .recipe import Recipe
    from .source import Source
    from .tensor import LazyTensor

Make = Callable[[], Tensor]  # makes a lazy tensor, without a graph


class Head(torch.autograd.Function):
    """The call of a head: from hidden states and parameters to logits that are not made."""

    @staticmethod
    def forward(ctx: Any, source: Source, make: Make, hidden: Tensor, *parameters: Tensor) -> Any:
        ctx.source = source
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, *parameters)
        return make()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if gradient is None:
            return None, None, *(None for _ in ctx.needs_input_grad[2:])
        hidden, *parameters = ctx.saved_tensors
        source: Source = ctx.source
        if is_last():
            ctx.source = None
        if torch.is_grad_enabled():
            gradients = source.differentiable_gradients(hidden, parameters, gradient)
        else:
            gradients = source.gradients(*parted(gradient))
        return None, None, *gradients


class Derived(torch.autograd.Function):
    """A tensor over the vocabulary, made of others by a call of a function of PyTorch."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, make: Make, *parents: LazyTensor) -> Any:
        ctx.recipe, ctx.parents = recipe, parents
        ctx.set_materialize_grads(False)
        return make()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        wanted, recipe, parents = ctx.needs_input_grad[2:], ctx.recipe, ctx.parents
        if is_last():  # release these, for somebody may keep the loss, and so this graph
            ctx.recipe, ctx.parents = None, [Gone(x, x.heads) for x in parents]
        if gradient is None:
            return None, None, *(None for _ in wanted)
        # A gradient of computed numbers goes back by one parent alone. Where the gradients of the
        # parents stop at different tensors on the way (see `LazyTensor.stops`), each parent needs a
        # plain gradient of its own.
        if len({x.stops() for x, wants in zip(parents, wanted, strict=True) if wants}) > 1:
            gradient = dense(gradient)  # else it would all go by the first
        terms, rest = parted(gradient)
        rests: list[Tensor | None] = [None] * len(parents)
        if rest is not None:
            rests = _of_parents(still_there(recipe).on_plain, rest, parents, wanted)
        return None, None, *_shared_out(terms, rests, parents, wanted)


class Used(torch.autograd.Function):
    """A few numbers for each token that were computed of tensors over the vocabulary."""

    @staticmethod
    def forward(ctx: Any, computed: Computed, value: Tensor, *parents: LazyTensor) -> Tensor:
        ctx.computed, ctx.parents = computed, parents
        ctx.set_materialize_grads(False)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        wanted = ctx.needs_input_grad[2:]
        if gradient is None:
            return None, None, *(None for _ in wanted)
        computed, parents = still_there(ctx.computed), ctx.parents
        if is_last():
            ctx.computed, ctx.parents = None, ()
        if torch.is_grad_enabled():
            return None, None, *_of_parents(computed.of_plain, gradient, parents, wanted)
        term = Term(computed, gradient, heads_of(parents))
        return None, None, *_shared_out([term], [None] * len(parents), parents, wanted)


class Built(torch.autograd.Function):
    """The logits, once they are built; or a tensor made from them, once built, if other code has a
    part in its place in the graph: a hook, a torch.autograd.Function, or a leaf.
    """

    @staticmethod
    def forward(
        ctx: Any, computed: Computed | None, inner: Tensor, logits: weakref.ref[LazyTensor],
        at: Tensor,
    ) -> Tensor:  # fmt: skip
        # A weak reference, since the lazy tensor holds what is returned.
        ctx.computed, ctx.logits = computed, logits
        lazy = logits()
        ctx.heads = frozenset() if lazy is None else lazy.heads
        # A tensor on the same memory. It is no view, since PyTorch would not let users write into a
        # view that is made here.
        return torch.empty_like(inner[:0]).set_(
            inner.untyped_storage(), inner.storage_offset(), inner.shape, inner.stride()
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if torch.is_grad_enabled() or ctx.computed is None:
            return None, None, None, gradient
        logits = ctx.logits()
        if logits is None:
            logits = Gone(gradient)
        term = Term(ctx.computed, gradient, ctx.heads)
        return None, None, None, LazyGradient(logits, [term])


def is_built(plain: Tensor) -> bool:
    """Whether a tensor stands in the graph as what was built of a lazy one, and unchanged."""
    return isinstance(plain.grad_fn, Built._backward_cls)


class Passed(torch.autograd.Function):
    """Keeps the place of a lazy tensor in the graph, to be found after a write gave it another."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyTensor) -> Tensor:
        return torch.empty((), dtype=lazy.dtype, device=lazy.device).expand(lazy.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Scaled(torch.autograd.Function):
    """Logits that were multiplied or divided in place."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyTensor, func: Callable[..., Tensor], by: Any) -> Any:
        ctx.mark_dirty(lazy)
        ctx.func, ctx.by = func, by
        ctx.set_materialize_grads(False)
        return lazy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if gradient is None:
            return None, None, None
        terms, rest = parted(gradient)
        if rest is not None:
            rest = ctx.func(rest.clone(), *ctx.by)
        if not terms:
            return rest, None, None
        return LazyGradient(Gone(gradient), terms, rest), None, None


class Replaced(torch.autograd.Function):
    """Puts a lazy tensor that was written into behind the plain tensor with what was written."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyTensor, plain: Tensor) -> Any:
        ctx.mark_dirty(lazy)
        return lazy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, dense(gradient)


def is_scaled(lazy: LazyTensor) -> bool:
    """Whether a lazy tensor was multiplied or divided in place."""
    return isinstance(lazy.grad_fn, Scaled._backward_cls)


def is_replaced(lazy: LazyTensor) -> bool:
    """Whether a lazy tensor stands behind its plain one in the graph, which was written into."""
    return isinstance(lazy.grad_fn, Replaced._backward_cls)


def _of_parents(
    of_plain: Callable[[], Tensor],
    gradient: Tensor | None,
    parents: Sequence[LazyTensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of parents, from the same call on their plain tensors."""
    if gradient is None:
        return [None] * len(parents)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [x.plain() for x, wants in zip(parents, wanted, strict=True) if wants]
        gradients = torch.autograd.grad(
            of_plain(), inputs, gradient, create_graph=again, allow_unused=True
        )
    rest = iter(gradients)
    return [next(rest) if wants else None for wants in wanted]


def heads_of(tensors: Sequence[LazyTensor]) -> Heads:
    """The heads that gradients of lazy tensors reach."""
    none: Heads = frozenset()
    with torch._C.DisableTorchFunctionSubclass():  # that dispatch takes longer than the rest
        return none.union(*(x.heads for x in tensors if x.requires_grad))


def _shared_out(
    terms: Terms,
    rests: Sequence[Tensor | None],
    parents: Sequence[LazyTensor | Gone],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of parents: each term goes once to each head, by the first parent that leads
    there.
    """
    gradients: list[Tensor | None] = []
    for parent, rest, wants in zip(parents, rests, wanted, strict=True):
        if not wants:
            gradients.append(None)
            continue
        its = [x._replace(heads=x.heads & parent.heads) for x in terms if x.heads & parent.heads]
        terms = [x._replace(heads=x.heads - parent.heads) for x in terms]
        gradient = LazyGradient(parent, its, rest) if its else rest
        # A leaf keeps its gradient, and a lazy gradient would hold the leaf.
        gradients.append(dense(gradient) if parent.is_leaf else gradient)
    return gradients
