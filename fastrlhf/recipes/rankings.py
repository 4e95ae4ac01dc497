"""Completions of one prompt in the order of their sentiment."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from .sampling import Sample
from .sentiment import accuracy, sentiments


class Ranking(NamedTuple):
    """Completions of one prompt, the kindest first, and VADER's scores of them."""

    samples: list[Sample]
    sentiment: list[float]


def ranked(samples: Sequence[Sample], size: int, minimal_gap: float) -> list[Ranking]:
    """Order each group of `size` successive completions by sentiment.

    A completion is dropped if its score is less than `minimal_gap` below the last one kept.
    Rankings of fewer than two completions are dropped too.
    """
    scores = sentiments(samples)
    rankings = []
    for first in range(0, len(samples), size):
        kept: list[int] = []
        for index in sorted(range(first, first + size), key=scores.__getitem__, reverse=True):
            if not kept or scores[kept[-1]] - scores[index] >= minimal_gap:
                kept.append(index)
        if len(kept) > 1:
            rankings.append(Ranking([samples[i] for i in kept], [scores[i] for i in kept]))
    return rankings


def pairs_in_order(scores: Tensor) -> Tensor:
    """Compute the share of pairs in order; scores (k,) are those of a ranking, best first."""
    return accuracy(torch.stack([a - b for a, b in combinations(scores, 2)]))
