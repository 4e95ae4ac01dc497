"""Measurements of models' heads, and how long each is used.

A measurement is used as long as the model's state is the one in which it was made: the head's
class, its kind of weight and adapters, hooks and patched forwards, and the numbers of the config.
To compare these takes microseconds. Changes that they do not show are found because the head is
measured again every so often.
"""

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .head_parts import HeadParts, text_config
from .logit_map import LogitMap
from .stand_in import StandIn

# A head on a GPU is measured again after this many calls, since the host has to wait for it. On a
# CPU it is measured at every call.
_CALLS_BETWEEN = 64


@dataclass
class Measured:
    """The measurement of a head, and the state of the model in which it was made."""

    state: tuple[Any, ...] | None = None
    map: LogitMap = field(default_factory=LogitMap)
    calls: int = 0
    follows_backbone: bool = False  # whether the head's input is what the backbone returns

    def is_due(self) -> bool:
        """Whether it is time to compare the head with its weight again; on a GPU, also to measure
        the map again.
        """
        return self.state is None or self.calls % _CALLS_BETWEEN == 0


_measured: WeakKeyDictionary[nn.Module, Measured] = WeakKeyDictionary()


def measured(base: Any, module: nn.Module, parts: HeadParts | None) -> Measured:
    """Return what is known of a head, after forgetting what was measured in another state."""
    known, state = _measured.get(module), state_of(base, module, parts)
    if known is None:
        known = _measured[module] = Measured()
    elif known.state is not None and known.state != state:
        # The former map is the first guess, since most changes do not affect it, such as switching
        # off an adapter to compute a reference.
        known = _measured[module] = Measured(map=known.map)
    return known


def state_of(base: Any, module: nn.Module, parts: HeadParts | None) -> tuple[Any, ...]:
    """Collect what could change how a model makes its logits, as far as that is cheap to find."""
    changes: list[Any] = []
    for part in (module, base):
        hooks = part._forward_hooks, part._forward_pre_hooks
        patches = (vars(part).get(name) for name in ("forward", "_old_forward"))
        forwards = (
            *(x.replaced if isinstance(x, StandIn) else x for x in patches),
            type(part).forward,
        )
        changes.append(
            (type(part), *(tuple(map(id, h.values())) for h in hooks), *map(id, forwards))
        )
    numbers = tuple(
        (name, value)
        for name, value in vars(text_config(base)).items()
        if isinstance(value, int | float)
    )
    if parts is None:
        return (*changes, numbers, None)
    # torch.func.functional_call puts a tensor in place of a parameter: both count as Tensor.
    weight = Tensor if isinstance(parts.weight, Tensor) else type(parts.weight)
    return (*changes, numbers, weight, parts.bias is None, len(parts.adapters))
