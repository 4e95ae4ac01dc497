"""Corrections for what an inference engine samples by, which is not the policy that is trained.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from fastrlhf.losses.ratios import saturated
from fastrlhf.losses.rollout_metrics import Metrics, metrics_of_tokens, moments
from fastrlhf.losses.rollout_tokens import (
    RolloutTokens,
    Units,
    rollout_tokens,
    sequence_means,
    sequence_sums,
    sequence_units,
    token_units,
)
from fastrlhf.ops.checks import check_bool, check_finite, check_one_of, check_positive
from fastrlhf.ops.ranks import Group

RolloutMode = Literal[
    "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_truncate",
    "geometric_mask",
]  # fmt: skip


@torch.no_grad()
def rollout_correction(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    mode: RolloutMode = "token_truncate",
    clip_max: float | None = 2.0,
    clip_min: float | None = None,
    batch_normalize: bool = False,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
) -> tuple[Tensor, Metrics]:
    """Compute importance weights π/μ for tokens that an inference engine sampled by μ, for
    `policy_loss(rollout_weights=...)`.

    Eager equivalent for the defaults: `(logprobs - rollout_logprobs).exp().clamp(max=2)`.

    Args:
        logprobs: (B, T) log-probs of the sampled tokens under the trainer's policy π, before the
            step that the loss is for: what `policy_loss` takes as old_logprobs, in nats.
        rollout_logprobs: (B, T) as the engine reported them.
        mask: (B, T) bool or 0/1, the tokens that count; what is outside can be anything.
        mode: what the ratio w is of, and what becomes of one that is out of bounds. "token": e^x of
            the token, x = logprobs - rollout_logprobs; "sequence": e^Σx of its sequence;
            "geometric": e^mean(x) of its sequence. "truncate" (TIS): w, but at most clip_max and at
            least clip_min; "mask" (MIS; with both bounds and tokens, IcePop): 0 out of bounds, w
            within. Bounds are within.
        clip_max: upper bound of w; None for none. (Of a geometric mean, which lies near 1, 1.001 is
            a usual bound, with a clip_min of 0.999.)
        clip_min: lower bound, likewise.
        batch_normalize: divide the weights by their mean over tokens, for "token", or over the
            sequences that have tokens.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last; with
            them, what is (B, T) is (N,) or (1, N).
        group: torch.distributed group over whose ranks the tokens of each sequence are spread, see
            `fastrlhf.losses.ranks`; None: all are here.

    Returns:
        weights: (B, T), fp32 (fp64 if either is), detached; 0 outside of the mask. Ratios end at
            e^80 (e^700 in fp64). A token that π rules out (-inf) has the ratio 0, and its sequence
            too; one that μ rules out alone, an infinite one, which the bound limits; one that both
            do, 1. NaN stays NaN.
        metrics: those of `rollout_metrics`, and detached 0-d tensors over tokens, or over sequences
            that have tokens: "rollout_corr/ratio_mean", "_std", "_min", "_max" of w;
            "rollout_corr/rollout_is_mean", "_std", "_min", "_max" of the weights, before they are
            normalised, and "rollout_is_eff_sample_size", (Σw)²/(nΣw²), from 1/n to 1;
            "rollout_is_ratio_fraction_high" and "_low", the shares out of either bound; and
            "rollout_is_batch_norm_factor", the mean that batch_normalize divides by.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; an unknown mode; bounds
            that are none, or in the wrong order; a group that is none.

    A sequence mask with token weights (seq-mask-TIS) is the product of these with a rejection::

        weights, _ = rollout_correction(logprobs, rollout_logprobs, mask)
        keep, _ = rollout_rejection(
            logprobs, rollout_logprobs, mask, level="sequence_mean", upper=0.001
        )
        loss, _ = policy_loss(..., rollout_weights=weights * keep)

    Source: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training"
    (fengyao.notion.site/off-policy-rl, TIS); Liu et al., "When speed kills stability"
    (richardli.xyz/rl-collapse, MIS and geometric means); IcePop: 2510.18855.

    Example:
        >>> rollout = torch.tensor([[-1.0, -2.0, -4.0]])  # from the engine that sampled
        >>> logprobs = torch.tensor([[-1.0, -1.9, -2.0]])  # from the trainer
        >>> weights, metrics = fastrlhf.rollout_correction(logprobs, rollout, torch.ones(1, 3))
        >>> weights
        tensor([[1.0000, 1.1052, 2.0000]])
    """
    check_one_of("mode", mode, get_args(RolloutMode))
    level, treatment = mode.split("_")
    least, most = _checked_bounds(clip_min, clip_max)
    check_bool("batch_normalize", batch_normalize)
    tokens = rollout_tokens(logprobs, rollout_logprobs, mask, cu_seqlens, group)
    log_ratio, units = _of_level(tokens, level)
    ratio = saturated(log_ratio).exp()
    low, high = ratio < least, ratio > most
    if_low, if_high = (least, most) if treatment == "truncate" else (0.0, 0.0)
    weights = torch.where(high, if_high, torch.where(low, if_low, ratio))
    metrics = metrics_of_tokens(tokens) | _weight_metrics(ratio, weights, low, high, units)
    if batch_normalize:
        mean = metrics["rollout_corr/rollout_is_mean"]
        factor = torch.where(mean == 0, 1.0, mean)
        weights, metrics["rollout_corr/rollout_is_batch_norm_factor"] = weights / factor, factor
    return torch.where(tokens.inside, units.on_tokens(weights), 0.0), metrics


def _of_level(tokens: RolloutTokens, level: str) -> tuple[Tensor, Units]:
    """Return log-ratios of tokens (B, T), or of sequences (B,), and what they belong to."""
    if level == "token":
        return tokens.log_ratio, token_units(tokens)
    reduce = sequence_sums if level == "sequence" else sequence_means
    return reduce(tokens, tokens.log_ratio), sequence_units(tokens)


def _checked_bounds(clip_min: float | None, clip_max: float | None) -> tuple[float, float]:
    """Return the bounds as numbers. Raise unless they are, in this order."""
    high = math.inf if clip_max is None else check_positive("clip_max", clip_max)
    low = 0.0 if clip_min is None else check_finite("clip_min", clip_min)
    if not 0 <= low <= high:
        raise ValueError(f"clip_min: expected a number in [0, clip_max], got {clip_min}")
    return low, high


def _weight_metrics(
    ratio: Tensor, weights: Tensor, low: Tensor, high: Tensor, units: Units
) -> Metrics:
    of_ratio, of_weights = moments(ratio, units), moments(weights, units)
    del of_ratio["eff_sample_size"]  # it is a property of weights, which the ratios are not
    return {
        **{f"rollout_corr/ratio_{name}": value for name, value in of_ratio.items()},
        **{f"rollout_corr/rollout_is_{name}": value for name, value in of_weights.items()},
        "rollout_corr/rollout_is_ratio_fraction_high": units.mean(high.to(ratio.dtype)),
        "rollout_corr/rollout_is_ratio_fraction_low": units.mean(low.to(ratio.dtype)),
    }
