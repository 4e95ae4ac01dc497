"""The graph of lazy logits, and their gradient, which is lazy too.

The logits of a call stand in PyTorch's graph where the head's output would: behind the hidden
states and the head's parameters. What is computed of them, a few numbers for each token, is made in
a graph of its own (see `source`); the gradient of these numbers passes back to the logits, through
whatever wrappers and users put between, as a `LazyGradient`: a tensor of the logits' shape that
holds nothing but what was computed and the gradients that came for it. Where the head was called it
is turned into the gradients of hidden states and weight. Somebody who reads it on the way gets the
gradient of plain logits, which are built for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from .recipe import Recipe
    from .source import Source
    from .tensor import LazyTensor

Make = Callable[[], Tensor]  # makes a lazy tensor, without a graph
# Calls of heads; weakly, since a loss that is kept keeps its graph.
Heads = frozenset["weakref.ref[Source]"]

_aten = torch.ops.aten
_ADDITIONS = {_aten.add.Tensor, _aten.add_.Tensor}
_HANDED_ON = {
    _aten.detach.default, _aten.alias.default, _aten.clone.default, _aten.view.default,
    _aten._unsafe_view.default, _aten._to_copy.default, _aten.expand.default,
}  # fmt: skip


class Computed:
    """Something that was computed in the inner graph, and what it is of plain logits.

    inner: the result, with its graph; or what makes it, of a value whose gradient costs much, and
    is seldom asked for.
    """

    def __init__(
        self, inner: Tensor | Callable[[], Tensor], heads: int,
        of_plain: Callable[[], Tensor] | None,
    ):  # fmt: skip
        self.inner: Tensor | Callable[[], Tensor] | None = inner
        self.heads = heads  # how many have to differentiate it
        self.of_plain = of_plain  # None: it is the logits themselves

    def graph(self) -> Tensor:
        """The result, with its graph, unless a backward that was said to be the last let it go."""
        inner = _still_there(self.inner)
        return inner if isinstance(inner, Tensor) else inner()

    def differentiated(self) -> None:
        """Let go of the graph, once nobody needs it any more."""
        if _is_last():
            self.heads -= 1
            if self.heads <= 0:
                self.inner = None


class Term(NamedTuple):
    """Something that was computed, the gradient that came for it, and the heads it has to reach."""

    computed: Computed
    upstream: Tensor
    heads: Heads


Terms = list[Term]


def _is_last() -> bool:
    """Whether what is kept for this backward may be let go."""
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _still_there(x: Any) -> Any:
    if x is None:
        raise RuntimeError(
            "lazy_logits: Trying to backward through the graph a second time; specify "
            "retain_graph=True if you need to backward through it twice"
        )
    return x


class LazyGradient(Tensor):
    """A gradient of logits: what was computed of them, and a gradient as it is, if any."""

    of: LazyTensor | _Gone
    terms: Terms
    rest: Tensor | None

    @staticmethod
    def __new__(
        cls, of: LazyTensor | _Gone, terms: Terms, rest: Tensor | None = None
    ) -> LazyGradient:
        made = Tensor._make_wrapper_subclass(
            cls, of.shape, dtype=of.dtype, device=of.device, storage_size=0
        )
        made.of, made.terms, made.rest = of, terms, rest
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _ADDITIONS and not kwargs and len(args) == 2:
            return _sum(*args) if func is _aten.add.Tensor else _added_to(*args)
        if func in _HANDED_ON and _keeps_form(*args, **kwargs or {}):
            return args[0]
        if args and isinstance(args[0], LazyGradient) and func._schema.is_mutable:
            raise RuntimeError(
                "lazy_logits: the gradient of logits that were not built is written into "
                f"({func}); change a copy of it"
            )
        with enable_reentrant_dispatch():
            args, kwargs = tree_map(dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyGradient(of {tuple(self.shape)})"


def _keeps_form(x: Tensor, shape: Any = None, *, dtype: Any = None, **_: Any) -> bool:
    return (shape is None or tuple(shape) == tuple(x.shape)) and dtype in (None, x.dtype)


def _sum(a: Any, b: Any) -> Tensor:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape):
        with enable_reentrant_dispatch():
            return dense(a) + dense(b)
    of = next(x.of for x in (a, b) if isinstance(x, LazyGradient))
    rests = [x.rest if isinstance(x, LazyGradient) else x for x in (a, b)]
    there = [x for x in rests if x is not None]
    terms = [term for x in (a, b) if isinstance(x, LazyGradient) for term in x.terms]
    return LazyGradient(of, terms, sum(there[1:], there[0]) if there else None)


def _added_to(a: Tensor, b: Any) -> Tensor:
    if not isinstance(a, LazyGradient):
        with enable_reentrant_dispatch():
            return a.add_(dense(b))
    total = _sum(a, b)
    a.terms, a.rest = _parted(total)
    return a


def _parted(gradient: Tensor) -> tuple[Terms, Tensor | None]:
    """What was computed, and a gradient as it is."""
    if isinstance(gradient, LazyGradient):
        return gradient.terms, gradient.rest
    return [], gradient


def dense(gradient: Any, of: LazyTensor | None = None) -> Any:
    """The gradient of plain logits, from one that is lazy; anything else as it is."""
    if not isinstance(gradient, LazyGradient):
        return gradient
    total = gradient.rest
    with torch.enable_grad():
        plain = (gradient.of if of is None else of).plain()  # built, if it was not
        for computed, upstream, _ in gradient.terms:
            part = upstream
            if computed.of_plain is not None:
                of_plain = computed.of_plain()
                with _unwatched(plain):
                    (part,) = torch.autograd.grad(of_plain, plain, upstream, retain_graph=True)
            total = part if total is None else total + part
    return torch.zeros_like(plain) if total is None else total


@contextmanager
def _unwatched(plain: Tensor) -> Iterator[None]:
    """Keep hooks and retain_grad from what is no gradient of the loss."""
    hooks: Any = plain._backward_hooks or {}
    waiting, kept = dict(hooks), plain.grad if plain.retains_grad else None
    hooks.clear()
    try:
        yield
    finally:
        hooks.update(waiting)
        if plain.retains_grad:
            plain.grad = kept


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
        if _is_last():
            ctx.source = None
        if torch.is_grad_enabled():
            found = source.differentiable_gradients(hidden, parameters, gradient)
        else:
            found = source.gradients(*_parted(gradient))
        return None, None, *found


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
        if _is_last():  # for somebody may keep the loss
            ctx.recipe, ctx.parents = None, [_Gone(x, x.heads) for x in parents]
        if gradient is None:
            return None, None, *(None for _ in wanted)
        terms, rest = _parted(gradient)
        rests: list[Tensor | None] = [None] * len(parents)
        if rest is not None:
            rests = _of_parents(_still_there(recipe).on_plain, rest, parents, wanted)
        return None, None, *_shared_out(terms, rests, parents, wanted)


class Used(torch.autograd.Function):
    """Numbers that were computed of tensors over the vocabulary."""

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
        computed, parents = _still_there(ctx.computed), ctx.parents
        if _is_last():
            ctx.computed, ctx.parents = None, ()
        if torch.is_grad_enabled():
            return None, None, *_of_parents(computed.of_plain, gradient, parents, wanted)
        term = Term(computed, gradient, heads_of(parents))
        return None, None, *_shared_out([term], [None] * len(parents), parents, wanted)


class Built(torch.autograd.Function):
    """The logits, once they are made after all; or another lazy tensor, in whose place in the graph
    others have a part.
    """

    @staticmethod
    def forward(
        ctx: Any, computed: Computed | None, inner: Tensor, logits: weakref.ref[LazyTensor],
        at: Tensor,
    ) -> Tensor:  # fmt: skip
        # Weakly, since they hold what is returned.
        ctx.computed, ctx.logits = computed, logits
        lazy = logits()
        ctx.heads = frozenset() if lazy is None else lazy.heads
        # Shares what it holds, and is no view, which could not be written into.
        return torch.empty_like(inner[:0]).set_(
            inner.untyped_storage(), inner.storage_offset(), inner.shape, inner.stride()
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if torch.is_grad_enabled() or ctx.computed is None:
            return None, None, None, gradient
        logits = ctx.logits()
        if logits is None:
            logits = _Gone(gradient)
        term = Term(ctx.computed, gradient, ctx.heads)
        return None, None, None, LazyGradient(logits, [term])


def is_built(plain: Tensor) -> bool:
    """Whether a tensor stands in the graph as what was built of a lazy one, and unchanged."""
    return isinstance(plain.grad_fn, Built._backward_cls)


class _Gone:
    """In the place of a lazy tensor that nobody holds any more, or that was something else."""

    def __init__(self, like: Tensor, heads: Heads = frozenset()):
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self.heads = heads

    def plain(self) -> Tensor:
        raise RuntimeError(
            "lazy_logits: the gradient of logits is read that were written into (logits /= T), or "
            "of a graph that was let go; divide without writing, or specify retain_graph=True"
        )


class Passed(torch.autograd.Function):
    """A place in the graph, to be found again after another has been given to a tensor."""

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
        terms, rest = _parted(gradient)
        if rest is not None:
            rest = ctx.func(rest.clone(), *ctx.by)
        if not terms:
            return rest, None, None
        return LazyGradient(_Gone(gradient), terms, rest), None, None


class Replaced(torch.autograd.Function):
    """A tensor over the vocabulary that was written into is what was written."""

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
    """Whether a lazy tensor hangs on its plain one in the graph, which was written into."""
    return isinstance(lazy.grad_fn, Replaced._backward_cls)


def _of_parents(
    of_plain: Callable[[], Tensor],
    gradient: Tensor | None,
    parents: Sequence[LazyTensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of parents by what plain ones would have been turned into."""
    if gradient is None:
        return [None] * len(parents)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [x.plain() for x, wants in zip(parents, wanted, strict=True) if wants]
        found = torch.autograd.grad(
            of_plain(), inputs, gradient, create_graph=again, allow_unused=True
        )
    rest = iter(found)
    return [next(rest) if wants else None for wants in wanted]


def heads_of(tensors: Sequence[LazyTensor]) -> Heads:
    """The heads that gradients of lazy tensors reach."""
    none: Heads = frozenset()
    with torch._C.DisableTorchFunctionSubclass():  # which takes longer than the rest
        return none.union(*(x.heads for x in tensors if x.requires_grad))


def _shared_out(
    terms: Terms,
    rests: Sequence[Tensor | None],
    parents: Sequence[LazyTensor | _Gone],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of parents: what was computed goes once to each head, by whichever parent."""
    found: list[Tensor | None] = []
    for parent, rest, wants in zip(parents, rests, wanted, strict=True):
        if not wants:
            found.append(None)
            continue
        its = [x._replace(heads=x.heads & parent.heads) for x in terms if x.heads & parent.heads]
        terms = [x._replace(heads=x.heads - parent.heads) for x in terms]
        found.append(LazyGradient(parent, its, rest) if its else rest)
    return found
