"""The policy-gradient losses of PPO, GRPO and their relatives, from log-probs of tokens.

The loss of a token is its surrogate, plus a KL penalty, minus an entropy bonus; the loss of a batch
is a weighted sum, with weights that the mask alone decides. That is why the same functions serve
the forms that start from logits or from hidden states, in `fused_policy.py`.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

from typing import Any

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_tokens
from fastrlhf.losses.penalties import KL_ESTIMATORS
from fastrlhf.losses.policy_arguments import PolicyBatch, PolicyOptions, policy_batch
from fastrlhf.losses.ratios import saturated
from fastrlhf.losses.reduce import masked_mean
from fastrlhf.losses.surrogates import SURROGATES
from fastrlhf.ops import PolicyTokens
from fastrlhf.ops.checks import check_floating, check_one_of, check_same_device, check_shape
from fastrlhf.ops.ranks import Group
from fastrlhf.reference import accumulation_dtype

Metrics = dict[str, Tensor]


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    surrogate: str = "clip",
    ratio_level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    rollout_weights: Tensor | None = None,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
) -> tuple[Tensor, Metrics]:
    """Compute a policy-gradient loss with its KL penalty and entropy bonus, reduced to one number.

    Eager equivalent for the defaults, PPO's clipped surrogate::

        ratio = (logprobs - old_logprobs).exp()
        losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        losses += kl_coef * kl_penalty(logprobs, ref_logprobs, "k3") - entropy_coef * entropy
        loss = losses[mask].mean()

    Args:
        logprobs: (B, T) log-probs of the tokens under the policy that is trained, in nats.
        old_logprobs: (B, T) under the policy that sampled them; None for the same policy (ratio 1).
        advantages: (B, T), or (B,) one for each sequence.
        mask: (B, T) bool or 0/1, the tokens that count. All other entries of all tensors can hold
            anything.
        surrogate: with r = π/π_old: "clip" -min(r·A, clip(r, 1-clip_low, 1+clip_high)·A); "cispo"
            -sg(min(r, 1+clip_high))·A·ln π; "sapo" -(4/τ)·σ(τ(r-1))·A; "plain" -A·ln π (REINFORCE).
        ratio_level: "token", or "sequence": every token has the ratio e^mean(ln π - ln π_old) of
            its sequence (GSPO).
        clip_low, clip_high: offsets from 1, for every surrogate. (Some libraries give cispo's
            bound itself: 5.0 there is 4.0 here.)
        dual_clip: bound c > 1 of the ratio where A < 0, for "clip".
        ref_logprobs: (B, T) under the reference policy, for the penalty; without a kl_coef, for its
            metric.
        kl_coef, kl_estimator: weight and kind of the penalty, see `kl_penalty`. (TRL's
            use_bias_correction_kl multiplies it by the ratio besides, which this does not.)
        entropy: (B, T) entropy of the policy at each token, in nats; for the bonus or its metric.
        entropy_coef: weight of the entropy bonus, which is reduced as the surrogate is.
        rollout_weights: (B, T), (B,) or (B, 1), at least 0: importance weights for the difference
            between the sampler's log-probs and old_logprobs. They multiply the advantage, and so
            the surrogate, but not the penalty.
        reduction: "token-mean" over all tokens; "sequence-mean" of the means over tokens;
            "sequence-sum", the mean over sequences of the sums over tokens; "constant", the sum
            divided by normalizer. Means over sequences count all B.
        normalizer: positive number, or 0-d tensor (whose value is not checked), that replaces the
            denominator: of tokens for token-mean, of sequences for the sequence reductions. Give
            the count of the global batch, where a batch is spread over steps or devices: see
            `global_normalizer`.
        sapo_temperatures: τ where A > 0, and where not.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last. With
            them, what is (B, T) is (N,) or (1, N); advantages and rollout_weights of that shape are
            of tokens, others of sequences.
        group: torch.distributed group over whose ranks the tokens of each sequence are spread, see
            `fastrlhf.losses.ranks`; None: all are here.

    Returns:
        loss: 0-d, fp32 (fp64 for fp64 log-probs).
        metrics: detached 0-d tensors. "clip_ratio/low_mean", "clip_ratio/high_mean" and
            "clip_ratio/region_mean": share of tokens (for the sequence ratio, of sequences that
            have tokens) whose ratio is clipped from below with A < 0, from above with A > 0, or
            either, A with its rollout weight; "policy/approxkl_avg": mean of (ln π - ln π_old)²/2
            over the tokens with a nonzero advantage (for the sequence ratio, of sequences that have
            one); "kl" and "entropy": means over all tokens, where their tensors are given.

    Differentiable, twice if need be, with respect to logprobs and entropy; everything else counts
    as constant. Log-ratios end at 80 (700 in fp64), so that no policy, however far, makes inf·0. A
    batch without tokens has loss 0 and gradient 0.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; an option out of range; a
            missing ref_logprobs, entropy or normalizer; a group that is none.

    Source: 1707.06347 Eq. 7; dual clip 1912.09729; 2507.18071 Eq. 5 to 7; 2506.13585; 2511.20347.
    """
    options = PolicyOptions(
        surrogate, ratio_level, clip_low, clip_high, dual_clip, kl_coef, kl_estimator,
        entropy_coef, reduction, normalizer, sapo_temperatures,
    ).checked()  # fmt: skip
    layout = check_tokens("logprobs", logprobs, mask, cu_seqlens, group)
    if entropy is not None:
        check_floating("entropy", entropy)
        check_shape("entropy", entropy, tuple(mask.shape), "the shape of mask")
        check_same_device("entropy", entropy, "mask", mask)
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy: expected a tensor for entropy_coef {entropy_coef}, got None")
    batch = policy_batch(
        options, logprobs.dtype, mask, old_logprobs, advantages, ref_logprobs, rollout_weights,
        with_entropy=entropy is not None, layout=layout,
    )  # fmt: skip
    dtype = accumulation_dtype(logprobs.dtype)
    logprobs = torch.where(batch.mask, logprobs, 0.0).to(dtype)
    if entropy is not None:
        entropy = torch.where(batch.mask, entropy, 0.0).to(dtype)
    loss = reduced_loss(options, batch, logprobs, entropy)
    return loss, policy_metrics(options, batch, logprobs, entropy)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """Compute PPO's clipped loss: `policy_loss` with surrogate "clip", with its other options,
    returns and errors.

    Eager equivalent: `-torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A)[mask].mean()`. Source:
    1707.06347 Eq. 7.
    """
    if "surrogate" in options:
        raise TypeError(
            'ppo_loss: unexpected option surrogate; it is "clip", policy_loss has others'
        )
    return policy_loss(logprobs, old_logprobs, advantages, mask, surrogate="clip", **options)


# What tells the members of GRPO's family apart, with the bounds that their papers took.
_GRPO: dict[str, dict[str, Any]] = {
    "grpo": {"reduction": "sequence-mean"},
    "bnpo": {"reduction": "token-mean"},
    "dr_grpo": {"reduction": "constant"},
    "dapo": {"reduction": "token-mean", "clip_high": 0.28},
    "gspo": {
        "ratio_level": "sequence", "reduction": "sequence-mean",
        "clip_low": 3e-4, "clip_high": 4e-4,
    },
    "cispo": {"surrogate": "cispo", "reduction": "token-mean", "clip_high": 4.0},
    "sapo": {"surrogate": "sapo", "reduction": "sequence-mean"},
}  # fmt: skip


def grpo_options(loss_type: str, **changes: Any) -> dict[str, Any]:
    """Return the options of `policy_loss` that a member of GRPO's family consists of.

    They serve its fused forms too: `linear_policy_loss(..., **grpo_options("gspo"))`. What is
    passed besides replaces or joins them: `grpo_options("dapo", clip_high=0.3, kl_coef=0.01)`.

    Args:
        loss_type: "grpo" (2402.03300): mean over tokens, then over sequences. "bnpo": mean over the
            tokens of the batch. "dr_grpo" (2503.20783): sum divided by a constant, `normalizer`,
            which is B times the longest completion allowed. "dapo" (2503.14476): clip_high 0.28 and
            mean over tokens, those of the global batch if `normalizer` counts them. "gspo"
            (2507.18071): the sequence's ratio, clipped at 3e-4 and 4e-4. "cispo" (2506.13585):
            ratio detached and at most 5 (clip_high 4; that bound is of 2510.13786). "sapo"
            (2511.20347): a sigmoid for a clip.

    Raises:
        ValueError: an unknown loss_type.
    """
    check_one_of("loss_type", loss_type, _GRPO)
    return {**_GRPO[loss_type], **changes}


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "dapo",
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """Compute a loss of GRPO's family: `policy_loss` with `grpo_options(loss_type)`.

    Eager equivalent: `policy_loss(..., **grpo_options(loss_type, **options))`, with its
    arguments, returns and errors. Advantages come from `group_advantages`; the papers' penalty is
    ref_logprobs and a kl_coef (0.04 in 2402.03300), which is 0 here unless given.
    """
    recipe = grpo_options(loss_type, **options)
    return policy_loss(logprobs, old_logprobs, advantages, mask, **recipe)


def reduced_loss(
    options: PolicyOptions, batch: PolicyBatch, logprobs: Tensor, entropy: Tensor | None
) -> Tensor:
    """Sum the weighted losses of all tokens, from log-probs that are 0 outside the mask."""
    log_ratio = _log_ratio(options, batch, logprobs)
    losses = token_losses(options, batch.tokens, logprobs, entropy, log_ratio)
    return batch.layout.total(losses * batch.tokens.weights)


def token_losses(
    options: PolicyOptions,
    tokens: PolicyTokens,
    logprobs: Tensor,
    entropy: Tensor | None,
    log_ratio: Tensor,
) -> Tensor:
    """Compute the loss of each token, of whatever shape the tokens are."""
    formula = SURROGATES[options.surrogate].formula
    # Without an advantage, what a token was sampled with must not matter: 0·NaN would.
    log_ratio = torch.where(tokens.advantages == 0, 0.0, log_ratio)
    losses = formula(log_ratio, logprobs, tokens.advantages, options.bounds)
    if options.kl_coef != 0:
        assert tokens.ref_logprobs is not None
        kl = KL_ESTIMATORS[options.kl_estimator](tokens.ref_logprobs - logprobs)
        losses = losses + options.kl_coef * kl
    if options.entropy_coef != 0:
        assert entropy is not None
        losses = losses - options.entropy_coef * entropy
    return losses


def token_log_ratio(tokens: PolicyTokens, logprobs: Tensor) -> Tensor:
    """Compute ln π - ln π_old of each token; 0, but with its gradient, where π_old is π."""
    if tokens.old_logprobs is None:
        # A token that both forbid has the ratio 1 too.
        logprobs = torch.where(logprobs == -torch.inf, 0.0, logprobs)
        return logprobs - logprobs.detach()
    return logprobs - tokens.old_logprobs


def _log_ratio(options: PolicyOptions, batch: PolicyBatch, logprobs: Tensor) -> Tensor:
    of_tokens = token_log_ratio(batch.tokens, logprobs)
    if options.ratio_level == "token":
        return of_tokens
    lengths = batch.layout.counts(batch.mask).clamp(min=1)
    mean = batch.layout.sums(torch.where(batch.mask, of_tokens, 0.0)) / lengths
    return batch.layout.spread(mean).expand(logprobs.shape)


@torch.no_grad()
def policy_metrics(
    options: PolicyOptions, batch: PolicyBatch, logprobs: Tensor, entropy: Tensor | None
) -> Metrics:
    """Compute the metrics of `policy_loss` from log-probs, which inactive tokens need not have."""
    mask, scored, active, tokens, layout = batch
    logprobs = torch.where(active, logprobs, 0.0)
    ratio = saturated(_log_ratio(options, batch, logprobs)).exp()
    surrogate = SURROGATES[options.surrogate]
    nowhere = torch.zeros_like(scored)
    low, high = nowhere, nowhere
    if surrogate.clips_low:
        low = scored & (ratio < 1 - options.clip_low) & (tokens.advantages < 0)
    if surrogate.clips_high:
        high = scored & (ratio > 1 + options.clip_high) & (tokens.advantages > 0)
    squares = token_log_ratio(tokens, logprobs).square() / 2
    metrics = {
        "clip_ratio/low_mean": _share(options, batch, low, ratio.dtype),
        "clip_ratio/high_mean": _share(options, batch, high, ratio.dtype),
        "clip_ratio/region_mean": _share(options, batch, low | high, ratio.dtype),
        "policy/approxkl_avg": masked_mean(squares, scored, layout),
    }
    if tokens.ref_logprobs is not None:
        kl = KL_ESTIMATORS[options.kl_estimator](tokens.ref_logprobs - logprobs)
        metrics["kl"] = masked_mean(kl, mask, layout)
    if entropy is not None:
        metrics["entropy"] = masked_mean(entropy, mask, layout)
    return metrics


def _share(
    options: PolicyOptions, batch: PolicyBatch, clipped: Tensor, dtype: torch.dtype
) -> Tensor:
    """Share of the clipped tokens, or of clipped sequences where they share a ratio."""
    if options.ratio_level == "token":
        return masked_mean(clipped.to(dtype), batch.mask, batch.layout)
    lengths = batch.layout.counts(batch.mask)
    of_sequences = batch.layout.counts(clipped).to(dtype) / lengths.clamp(min=1)
    return masked_mean(of_sequences, lengths > 0)
