"""The surrogate objectives of policy gradients, as losses of one token each.

Each is a function of the log-ratio ln(π/π_old), of the log-prob ln π and of the advantage A, and a
row of `SURROGATES`; its counterpart in `kernels/policy_loss.py` has the same name there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.losses.ratios import at_least, at_most, saturated
from fastrlhf.reference import expm1, sigmoid


class Bounds(NamedTuple):
    """Where a surrogate stops to reward a change of the policy."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    tau_positive: float
    tau_negative: float


def clip(log_ratio: Tensor, logprob: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """Compute PPO's loss, -min(r·A, bounded r·A), r bounded to [1-ε_l, 1+ε_h]: 1707.06347 Eq. 7.

    With dual_clip c, -max(min(...), c·A) where A < 0: 1912.09729 Eq. 5.
    """
    ratio = saturated(log_ratio).exp()
    from_above = at_most(ratio, 1 + bounds.clip_high)
    from_below = at_least(ratio, 1 - bounds.clip_low)
    if bounds.dual_clip is not None:
        from_below = at_most(from_below, bounds.dual_clip)
    return -torch.where(advantage < 0, from_below, from_above) * advantage


def cispo(log_ratio: Tensor, logprob: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """Compute -sg(min(r, 1+ε_h))·A·ln π: CISPO, 2506.13585 Eq. 4 and 5."""
    ratio = at_most(saturated(log_ratio).exp(), 1 + bounds.clip_high)
    return _likelihood(ratio.detach() * advantage, logprob)


def sapo(log_ratio: Tensor, logprob: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """Compute -(4/τ)·σ(τ(r - 1))·A with τ by the sign of A: SAPO, 2511.20347 Eq. 5 and 6."""
    # Of the dtype of A: torch.where of two numbers would round them to fp32.
    tau = torch.where(
        advantage > 0, advantage.new_full((), bounds.tau_positive), bounds.tau_negative
    )
    return -(4 / tau) * sigmoid(tau * expm1(saturated(log_ratio))) * advantage


def plain(log_ratio: Tensor, logprob: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """Compute -A·ln π: REINFORCE."""
    return _likelihood(advantage, logprob)


def _likelihood(weight: Tensor, logprob: Tensor) -> Tensor:
    """-weight·ln π, and 0 for weight 0 even where ln π is -inf."""
    return torch.where(weight == 0, 0.0, -weight * logprob)


class Surrogate(NamedTuple):
    """A formula, and at which ends it clips the ratio."""

    formula: Callable[[Tensor, Tensor, Tensor, Bounds], Tensor]
    clips_low: bool
    clips_high: bool


SURROGATES = {
    "clip": Surrogate(clip, clips_low=True, clips_high=True),
    "cispo": Surrogate(cispo, clips_low=False, clips_high=True),
    "sapo": Surrogate(sapo, clips_low=False, clips_high=False),
    "plain": Surrogate(plain, clips_low=False, clips_high=False),
}
