"""Calls that ask for the gradient of a lazy tensor, who get it as that of plain logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .graph import dense
from .recipe import Recipe
from .tensor import LazyTensor, lazy_tensors

_GRAD: Any = Tensor.grad


def _natively(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def register_hook(recipe: Recipe, x: LazyTensor, hook: Callable[[Tensor], Any]) -> Any:
    """The hooks of torch.distributed only wait for a gradient; others look at it."""
    waits = getattr(hook, "__module__", "").startswith("torch.distributed.")
    seen = hook if waits else lambda gradient: hook(dense(gradient))
    return _natively(Tensor.register_hook, x, seen)


def requires_grad_(recipe: Recipe, x: LazyTensor, requires_grad: bool = True) -> LazyTensor:
    led = x.ends_gradients
    _natively(Tensor.requires_grad_, x, requires_grad)
    if not led:
        x.lead_here()  # if it was built before
    return x


def retain_grad(recipe: Recipe, x: LazyTensor) -> None:
    _natively(Tensor.retain_grad, x)


def grad(recipe: Recipe, x: LazyTensor) -> Any:
    return dense(_natively(_GRAD.__get__, x))


def gradients(recipe: Recipe, *args: Any, **kwargs: Any) -> Any:
    """torch.autograd.grad, with respect to logits."""
    outputs = kwargs.get("outputs", args[0] if args else ())
    if any(lazy_tensors(outputs)):
        return NotImplemented
    return tuple(map(dense, _natively(torch.autograd.grad, *args, **kwargs)))


OF_GRADIENT: dict[Any, Callable[..., Any]] = {  # for which a leaf is not built
    Tensor.register_hook: register_hook,
    Tensor.requires_grad_: requires_grad_,
    Tensor.retain_grad: retain_grad,
    _GRAD.__get__: grad,
    torch.autograd.grad: gradients,
}
