"""What ZeRO-3 of DeepSpeed does to a model, in little: a test needs no DeepSpeed for it.

As there, each parameter is an empty tensor but within the calls of the module that holds it. Hooks
before and after each module's forward gather and release, and so do functions of autograd on its
outputs and inputs, in backward. The engine passes on what it is asked for to the model, but has a
config of its own.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _BeforeBackward(torch.autograd.Function):
    """The identity, on an output of a module."""

    @staticmethod
    def forward(ctx, output, gather):
        ctx.gather = gather
        return output.detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.gather()
        return gradient, None


class _AfterBackward(torch.autograd.Function):
    """The identity, on an input of a module."""

    @staticmethod
    def forward(ctx, given, release):
        ctx.release = release
        return given.detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.release()
        return gradient, None


class FakeZero3(nn.Module):
    """A model of which each process of a group keeps a part; gradients are averaged over it.

    `ahead`: with a module's parameters, gather those of the modules within, before their calls.
    """

    def __init__(self, module: nn.Module, group: Any, *, ahead: bool = False):
        super().__init__()
        self.ahead = ahead
        self.module, self.group, self.config = module, group, {"stage": 3}
        self.averages: dict[int, Tensor] = {}
        self._parts: dict[int, Tensor] = {}
        for parameter in module.parameters():
            self._keep_a_part(parameter)
        for part in module.modules():
            self._hook(part)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for parameter in self.module.parameters():  # of modules whose inputs have no gradient
            self._release(parameter)

    def gather(self, parameter: Any) -> None:
        if parameter.ds_status == "AVAILABLE":
            return
        part = self._parts[id(parameter)]
        parts = [torch.empty_like(part) for _ in range(self.group.size())]
        dist.all_gather(parts, part, group=self.group)
        shape = parameter.ds_shape
        parameter.data = torch.cat(parts)[: shape.numel()].view(shape)
        parameter.ds_status = "AVAILABLE"

    def gradients(self) -> dict[str, Tensor | None]:
        """Whole gradients of the parameters that are trained, averaged over the processes."""
        trained = ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)
        return {name: self.averages.get(id(p)) for name, p in trained}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.averages.clear()

    def _keep_a_part(self, parameter: Any) -> None:
        ranks, rank = self.group.size(), self.group.rank()
        flat = parameter.detach().flatten()
        padded = nn.functional.pad(flat, (0, -len(flat) % ranks))
        self._parts[id(parameter)] = padded.chunk(ranks)[rank].clone()
        parameter.ds_shape, parameter.ds_status = parameter.shape, "AVAILABLE"
        self._release(parameter)
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(self._average)

    def _release(self, parameter: Any) -> None:
        parameter.data = torch.empty(0, dtype=parameter.dtype)
        parameter.ds_status = "NOT_AVAILABLE"

    def _average(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=self.group)
        average = parameter.grad / self.group.size()
        before = self.averages.get(id(parameter))
        self.averages[id(parameter)] = average if before is None else before + average
        parameter.grad = None

    def _hook(self, part: nn.Module) -> None:
        def gather(ahead: bool = False) -> None:
            for parameter in part.parameters(recurse=ahead):
                self.gather(parameter)

        def release() -> None:
            for parameter in part.parameters(recurse=False):
                self._release(parameter)

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            gather(self.ahead)
            return tuple(_AfterBackward.apply(x, release) if _is_trained(x) else x for x in args)

        def after(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            release()
            return _BeforeBackward.apply(output, gather) if _is_trained(output) else output

        part.register_forward_pre_hook(before)
        part.register_forward_hook(after)


def _is_trained(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
