"""Whether a result is as accurate as plain PyTorch's, compared so that what is missing shows.

A result's error is its distance from the same formula in fp64, and its budget twice the error that
plain PyTorch makes in the same dtype on the same machine, or twice what rounding the exact result
to that dtype costs, if that is more; and a few roundings, for where the plain formula happens to be
exact. Where the plain formula loses much itself, as fp16 does where it underflows, its error counts
as `_MOST` of the result and no more: an all-zero gradient is never within a budget.

Over a large vocabulary the target's entry is nearly all of a row's norm. So the entries of the
targets and the rest are compared apart, the rest row by row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# How far apart two results in bf16 may be which were added up in another order.
IN_ANOTHER_ORDER = torch.finfo(torch.bfloat16).eps

_FACTOR = 2.0
_MOST = 0.05


class Verdict(NamedTuple):
    """Relative errors of the row that comes nearest to its budget, or furthest past it."""

    error: float
    budget: float
    plain: float  # error of plain PyTorch

    @property
    def passed(self) -> bool:
        """Not "error > budget": NaN must not pass."""
        return self.error <= self.budget


def judge(found: Tensor, plain: Tensor, exact: Tensor, slack: float) -> Verdict:
    """Compare rows (R, n) by their L2 norms; the worst one decides."""
    if exact.numel() == 0:
        return Verdict(0.0, 0.0, 0.0)
    exact = exact.detach().double()
    size = exact.norm(dim=-1)
    errors = [
        (x.detach().double() - exact).norm(dim=-1) for x in (found, plain, exact.to(found.dtype))
    ]
    return _worst(*errors, size, slack)


def judge_values(found: Tensor, plain: Tensor, exact: Tensor, slack: float) -> Verdict:
    """Compare numbers by the largest error, relative to the largest of them, at least to 1: what
    they are sums of is of that order.
    """
    if exact.numel() == 0:
        return Verdict(0.0, 0.0, 0.0)
    exact = exact.detach().double().flatten()
    size = exact.abs().max().clamp(min=1.0)
    errors = [
        (x.detach().double().flatten() - exact).abs().max()
        for x in (found, plain, exact.to(found.dtype))
    ]
    return _worst(*(error[None] for error in errors), size[None], slack)


def _worst(error: Tensor, plain: Tensor, rounding: Tensor, size: Tensor, slack: float) -> Verdict:
    allowed = torch.minimum(plain.nan_to_num(0.0, 0.0), _MOST * size)
    budget = _FACTOR * torch.maximum(rounding, allowed) + slack * size
    share = torch.where(error == 0, 0.0, error / budget).nan_to_num(torch.inf, torch.inf)
    row = int(share.argmax())
    # Of a row that should be zero there is no relative error.
    unit = float(size[row]) or 1.0
    return Verdict(*(float(x[row]) / unit for x in (error, budget, plain)))


def split_logits(gradient: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The targets' entries of a (B, T, V) gradient as one row, and the rest of each row; of the
    rows with a target.
    """
    live = targets != -100
    rows, index = gradient[live], targets[live][:, None]
    return rows.gather(1, index).T, rows.scatter(1, index, 0.0)


def split_weight(gradient: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The targets' rows of a (V, H) gradient, and all other rows, each as one."""
    chosen = torch.zeros(gradient.shape[0], dtype=torch.bool, device=gradient.device)
    chosen[targets[targets != -100]] = True
    return gradient[chosen].flatten()[None], gradient[~chosen].flatten()[None]


def distance(found: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> float:
    """The largest relative difference of some results, a piece at a time for the sake of memory."""
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    largest = 0.0
    for x, y in zip(found, expected, strict=True):
        squares = [
            torch.stack([(a.float() - b.float()).square().sum(), b.float().square().sum()])
            for a, b in zip(x.split(256), y.split(256), strict=True)
        ]
        if squares:
            error, size = torch.stack(squares).sum(0).tolist()
            # Not max(), which may pass over NaN.
            share = (error / size) ** 0.5 if size else error
            largest = share if not share <= largest else largest
    return largest
