"""Log-probs of pairs whose lengths are to matter less: LD-DPO.

Used by `pair_scores.py` alone.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed, P pairs.
"""

import torch
from torch import Tensor

from fastrlhf.losses.segments import suffix_scan
from fastrlhf.reference import Layout, masked_sum


def length_desensitized(
    x: Tensor, mask: Tensor, pair: tuple[Tensor, Tensor], alpha: float, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Sum numbers of tokens (B, T) for both sequences of each pair (P,), those beyond the public
    length of the pair, which is the shorter one's, weighed by α: 2409.06411.
    """
    counts, sums = layout.counts(mask), masked_sum(x, mask, layout)
    public = torch.minimum(*(counts[i] for i in pair))
    chosen, rejected = (
        _weighed(sums[i], first, alpha)
        for i, first in zip(pair, _first_tokens(x, mask, public, pair, layout), strict=True)
    )
    return chosen, rejected


def _weighed(all_tokens: Tensor, first: Tensor, alpha: float) -> Tensor:
    # Without the factors 0 and 1: 0 times an infinite log-prob would be NaN.
    if alpha in (0, 1):
        return all_tokens if alpha else first
    return alpha * all_tokens + (1 - alpha) * first


def _first_tokens(
    x: Tensor, mask: Tensor, count: Tensor, pair: tuple[Tensor, Tensor], layout: Layout
) -> list[Tensor]:
    """Sum the first `count` (P,) tokens of the mask of each sequence of the pairs: 2 of (P,)."""
    inside = (mask != 0).reshape(-1)
    values = torch.where(inside, x.reshape(-1), 0.0)
    ids = layout.ids(mask).reshape(-1)
    # The sum of the values of a sequence up to each of its tokens, (N,).
    up_to = suffix_scan(torch.add, values.flip(0), ids.flip(0)).flip(0)
    up_to = torch.cat((up_to.new_zeros(1), up_to))
    # counted: of the tokens of the mask in all sequences, how many there are up to each position.
    # Where it reaches those of the sequences before, and `count` more, is the token to stop at.
    counted, counts = inside.cumsum(0), layout.counts(mask)
    before = counts.cumsum(0) - counts
    places = (torch.searchsorted(counted, before[i] + count) + 1 for i in pair)
    return [up_to[torch.where(count > 0, place, 0)] for place in places]
