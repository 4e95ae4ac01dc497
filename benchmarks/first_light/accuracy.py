"""Judge whether a result is as accurate as plain PyTorch's.

The error of a result is its distance from the same formula in fp64. The budget is twice the error
of plain PyTorch in the same dtype on the same machine, or twice the error of rounding the exact
result to that dtype if that is more. A few roundings are added, for cases in which the plain
formula happens to be exact. If the plain formula itself loses much, as fp16 does where it
underflows, its error counts as no more than `_MOST` of the result, so an all-zero gradient is never
within a budget.

Over a large vocabulary, the target's entry is nearly all of a row's norm and would hide errors of
the others. So the targets' entries and the rest are compared separately, the rest row by row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# How far apart two bf16 results may be whose sums were added up in different orders.
IN_ANOTHER_ORDER = torch.finfo(torch.bfloat16).eps

_FACTOR = 2.0
_MOST = 0.05


class Verdict(NamedTuple):
    """Relative errors of the worst row: the one with the largest ratio of error to budget."""

    error: float
    budget: float
    plain: float  # error of plain PyTorch

    @property
    def passed(self) -> bool:
        """Whether the error is within the budget. "not error > budget" would let NaN pass."""
        return self.error <= self.budget


def judge(found: Tensor, plain: Tensor, exact: Tensor, slack: float) -> Verdict:
    """Compare rows (R, n) by their L2 norms. The worst row decides."""
    if exact.numel() == 0:
        return Verdict(0.0, 0.0, 0.0)
    exact = exact.detach().double()
    size = exact.norm(dim=-1)
    errors = [
        (x.detach().double() - exact).norm(dim=-1) for x in (found, plain, exact.to(found.dtype))
    ]
    return _worst(*errors, size, slack)


def judge_values(found: Tensor, plain: Tensor, exact: Tensor, slack: float) -> Verdict:
    """Compare numbers by their largest error, relative to the largest number or to 1 if that is
    more.

    1 is the order of magnitude of the terms that were summed to these numbers.
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
    # A row that should be zero has no relative error; its absolute error is given.
    unit = float(size[row]) or 1.0
    return Verdict(*(float(x[row]) / unit for x in (error, budget, plain)))


def split_logits(gradient: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Split a (B, T, V) gradient into the targets' entries as one row, and the rest of each row.

    Rows without a target are left out.
    """
    live = targets != -100
    rows, index = gradient[live], targets[live][:, None]
    return rows.gather(1, index).T, rows.scatter(1, index, 0.0)


def split_weight(gradient: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Split a (V, H) gradient into the targets' rows and the others, each flattened to one row."""
    chosen = torch.zeros(gradient.shape[0], dtype=torch.bool, device=gradient.device)
    chosen[targets[targets != -100]] = True
    return gradient[chosen].flatten()[None], gradient[~chosen].flatten()[None]


def distance(found: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> float:
    """Return the largest relative difference of results, computed piecewise to save memory."""
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    largest = 0.0
    for x, y in zip(found, expected, strict=True):
        squares = [
            torch.stack([(a.float() - b.float()).square().sum(), b.float().square().sum()])
            for a, b in zip(x.split(256), y.split(256), strict=True)
        ]
        if squares:
            error, size = torch.stack(squares).sum(0).tolist()
            # max() is not used, because it may ignore NaN.
            share = (error / size) ** 0.5 if size else error
            largest = share if not share <= largest else largest
    return largest
