"""From the logits of a head to the effective ones, and what sums over a row of them are made by.

`capped_logits` leaves the temperature out: a difference of two nearly equal logits is exact before
it is divided. Some functions work in place, or otherwise where PyTorch's compiler makes a loop of
them, since backends without kernels run them: see `row_statistics`.

Dims: N rows, V vocabulary, ... any leading shape.
"""

import math

import torch
from torch import Tensor


def capped_logits(logits: Tensor, softcap: float | Tensor | None, scale: float | Tensor) -> Tensor:
    """softcap·tanh(scale·x / softcap), or scale·x without a cap: the logits but for the
    temperature.
    """
    scaled = logits if is_one(scale) else logits * scale
    return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)


def cap_slope(logits: Tensor, softcap: float | Tensor, scale: float | Tensor) -> Tensor:
    """Compute 1 - tanh²(scale·x / softcap), without its cancellation where the cap saturates.

    As 4d/(1 + d)² with d = e^-2|·|, since the bits of PyTorch's cosh depend on where in memory a
    number lies.
    """
    decay = logits.abs().mul_(-2 * (scale / softcap)).exp_()
    return decay.mul(4).div_(decay.add_(1).square_())


def row_sums(x: Tensor) -> Tensor:
    """Sum (..., V) to (..., 1). A lone row comes twice, for PyTorch would sum it in as many parts
    as there are threads, and its bits would not be those that it has among others.
    """
    if _compiles_for_cpu(x):
        # The compiler adds one number after the other, where PyTorch adds up sums of parts: fp32
        # would not do.
        return x.sum(-1, keepdim=True, dtype=torch.float64).to(x.dtype)
    lone = x.ndim == 2 and x.shape[0] == 1
    return (x.expand(2, -1) if lone else x).sum(-1, keepdim=True)[: x.shape[0]]


def _compiles_for_cpu(x: Tensor) -> bool:
    return torch.compiler.is_dynamo_compiling() and x.device.type == "cpu"


def exp_of_sums(x: Tensor) -> Tensor:
    """e^x, of which sums are made: as a power of 2, with an error of |x| roundings, where the
    compiler would put an exponential that is used twice into memory in between.
    """
    return torch.exp2(x * math.log2(math.e)) if _compiles_for_cpu(x) else x.exp()


def finite_base(peak: Tensor) -> Tensor:
    """The peak, or 0 where there is nothing but -inf: any finite base then gives e^-inf = 0."""
    return torch.where(peak == -torch.inf, 0.0, peak)


def divide_(x: Tensor, temperature: float | Tensor) -> Tensor:
    """Divide in place, and not at all by the number 1: a pass over the vocabulary less."""
    return x if is_one(temperature) else x.div_(temperature)


def divided(x: Tensor, temperature: float | Tensor) -> Tensor:
    return x if is_one(temperature) else x / temperature


def is_one(factor: float | Tensor) -> bool:
    """Whether it is known to be 1, which a tensor is not."""
    return isinstance(factor, (int, float)) and factor == 1


def column_of(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """The number, or the temperatures (...) of rows as (..., 1)."""
    return temperature.to(dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
