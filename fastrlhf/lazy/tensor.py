"""The lazy tensor: it stands for logits, or for a tensor made from them, and holds no numbers.

Every function of PyTorch that is given a lazy tensor arrives at `__torch_function__`. A known
function (see `functions`) makes another lazy tensor, or computes its result from what entered the
head. For any other function, the logits are built, once, and from then on all tensors that were
made from them are the plain ones that they would have been.

Functions below that level (`__torch_dispatch__`: within a torch.autograd.Function, or a
collective), whose graph PyTorch's own autograd makes, get built logits too.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_leaves

from .building import call_with_plain, note_of_building
from .gradient import Computed, Heads
from .graph import (
    Built,
    Derived,
    Head,
    Passed,
    Scaled,
    Used,
    heads_of,
    is_built,
)
from .meaning import Kind, Words
from .recipe import History, Recipe, plain
from .report import Cost, name_of, note_fused
from .source import Source

_aten = torch.ops.aten
_HANDED_ON = {_aten.detach.default, _aten.alias.default}


class LazyTensor(Tensor):
    """Numbers for each word of a vocabulary that are computed once somebody asks for them."""

    words: Words | None  # what the numbers mean; None: only the recipe tells
    vocab_dim: int  # where the vocabulary is, counted from the end
    recipe: Recipe | None  # the call that made it; None: a head did, these are its logits
    history: History
    sources: frozenset[Source]
    _heads: Heads
    memory: object  # the same for tensors that would share their memory
    is_watched: bool  # whether a hook or retain_grad looks at its gradient
    _before: Tensor | None  # keeps its place in the graph from before it was written into
    _node: Any  # its place in the graph (grad_fn) when it was built
    _plain: Tensor | None  # once built; that of a leaf has no graph, which would hold the leaf
    _led: weakref.ref[Tensor] | None  # a leaf's plain tensor with a graph, while somebody holds it

    @staticmethod
    def __new__(
        cls,
        words: Words | None,
        recipe: Recipe | None,
        history: History,
        sources: frozenset[Source],
        heads: Heads,
        *,
        like: Tensor,
        vocab_dim: int = -1,
    ) -> LazyTensor:
        """`like`: a tensor on the meta device that has its shape, strides and dtype."""
        (device,) = {source.device for source in sources}
        made = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device, storage_size=0
        )
        made.words, made.recipe, made.history = words, recipe, history
        made.sources, made._heads = sources, heads
        made.vocab_dim, made.memory, made._plain = vocab_dim, object(), None
        made.is_watched, made._before, made._node, made._led = False, None, None, None
        return made

    def plain(self) -> Tensor:
        """The plain tensor that this one stands for; it is built if it was not yet."""
        if self._plain is None:
            self.history.make_all()
        elif self.grad_fn is not self._node:
            raise RuntimeError(
                "lazy_logits: a torch.autograd.Function writes into logits (mark_dirty); leave "
                "lazy_logits"
            )
        assert self._plain is not None
        return self._leading_here() if self._is_end else self._plain

    @property
    def is_built(self) -> bool:
        return self._plain is not None

    @property
    def heads(self) -> Heads:
        """The calls of heads that its gradient reaches; of a leaf, where the gradient ends, those
        that it would reach otherwise.
        """
        return frozenset(map(weakref.ref, self.sources)) if self._is_end else self._heads

    @property
    def _is_end(self) -> bool:
        """Whether it is a leaf that requires a gradient, which ends here and is kept."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.requires_grad and self.is_leaf

    def meaning(self) -> Words | None:
        """Return the meaning of these numbers, and which have a gradient; None if only the recipe
        tells.
        """
        if self.words is None or not self.requires_grad:
            return self.words and self.words.constant()
        if not any(source.requires_grad for source in self.sources):
            return None  # requires_grad_() made it a leaf
        if self.is_of_others and not self._is_as_its_parent():
            return None
        if len(self.words.of) > 1:
            return self.words
        return self.words._replace(of=(self.words.first.with_gradient(True),))

    @property
    def is_of_others(self) -> bool:
        """Whether other code gave it its place in the graph: a torch.autograd.Function returned it,
        or it was made a leaf.
        """
        return self.requires_grad and self.recipe is not None and not self.recipe.grad

    def _is_as_its_parent(self) -> bool:
        """Whether that other code passed the numbers on as they were, and so may pass on their
        gradient too.
        """
        assert self.recipe is not None
        parent = self.recipe.args[0]
        if self.words is None or parent.words is None or self.shape != parent.shape:
            return False
        return self.dtype == parent.dtype and self.words.same_as(parent.words)

    def stops(self) -> frozenset[int]:
        """The tensors, by id, at which its gradient, on the way to the logits, is looked at, may be
        changed by other code, or ends.
        """
        if self.recipe is None:
            return frozenset()
        own = frozenset({id(self)} if self.is_watched or self.is_of_others else ())
        if self.is_leaf:
            return own
        parents = lazy_tensors((self.recipe.args, self.recipe.kwargs))
        return own.union(*(x.stops() for x in parents if x.requires_grad))

    @property
    def is_under_plain(self) -> bool:
        """Whether gradients of the plain tensor pass through this one."""
        return self._plain is not None and (self._is_end or is_built(self._plain))

    def make_plain(self) -> None:
        """Make the plain tensor; those that it is made from have been made before."""
        if self._plain is not None:
            return
        self._node = self.grad_fn
        if self.recipe is not None:
            self._plain = self.recipe.on_plain()
            if self._is_end:
                self._plain = self._plain.detach()
            elif self.requires_grad and (self.is_of_others or self.is_watched):
                self.lead_here()
            return
        at, of = self if self._before is None else self._before, weakref.ref(self)
        (source,) = self.sources
        with source.at_work(differentiable=True):
            inner = source.logits()
        if self._is_end:
            self._plain = inner.detach()
            return
        with torch.set_grad_enabled(self.requires_grad):
            computed = Computed(inner, 1, None) if source.requires_grad else None
            self._plain = Built.apply(computed, inner.detach(), of, at)

    def lead_here(self) -> None:
        """Make gradients of the plain tensor pass through this one."""
        assert self._plain is not None
        at = self if self._before is None else self._before
        with torch.enable_grad():
            self._plain = Built.apply(None, self._plain.detach(), weakref.ref(self), at)

    def _leading_here(self) -> Tensor:
        """The plain tensor of a leaf, with a graph that leads to the leaf. It is held weakly, since
        that graph holds the leaf.
        """
        led = None if self._led is None else self._led()
        if led is None:
            with torch.enable_grad():
                led = Built.apply(None, self._plain, weakref.ref(self), self)
            self._led = weakref.ref(led)
        return led

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called = _called_outside_of_graphs() if "torch._dynamo" in sys.modules else _called
        return called(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _HANDED_ON:
            (lazy,) = args
            return _remade(lazy, Recipe.of(func, args, {}, lazy.device)._replace(grad=False))
        lazies = list(lazy_tensors((args, kwargs or {})))
        note_of_building(func, lazies)
        with enable_reentrant_dispatch():
            plain_args, plain_kwargs = plain((args, kwargs or {}))
        value = func(*plain_args, **plain_kwargs)
        return args[0] if args and value is plain_args[0] else value  # the first: an in-place call


@functools.cache
def _called_outside_of_graphs() -> Callable[..., Any]:
    return torch.compiler.disable(_called)  # made once, since that takes longer than most calls


def _called(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function of PyTorch that was given lazy tensors."""
    from .asked_gradients import OF_GRADIENT
    from .functions import KNOWN, OF_FORM

    if func in OF_FORM:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    lazies = list(lazy_tensors((args, kwargs)))
    if not lazies:  # the lazy tensors are within something other than a list, tuple or dict
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if func in OF_GRADIENT or (func in KNOWN and not any(x.is_built for x in lazies)):
        value = _known(func, lazies[0].device, args, kwargs)
        if value is not NotImplemented:
            return value
    return call_with_plain(func, lazies, args, kwargs)


def _known(func: Any, device: torch.device, args: Any, kwargs: Any) -> Any:
    """Call a known function; NotImplemented for a call that is not known in this form."""
    from .functions import KNOWN, signature

    if "input" in kwargs and not args:
        args, kwargs = (kwargs["input"],), {k: x for k, x in kwargs.items() if k != "input"}
    if kwargs.get("out") is not None:
        return NotImplemented
    known, recipe = KNOWN[func], Recipe.of(func, args, kwargs, device)
    try:
        signature(known).bind(recipe, *args, **kwargs)
    except TypeError:
        return NotImplemented
    return known(recipe, *args, **kwargs)


def lazy_tensors(x: Any) -> Iterator[LazyTensor]:
    return (leaf for leaf in tree_leaves(x) if isinstance(leaf, LazyTensor))


def logits_of(source: Source, hidden: Tensor) -> LazyTensor:
    """The lazy logits of a call of a head, in the graph behind its hidden states and parameters."""
    like = torch.empty(source.shape, dtype=source.dtype, device="meta")
    words, history = Words(Kind.LOGITS, (source.whole,)), History()

    def make() -> LazyTensor:
        heads = frozenset({weakref.ref(source)})
        return LazyTensor(words, None, history, frozenset({source}), heads, like=like)

    made = Head.apply(source, make, hidden, *source.parameters)
    history.made(made)
    return made


def derived(
    recipe: Recipe,
    words: Words | None,
    like: Tensor,
    *,
    vocab_dim: int = -1,
    view: bool = False,
) -> LazyTensor:
    """Make the lazy tensor that a call on lazy tensors returns, with the shape, strides and dtype
    of `like`. `view`: whether it would share the memory of the first of them.
    """
    parents = list(lazy_tensors((recipe.args, recipe.kwargs)))
    histories = {id(x.history): x.history for x in parents}
    sources = frozenset[Source]().union(*(x.sources for x in parents))
    differentiable = recipe.grad and any(x.requires_grad for x in parents)
    if words is not None and not differentiable:
        words = words.constant()

    # Also where no gradient is wanted: a torch.autograd.Function may put the result into the graph.
    heads = heads_of(parents)

    def make() -> LazyTensor:
        return LazyTensor(
            words, recipe, parents[0].history, sources, heads, like=like, vocab_dim=vocab_dim
        )

    made = Derived.apply(recipe, make, *parents) if differentiable else make()
    if view:
        made.memory = parents[0].memory
    for history in histories.values():
        history.made(made)
    return made


def _remade(lazy: LazyTensor, recipe: Recipe) -> LazyTensor:
    """Another lazy tensor of the same numbers, whose place in the graph PyTorch makes."""
    made = LazyTensor(
        lazy.words, recipe, lazy.history, lazy.sources, lazy.heads, like=form_of(lazy),
        vocab_dim=lazy.vocab_dim,
    )  # fmt: skip
    made.memory = lazy.memory
    lazy.history.made(made)
    return made


def written(recipe: Recipe, lazy: LazyTensor, words: Words) -> LazyTensor:
    """Note a call that writes into a lazy tensor, which means `words` from then on."""
    lazy.history.check_views(lazy, writes=True)
    for other in lazy.history.alive():
        if other is not lazy and other.memory is lazy.memory:
            other.words = None
    lazy.history.written(lazy, recipe)
    lazy.words = words
    if recipe.grad and lazy.requires_grad:
        if lazy._before is None:
            lazy._before = Passed.apply(lazy)
        Scaled.apply(lazy, recipe.func, recipe.args[1:])
    return lazy


def form_of(x: Tensor) -> Tensor:
    """Make a tensor on the meta device of the same shape, strides and dtype."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def computed(
    recipe: Recipe,
    parents: Sequence[LazyTensor],
    compute: Callable[[], Tensor],
    *,
    dtype: torch.dtype,
    cost: Cost,
    again_for_gradient: bool = False,
) -> Tensor:
    """Return the result of a call, a few numbers for each token, computed without logits.

    again_for_gradient: compute the value without a graph, and again with one if a gradient comes.
    """
    differentiable = recipe.grad and any(x.requires_grad for x in parents)
    for parent in parents:
        parent.history.check_views(parent, writes=False)
    sources = frozenset[Source]().union(*(x.sources for x in parents))
    known_before = sum(len(source.known) for source in sources)

    def result(*, with_graph: bool) -> Tensor:
        with contextlib.ExitStack() as modes:
            for source in sources:
                modes.enter_context(source.at_work(differentiable=with_graph))
            with torch.set_grad_enabled(with_graph):
                return compute().to(dtype)

    value = result(with_graph=differentiable and not again_for_gradient)
    if cost.of_statistics and sum(len(source.known) for source in sources) == known_before:
        cost = Cost(0, 0, 0)
    tokens = sum(x.numel() // max(1, x.shape[x.vocab_dim]) for x in parents)
    trained = any(source.head_is_trained for source in sources)
    plan = cost.plan(differentiable=differentiable, trained=trained)
    note_fused(name_of(recipe.func), plan, tokens)
    if not differentiable or not (value.requires_grad or again_for_gradient):
        return value.clone()  # the caller may write into it, and must not change what is remembered
    inner = functools.partial(result, with_graph=True) if again_for_gradient else value
    heads = len(heads_of(parents))
    return Used.apply(Computed(inner, heads, recipe.on_plain), value.detach(), *parents)
