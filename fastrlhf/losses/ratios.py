"""Ratios of probabilities from the difference of their logs: finite, and exact near 1.

Used wherever a loss has a ratio: `surrogates.py`, `penalties.py`, `rollout.py` and their relatives.
"""

import torch
from torch import Tensor


def saturated(log_ratio: Tensor) -> Tensor:
    """Bound the log of a ratio, and so its derivative, at 80 (700 in fp64).

    Not far beyond, the ratio would be inf, whose product with 0 is NaN.
    """
    return at_most(log_ratio, 700.0 if log_ratio.dtype == torch.float64 else 80.0)


def at_most(x: Tensor, bound: float) -> Tensor:
    """Bound x from above: `x.clamp(max=bound)`, but the gradient of NaN is NaN, and not 0."""
    return torch.where(x > bound, bound, x)


def at_least(x: Tensor, bound: float) -> Tensor:
    """Bound x from below: `x.clamp(min=bound)`, but the gradient of NaN is NaN, and not 0."""
    return torch.where(x < bound, bound, x)
