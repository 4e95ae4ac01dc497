"""Tokens and sequences that are left out because the policy that sampled them is too far from the
one that is trained.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from fastrlhf.losses.penalties import KL_ESTIMATORS
from fastrlhf.losses.ratios import saturated
from fastrlhf.losses.rollout_metrics import Metrics
from fastrlhf.losses.rollout_tokens import (
    RolloutTokens,
    Units,
    rollout_tokens,
    sequence_means,
    sequence_sums,
    sequence_units,
    token_units,
)
from fastrlhf.ops.checks import check_between, check_finite, check_one_of, check_positive
from fastrlhf.ops.ranks import Group

RejectionLevel = Literal["token", "sequence_mean", "sequence_sum", "sequence_max"]
RejectionEstimator = Literal["k1", "k2", "k3"]


@torch.no_grad()
def rollout_rejection(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    level: RejectionLevel = "token",
    estimator: RejectionEstimator = "k1",
    upper: float,
    lower: float | None = None,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
) -> tuple[Tensor, Metrics]:
    """Find the tokens, or whole sequences, at which π is not too far from the μ that sampled.

    Eager equivalent for the defaults: `mask & ((rollout_logprobs - logprobs).abs() <= upper)`.

    Args:
        logprobs, rollout_logprobs, mask, cu_seqlens, group: see `rollout_correction`.
        level: of "token" each by its own estimate; of a sequence all by the mean of its tokens'
            estimates, their sum, or the largest: "sequence_max" keeps a sequence if each of its
            tokens is within the bounds.
        estimator: with x = logprobs - rollout_logprobs: "k1" -x; "k2" x²/2; "k3" e^x - 1 - x.
        upper: the largest estimate of KL(μ‖π) that is kept, in nats.
        lower: the smallest, for k1: -upper for None, -math.inf for none. k2 and k3 take None.

    Returns:
        keep: (B, T) bool, False outside of the mask. As a mask of a loss (`mask=keep`), what is
            rejected does not count in means; as weights (`rollout_weights=keep`, or times those of
            `rollout_correction`) it counts as 0. An estimate of NaN is not kept; nor is a token
            that π rules out, and μ does not, by any level or estimator.
        metrics: detached 0-d tensors, with names that start with "rollout_corr/rollout_rs_token_k1"
            or "rollout_corr/rollout_rs_seq_mean_k1" and the like: "_mean", "_min" and "_max" of
            the estimates of tokens, or of sequences that have tokens (for "sequence_max", of their
            tokens), which end at ±e^80 (e^700 in fp64); "_fraction_high" and "_fraction_low", the
            shares of them out of either bound; "_masked_fraction", the share of the mask's tokens
            that is rejected; "_seq_masked_fraction", that of the sequences that lose a token.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; an unknown level or
            estimator; bounds that are none, or in the wrong order, or a lower one where there is
            none; a group that is none.

    Source: Liu et al., "When speed kills stability" (richardli.xyz/rl-collapse); Schulman,
    "Approximating KL divergence" (2020).

    Example:
        >>> rollout, logprobs = torch.tensor([[-1.0, -4.0]]), torch.tensor([[-1.1, -2.0]])
        >>> mask = torch.ones(1, 2)
        >>> keep, metrics = fastrlhf.rollout_rejection(logprobs, rollout, mask, upper=0.5)
        >>> keep
        tensor([[ True, False]])
    """
    check_one_of("level", level, get_args(RejectionLevel))
    check_one_of("estimator", estimator, get_args(RejectionEstimator))
    low, high = _checked_estimates(lower, upper, estimator)
    tokens = rollout_tokens(logprobs, rollout_logprobs, mask, cu_seqlens, group)
    estimates, units = KL_ESTIMATORS[estimator](tokens.log_ratio), token_units(tokens)
    if level in ("sequence_mean", "sequence_sum"):
        reduce = sequence_means if level == "sequence_mean" else sequence_sums
        estimates, units = reduce(tokens, estimates), sequence_units(tokens)
    keep = tokens.inside & units.on_tokens((estimates >= low) & (estimates <= high))
    if level == "sequence_max":
        complete = tokens.layout.counts(tokens.inside & ~keep) == 0
        keep = tokens.inside & sequence_units(tokens).on_tokens(complete)
    metrics = _estimate_metrics(estimates, low, high, units) | _rejected(tokens, keep)
    name = f"rollout_corr/rollout_rs_{level.replace('sequence', 'seq')}_{estimator}"
    return keep, {f"{name}_{key}": value for key, value in metrics.items()}


def _checked_estimates(lower: float | None, upper: float, estimator: str) -> tuple[float, float]:
    """Return the bounds as numbers. Raise unless they are, in this order."""
    if estimator != "k1":
        if lower is not None:
            raise ValueError(
                f"lower: expected None for estimator {estimator!r}, which is never below 0, got "
                f"{lower}"
            )
        return -math.inf, check_positive("upper", upper)
    high = check_finite("upper", upper)
    if lower is None:
        return -check_positive("upper", upper), high
    return check_between("lower", lower, -math.inf, high), high


def _estimate_metrics(estimates: Tensor, low: float, high: float, units: Units) -> Metrics:
    most = saturated(estimates.new_full((), torch.inf)).exp()
    x = estimates.clamp(-most, most)
    return {
        "mean": units.mean(x),
        "min": units.smallest(x),
        "max": units.largest(x),
        "fraction_high": units.mean((estimates > high).to(x.dtype)),
        "fraction_low": units.mean((estimates < low).to(x.dtype)),
    }


def _rejected(tokens: RolloutTokens, keep: Tensor) -> Metrics:
    rejected = tokens.inside & ~keep
    losing = tokens.layout.counts(rejected) > 0
    dtype = tokens.logprobs.dtype
    return {
        "masked_fraction": token_units(tokens).mean(rejected.to(dtype)),
        "seq_masked_fraction": sequence_units(tokens).mean(losing.to(dtype)),
    }
