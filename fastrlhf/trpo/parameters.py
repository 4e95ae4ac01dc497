"""The parameters of a policy as one vector: how gradients are flattened and steps are taken.

Dims: D elements of all parameters, in order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrlhf.ops.checks import check_floating


class Parameters:
    """Leaves that require a gradient, each once."""

    def __init__(self, params: Sequence[Tensor]):
        try:
            self.tensors = list(params)
        except TypeError:
            raise TypeError(f"params: expected tensors, got {type(params).__name__}") from None
        for p in self.tensors:
            check_floating("params", p)
        if not self.tensors or not all(p.is_leaf and p.requires_grad for p in self.tensors):
            raise ValueError("params: expected leaves that require a gradient, at least one")
        if len({id(p) for p in self.tensors}) < len(self.tensors):
            raise ValueError("params: expected each parameter once")
        self.sizes = [p.numel() for p in self.tensors]

    @property
    def size(self) -> int:
        """The number D of elements of all parameters."""
        return sum(self.sizes)

    def gradient(self, output: Tensor, upstream: Tensor | None = None) -> Tensor:
        """Compute the gradient (D,) of an output, in fp32 at least; it is 0 for parameters that the
        output does not use.
        """
        gradients = torch.autograd.grad(output, self.tensors, upstream, allow_unused=True)
        pairs = zip(self.tensors, gradients, strict=True)
        parts = (torch.zeros_like(p) if x is None else x for p, x in pairs)
        return torch.cat([wide(x).reshape(-1) for x in parts])

    def split(self, vector: Tensor) -> list[Tensor]:
        """Cut a vector (D,) into tensors like the parameters, in their dtypes."""
        return [x.to(p.dtype) for x, p in zip(self._parts(vector), self.tensors, strict=True)]

    def copies(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.tensors]

    @torch.no_grad()
    def move(self, saved: list[Tensor], step: Tensor) -> None:
        """Set the parameters to what they were, plus a step (D,)."""
        for p, old, part in zip(self.tensors, saved, self._parts(step), strict=True):
            p.copy_(wide(old) + part)

    @torch.no_grad()
    def restore(self, saved: list[Tensor]) -> None:
        for p, old in zip(self.tensors, saved, strict=True):
            p.copy_(old)

    def _parts(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split(self.sizes)
        return [x.view(p.shape) for x, p in zip(parts, self.tensors, strict=True)]


def wide(x: Tensor) -> Tensor:
    """Convert to fp32 what has fewer bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
