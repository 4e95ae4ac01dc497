"""Calls that ask for the gradient of a lazy tensor: hooks, retain_grad, grad, torch.autograd.grad.

They get the gradient of plain logits. On its way it is a `gradient.LazyGradient`, so it has to be
turned into numbers before other code reads it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .gradient import LazyGradient, dense
from .graph import is_replaced, is_scaled
from .recipe import Recipe, plain
from .tensor import LazyTensor

_GRAD: Any = Tensor.grad


def _natively(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def _is_beside(x: LazyTensor) -> bool:
    """Whether there is a plain tensor whose gradients do not pass through the lazy one."""
    return x.is_built and not x.is_under_plain


def register_hook(recipe: Recipe, x: LazyTensor, hook: Callable[[Tensor], Any]) -> Any:
    """Register a hook. Those of torch.distributed only wait for a gradient, and may get a lazy one;
    others read it.
    """
    if is_scaled(x):
        x.plain()
    if _is_beside(x):
        _refuse_another_part(x)
        return x.plain().register_hook(hook)
    x.is_watched = True
    waits = getattr(hook, "__module__", "").startswith("torch.distributed.")
    seen = hook if waits else lambda gradient: hook(dense(gradient))
    return _natively(Tensor.register_hook, x, seen)


def requires_grad_(recipe: Recipe, x: LazyTensor, requires_grad: bool = True) -> LazyTensor:
    _natively(Tensor.requires_grad_, x, requires_grad)
    if x.is_built and x.requires_grad and not x.plain().requires_grad:
        x.lead_here()
    return x


def retain_grad(recipe: Recipe, x: LazyTensor) -> None:
    if is_scaled(x):
        x.plain()
    if _is_beside(x):
        _refuse_another_part(x)
        return x.plain().retain_grad()
    if not x.retains_grad and not x.is_leaf:
        x.is_watched = True
        # If a lazy gradient were kept, it would hold the logits, which hold it.
        _natively(Tensor.register_hook, x, dense)
    return _natively(Tensor.retain_grad, x)


def _refuse_another_part(x: LazyTensor) -> None:
    """Refuse, in backward, a gradient that also arrives at the lazy tensor: what the plain tensor
    gets is then only a part.
    """
    if not is_replaced(x) and x.requires_grad:
        _natively(Tensor.register_hook, x, _refuse)


def _refuse(gradient: Tensor) -> None:
    raise RuntimeError(
        "lazy_logits: a hook, or retain_grad, came after logits were used in fused form and were "
        "built; put it before the first use"
    )


def grad(recipe: Recipe, x: LazyTensor) -> Any:
    if _is_beside(x) and not x.is_leaf:
        return x.plain().grad
    gradient = _natively(_GRAD.__get__, x)
    if isinstance(gradient, LazyGradient):
        gradient = dense(gradient, x)
        _natively(_GRAD.__set__, x, gradient)  # so that it can be written into
    return gradient


def gradients(recipe: Recipe, outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.autograd.grad, with respect to logits."""
    outputs = plain(outputs)
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    beside = {n for n, x in enumerate(inputs) if isinstance(x, LazyTensor) and _is_beside(x)}
    both = [n for n in beside if not is_replaced(inputs[n])]
    # Where gradients arrive at the plain tensor and at the lazy one, both are asked for and added.
    asked = [x.plain() if n in beside else x for n, x in enumerate(inputs)]
    asked += [inputs[n] for n in both]
    may_be_unused = kwargs.get("allow_unused") or kwargs.get("materialize_grads")
    if both:
        kwargs["allow_unused"] = True
    by_input = _natively(torch.autograd.grad, outputs, asked, *args, **kwargs)
    by_input = [
        dense(x, of if isinstance(of, LazyTensor) else None)
        for x, of in zip(by_input, asked, strict=True)
    ]
    for n, part in zip(both, by_input[len(inputs) :], strict=True):
        if part is not None:
            by_input[n] = part if by_input[n] is None else by_input[n] + part
    del by_input[len(inputs) :]
    if both and not may_be_unused and any(x is None for x in by_input):
        raise RuntimeError(
            "One of the differentiated Tensors appears to not have been used in the graph. Set "
            "allow_unused=True if this is the desired behavior."
        )
    return tuple(by_input)


def backward(
    recipe: Recipe, tensors: Any, *args: Any, inputs: Any = None, **kwargs: Any
) -> None:  # fmt: skip
    """torch.autograd.backward, of lazy tensors, or with some among its inputs."""
    given = [] if inputs is None else [inputs] if isinstance(inputs, Tensor) else inputs
    if any(isinstance(x, LazyTensor) and not x.is_leaf for x in given):
        raise RuntimeError(
            "lazy_logits: backward(inputs=) is given logits that are no leaf; ask for their "
            "gradient by torch.autograd.grad"
        )
    tensors, args, kwargs = plain((tensors, args, kwargs))
    _natively(torch.autograd.backward, tensors, *args, inputs=inputs, **kwargs)


# They are called for built tensors too, and do not build a leaf.
OF_GRADIENT: dict[Any, Callable[..., Any]] = {
    Tensor.register_hook: register_hook,
    Tensor.requires_grad_: requires_grad_,
    Tensor.retain_grad: retain_grad,
    _GRAD.__get__: grad,
    torch.autograd.grad: gradients,
    torch.autograd.backward: backward,
}
