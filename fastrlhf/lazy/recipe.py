"""How a lazy tensor would be made: the call that made it, to be made once more of plain tensors.

The calls on one head's logits are remembered in their order, those that write into them among them,
and what is still wanted is made in that order: views see what was written through others, as they
would have.
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
    seen: list[tuple[Tensor, int]]  # other tensors among its arguments, and their versions

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, device: torch.device) -> Recipe:
        others = [x for x in tree_leaves((args, kwargs)) if type(x) is Tensor]
        seen = [(x, x._version) for x in others if not x.is_inference()]
        autocast = current_autocast(device.type)
        return cls(func, args, kwargs, torch.is_grad_enabled(), autocast, seen)

    def after(self, *args: Any) -> Recipe:
        """The same with arguments before the others."""
        return self._replace(args=(*args, *self.args))

    def on_plain(self) -> Any:
        """The same of plain tensors.

        Raises:
            RuntimeError: one of the others was written into, so that it would not be the same.
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
    """Anything, with plain tensors in place of lazy ones."""
    from .tensor import LazyTensor

    return tree_map(lambda x: x.plain() if isinstance(x, LazyTensor) else x, x)


class _Weakly:
    """A lazy tensor that may be gone: then by how it was made, if it is a view of one that is not.

    The history of a tensor may not hold it, or it would be there until garbage is collected.
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
        """The plain tensor; None: nobody holds a view of it."""
        lazy = self._lazy()
        if lazy is not None:
            return lazy.plain()
        base = None if self._base is None else self._base.plain()
        return None if base is None or self._recipe is None else self._recipe.after(base).on_plain()


class _Written(NamedTuple):
    """A call that wrote into a lazy tensor."""

    target: _Weakly
    call: Recipe  # without the tensor

    def on_plain(self) -> None:
        target = self.target.plain()
        if target is not None:
            self.call.after(target).on_plain()


class History:
    """What was made of the logits of one head, in its order."""

    def __init__(self) -> None:
        self._steps: list[weakref.ref[LazyTensor] | _Written] = []
        # Numbers that were computed, and would be views: (what, its memory, its version, whose
        # memory it would have).
        self._views: list[tuple[weakref.ref[Tensor], Tensor, int, object]] = []

    def made(self, lazy: LazyTensor) -> None:
        self._steps.append(weakref.ref(lazy))

    def written(self, lazy: LazyTensor, recipe: Recipe) -> None:
        """Remember a call that writes into a lazy tensor, its first argument."""
        call = recipe._replace(args=recipe.args[1:])
        self._steps.append(_Written(_Weakly(lazy), call))

    def viewed(self, lazy: LazyTensor, view: Tensor) -> None:
        """Remember numbers that were computed, and would share the memory of plain ones."""
        self._views.append((weakref.ref(view), view.detach(), view._version, lazy.memory))

    def check_views(self, lazy: LazyTensor, *, writes: bool) -> None:
        """Raise RuntimeError where one of two that would share their memory was written into."""
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
        """Make everything that somebody still holds."""
        with torch.inference_mode(False), _as_outside():
            for step in tuple(self._steps):
                if isinstance(step, _Written):
                    self._steps.remove(step)
                    step.on_plain()
                elif (lazy := step()) is not None:
                    lazy.make_plain()


def _as_outside() -> AbstractContextManager[Any]:
    """Hide what is saved for backward from a checkpoint, which would count it: logits would have
    been made outside of it.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
