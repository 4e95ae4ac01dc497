"""Calls of functions that are not known: they are given plain tensors, for which the logits are
built, and return what they would have returned without lazy logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .graph import Replaced
from .recipe import plain
from .report import name_of, note_built
from .source import Source

if TYPE_CHECKING:
    from .tensor import LazyTensor


def call_with_plain(func: Any, lazies: list[LazyTensor], args: Any, kwargs: Any) -> Any:
    """Call a function that is not known, with plain tensors in place of lazy ones."""
    note_of_building(func, lazies)
    written = lazies[0] if args and args[0] is lazies[0] and _writes(func, kwargs) else None
    for lazy in lazies:
        lazy.history.check_views(lazy, writes=lazy is written)
    plain_args, plain_kwargs = plain((args, kwargs))
    if written is not None and torch.is_grad_enabled():
        _check_not_watched(written)
    value = func(*plain_args, **plain_kwargs)
    if written is None:
        return value
    # The lazy tensors of this memory take the plain ones' place in the graph: whoever holds them
    # holds what was written.
    for lazy in written.history.alive():
        if lazy.memory is not written.memory or not torch.is_grad_enabled():
            continue
        if lazy._plain is not None and lazy._plain.requires_grad:
            if lazy.retains_grad:
                lazy._plain.retain_grad()
            Replaced.apply(lazy, lazy._plain)
            lazy._node = lazy.grad_fn
    return written if value is plain_args[0] else value


def _check_not_watched(written: LazyTensor) -> None:
    """Refuse to write into logits of which a view has a place of its own in the graph."""
    for lazy in written.history.alive():
        if lazy.memory is written.memory and lazy.recipe is not None and lazy.is_under_plain:
            of = lazy.recipe.args[0]
            if getattr(of, "memory", None) is lazy.memory:
                raise RuntimeError(
                    "lazy_logits: logits are written into of which a view has a hook, or went "
                    "through a torch.autograd.Function; leave lazy_logits"
                )


def _writes(func: Any, kwargs: Any) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITING or kwargs.get("inplace", False) is True


_WRITING = {
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ifloordiv__",
    "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip


def note_of_building(func: Any, lazies: list[LazyTensor]) -> None:
    """Report the logits that a call is about to build."""
    for source in frozenset[Source]().union(*(x.sources for x in lazies if not x.is_built)):
        size = source.tokens * source.vocab * source.dtype.itemsize
        note_built(name_of(func), source.tokens, size)
