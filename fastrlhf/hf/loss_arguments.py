"""What the losses of models do alike with what they are given, and with what they return."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .at_head import Done


def separated(given: dict[str, Any], known: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell the options of a loss from what the model's forward takes."""
    names = set(known)
    options = {name: x for name, x in given.items() if name in names}
    return options, {name: x for name, x in given.items() if name not in names}


def beside(targets: Tensor, *tensors: Tensor | None) -> list[Any]:
    """Bring tensors to where the head is, which may be another device than that of the ids."""
    return [None if x is None else x.to(targets.device) for x in tensors]


def returned(done: Done, with_outputs: bool) -> tuple[Any, ...]:
    """Put together what the work at the head gave, and the model's outputs if they are wanted."""
    found = done.result, done.aside
    return (*found, done.outputs) if with_outputs else found
