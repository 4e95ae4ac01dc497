"""What a token of the vocabulary adds to a divergence of p and q: terms that are never negative.

The sums of p·ln(p/q) over nearly equal distributions would be small differences of large numbers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .effective_logits import row_sums
from .scalars import expm1_minus_by_series


def kl_terms(p: Tensor, q: Tensor, w: Tensor) -> Tensor:
    """Compute q - p + p·w with w = ln p - ln q: what a token adds to KL(p‖q), never negative.

    The sum of q - p is 0. Of p·w alone, the sum over nearly equal distributions is a small
    difference of large numbers. inf where q alone is 0, q where p is.
    """
    near = w.abs() < 1
    far = q - p + p * torch.where(p == 0, 0.0, w)
    return torch.where(near, p * expm1_minus_by_series(-w, near), far)


def log_to_mixture(gap: Tensor, share: float | Tensor, share_other: float | Tensor) -> Tensor:
    """Compute ln m - ln p, m = share·p + share_other·q, from the gap ln q - ln p."""
    # m / p - 1, which has its relative accuracy however small a share is, where it does not end.
    small = gap < 40
    near, moderate = gap.abs() < 1, torch.where(small, gap, 0.0)
    # The compiler's own expm1 is e^x - 1.
    by_series = expm1_minus_by_series(gap, near) + torch.where(near, gap, 0.0)
    excess = share_other * torch.where(near, by_series, torch.exp(moderate) - 1)
    small = small & (excess > -0.5)
    # By way of the larger of the two.
    smaller, more = torch.exp(-gap.abs()), gap > 0
    mixed = torch.where(more, share_other + share * smaller, share + share_other * smaller)
    by_the_larger = torch.where(more, gap, 0.0) + mixed.log()
    return torch.where(small, torch.log1p(torch.where(small, excess, 0.0)), by_the_larger)


class Shares(NamedTuple):
    """Of q and of p in a mixture: both, for in fp32 the one is not 1 minus the other."""

    q: float | Tensor
    p: float | Tensor


def both_shares(share: float | Shares) -> Shares:
    return share if isinstance(share, Shares) else Shares(share, 1 - share)


def jsd_terms(p: Tensor, q: Tensor, w: Tensor, share: float | Shares) -> Tensor:
    """Compute (1-share)·p·ln(p/m) + share·q·ln(q/m), with share of q in the mixture m and
    w = ln p - ln q: what a token adds to the JSD, never negative.
    """
    w = torch.where((p == 0) & (q == 0), 0.0, w)
    of = both_shares(share)
    return of.p * mixture_terms(p, -w, of.p, of.q) + of.q * mixture_terms(q, w, of.q, of.p)


def mixture_terms(
    own: Tensor, gap: Tensor, share: float | Tensor, share_other: float | Tensor
) -> Tensor:
    """Compute m - own + own·ln(own/m), from the gap ln other - ln own: what a token adds to
    KL(own‖m), never negative; but own·ln(own/m) alone where the gap is large, and m - own, whose
    sum weighted by the shares is 0, does not matter. 0 where own is.
    """
    to_mixture = torch.where(own == 0, 0.0, log_to_mixture(gap, share, share_other))
    near = gap.abs() < 0.5
    small = torch.where(near, to_mixture, 0.0)
    return own * torch.where(near, expm1_minus_by_series(small, near), -to_mixture)


@torch.no_grad()
def surplus(p: Tensor, q: Tensor, w: Tensor) -> Tensor:
    """Compute Σ(q - p) (...) with w = ln p - ln q: what the rounding of the normalisers makes of
    0.
    """
    near = w.abs() < 1
    difference = torch.where(near, p * (expm1_minus_by_series(-w, near) - w), q - p)
    return row_sums(difference).squeeze(-1)
