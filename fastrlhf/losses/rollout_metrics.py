"""Metrics of how far the policy that is trained is from the one that sampled.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

import torch
from torch import Tensor

from fastrlhf.losses.ratios import saturated
from fastrlhf.losses.rollout_tokens import (
    RolloutTokens,
    Units,
    bounded,
    rollout_tokens,
    sequence_means,
    sequence_units,
    token_units,
)
from fastrlhf.ops.ranks import Group
from fastrlhf.reference import expm1, expm1_minus

Metrics = dict[str, Tensor]


@torch.no_grad()
def rollout_metrics(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
) -> Metrics:
    """Measure how far the trainer's policy π is from μ, by which the inference engine sampled.

    Eager equivalent, with x = logprobs - rollout_logprobs and w = e^x::

        {"kl": -x[mask].mean(), "k3_kl": (w - 1 - x)[mask].mean(),
         "chi2_token": w[mask].square().mean() - 1, ...}

    Args:
        logprobs: (B, T) log-probs of the sampled tokens under π, in nats.
        rollout_logprobs: (B, T) as the engine reported them.
        mask: (B, T) bool or 0/1; what is outside can be anything.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last; with
            them, what is (B, T) is (N,) or (1, N).
        group: torch.distributed group over whose ranks the tokens of each sequence are spread, see
            `fastrlhf.losses.ranks`; None: all are here.

    Returns:
        Detached 0-d tensors, fp32 (fp64 if either is). Means over tokens: "rollout_corr/kl" and
        "rollout_corr/k3_kl", estimates of KL(μ‖π) in nats; "rollout_corr/chi2_token", w² - 1;
        "sampling/sampling_logp_difference/mean" and ".../max", of |x|. Means over the sequences
        that have tokens, of their means over tokens: "rollout_corr/training_ppl" and "rollout_ppl",
        perplexities e^-mean(ln π) and e^-mean(ln μ); "training_log_ppl" and "rollout_log_ppl",
        their logs; "log_ppl_diff", mean(-x), and "log_ppl_abs_diff", its absolute value;
        "ppl_ratio", e^mean(-x); and "chi2_seq", (Πw)² - 1 of the product over the sequence. 0 where
        there are no tokens. Logs of ratios and of perplexities end at ±80 (±700 in fp64), so that
        all is finite. None is differentiable.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; a group that is none.

    Source: Schulman, "Approximating KL divergence" (2020); the names are verl's and TRL's.

    Example:
        >>> rollout, logprobs = torch.tensor([[-1.0, -4.0]]), torch.tensor([[-1.1, -3.9]])
        >>> metrics = fastrlhf.rollout_metrics(logprobs, rollout, torch.ones(1, 2))
        >>> metrics["rollout_corr/k3_kl"]
        tensor(0.0050)
    """
    tokens = rollout_tokens(logprobs, rollout_logprobs, mask, cu_seqlens, group)
    return metrics_of_tokens(tokens)


def metrics_of_tokens(tokens: RolloutTokens) -> Metrics:
    """Compute what `rollout_metrics` returns."""
    token, sequence = token_units(tokens), sequence_units(tokens)
    x = bounded(tokens.log_ratio)
    log_ppl, rollout_log_ppl, log_ppl_diff = (
        bounded(-sequence_means(tokens, of))
        for of in (tokens.logprobs, tokens.rollout_logprobs, tokens.log_ratio)
    )
    of_product = tokens.layout.sums(tokens.log_ratio)
    metrics = {
        "kl": token.mean(-x),
        "k3_kl": token.mean(expm1_minus(x)),
        "chi2_token": token.mean(expm1(saturated(2 * x))),
        "chi2_seq": sequence.mean(expm1(saturated(2 * of_product))),
        "training_ppl": sequence.mean(log_ppl.exp()),
        "training_log_ppl": sequence.mean(log_ppl),
        "rollout_ppl": sequence.mean(rollout_log_ppl.exp()),
        "rollout_log_ppl": sequence.mean(rollout_log_ppl),
        "log_ppl_diff": sequence.mean(log_ppl_diff),
        "log_ppl_abs_diff": sequence.mean(log_ppl_diff.abs()),
        "ppl_ratio": sequence.mean(log_ppl_diff.exp()),
    }
    return {f"rollout_corr/{name}": value for name, value in metrics.items()} | {
        "sampling/sampling_logp_difference/mean": token.mean(x.abs()),
        "sampling/sampling_logp_difference/max": token.largest(x.abs()),
    }


def moments(x: Tensor, units: Units) -> Metrics:
    """Describe weights of at least 0: mean, standard deviation (of the whole: divided by n), min
    and max, and the effective sample size, as a share of n: (Σx)² / (n Σx²).
    """
    largest = units.largest(x)
    # Weights relative to the largest, since the squares of the weights might be inf.
    scale = torch.where(largest > 0, largest, 1.0)
    share = x / scale
    mean = units.mean(share)
    squares = units.mean(share.square())
    return {
        "mean": mean * scale,
        "std": units.mean((share - mean).square()).sqrt() * scale,
        "min": units.smallest(x),
        "max": largest,
        "eff_sample_size": mean.square() / torch.where(squares == 0, 1.0, squares),
    }
