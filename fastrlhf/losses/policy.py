"""The policy-gradient losses of PPO, GRPO and their relatives, from log-probs of tokens.

The loss of a token is its surrogate, plus a KL penalty, minus an entropy bonus; the loss of a batch
is a weighted sum, with weights that the mask alone decides. That is why the same functions serve
the forms that start from logits or from hidden states, in `fused_policy.py`.

Three functions are called `policy_loss`. The one here is what users call: it takes log-probs, and
is plain PyTorch. `fastrlhf.ops.policy_loss.policy_loss` is the operation that takes logits and
makes the gradient along with the loss, for `logits_policy_loss` on a GPU; it calls the launcher of
the kernel, `fastrlhf.kernels.policy_loss.policy_loss`.

`policy_options.py` and `policy_arguments.py` check what is given here, `surrogates.py` has the
surrogates, `penalties.py` the KL penalties, `reduce.py` the weights.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_like, check_tokens
from fastrlhf.losses.penalties import KL_ESTIMATORS, importance_corrected
from fastrlhf.losses.policy_arguments import PolicyBatch, PolicyTensors, SequenceSums, policy_batch
from fastrlhf.losses.policy_options import (
    OPTIONAL_ARGUMENTS,
    PolicyArguments,
    PolicyLossOptions,
    PolicyOptions,
)
from fastrlhf.losses.reduce import masked_mean
from fastrlhf.losses.signatures import showing
from fastrlhf.losses.surrogates import SURROGATES, bounded_one_by_one
from fastrlhf.ops import PolicyTokens
from fastrlhf.ops.checks import check_floating
from fastrlhf.ops.keywords import Unpack
from fastrlhf.ops.ranks import Group
from fastrlhf.reference import accumulation_dtype

Metrics = dict[str, Tensor]

_PPO_DEFAULTS = {**OPTIONAL_ARGUMENTS, **PolicyOptions()._asdict()}
del _PPO_DEFAULTS["surrogate"]


@showing(PolicyLossOptions, PolicyOptions()._asdict())
def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
    **policy_options: Unpack[PolicyLossOptions],
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
        ref_logprobs: (B, T) under the reference policy, for the penalty; without a kl_coef, for its
            metric.
        entropy: (B, T) entropy of the policy at each token, in nats; for the bonus or its metric.
        rollout_weights: (B, T), (B,) or (B, 1), at least 0: importance weights for the difference
            between the sampler's log-probs and old_logprobs (`rollout_correction`), or 0 and 1 for
            tokens to leave out, which the denominator still counts (`top_entropy_mask`,
            `clip_cov_mask`). They multiply the advantage, and so the surrogate, but not the
            penalty.
        kl_weights: likewise, of the penalty of each token: with `kl_cov_mask`, KL-Cov.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last. With
            them, what is (B, T) is (N,) or (1, N); advantages and weights of that shape are of
            tokens, others of sequences.
        group: torch.distributed group over whose ranks the tokens of each sequence are spread, see
            `fastrlhf.losses.ranks`; None: all are here.

    Options, which every form of this loss takes, and `grpo_options` names sets of:
        surrogate: with r = π/π_old: "clip" (default) -min(r·A, clip(r, 1-clip_low, 1+clip_high)·A);
            "cispo" -sg(clip(r, ratio_floor, 1+clip_high))·A·ln π; "sapo" -(4/τ)·σ(τ(r-1))·A;
            "plain" -A·ln π (REINFORCE). "dppo_tv" and "dppo_kl" -r·A, and 0 for a token that A
            drives further from π_old than its bounds allow, measured on "this token, or another":
            by π - π_old, and by KL(π_old‖π). "gmpo" -r·A with r the geometric mean over the
            sequence of ratios bounded one by one; "vespo" -sg(r^k·e^(λ(1-r)))·A·ln π with r of the
            whole sequence.
        ratio_level: "token" (default); "sequence", every token has the ratio e^mean(ln π - ln
            π_old) of its sequence (GSPO); "sequence-token", that ratio, with the gradient of the
            token's own (GSPO-token); "product", e^sum, the probability ratio of the sequence. gmpo
            is of "sequence", vespo of "product", and DPPO of "token" alone.
        clip_low, clip_high: offsets from 1 (default 0.2), for every surrogate, but for DPPO, whose
            divergence they bound. (Some libraries give cispo's bound itself: 5.0 there is 4.0
            here; it may be below 1, and clip_high negative.)
        ratio_floor: lower bound of cispo's ratio (default 0, none).
        dual_clip: bound c > 1 of the ratio where A < 0, for "clip"; for DPPO of every ratio, whose
            gradient it bounds, not ends. None (default) for no bound.
        sapo_temperatures: τ where A > 0, and where not (default 1.0 and 1.05).
        vespo_shape: k and λ where A > 0, and where not (default 2, 3, 3, 2).
        kl_coef, kl_estimator: weight (default 0) and kind (default "k3") of the penalty, see
            `kl_penalty`.
        kl_reference: whether the penalty is measured against ref_logprobs ("ref", default), or
            against old_logprobs ("old"): with "k2", τ·(ln π - ln π_old)² for kl_coef 2τ.
        kl_bias_correction: multiply the penalty by the ratio, through which a gradient goes too
            (default False). On samples of π_old its expected value is then KL(π‖ref), and with "k3"
            its expected gradient that of KL(π‖ref).
        off_policy_mask_threshold: δ, or None (default): a token with A < 0 in a sequence whose mean
            of ln π_old - ln π is above δ has no surrogate.
        entropy_coef: weight of the entropy bonus (default 0), which is reduced as the surrogate is.
        reduction: "token-mean" (default) over all tokens; "sequence-mean" of the means over tokens;
            "sequence-sum", the mean over sequences of the sums over tokens; "constant", the sum
            divided by normalizer; "none", the losses of the tokens. Means over sequences count all
            B.
        normalizer: positive number, or 0-d tensor (whose value is not checked), that replaces the
            denominator: of tokens for token-mean, of sequences for the sequence reductions. Give
            the count of the global batch, where a batch is spread over steps or devices: see
            `global_normalizer`.

    Returns:
        loss: 0-d, or for reduction "none" of the shape of the mask, with 0 outside of it; fp32
            (fp64 for fp64 log-probs).
        metrics: detached 0-d tensors. "clip_ratio/low_mean", "clip_ratio/high_mean" and
            "clip_ratio/region_mean": share of tokens (for the sequence ratio, of sequences that
            have tokens) whose ratio is clipped from below with A < 0, from above with A > 0, or
            either, A with its rollout weight (for DPPO, that are left out; for gmpo, of tokens by
            their own ratios); "policy/approxkl_avg": mean of (ln π - ln π_old)²/2 over the tokens
            with a nonzero advantage (for the sequence ratio, of sequences that have one); "kl" and
            "entropy": means over all tokens, where their tensors are given, "kl" of the estimates,
            times the ratio if they are corrected, and without their weights; with a threshold,
            "off_policy_mask/masked_mean": share of tokens that it leaves out.

    Differentiable, twice if need be, with respect to logprobs and entropy; everything else counts
    as constant. Log-ratios end at 80 (700 in fp64), so that no policy, however far, makes inf·0. A
    batch without tokens has loss 0 and gradient 0.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; an option out of range; a
            missing ref_logprobs, entropy or normalizer; a group that is none.

    Source: 1707.06347 Eq. 7; dual clip 1912.09729; 2507.18071 Eq. 5 to 7, and for GSPO-token 13;
    2506.13585; 2511.20347; DPPO 2602.04879; GMPO 2507.20673; VESPO 2602.10693; k2 against π_old
    2602.02276; the corrected k3 and the off-policy mask 2512.02556, section 3.1.

    Example:
        >>> old = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.0, 0.0]])
        >>> logprobs = (old + 0.1).requires_grad_()
        >>> mask = torch.tensor([[True, True, True], [True, True, False]])
        >>> loss, metrics = fastrlhf.policy_loss(logprobs, old, torch.tensor([1.0, -0.5]), mask)
        >>> loss.backward()
        >>> loss.detach(), metrics["policy/approxkl_avg"]
        (tensor(-0.4421), tensor(0.0050))
    """
    options = PolicyOptions.parse("policy_loss", policy_options)
    layout = check_tokens("logprobs", logprobs, mask, cu_seqlens, group)
    if entropy is not None:
        check_floating("entropy", entropy)
        check_like("entropy", entropy, "mask", mask)
    if options.entropy_coef != 0 and entropy is None:
        raise ValueError(
            f"entropy: expected a tensor for entropy_coef {options.entropy_coef}, got None"
        )
    tensors = PolicyTensors(old_logprobs, advantages, ref_logprobs, rollout_weights, kl_weights)
    batch = policy_batch(
        options, logprobs.dtype, mask, *tensors, with_entropy=entropy is not None, layout=layout
    )
    dtype = accumulation_dtype(logprobs.dtype)
    logprobs = torch.where(batch.mask, logprobs, 0.0).to(dtype)
    if entropy is not None:
        entropy = torch.where(batch.mask, entropy, 0.0).to(dtype)
    return loss_and_metrics(options, batch, logprobs, entropy)


@showing(PolicyArguments, _PPO_DEFAULTS)
def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    **options: Unpack[PolicyArguments],
) -> tuple[Tensor, Metrics]:
    """Compute PPO's clipped loss: `policy_loss` with surrogate "clip", and with its arguments and
    other options.

    Eager equivalent: `-torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A)[mask].mean()`.

    Returns:
        loss and metrics, differentiable, as `policy_loss`.

    Raises:
        TypeError, ValueError: as `policy_loss`.

    Source: 1707.06347 Eq. 7.

    Example:
        >>> old = torch.tensor([[-1.0, -2.0, -0.5]])
        >>> advantages, mask = torch.tensor([[1.0, -0.5, 0.2]]), torch.ones(1, 3)
        >>> loss, metrics = fastrlhf.ppo_loss(old + 0.3, old, advantages, mask, clip_high=0.2)
        >>> loss, metrics["clip_ratio/high_mean"]
        (tensor(-0.2550), tensor(0.6667))
    """
    if "surrogate" in options:
        raise TypeError(
            'ppo_loss: unexpected option surrogate; it is "clip", policy_loss has others'
        )
    return policy_loss(logprobs, old_logprobs, advantages, mask, **options)


def loss_and_metrics(
    options: PolicyOptions, batch: PolicyBatch, logprobs: Tensor, entropy: Tensor | None
) -> tuple[Tensor, Metrics]:
    """Sum the weighted losses of all tokens, from log-probs that are 0 outside the mask, or return
    them where they are not reduced; and the metrics of the same log-probs.
    """
    losses = token_losses(options, batch.tokens, logprobs, entropy, batch.sums)
    losses = torch.where(batch.mask, losses, 0.0) * batch.tokens.weights
    loss = losses if options.reduction == "none" else batch.layout.total(losses)
    return loss, policy_metrics(options, batch, logprobs, entropy)


def token_losses(
    options: PolicyOptions,
    tokens: PolicyTokens,
    logprobs: Tensor,
    entropy: Tensor | None,
    sums: SequenceSums,
) -> Tensor:
    """Compute the loss of each token, of whatever shape the tokens are."""
    token_log_ratios = token_log_ratio(tokens, logprobs)
    surrogate_log_ratios = surrogate_log_ratio(options, token_log_ratios, tokens, sums)
    # Without an advantage, what a token was sampled with must not matter: 0·NaN would.
    of_surrogate = torch.where(tokens.advantages == 0, 0.0, surrogate_log_ratios)
    formula = SURROGATES[options.surrogate].formula
    losses = formula(of_surrogate, logprobs, tokens.advantages, options.bounds)
    if options.off_policy_mask_threshold is not None:
        left_out = _off_policy(options.off_policy_mask_threshold, tokens, token_log_ratios, sums)
        losses = torch.where(left_out, 0.0, losses)
    if options.kl_coef != 0:
        losses = losses + options.kl_coef * _penalty(
            options, tokens, logprobs, surrogate_log_ratios
        )
    if options.entropy_coef != 0:
        assert entropy is not None
        losses = losses - options.entropy_coef * entropy
    return losses


def _penalty(
    options: PolicyOptions, tokens: PolicyTokens, logprobs: Tensor, log_ratio: Tensor
) -> Tensor:
    """Compute the KL penalty of each token, from its log-prob and the log of the ratio that the
    surrogate is of.
    """
    assert tokens.ref_logprobs is not None
    x = tokens.ref_logprobs - logprobs
    if tokens.kl_weights is not None:
        # A penalty of weight 0 leaves nothing, even where it is infinite (0·inf would be NaN), and
        # has no gradient.
        counts = tokens.kl_weights != 0
        x, log_ratio = (torch.where(counts, y, 0.0) for y in (x, log_ratio))
    if options.kl_bias_correction:
        log_product = x + log_ratio
        if options.ratio_level == "token":
            log_product = log_product.detach()
        kl = importance_corrected(options.kl_estimator, x, log_ratio, log_product)
    else:
        kl = KL_ESTIMATORS[options.kl_estimator](x)
    return kl if tokens.kl_weights is None else tokens.kl_weights * kl


def token_log_ratio(tokens: PolicyTokens, logprobs: Tensor) -> Tensor:
    """Compute ln π - ln π_old of each token; 0, but with its gradient, where π_old is π."""
    if tokens.old_logprobs is None:
        # A token that is forbidden (log-prob -inf) is so by both, and its ratio is 1 too.
        logprobs = torch.where(logprobs == -torch.inf, 0.0, logprobs)
        return logprobs - logprobs.detach()
    return logprobs - tokens.old_logprobs


def surrogate_log_ratio(
    options: PolicyOptions, log_ratio: Tensor, tokens: PolicyTokens, sums: SequenceSums
) -> Tensor:
    """Compute the log of the ratio that the surrogate is of, from those of the tokens: the token's
    own, or one that all tokens of its sequence share.
    """
    if options.ratio_level == "token":
        return log_ratio
    if SURROGATES[options.surrogate].one_by_one:
        signs = tokens.advantages if tokens.unweighed is None else tokens.unweighed
        log_ratio = bounded_one_by_one(log_ratio, signs, options.bounds)
    total = sums(log_ratio)
    if options.ratio_level == "product":
        return total
    mean = total / sums(torch.ones_like(log_ratio)).clamp(min=1)
    if options.ratio_level == "sequence":
        return mean
    # "sequence-token": the value of the sequence's ratio, with the gradient of the token's own.
    finite = torch.where(log_ratio.isinf(), 0.0, log_ratio)
    return mean.detach() + finite - finite.detach()


def _off_policy(
    threshold: float, tokens: PolicyTokens, log_ratio: Tensor, sums: SequenceSums
) -> Tensor:
    """Tell which tokens the off-policy mask leaves out: those with a negative advantage, in
    sequences that the policy makes less likely than π_old did by more than the threshold, in nats
    per token.
    """
    constant = log_ratio.detach()
    drift = -sums(constant) / sums(torch.ones_like(constant)).clamp(min=1)
    return (drift > threshold) & (tokens.advantages < 0)


@torch.no_grad()
def policy_metrics(
    options: PolicyOptions, batch: PolicyBatch, logprobs: Tensor, entropy: Tensor | None
) -> Metrics:
    """Compute the metrics of `policy_loss` from log-probs, which inactive tokens need not have."""
    mask, scored, active, tokens, layout = batch
    logprobs = torch.where(active, logprobs, 0.0)
    dtype = logprobs.dtype
    token_log_ratios = token_log_ratio(tokens, logprobs)
    surrogate_log_ratios = surrogate_log_ratio(options, token_log_ratios, tokens, batch.sums)
    metrics = _clip_metrics(options, batch, logprobs, token_log_ratios, surrogate_log_ratios)
    metrics["policy/approxkl_avg"] = masked_mean(token_log_ratios.square() / 2, scored, layout)
    if tokens.ref_logprobs is not None:
        kl = _penalty(options, tokens._replace(kl_weights=None), logprobs, surrogate_log_ratios)
        metrics["kl"] = masked_mean(kl, mask, layout)
    if entropy is not None:
        metrics["entropy"] = masked_mean(entropy, mask, layout)
    if options.off_policy_mask_threshold is not None:
        threshold = options.off_policy_mask_threshold
        left_out = scored & _off_policy(threshold, tokens, token_log_ratios, batch.sums)
        metrics["off_policy_mask/masked_mean"] = masked_mean(left_out.to(dtype), mask, layout)
    return metrics


def _clip_metrics(
    options: PolicyOptions,
    batch: PolicyBatch,
    logprobs: Tensor,
    token_log_ratios: Tensor,
    surrogate_log_ratios: Tensor,
) -> Metrics:
    """Compute the shares of tokens whose ratio is clipped, or of sequences where they share it."""
    surrogate = SURROGATES[options.surrogate]
    bounded = token_log_ratios if surrogate.one_by_one else surrogate_log_ratios
    too_low, too_high = surrogate.limits(bounded, logprobs, options.bounds)
    low = batch.scored & too_low & (batch.tokens.advantages < 0)
    high = batch.scored & too_high & (batch.tokens.advantages > 0)
    by_sequence = options.ratio_level != "token" and not surrogate.one_by_one
    share = _share_of_sequences if by_sequence else _share_of_tokens
    return {
        "clip_ratio/low_mean": share(batch, low, logprobs.dtype),
        "clip_ratio/high_mean": share(batch, high, logprobs.dtype),
        "clip_ratio/region_mean": share(batch, low | high, logprobs.dtype),
    }


def _share_of_tokens(batch: PolicyBatch, clipped: Tensor, dtype: torch.dtype) -> Tensor:
    return masked_mean(clipped.to(dtype), batch.mask, batch.layout)


def _share_of_sequences(batch: PolicyBatch, clipped: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the share of clipped sequences among those that have tokens."""
    lengths = batch.layout.counts(batch.mask)
    of_sequences = batch.layout.counts(clipped).to(dtype) / lengths.clamp(min=1)
    return masked_mean(of_sequences, lengths > 0)
