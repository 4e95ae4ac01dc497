"""From rewards to advantages: shaped rewards, and whitening.

What compares the samples of a group is in `groups.py`.

Everything here is a constant of the training step: nothing is differentiable, but `whiten`.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_like, check_tokens
from fastrlhf.losses.penalties import check_estimator, kl_penalty
from fastrlhf.ops.checks import (
    check_bool,
    check_finite,
    check_floating,
    check_mask,
    check_real,
    check_same_device,
    check_shape,
)
from fastrlhf.ops.ranks import (
    Group,
    check_group,
    shared_by_ranks,
    sum_over_ranks,
)
from fastrlhf.reference import accumulation_dtype


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

    Differentiable; with a group, the gradient is that of the sum of the ranks' losses.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; a group that is none.

    Source: a definition; standardisation (the standard score), with the variance of a sample.

    Example:
        >>> advantages = torch.tensor([[1.0, 2.0, 3.0]])
        >>> fastrlhf.whiten(advantages, torch.tensor([[True, False, True]]))
        tensor([[-0.7071,  0.0000,  0.7071]])
    """
    check_floating("x", x)
    check_mask("mask", mask)
    check_bool("shift_mean", shift_mean)
    check_group(group)
    check_like("mask", mask, "x", x)
    inside = mask != 0
    x = torch.where(inside, x, 0.0).to(accumulation_dtype(x.dtype))
    count = sum_over_ranks(inside.sum(), group)

    def over_batch(entries: Tensor, divisor: Tensor) -> Tensor:
        return sum_over_ranks(entries.sum(), group) / divisor.clamp(min=1)

    mean = shared_by_ranks(over_batch(x, count), group)
    # Subtracted twice: of equal large entries, what is left after the first time is the rounding of
    # their mean.
    correction = over_batch(torch.where(inside, x - mean, 0.0), count)
    mean = mean + shared_by_ranks(correction, group)
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

    Example:
        >>> logprobs, ref_logprobs = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.0]])
        >>> scores, mask = torch.tensor([1.0]), torch.ones(1, 2)
        >>> fastrlhf.shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=0.1)
        tensor([[-0.0500,  1.0000]])
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
