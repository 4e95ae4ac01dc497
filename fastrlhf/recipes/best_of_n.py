"""Best of n, the baseline without training: sample n texts of a prompt, keep the kindest."""

import math
from collections.abc import Sequence

from .sentiment import Estimate, estimate


def best_of_n(scores: Sequence[Sequence[float]], n: int) -> Estimate:
    """Estimate the mean reward of the best of n, over prompts.

    Args:
        scores: of each prompt, the scores of N ≥ n independent completions.
        n: how many are chosen from.

    Each prompt's mean is over all subsets of n of its N scores: the k-th smallest is the best of
    C(k - 1, n - 1) of them.
    """
    means = []
    for of_prompt in scores:
        total = math.comb(len(of_prompt), n)
        ordered = sorted(of_prompt)
        weights = [math.comb(rank, n - 1) / total for rank in range(len(ordered))]
        means.append(sum(w * score for w, score in zip(weights, ordered, strict=True)))
    return estimate(means)


def kl_of_best_of_n(n: int) -> float:
    """Bound the KL of best of n to the model itself: ln n - (n - 1)/n nats a text.

    It is the KL itself where no two texts have the same score, and otherwise more than it
    (arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n
