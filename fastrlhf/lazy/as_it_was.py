"""A later call of a module in the state that it was in before: with the adapters that were active,
the parameters that it had, and in training mode or not.

A `Source` calls its head later than the model did, and needs it as it was then.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import Tensor, nn

# The types of the attributes that a module's forward depends on, which are restored for a call.
_KINDS = bool, int, float, str, tuple, list, dict, set


class AsItWas:
    """A module's forward. For each call, the module's attributes are what they were when this was
    made.
    """

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
