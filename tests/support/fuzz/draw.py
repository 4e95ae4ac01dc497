"""Tensors and options from a seed: odd shapes, any strides, values at the ends of what is legal."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Draw:
    """A source of choices; the same seed makes the same."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def of(self, *options: Any) -> Any:
        return self.random.choice(options)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def size(self, most: int, least: int = 0) -> int:
        """A number of things; one and none more often than any other."""
        return max(least, self.of(0, 1, 1, *range(2, most + 1), *range(2, most + 1)))

    def between(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        values = torch.randint(max(high, 1), tuple(shape), generator=self.generator)
        return self.laid_out(values.to(self.of(torch.int64, torch.int32)))

    def bits(self, *shape: int) -> Tensor:
        """A mask: random, empty or full, bool or 0/1."""
        share = self.of(0.5, 0.5, 0.8, 0.0, 1.0)
        mask = torch.rand(shape, generator=self.generator) < share
        return self.laid_out(mask.to(self.of(torch.bool, torch.int64, torch.float32)))

    def logits(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Of all sizes that occur, some of them forbidden, prefixes and whole tiles included."""
        x = self.normal(*shape) * self.of(1e-30, 1e-3, 1.0, 1.0, 5.0, 30.0)
        x = x + self.of(0.0, 0.0, 100.0, -1e4, 1e4)
        if x.numel() and self.chance(0.3):
            x[torch.rand(shape, generator=self.generator) < 0.2] = -torch.inf
        if x.numel() and self.chance(0.15):
            x[..., : max(1, 2 * shape[-1] // 3)] = -torch.inf
        return self.laid_out(x.to(dtype))

    def logprobs(self, *shape: int, dtype: torch.dtype, far: float = 0.1) -> Tensor:
        x = -self.normal(*shape).abs() * self.of(1e-6, 0.1, 1.0, 1.0, 5.0)
        if self.chance(far):
            x = x - 300 * (torch.rand(shape, generator=self.generator) < 0.3)
        return self.laid_out(x.to(dtype))

    def hidden(self, x: Tensor, mask: Tensor) -> Tensor:
        """Fill what a mask hides with rubbish, as padding may hold anything."""
        if not self.chance(0.5) or x.numel() == 0:
            return x
        hidden = (mask == 0).view(*mask.shape, *[1] * (x.ndim - mask.ndim))
        return torch.where(hidden, self.of(torch.nan, torch.inf, -torch.inf, 1e30), x)

    def laid_out(self, x: Tensor, *, repeated: bool = True) -> Tensor:
        """The same numbers in memory in another way; expanded tensors repeat their first row."""
        how = self.of("plain", "transposed", "offset", "strided", "expanded")
        how = "plain" if how == "expanded" and not repeated else how
        if x.ndim == 0 or x.numel() == 0 or how == "plain":
            return x
        if how == "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if how == "expanded":
            return x[:1].expand(x.shape)
        if how == "offset":  # starts one element behind where memory is aligned
            return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)
        return x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))[..., ::2].copy_(x)

    def temperature(self, *shape: int) -> float | Tensor:
        numbers = (1.0, 1.0, 0.7, 2, 1e-3, 1e3)
        if self.chance(0.7):
            return self.of(*numbers)
        kind = self.of("tokens", "sequences") if len(shape) == 2 else "tokens"
        x = torch.rand(shape, generator=self.generator) + 0.5
        return x[:, 0] if kind == "sequences" and shape[1] else x

    def transform(self, *shape: int) -> dict[str, Any]:
        """Options of the map from logits to effective ones."""
        return {
            "temperature": self.temperature(*shape),
            "softcap": self.of(None, None, None, 0.5, 30.0),
            "scale": self.of(1.0, 1.0, 0.25, 3),
        }
