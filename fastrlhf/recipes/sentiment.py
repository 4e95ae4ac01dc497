"""Rate the sentiment of texts with VADER, and derive preferences from it.

VADER is a lexicon of words whose sentiment was rated by people.
"""

import math
from collections.abc import Sequence
from statistics import mean, variance
from typing import NamedTuple

from torch import Tensor
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from .sampling import Sample


class Pair(NamedTuple):
    """Two completions of one prompt, the one with the higher sentiment first."""

    chosen: Sample
    rejected: Sample


def accuracy(margins: Tensor) -> Tensor:
    """Compute the share of margins above 0. A tie counts one half, as a guess would on average."""
    return (margins > 0).float().mean() + 0.5 * (margins == 0).float().mean()


class Estimate(NamedTuple):
    """A mean with its standard error."""

    mean: float
    standard_error: float


def sentiments(samples: Sequence[Sample]) -> list[float]:
    """Rate each completion, without its prompt: VADER's compound score, from -1 to 1."""
    return vader([sample.completion for sample in samples])


def vader(texts: Sequence[str]) -> list[float]:
    """Rate texts: the compound score, from -1 (unkind) to 1 (kind)."""
    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


def preference_pairs(samples: Sequence[Sample], minimal_gap: float) -> list[Pair]:
    """Pair samples 0 and 1, 2 and 3, and so on, and order each pair by sentiment.

    The two samples of a pair must share their prompt.

    Pairs closer than `minimal_gap` are dropped: a tie carries no preference.
    """
    scores = sentiments(samples)
    pairs = []
    for first in range(0, len(samples) - 1, 2):
        second = first + 1
        if samples[first].prompt != samples[second].prompt:
            raise ValueError(f"samples: expected {first} and {second} to share their prompt")
        if abs(scores[first] - scores[second]) < minimal_gap:
            continue
        chosen, rejected = sorted((first, second), key=scores.__getitem__, reverse=True)
        pairs.append(Pair(samples[chosen], samples[rejected]))
    return pairs


def by_prompt(samples: Sequence[Sample], values: Sequence[float] | None = None) -> list[float]:
    """Average the values of all completions of each prompt. Values of None mean the sentiment.

    Completions of one prompt are not independent, but different prompts are. Standard errors are
    therefore computed over prompts.
    """
    values = sentiments(samples) if values is None else values
    grouped: dict[str, list[float]] = {}
    for sample, value in zip(samples, values, strict=True):
        grouped.setdefault(sample.prompt, []).append(value)
    return [mean(one) for one in grouped.values()]


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate a mean from n ≥ 2 independent values; its error is sqrt(sample variance / n)."""
    return Estimate(mean(values), math.sqrt(variance(values) / len(values)))
