"""From the logits of a head to effective logits, and functions for sums over rows of these.

`capped_logits` does not divide by the temperature, because the difference of two nearly equal
logits is exact only before the division. Backends without kernels run these functions, for large
rows (see `row_statistics`). So some work in place, and some do differently what PyTorch's compiler
would do badly.

Dims: N rows, V vocabulary, ... any leading shape.
"""

import math

import torch
from torch import Tensor


def capped_logits(logits: Tensor, softcap: float | Tensor | None, scale: float | Tensor) -> Tensor:
    """Compute softcap·tanh(scale·x / softcap), or scale·x without a softcap: the effective logits
    before the division by the temperature.
    """
    scaled = logits if is_one(scale) else logits * scale
    return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)


def cap_slope(logits: Tensor, softcap: float | Tensor, scale: float | Tensor) -> Tensor:
    """Compute 1 - tanh²(scale·x / softcap), without its cancellation where the cap saturates.

    The formula is 4d/(1 + d)² with d = e^-2|·|. It is not 1/cosh², because the bits of PyTorch's
    cosh depend on where in memory a number lies.
    """
    decay = logits.abs().mul_(-2 * (scale / softcap)).exp_()
    return decay.mul(4).div_(decay.add_(1).square_())


def row_sums(x: Tensor) -> Tensor:
    """Sum (..., V) to (..., 1). A lone row is summed twice, as if it were two rows: PyTorch would
    sum it alone in as many parts as there are threads, and it would get other bits than among other
    rows.
    """
    if _compiles_for_cpu(x):
        # Compiled code adds one number after the other, where PyTorch adds up sums of parts. In
        # fp32 that is not accurate enough.
        return x.sum(-1, keepdim=True, dtype=torch.float64).to(x.dtype)
    lone = x.ndim == 2 and x.shape[0] == 1
    return (x.expand(2, -1) if lone else x).sum(-1, keepdim=True)[: x.shape[0]]


def _compiles_for_cpu(x: Tensor) -> bool:
    return torch.compiler.is_dynamo_compiling() and x.device.type == "cpu"


def exp_of_sums(x: Tensor) -> Tensor:
    """Compute e^x for a sum over a row. In compiled code it is a power of 2, with an error of |x|
    roundings: an exponential that is used twice would be written to memory in between.
    """
    return torch.exp2(x * math.log2(math.e)) if _compiles_for_cpu(x) else x.exp()


def finite_base(peak: Tensor) -> Tensor:
    """Return the peak, or 0 where it is -inf, since -inf minus -inf is NaN. All logits are -inf
    then, and any finite base gives e^-inf = 0.
    """
    return torch.where(peak == -torch.inf, 0.0, peak)


def divide_(x: Tensor, temperature: float | Tensor) -> Tensor:
    """Divide in place. For the number 1 nothing is done, which saves a pass over the vocabulary."""
    return x if is_one(temperature) else x.div_(temperature)


def divided(x: Tensor, temperature: float | Tensor) -> Tensor:
    return x if is_one(temperature) else x / temperature


def is_one(factor: float | Tensor) -> bool:
    """Whether the factor is known to be 1; of a tensor, nothing is known."""
    return isinstance(factor, (int, float)) and factor == 1


def column_of(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Return the number as it is, or the temperatures (...) of rows as (..., 1)."""
    return temperature.to(dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
