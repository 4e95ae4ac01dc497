"""The calls that made lazy tensors, kept so that they can be repeated on plain tensors.

A `Recipe` is one such call. A `History` has all calls on the logits of one call of a head in their
order, including those that write into a tensor. When the logits have to be built, it repeats in
that order what somebody still holds: so a view sees what was written through another view, as it
would have with plain logits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastrlhf.ops.backend import current_autocast

if TYPE_CHECKING:
    from .tensor import LazyTensor


class Recipe(NamedTuple):
    """A call of a function of PyTorch, and the modes that it was made in."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool
    autocast: Callable[[], torch.autocast]
    seen: list[tuple[Tensor, int]]  # plain tensors among the arguments, and their versions then

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, device: torch.device) -> Recipe:
        others = [x for x in tree_leaves((args, kwargs)) if type(x) is Tensor]
        seen = [(x, x._version) for x in others if not x.is_inference()]
        autocast = current_autocast(device.type)
        return cls(func, args, kwargs, torch.is_grad_enabled(), autocast, seen)

    def after(self, *args: Any) -> Recipe:
        """The same call, with these arguments before the others."""
        return self._replace(args=(*args, *self.args))

    def on_plain(self) -> Any:
        """Repeat the call, with plain tensors in place of lazy ones.

        Raises:
            RuntimeError: another tensor among the arguments was written into since, so that the
                result would not be the same.
        """
        if any(x._version != version for x, version in self.seen):
            raise RuntimeError(
                f"lazy_logits: logits are built after a tensor that {self.func.__name__} was given "
                "with them was written into; write into a copy of it"
            )
        args, kwargs = plain((self.args, self.kwargs))
        with torch.set_grad_enabled(self.grad), self.autocast():
            return self.func(*args, **kwargs)


def plain(x: Any) -> Any:
    """Any nested structure, with plain tensors in place of lazy ones."""
    from .tensor import LazyTensor

    return tree_map(lambda x: x.plain() if isinstance(x, LazyTensor) else x, x)


class _Weakly:
    """A weak reference to a lazy tensor that was written into.

    If nobody holds the tensor any more, but still one that it was a view of, the view is made again
    by its recipe. The reference is weak, since a tensor that is held by its own history would stay
    in memory until the garbage collector runs.
    """

    def __init__(self, lazy: LazyTensor):
        self._lazy, self._recipe = weakref.ref(lazy), lazy.recipe
        self._base: _Weakly | None = None
        if lazy.recipe is not None:
            base, *others = lazy.recipe.args
            is_view = getattr(base, "memory", None) is lazy.memory
            self._base = _Weakly(base) if is_view else None
            self._recipe = lazy.recipe._replace(args=tuple(others))

    def plain(self) -> Tensor | None:
        """The plain tensor; None: nobody holds the lazy one, or what it was a view of."""
        lazy = self._lazy()
        if lazy is not None:
            return lazy.plain()
        base = None if self._base is None else self._base.plain()
        return None if base is None or self._recipe is None else self._recipe.after(base).on_plain()


class _Written(NamedTuple):
    """A call that wrote into a lazy tensor."""

    target: _Weakly
    call: Recipe  # without its first argument, which is the target

    def on_plain(self) -> None:
        target = self.target.plain()
        if target is not None:
            self.call.after(target).on_plain()


class History:
    """The lazy tensors made from one call of a head, and the writes into them, in their order."""

    def __init__(self) -> None:
        self._steps: list[weakref.ref[LazyTensor] | _Written] = []
        # Results that were computed, and would be views of a plain tensor: (the result, a tensor on
        # its memory, its version then, `LazyTensor.memory` of what it would be a view of).
        self._views: list[tuple[weakref.ref[Tensor], Tensor, int, object]] = []

    def made(self, lazy: LazyTensor) -> None:
        self._steps.append(weakref.ref(lazy))

    def written(self, lazy: LazyTensor, recipe: Recipe) -> None:
        """Remember a call that writes into a lazy tensor, its first argument."""
        call = recipe._replace(args=recipe.args[1:])
        self._steps.append(_Written(_Weakly(lazy), call))

    def viewed(self, lazy: LazyTensor, view: Tensor) -> None:
        """Remember a computed result that would share its memory with the plain tensor."""
        self._views.append((weakref.ref(view), view.detach(), view._version, lazy.memory))

    def check_views(self, lazy: LazyTensor, *, writes: bool) -> None:
        """Raise RuntimeError where a lazy tensor and a computed result would share their memory,
        and one of them was written into. `writes`: whether the lazy one is about to be.
        """
        for view, numbers, version, memory in self._views:
            is_seen = writes and view() is not None
            if memory is lazy.memory and (is_seen or numbers._version != version):
                raise RuntimeError(
                    "lazy_logits: one of x and x[..., word] is written into, which the other would "
                    "see; take x[..., [word]]"
                )

    def alive(self) -> list[LazyTensor]:
        made = (step() for step in self._steps if not isinstance(step, _Written))
        return [lazy for lazy in made if lazy is not None]

    def make_all(self) -> None:
        """Make the plain tensors of all lazy ones that somebody still holds."""
        with torch.inference_mode(False), _as_outside():
            for step in tuple(self._steps):
                if isinstance(step, _Written):
                    self._steps.remove(step)
                    step.on_plain()
                elif (lazy := step()) is not None:
                    lazy.make_plain()


def _as_outside() -> AbstractContextManager[Any]:
    """Hide from an activation checkpoint what is saved for backward while logits are built.

    A checkpoint counts what is saved within it, but plain logits would have been made outside.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
