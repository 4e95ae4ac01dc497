"""From rewards to advantages: shaped rewards, whitening, and baselines from groups of samples.

Everything here is a constant of the training step: nothing is differentiable, but `whiten`.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_tokens
from fastrlhf.losses.penalties import check_estimator, kl_penalty
from fastrlhf.losses.segments import segment_sums
from fastrlhf.ops.checks import (
    check_bool,
    check_finite,
    check_floating,
    check_integer,
    check_mask,
    check_one_of,
    check_real,
    check_same_device,
    check_shape,
    known_on_host,
)
from fastrlhf.ops.ranks import (
    Group,
    check_group,
    concatenated,
    shared_by_ranks,
    sum_over_ranks,
)
from fastrlhf.reference import accumulation_dtype

ADVANTAGES = ("grpo", "dr_grpo", "rloo", "reinforce++")


def whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, group: Group | None = None
) -> Tensor:
    """Scale the entries of the mask to variance 1, and shift them to mean 0.

    Eager equivalent: `(x - x[mask].mean()) * (x[mask].var() + 1e-8).rsqrt()`, plus the mean again
    without shift_mean; the variance is that of a sample (divided by n - 1).

    Args:
        x: (B, T), or any shape.
        mask: the same shape, bool or 0/1; entries outside can hold anything.
        shift_mean: whether the mean becomes 0, or stays.
        group: torch.distributed group whose ranks have parts of the batch, of whatever shapes: mean
            and variance are those of all; None: of x alone.

    Returns:
        The shape of x, fp32 (fp64 for fp64); 0 outside of the mask. A single entry has variance 0.

    Differentiable; with a group, the gradient is that of the sum of the ranks' losses. Raises
    TypeError, ValueError for dtypes, shapes or devices that do not fit, and for a wrong group.
    """
    check_floating("x", x)
    check_mask("mask", mask)
    check_bool("shift_mean", shift_mean)
    check_group(group)
    check_shape("mask", mask, tuple(x.shape), "the shape of x")
    check_same_device("mask", mask, "x", x)
    inside = mask != 0
    x = torch.where(inside, x, 0.0).to(accumulation_dtype(x.dtype))
    count = sum_over_ranks(inside.sum(), group)

    def over_batch(entries: Tensor, divisor: Tensor) -> Tensor:
        return sum_over_ranks(entries.sum(), group) / divisor.clamp(min=1)

    mean = shared_by_ranks(over_batch(x, count), group)
    # The rounding of the mean of large entries is all that is left of equal ones: once more.
    rest = over_batch(torch.where(inside, x - mean, 0.0), count)
    mean = mean + shared_by_ranks(rest, group)
    centred = torch.where(inside, x - mean, 0.0)
    variance = shared_by_ranks(over_batch(centred.square(), count - 1), group)
    scaled = centred * torch.rsqrt(variance + 1e-8)
    return scaled if shift_mean else torch.where(inside, scaled + mean, 0.0)


@torch.no_grad()
def shaped_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compute the reward of each token: a KL penalty, and on the last token the sequence's score.

    Eager equivalent::

        rewards = -kl_coef * kl_penalty(logprobs, ref_logprobs, kl_estimator) * mask
        rewards[sequence, last_token_of_mask] += scores

    Args:
        scores: (B,) of the reward model.
        logprobs, ref_logprobs: (B, T) under the policy that sampled and the reference, in nats.
        mask: (B, T) bool or 0/1, the tokens of the completions; the others can hold anything.
        kl_coef: weight of the penalty.
        kl_estimator: see `kl_penalty`.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last; with
            them, what is (B, T) is (N,) or (1, N).

    Returns:
        The shape of logprobs, fp32 (fp64 for fp64 log-probs), 0 outside of the mask; not
        differentiable. The score of a sequence without tokens goes nowhere.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; an unknown estimator.

    Every sequence has all of its tokens here: there is no group, see `fastrlhf.losses.ranks`.

    Source: 2203.02155 (InstructGPT), 2009.01325.
    """
    layout = check_tokens("logprobs", logprobs, mask, cu_seqlens)
    check_real("scores", scores)
    check_shape("scores", scores, (layout.sequences(logprobs),), "one for each sequence")
    check_same_device("scores", scores, "logprobs", logprobs)
    kl_coef = check_finite("kl_coef", kl_coef)
    check_estimator("kl_estimator", kl_estimator)
    inside = mask != 0
    penalty = kl_penalty(logprobs, ref_logprobs, kl_estimator)
    rewards = torch.where(inside, -kl_coef * penalty, 0.0)
    with_score = rewards + layout.spread(scores)
    return torch.where(layout.last(inside), with_score, rewards).to(penalty.dtype)


@torch.no_grad()
def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    kind: str = "grpo",
    valid: Tensor | None = None,
    group: Group | None = None,
) -> Tensor:
    """Compute the advantage of each sequence over the others that answer the same prompt.

    Call it once on all that was sampled, with a `group` that of every rank, before that is cut into
    minibatches: a group that is cut has another mean, and a group of one has no advantage at all.

    Eager equivalent, for the rewards R of one group, μ their mean, σ their sample standard
    deviation (n - 1) and n their number::

        grpo: (R - μ) / (σ + 1e-4)
        dr_grpo: R - μ
        rloo: R_i - mean of the other R_j = (R - μ) · n / (n - 1)
        reinforce++: (R - μ) / (σ + 1e-4), where μ and σ are those of the whole batch

    Args:
        rewards: (B,) one for each sequence, floating, integer or bool.
        groups: (B,) integer, the same for the samples of one prompt; in any order, of any sizes.
        kind: see above.
        valid: (B,) bool or 0/1; a sample with 0, whose reward can be anything (a verifier that
            crashed), gets 0 and counts nowhere. None: all are. Of those that count, a reward that
            is not finite makes its group NaN; for reinforce++, where it would make the batch NaN,
            it is an error on the CPU.
        group: torch.distributed group whose ranks have parts of the batch, of any B each: rewards
            of one dtype, and groups that are the same where the prompt is, on whatever rank. The
            host waits for the sizes. None: this process has all.

    Returns:
        (B,) fp32 (fp64 for fp64 rewards), not differentiable. A group of equal rewards gets exactly
        0, so that the fused losses do not read its tokens; so does a group of one. Over ranks, each
        has its part of what one process gets for all, in their order, in the same bits.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; an unknown kind; a group
            that is none, or without this process.

    Source: 2402.03300 (GRPO), 2503.20783 (Dr. GRPO), 2402.14740 (RLOO), 2501.03262 (REINFORCE++).
    """
    check_real("rewards", rewards)
    check_integer("groups", groups)
    if rewards.ndim != 1:
        raise ValueError(f"rewards: expected shape (B,), got {tuple(rewards.shape)}")
    check_shape("groups", groups, tuple(rewards.shape), "the shape of rewards")
    check_same_device("groups", groups, "rewards", rewards)
    check_one_of("kind", kind, ADVANTAGES)
    counts, own = _counting(rewards, valid), slice(None)
    if check_group(group) is not None:
        # In dtypes that are the same on every rank, and that all backends send.
        wide = rewards.to(accumulation_dtype(rewards.dtype))
        parts = (wide, groups.long(), counts.to(torch.uint8))
        (rewards, groups, counts), own = concatenated(parts, group)
        counts = counts != 0
    rewards = torch.where(counts, rewards.to(accumulation_dtype(rewards.dtype)), 0.0)
    if kind == "reinforce++":
        _check_one_group_is_finite(rewards)
        groups = torch.zeros_like(groups)
    # Those that count come first in their group.
    order = torch.logical_not(counts).to(torch.uint8).argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    ids, values, counts = groups[order], rewards[order], counts[order]
    # Relative to the first of its group, so that rounding leaves no trace of equal rewards.
    values = torch.where(counts, values - values[torch.searchsorted(ids, ids)], 0.0)
    count = segment_sums(counts.to(values.dtype), ids).clamp(min=1)
    centred = torch.where(counts, values - segment_sums(values, ids) / count, 0.0)
    if kind in ("grpo", "reinforce++"):
        variance = segment_sums(centred.square(), ids) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + 1e-4)
    elif kind == "rloo":
        centred = centred * count / (count - 1).clamp(min=1)
    return centred[order.argsort()][own]


def _counting(rewards: Tensor, valid: Tensor | None) -> Tensor:
    """Which samples (B,) count."""
    if valid is None:
        return torch.ones_like(rewards, dtype=torch.bool)
    check_mask("valid", valid)
    check_shape("valid", valid, tuple(rewards.shape), "the shape of rewards")
    check_same_device("valid", valid, "rewards", rewards)
    return valid != 0


def _check_one_group_is_finite(rewards: Tensor) -> None:
    """Raise ValueError, on the CPU, for a reward that would spoil the whole batch."""
    if known_on_host(rewards) and not rewards.isfinite().all():
        worst = rewards[~rewards.isfinite()][0].item()
        raise ValueError(
            f"rewards: expected finite numbers for kind 'reinforce++', got {worst}; leave such "
            "samples out with `valid`"
        )
