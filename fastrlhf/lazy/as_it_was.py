"""The call of a module once more, in the state that it was in: with the adapters that were active,
the parameters that it had, in training or not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import Tensor, nn

# Of what is in the attributes that a module's forward goes by.
_KINDS = bool, int, float, str, tuple, list, dict, set


class AsItWas:
    """A forward of a module, whose attributes are for each call what they were at first."""

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor]):
        self._forward = forward
        self._states = [(part, _state_of(part)) for part in module.modules()]

    def __call__(self, *args: Any) -> Tensor:
        with self._restored():
            return self._forward(*args)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        now = [(part, dict(vars(part))) for part, _ in self._states]
        try:
            for part, state in self._states:
                vars(part).update(state)
            yield
        finally:
            for part, state in now:
                vars(part).update(state)


def _state_of(part: nn.Module) -> dict[str, Any]:
    return {name: copy(x) for name, x in vars(part).items() if isinstance(x, _KINDS)}
