"""Sentiment of texts by VADER, a lexicon that people rated, and the preferences that it implies."""

import math
from collections.abc import Sequence
from statistics import mean, variance
from typing import NamedTuple

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from .sampling import Sample


class Pair(NamedTuple):
    """Two completions of one prompt, the one with the higher sentiment first."""

    chosen: Sample
    rejected: Sample


class Estimate(NamedTuple):
    """A mean with its standard error."""

    mean: float
    standard_error: float


def sentiments(samples: Sequence[Sample]) -> list[float]:
    """Rate each completion, without its prompt: VADER's compound score, from -1 to 1."""
    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(sample.completion)["compound"] for sample in samples]


def preference_pairs(samples: Sequence[Sample], minimal_gap: float) -> list[Pair]:
    """Pair samples 0 and 1, 2 and 3, ..., each two of one prompt, and order each pair by sentiment.

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


def by_prompt(samples: Sequence[Sample]) -> list[float]:
    """Average the sentiment of all the completions of each prompt.

    Completions of one prompt are not independent; prompts are, so errors are counted over them.
    """
    grouped: dict[str, list[float]] = {}
    for sample, score in zip(samples, sentiments(samples), strict=True):
        grouped.setdefault(sample.prompt, []).append(score)
    return [mean(scores) for scores in grouped.values()]


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate a mean from at least two independent values: error sqrt(sample variance / n)."""
    return Estimate(mean(values), math.sqrt(variance(values) / len(values)))
