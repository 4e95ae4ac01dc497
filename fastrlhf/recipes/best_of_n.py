"""Best of n, the baseline without training: sample n texts for a prompt, keep the kindest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .models import load_model, source_of
from .prompts import HELD_OUT_PROMPTS
from .run import Run
from .sampling import sample_completions
from .sentiment import Estimate, estimate, sentiments
from .settings import EvaluationOptions, Positive, option


@dataclass
class BestOfNOptions(EvaluationOptions):
    """Options of best of n."""

    best_of: Positive = option(16, "texts of each held-out prompt")


def train(options: BestOfNOptions) -> dict[str, Any]:
    """Sample from the reference model, and evaluate the best of 1, 2, 4, ... of its texts."""
    run = Run("best-of-n", options)
    model, tokenizer = load_model(source_of(options.model), run.device)
    prompts = HELD_OUT_PROMPTS[: options.eval_prompts]
    texts = [prompt for prompt in prompts for _ in range(options.best_of)]
    with run.report.phase("Sample held-out completions", len(texts)) as advance:
        samples = sample_completions(model, tokenizer, texts, options, options.seed, advance)
    scores = torch.tensor(sentiments(samples)).view(-1, options.best_of).tolist()
    for power in range(options.best_of.bit_length()):
        n = 2**power
        reward = best_of_n(scores, n)
        run.evaluations.append(
            {
                "step": n,
                "reward": reward.mean,
                "reward_error": reward.standard_error,
                "kl": kl_of_best_of_n(n),
                "kl_error": 0.0,
            }
        )
    return run.finish()


def best_of_n(scores: Sequence[Sequence[float]], n: int) -> Estimate:
    """Estimate the mean reward of the best of n, over prompts.

    Args:
        scores: for each prompt, the scores of N ≥ n independent completions.
        n: the number of completions of which the best is kept.

    The mean of a prompt is taken over all subsets of n of its N scores. The k-th smallest score is
    the best of C(k - 1, n - 1) of these subsets.
    """
    means = []
    for of_prompt in scores:
        total = math.comb(len(of_prompt), n)
        ordered = sorted(of_prompt)
        weights = [math.comb(rank, n - 1) / total for rank in range(len(ordered))]
        means.append(sum(w * score for w, score in zip(weights, ordered, strict=True)))
    return estimate(means)


def kl_of_best_of_n(n: int) -> float:
    """Bound the KL from best of n to the sampled model: ln n - (n - 1)/n nats a text.

    The bound equals the KL if scores are continuous, so that no two texts have the same score. Here
    the same text can be drawn twice, so the KL is less than the bound (arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n
