"""How a lazy tensor would be made: the call that made it, to be made once more of plain tensors.

The calls on one head's logits are remembered in their order, those that write into them among them,
and what is still wanted is made in that order: views see what was written through others, as they
would have.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
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


class _Written(NamedTuple):
    """A call that wrote into a lazy tensor, which may be gone: then by how it was made."""

    lazy: weakref.ref[LazyTensor]
    made_by: Recipe | None
    call: Recipe  # without the tensor

    def on_plain(self) -> None:
        lazy = self.lazy()
        if lazy is not None:
            target = lazy.plain()
        elif self.made_by is not None:
            target = self.made_by.on_plain()
        else:
            return  # nor does anybody hold a view of it
        call = self.call
        call._replace(args=(target, *call.args)).on_plain()


class History:
    """What was made of the logits of one head, in its order."""

    def __init__(self) -> None:
        self._steps: list[weakref.ref[LazyTensor] | _Written] = []

    def made(self, lazy: LazyTensor) -> None:
        self._steps.append(weakref.ref(lazy))

    def written(self, lazy: LazyTensor, recipe: Recipe) -> None:
        """Remember a call that writes into a lazy tensor, its first argument."""
        call = recipe._replace(args=recipe.args[1:])
        self._steps.append(_Written(weakref.ref(lazy), lazy.recipe, call))

    def alive(self) -> list[LazyTensor]:
        made = (step() for step in self._steps if not isinstance(step, _Written))
        return [lazy for lazy in made if lazy is not None]

    def make_all(self) -> None:
        """Make everything that somebody still holds."""
        for step in tuple(self._steps):
            if isinstance(step, _Written):
                self._steps.remove(step)
                step.on_plain()
            elif (lazy := step()) is not None:
                lazy.make_plain()
