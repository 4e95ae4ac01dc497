"""Handling of tensors and keywords that the losses of models have in common.

Used by `model_losses.py`, `model_policy.py` and `model_preference.py`.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def separated(given: dict[str, Any], known: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell the options of a loss from what the model's forward takes."""
    names = set(known)
    options = {name: x for name, x in given.items() if name in names}
    return options, {name: x for name, x in given.items() if name not in names}


def on_device_of(targets: Tensor, *tensors: Tensor | None) -> list[Any]:
    """Bring tensors to where the head is, which may be another device than that of the ids."""
    return [None if x is None else x.to(targets.device) for x in tensors]
