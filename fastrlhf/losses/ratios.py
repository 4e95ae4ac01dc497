"""Ratios of probabilities from the difference of their logs: finite, and exact near 1."""

import torch
from torch import Tensor


def saturated(log_ratio: Tensor) -> Tensor:
    """Let the log of a ratio end at 80 (700 in fp64), with its derivative.

    Beyond lies inf, which makes NaN of every product with 0.
    """
    return at_most(log_ratio, 700.0 if log_ratio.dtype == torch.float64 else 80.0)


def at_most(x: Tensor, bound: float) -> Tensor:
    """Bound x from above: `x.clamp(max=bound)`, but the gradient of NaN is NaN, and not 0."""
    return torch.where(x > bound, bound, x)


def at_least(x: Tensor, bound: float) -> Tensor:
    """Bound x from below, likewise."""
    return torch.where(x < bound, bound, x)


def expm1_minus(x: Tensor) -> Tensor:
    """Compute e^x - 1 - x, whose leading term x²/2 would drown in the rounding of e^x - 1."""
    # Where five terms of the series err as little as the difference does.
    near = x.abs() < (2e-3 if x.dtype == torch.float64 else 0.125)
    small = torch.where(near, x, 0.0)
    series = 1 + small / 3 * (1 + small / 4 * (1 + small / 5 * (1 + small / 6)))
    return torch.where(near, small.square() / 2 * series, torch.expm1(x) - x)
