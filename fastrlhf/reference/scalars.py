"""Scalar functions that are accurate in their tails, and so are their derivatives.

Nearly every module of this folder imports it; `token_statistics.py` is the next to read.
"""

import math

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; every other floating dtype is computed in fp32."""
    return torch.promote_types(dtype, torch.float32)


def sigmoid(x: Tensor) -> Tensor:
    """Compute σ(x) from the tail that is small: from σ(-x) where x > 0.

    PyTorch's derivative σ·(1 - σ) is 0 as soon as σ rounds to 1, at x = 17 in fp32. The derivative
    of this one keeps its relative accuracy in both tails, and so does the second derivative.
    """
    small = x <= 0
    tail = torch.sigmoid(torch.where(small, x, -x))
    return torch.where(small, tail, 1 - tail)


def log_sigmoid(x: Tensor) -> Tensor:
    """Compute ln σ(x). Its second derivative has relative accuracy in both tails too; that of
    `F.logsigmoid` loses it where σ rounds to 1.
    """
    negative = x <= 0
    decay = torch.exp(torch.where(negative, x, -x))
    return torch.where(negative, x, 0.0) - torch.log1p(decay)


def log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    """Compute ln(e^a + e^b), where a and b are not both infinite. The second derivative of
    `torch.logaddexp` is NaN where they are more than 88 apart; that of this one is not.
    """
    first = a > b
    return torch.where(first, a, b) + torch.log1p(torch.exp(torch.where(first, b - a, a - b)))


def expm1(x: Tensor) -> Tensor:
    """Compute e^x - 1, with the derivative e^x. PyTorch computes the derivative as the value plus
    1, which is 0 where the value rounds to -1.
    """
    near = x > -0.5
    far = torch.exp(torch.where(near, 0.0, x)) - 1
    return torch.where(near, torch.expm1(torch.where(near, x, 0.0)), far)


def expm1_minus(x: Tensor) -> Tensor:
    """Compute e^x - 1 - x, whose leading term x²/2 would drown in the rounding of e^x - 1."""
    near = x.abs() < 1
    return torch.where(near, expm1_minus_by_series(x, near), torch.exp(x) - 1 - x)


def expm1_minus_by_series(x: Tensor, near: Tensor) -> Tensor:
    """Compute e^x - 1 - x where |x| < 1, as x²/2 times Σ 2 x^k / (k + 2)!; 0 elsewhere."""
    small = torch.where(near, x, 0.0)
    terms = 18 if x.dtype == torch.float64 else 10
    series = torch.full_like(x, 2 / math.factorial(terms + 1))
    for k in range(terms, 1, -1):
        series = series * small + 2 / math.factorial(k)
    return small * small * 0.5 * series
