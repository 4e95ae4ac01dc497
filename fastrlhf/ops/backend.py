"""The choice of a backend for an operation.

There are three, all with the same semantics: Triton kernels, functions that PyTorch's compiler
makes (`compiled.py`), and eager PyTorch. Beside the choice, here is what an operation has to know
about transforms of torch.func, forward mode and autocast, under which it may have to run otherwise.
"""

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from .compiled import compiler_is_there
from .tracing import being_traced

Function = TypeVar("Function", bound=Callable[..., Any])

try:
    _TRITON_INSTALLED = find_spec("triton") is not None
except ImportError:  # raised by an import hook that forbids triton
    _TRITON_INSTALLED = False

_TRITON_DEVICES = {"cuda", "xpu"}  # ROCm devices call themselves cuda

BACKENDS = ("auto", "triton", "compiled", "eager")

# "auto" takes compiled functions from this many numbers on. Fewer are done eagerly in less time
# than the preparation of a compiled call takes.
_WORTH_COMPILING = 2**22

_VARIABLE = "FASTRLHF_BACKEND"
_chosen: str | None = None  # the last argument of set_backend; None before its first call


def check_impl(impl: str, name: str = "impl") -> None:
    """Raise TypeError or ValueError unless `impl` names a backend, or "auto"."""
    if not isinstance(impl, str):
        raise TypeError(f"{name}: expected a string, got {type(impl).__name__}")
    if impl not in BACKENDS:
        raise ValueError(f'{name}: expected "auto", "triton", "compiled" or "eager", got {impl!r}')


def set_backend(backend: str) -> None:
    """Choose what `impl="auto"` stands for, in all operations of this process.

    Args:
        backend: "triton" (where it runs), "compiled" or "eager" (see `token_stats`); "auto" leaves
            it to the device and the size of the problem, whatever the environment variable
            FASTRLHF_BACKEND says, which decides before this is called.

    Raises:
        TypeError, ValueError: anything else.

    Example:
        >>> fastrlhf.set_backend("eager")
        >>> fastrlhf.get_backend()
        'eager'
        >>> fastrlhf.set_backend("auto")
    """
    global _chosen
    check_impl(backend, "backend")
    _chosen = backend


def get_backend() -> str:
    """Return what `impl="auto"` stands for: see `set_backend`.

    Example:
        >>> fastrlhf.set_backend("auto")
        >>> fastrlhf.get_backend()
        'auto'
    """
    if _chosen is not None:
        return _chosen
    of_environment = os.environ.get(_VARIABLE) or "auto"
    check_impl(of_environment, _VARIABLE)
    return of_environment


def backend_of(impl: str, tensor: Tensor, numbers: int) -> str:
    """Decide the backend, "triton", "compiled" or "eager", for an operation on so many `numbers` on
    the device of `tensor`.

    Raises:
        ValueError: an unknown `impl`, or "triton" for a device on which it cannot run.
    """
    if use_triton(impl, tensor):
        return "triton"
    impl = get_backend() if impl == "auto" else impl
    if impl in ("auto", "triton"):  # "triton" of set_backend counts where Triton runs, not here
        worth_it = tensor.device.type == "cpu" and numbers >= _WORTH_COMPILING
        # While a graph is traced, whether there is a compiler is left open until the graph runs.
        there = being_traced() or compiler_is_there()
        return "compiled" if worth_it and there else "eager"
    return impl


def outside_of_graphs(function: Function) -> Function:
    """Keep torch.compile out of a function whose course depends on the values of tensors.

    `torch.compiler.disable` is not used as a decorator, because it imports the compiler, which
    takes seconds. Where nobody has imported the compiler, nothing can be compiled.
    """
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


def use_triton(impl: str, tensor: Tensor, *, auto_interprets: bool = False) -> bool:
    """Whether an operation runs on Triton kernels, on the device of `tensor`.

    "auto" takes Triton on a GPU, if it is installed. With `auto_interprets`, "auto" takes it on the
    CPU too, when Triton's interpreter is on: for kernels that are small enough not to be slow
    there.

    Raises:
        ValueError: an unknown `impl`, or "triton" for a device on which it cannot run.
    """
    check_impl(impl)
    named, impl = impl, get_backend() if impl == "auto" else impl
    on_gpu = tensor.device.type in _TRITON_DEVICES
    interpreted = tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if impl in ("compiled", "eager"):
        return False
    if named == "auto":
        may_interpret = auto_interprets or impl == "triton"
        return (on_gpu or (may_interpret and interpreted)) and _TRITON_INSTALLED
    if not _TRITON_INSTALLED:
        raise ValueError('impl: "triton" needs the triton package, which is not installed')
    if not (on_gpu or interpreted):
        raise ValueError(
            'impl: "triton" needs tensors on a GPU, or on the CPU with TRITON_INTERPRET=1 set '
            f"before Python starts; got {tensor.device}"
        )
    return True


def current_autocast(device: str) -> Callable[[], torch.autocast]:
    """Return a function that makes contexts with autocast as it is now. A backward runs outside of
    the autocast of its forward, and may have to restore it.
    """
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)


def under_transform(*upstream: Tensor | None) -> bool:
    """Whether torch.func (grad, vmap, jvp, ...) or forward-mode differentiation is active, or
    upstream gradients come many at once (is_grads_batched).

    Our operators have no derivatives and batching rules for them, so that under them the definition
    in plain PyTorch runs instead.
    """
    if torch._C._are_functorch_transforms_active():  # this call can be traced by the compiler
        return True
    if being_traced():
        return False
    if forward_ad._current_level >= 0:
        return True
    return any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in upstream)


def is_batched(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors is batched by torch.func.vmap, so that its values cannot be
    checked.
    """
    return any(x is not None and _is_batched(x) for x in tensors)


def _is_batched(x: Tensor) -> bool:
    if being_traced():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def refuse_transforms(function: str, alternative: str, *upstream: Tensor) -> None:
    """Raise under a transform, for a function that has no definition to fall back on."""
    if under_transform(*upstream):
        raise RuntimeError(
            f"{function}: does not work under torch.func transforms or forward-mode "
            f"differentiation; use {alternative}"
        )


def refuse_second_derivative(function: str, alternative: str) -> None:
    """Raise in a backward whose own derivative is asked for: without an error, it would be taken
    for zero.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}: its gradient is computed in the forward and cannot be differentiated "
            f"again (create_graph=True); that of {alternative} can"
        )


def wanted_or_detached(*tensors: Any) -> tuple[Any, ...]:
    """Return the tensors, detached under no_grad: an autograd Function's `needs_input_grad` does
    not take no_grad into account.
    """
    if torch.is_grad_enabled():
        return tensors
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in tensors)
