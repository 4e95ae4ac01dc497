"""The tensor in the place of a model's logits once its loss has been made: nobody may read it.

It is handed on, through the wrappers of a model to its caller, who has no use for it. Whoever reads
it all the same (a forward that adds a penalty of its logits to the loss, a hook that logs their
size) would read numbers that are none, and gets an error instead.
"""

from typing import Any

from torch import Tensor

# Functions that hand a tensor on, or ask for anything but what it holds; the compiler asks a lot.
_HANDING_ON = {
    "__get__", "_is_view", "bfloat16", "clone", "contiguous", "cpu", "cuda", "data_ptr", "detach",
    "dim", "double", "element_size", "float", "half", "is_complex", "is_conj", "is_contiguous",
    "is_floating_point", "is_inference", "is_neg", "numel", "record_stream", "register_hook",
    "requires_grad_", "retain_grad", "size", "storage_offset", "stride", "to", "type",
    "untyped_storage", "view_as",
}  # fmt: skip


class SpentLogits(Tensor):
    """A tensor that may be handed on, converted and copied, but not read."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in _HANDING_ON:
            raise TypeError(
                f"model: its logits are read ({name}) after its loss was made, where they are not "
                "there"
            )
        return super().__torch_function__(func, types, args, kwargs or {})


def spend(logits: Tensor) -> None:
    """Let nobody read a tensor from now on, whoever holds it already."""
    if type(logits) is Tensor:
        logits.__class__ = SpentLogits
