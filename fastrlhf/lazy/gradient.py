"""The gradient of lazy logits, which is lazy too.

It is a tensor of the logits' shape without numbers. It refers to what was computed of the logits in
the inner graph (see `source`), and to the gradients that came for that. When it arrives where the
head was called, it is turned into the gradients of hidden states and weight (`Source.gradients`).
Code that reads it on the way gets the gradient of plain logits, which are built for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from .source import Source
    from .tensor import LazyTensor

# Calls of heads. The references are weak, since a loss that somebody keeps also keeps its graph,
# which would keep what entered the heads.
Heads = frozenset["weakref.ref[Source]"]

_aten = torch.ops.aten
_ADDITIONS = {_aten.add.Tensor, _aten.add_.Tensor}
_HANDED_ON = {
    _aten.detach.default, _aten.alias.default, _aten.clone.default, _aten.view.default,
    _aten._unsafe_view.default, _aten._to_copy.default, _aten.expand.default,
}  # fmt: skip


class Computed:
    """Something that was computed in the inner graph, and how plain logits would give the same.

    inner: the result, with its graph; or a function that makes it, for a value whose gradient costs
    much, and is seldom asked for.
    """

    def __init__(
        self, inner: Tensor | Callable[[], Tensor], heads: int,
        of_plain: Callable[[], Tensor] | None,
    ):  # fmt: skip
        self.inner: Tensor | Callable[[], Tensor] | None = inner
        self.heads = heads  # how many heads have yet to differentiate it
        self.of_plain = of_plain  # computes it from plain logits; None: it is the logits themselves

    def graph(self) -> Tensor:
        """The result, with its graph; an error if a backward without retain_graph released it."""
        inner = still_there(self.inner)
        return inner if isinstance(inner, Tensor) else inner()

    def differentiated(self) -> None:
        """Let go of the graph, once nobody needs it any more."""
        if is_last():
            self.heads -= 1
            if self.heads <= 0:
                self.inner = None


class Term(NamedTuple):
    """Something that was computed, the gradient that came for it, and the heads it has to reach."""

    computed: Computed
    upstream: Tensor
    heads: Heads


Terms = list[Term]


def is_last() -> bool:
    """Whether this backward is without retain_graph, so that what is kept for it is released."""
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def still_there(x: Any) -> Any:
    if x is None:
        raise RuntimeError(
            "lazy_logits: Trying to backward through the graph a second time; specify "
            "retain_graph=True if you need to backward through it twice"
        )
    return x


class LazyGradient(Tensor):
    """A gradient of logits: the sum of its terms and, if there is one, of a plain gradient `rest`.

    of: the lazy tensor that it is the gradient of.
    """

    of: LazyTensor | Gone
    terms: Terms
    rest: Tensor | None

    @staticmethod
    def __new__(
        cls, of: LazyTensor | Gone, terms: Terms, rest: Tensor | None = None
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
    a.terms, a.rest = parted(total)
    return a


def parted(gradient: Tensor) -> tuple[Terms, Tensor | None]:
    """The terms of a gradient, and its plain rest."""
    if isinstance(gradient, LazyGradient):
        return gradient.terms, gradient.rest
    return [], gradient


def dense(gradient: Any, of: LazyTensor | None = None) -> Any:
    """Turn a lazy gradient into that of plain logits; return anything else as it is."""
    if not isinstance(gradient, LazyGradient):
        return gradient
    total = gradient.rest
    with torch.enable_grad():
        lazy = gradient.of if of is None else of
        plain = lazy.plain()  # built, if it was not
        at: Any = lazy if lazy.is_leaf else plain  # a leaf may have several plain tensors
        for computed, upstream, _ in gradient.terms:
            part = upstream
            if computed.of_plain is not None:
                of_plain = computed.of_plain()
                with _unwatched(at), torch._C.DisableTorchFunctionSubclass():
                    (part,) = torch.autograd.grad(of_plain, at, upstream, retain_graph=True)
            total = part if total is None else total + part
    return torch.zeros_like(plain) if total is None else total


@contextmanager
def _unwatched(plain: Tensor) -> Iterator[None]:
    """Keep hooks and retain_grad from seeing a gradient that is not that of the loss."""
    hooks: Any = plain._backward_hooks or {}
    waiting, kept = dict(hooks), plain.grad if plain.retains_grad else None
    hooks.clear()
    try:
        yield
    finally:
        hooks.update(waiting)
        if plain.retains_grad:
            plain.grad = kept


class Gone:
    """Stands for a lazy tensor that nobody holds any more, or that was written into since."""

    def __init__(self, like: Tensor, heads: Heads = frozenset()):
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self.heads, self.is_leaf = heads, False

    def stops(self) -> frozenset[int]:
        return frozenset()

    def plain(self) -> Tensor:
        raise RuntimeError(
            "lazy_logits: the gradient of logits is read that were written into (logits /= T), or "
            "of a graph that was let go; divide without writing, or specify retain_graph=True"
        )
