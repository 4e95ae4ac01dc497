"""Rewards of tokens, and returns of them without a value model.

Everything here is a constant of the training step: nothing is differentiable.

`advantages.py` has shaped rewards and whitening, `fastrlhf/ops/gae.py` advantages with a value
model, and `groups.py` those of groups of samples.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

import torch
from torch import Tensor

from fastrlhf.ops.checks import (
    check_bool,
    check_counts,
    check_mask,
    check_positive,
    check_real,
    check_same_device,
    check_shape,
)
from fastrlhf.ops.gae import gae
from fastrlhf.ops.layout import layout_of
from fastrlhf.reference import accumulation_dtype


@torch.no_grad()
def monte_carlo_returns(
    rewards: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    last_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute what each token and those after it earn, discounted: the return-to-go of REINFORCE.

    Eager equivalent, for one sequence, where everything counts and returns[T] is its last value::

        for t in reversed(range(T)):
            returns[t] = rewards[t] + gamma * returns[t + 1]

    This is `gae` of values that are all 0, with λ = 1.

    Args:
        rewards: (B, T), or with cu_seqlens (N,) or (1, N) as all below; see `shaped_rewards` and
            `outcome_rewards`.
        mask: (B, T) bool or 0/1, the tokens that count. The others can hold anything, and are
            passed over.
        gamma: discount in [0, 1].
        last_values: (B,) what is earned after the last token, of a sequence that was cut there; 0
            where it ended. None: all ended.
        cu_seqlens, impl: see `gae`.

    Returns:
        The shape of rewards, fp32 (fp64 for fp64 rewards), 0 outside of the mask; not
        differentiable.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; gamma outside [0, 1].

    Source: 1506.02438 Eq. 18, with values 0.

    Example:
        >>> rewards = torch.tensor([[0.0, 0.0, 1.0]])
        >>> fastrlhf.monte_carlo_returns(rewards, torch.ones(1, 3), gamma=0.5)
        tensor([[0.2500, 0.5000, 1.0000]])
    """
    check_real("rewards", rewards)
    nothing = torch.zeros_like(rewards, dtype=accumulation_dtype(rewards.dtype))
    return gae(
        rewards, nothing, mask, gamma=gamma, lam=1.0, last_values=last_values,
        cu_seqlens=cu_seqlens, impl=impl,
    )[1]  # fmt: skip


@torch.no_grad()
def outcome_rewards(
    scores: Tensor, mask: Tensor, *, every_token: bool = False, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Give the score of each sequence to its last token, or to every one.

    Eager equivalent: `rewards[sequence, last_token_of_mask] = scores`; for every token,
    `scores[:, None] * mask`. With a KL penalty, see `shaped_rewards`.

    Args:
        scores: (B,) floating, integer or bool: rewards, or advantages (B,) to be spread.
        mask: (B, T) bool or 0/1, the tokens that count, or with cu_seqlens (N,) or (1, N).
        every_token: whether the score is that of every token, or of the last one.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last.

    Returns:
        The shape of mask, fp32 (fp64 for fp64 scores), 0 elsewhere; not differentiable. The score
        of a sequence without tokens goes nowhere.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit.

    Source: a definition; outcome supervision, as in 2402.03300, section 4.1.2, whose advantages are
    those of every token.

    Example:
        >>> mask = torch.tensor([[True, True, False], [True, True, True]])
        >>> fastrlhf.outcome_rewards(torch.tensor([1.0, -1.0]), mask)
        tensor([[ 0.,  1.,  0.],
                [ 0.,  0., -1.]])
    """
    check_real("scores", scores)
    check_mask("mask", mask)
    layout = layout_of("mask", mask, cu_seqlens)
    check_shape("scores", scores, (layout.sequences(mask),), "one for each sequence")
    check_same_device("scores", scores, "mask", mask)
    check_bool("every_token", every_token)
    inside = mask != 0
    which = inside if every_token else layout.last(inside)
    return torch.where(which, layout.spread(scores.to(accumulation_dtype(scores.dtype))), 0.0)


@torch.no_grad()
def length_adaptive_lambda(lengths: Tensor, *, alpha: float = 0.05) -> Tensor:
    """Compute λ of each sequence, the larger the longer it is: `lam` of `gae`, as in VAPO.

    Eager equivalent: `(1 - 1 / (alpha * lengths)).clamp(min=0)`: a sequence of up to 1/α tokens,
    for which the paper's formula is negative, gets one-step estimates. The weights λ^t of the
    temporal differences then add up to α times the length.

    Args:
        lengths: (B,) tokens of each sequence, whole numbers: `mask.sum(-1)`.
        alpha: positive.

    Returns:
        (B,) fp32 (fp64 for fp64 lengths) in [0, 1]; not differentiable.

    Raises:
        TypeError, ValueError: lengths that are no counts; alpha ≤ 0.

    Source: 2504.05118 (VAPO) §4.2.

    Example:
        >>> fastrlhf.length_adaptive_lambda(torch.tensor([10, 40, 1000]))
        tensor([0.0000, 0.5000, 0.9800])
    """
    check_counts("lengths", lengths)
    alpha = check_positive("alpha", alpha)
    scaled = alpha * lengths.to(accumulation_dtype(lengths.dtype))
    return 1 - 1 / scaled.clamp(min=1)
