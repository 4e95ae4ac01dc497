"""What each word of the vocabulary adds to a divergence of p and q: terms that are never negative.

For nearly equal distributions, the terms p·ln(p/q) have both signs, and their sum would be a small
difference of large numbers. q - p, whose sum is 0, is added to each term to prevent that.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .effective_logits import row_sums
from .scalars import expm1_minus_by_series


def kl_terms(p: Tensor, q: Tensor, w: Tensor) -> Tensor:
    """Compute q - p + p·w with w = ln p - ln q: what a word adds to KL(p‖q), never negative.

    The sum of q - p is 0; the sum of p·w alone would be a small difference of large numbers for
    nearly equal distributions. A term is inf where only q is 0, and q where p is 0.
    """
    near = w.abs() < 1
    far = q - p + p * torch.where(p == 0, 0.0, w)
    return torch.where(near, p * expm1_minus_by_series(-w, near), far)


def log_to_mixture(gap: Tensor, share: float | Tensor, share_other: float | Tensor) -> Tensor:
    """Compute ln m - ln p, m = share·p + share_other·q, from the gap ln q - ln p."""
    # m / p - 1 is accurate relative to itself, however small a share is. It is used where it does
    # not overflow and is above -0.5.
    small = gap < 40
    near, moderate = gap.abs() < 1, torch.where(small, gap, 0.0)
    # Not torch.expm1: PyTorch's compiler would make e^x - 1 of it, which cancels.
    by_series = expm1_minus_by_series(gap, near) + torch.where(near, gap, 0.0)
    excess = share_other * torch.where(near, by_series, torch.exp(moderate) - 1)
    small = small & (excess > -0.5)
    # Elsewhere the larger of p and q is factored out of m.
    smaller, more = torch.exp(-gap.abs()), gap > 0
    mixed = torch.where(more, share_other + share * smaller, share + share_other * smaller)
    by_the_larger = torch.where(more, gap, 0.0) + mixed.log()
    return torch.where(small, torch.log1p(torch.where(small, excess, 0.0)), by_the_larger)


class Shares(NamedTuple):
    """The shares of q and of p in a mixture. Both are given, since 1 minus one of them would not be
    the other in fp32.
    """

    q: float | Tensor
    p: float | Tensor


def both_shares(share: float | Shares) -> Shares:
    return share if isinstance(share, Shares) else Shares(share, 1 - share)


def jsd_terms(p: Tensor, q: Tensor, w: Tensor, share: float | Shares) -> Tensor:
    """Compute what a word adds to the JSD, (1-share)·p·ln(p/m) + share·q·ln(q/m), never negative;
    `share` is that of q in the mixture m, and w = ln p - ln q.
    """
    w = torch.where((p == 0) & (q == 0), 0.0, w)
    of = both_shares(share)
    return of.p * mixture_terms(p, -w, of.p, of.q) + of.q * mixture_terms(q, w, of.q, of.p)


def mixture_terms(
    own: Tensor, gap: Tensor, share: float | Tensor, share_other: float | Tensor
) -> Tensor:
    """Compute m - own + own·ln(own/m), from the gap ln other - ln own: what a word adds to
    KL(own‖m), never negative. Where the gap is large, own·ln(own/m) alone is computed: m - own can
    be left out, since its sum over both sides, weighted by their shares, is 0. The term is 0 where
    own is 0.
    """
    to_mixture = torch.where(own == 0, 0.0, log_to_mixture(gap, share, share_other))
    near = gap.abs() < 0.5
    small = torch.where(near, to_mixture, 0.0)
    return own * torch.where(near, expm1_minus_by_series(small, near), -to_mixture)


@torch.no_grad()
def surplus(p: Tensor, q: Tensor, w: Tensor) -> Tensor:
    """Compute Σ(q - p) (...) with w = ln p - ln q, which would be 0 if the normalisers were not
    rounded.
    """
    near = w.abs() < 1
    difference = torch.where(near, p * (expm1_minus_by_series(-w, near) - w), q - p)
    return row_sums(difference).squeeze(-1)
