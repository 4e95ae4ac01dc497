"""The surrogate objectives of policy gradients, as losses of one token each.

Each is a function of the log-ratio ln(π/π_old), of the log-prob ln π and of the advantage A, and a
row of `SURROGATES`, which also says where it stops to follow the ratio. One that is defined token
by token has a counterpart of the same name in `kernels/policy_loss.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.losses.ratios import at_least, at_most, saturated
from fastrlhf.reference import expm1, sigmoid


class Bounds(NamedTuple):
    """The numbers of a surrogate. `low` and `high` are bounds of what its row of `SURROGATES` says:
    of the ratio, or of the divergence of the two policies.
    """

    low: float
    high: float
    dual_clip: float | None
    tau_positive: float
    tau_negative: float
    vespo_shape: tuple[float, float, float, float]


def clip(log_ratio: Tensor, logprob: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """Compute PPO's loss, -min(r·A, bounded r·A), r bounded to [1-ε_l, 1+ε_h]: 1707.06347 Eq. 7.

    With dual_clip c, -max(min(...), c·A) where A < 0: 1912.09729 Eq. 5.
    """
    ratio = saturated(log_ratio).exp()
    from_above = at_most(ratio, bounds.high)
    from_below = at_least(ratio, bounds.low)
    if bounds.dual_clip is not None:
        from_below = at_most(from_below, bounds.dual_clip)
    return -torch.where(advantage < 0, from_below, from_above) * advantage


def cispo(log_ratio: Tensor, logprob: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """Compute -sg(r bounded to [floor, 1+ε_h])·A·ln π: CISPO, 2506.13585 Eq. 4 and 5."""
    ratio = at_least(at_most(saturated(log_ratio).exp(), bounds.high), bounds.low)
    return _likelihood(ratio.detach() * advantage, logprob)


def sapo(log_ratio: Tensor, logprob: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """Compute -(4/τ)·σ(τ(r - 1))·A with τ by the sign of A: SAPO, 2511.20347 Eq. 5 and 6."""
    # As a tensor of the dtype of A: torch.where of two plain numbers would make fp32 of them.
    tau = torch.where(
        advantage > 0, advantage.new_full((), bounds.tau_positive), bounds.tau_negative
    )
    return -(4 / tau) * sigmoid(tau * expm1(saturated(log_ratio))) * advantage


def plain(log_ratio: Tensor, logprob: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """Compute -A·ln π: REINFORCE."""
    return _likelihood(advantage, logprob)


def dppo_tv(log_ratio: Tensor, logprob: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """Compute -r·A, without the tokens that have moved too far: DPPO-Binary-TV, 2602.04879."""
    limits = _tv_limits(log_ratio, logprob, bounds)
    return _unless_too_far(log_ratio, logprob, advantage, bounds, limits)


def dppo_kl(log_ratio: Tensor, logprob: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """Compute -r·A, without the tokens that have moved too far: DPPO-Binary-KL, 2602.04879."""
    limits = _kl_limits(log_ratio, logprob, bounds)
    return _unless_too_far(log_ratio, logprob, advantage, bounds, limits)


def _unless_too_far(
    log_ratio: Tensor,
    logprob: Tensor,
    advantage: Tensor,
    bounds: Bounds,
    limits: tuple[Tensor, Tensor],
) -> Tensor:
    """Compute -r·A, and 0 where a token is beyond its limits and the advantage leads further away.
    Beyond dual_clip, the ratio and the weight of the gradient stay what they are at dual_clip.
    """
    too_low, too_high = limits
    ratio = saturated(log_ratio).exp()
    if bounds.dual_clip is not None:
        ratio = at_most(ratio, bounds.dual_clip).detach() * _one_with_gradient(logprob)
    too_far = torch.where(advantage > 0, too_high, too_low)
    return torch.where(too_far, 0.0, -ratio * advantage)


def _one_with_gradient(logprob: Tensor) -> Tensor:
    """Compute π / sg(π), which is 1."""
    possible = torch.where(logprob == -torch.inf, 0.0, logprob)
    return (possible - possible.detach()).exp()


def gmpo(log_ratio: Tensor, logprob: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """Compute -r·A, r the geometric mean over the sequence of ratios that are bounded one by one
    (see `bounded_one_by_one`): GMPO, 2507.20673.
    """
    return -saturated(log_ratio).exp() * advantage


def vespo(log_ratio: Tensor, logprob: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """Compute -sg(φ(r))·A·ln π, φ(r) = r^k·e^(λ(1-r)) with k and λ by the sign of A: VESPO,
    2602.10693.
    """
    k_positive, rate_positive, k_negative, rate_negative = bounds.vespo_shape
    # As tensors of the dtype of A: torch.where of two plain numbers would make fp32 of them.
    number, good = advantage.new_full, advantage > 0
    k = torch.where(good, number((), k_positive), k_negative)
    rate = torch.where(good, number((), rate_positive), rate_negative)
    constant = saturated(log_ratio).detach()
    weight = (k * constant - rate * expm1(constant)).exp()
    return _likelihood(weight * advantage, logprob)


def _likelihood(weight: Tensor, logprob: Tensor) -> Tensor:
    """Compute -weight·ln π, and 0 for weight 0 even where ln π is -inf."""
    return torch.where(weight == 0, 0.0, -weight * logprob)


def bounded_one_by_one(log_ratio: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """Bound the log-ratio of each token on the side to which its advantage drives it."""
    low = log_ratio.new_full((), bounds.low).log()
    high = log_ratio.new_full((), bounds.high).log()
    from_above = torch.where(log_ratio > high, high, log_ratio)
    from_below = torch.where(log_ratio < low, low, log_ratio)
    return torch.where(advantage < 0, from_below, from_above)


# The limits of a surrogate: which tokens have moved further than its bounds, below and above, each
# (...) bool.


def _ratio_limits(log_ratio: Tensor, logprob: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    ratio = saturated(log_ratio).exp()
    return ratio < bounds.low, ratio > bounds.high


def _tv_limits(log_ratio: Tensor, logprob: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Find where π - π_old of the token is out of bounds: but for its sign, that is the total
    variation between two policies that choose between this token and any other.
    """
    # As a share of the larger of the two, since their difference would lose digits where they are
    # nearly equal.
    grown = log_ratio > 0
    larger = torch.where(grown, logprob, logprob - log_ratio).exp()
    moved = larger * torch.where(grown, -expm1(-log_ratio), expm1(log_ratio))
    return moved < bounds.low, moved > bounds.high


def _kl_limits(log_ratio: Tensor, logprob: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Find where KL(π_old‖π), with the sign of π - π_old, is out of bounds, for two policies that
    choose between this token and any other.
    """
    old = logprob - log_ratio
    of_token = torch.where(old == -torch.inf, 0.0, -old.exp() * log_ratio)
    divergence = of_token - expm1(old) * (_log_of_others(old) - _log_of_others(logprob))
    too_low = (divergence > -bounds.low) & (log_ratio < 0)
    too_high = (divergence > bounds.high) & (log_ratio > 0)
    return too_low, too_high


def _log_of_others(logprob: Tensor) -> Tensor:
    """Compute ln(1 - p) from ln p; for p = 1, the log of the smallest normal number."""
    return torch.log(-expm1(logprob.clamp(max=-torch.finfo(logprob.dtype).tiny)))


def _no_limits(log_ratio: Tensor, logprob: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    nowhere = torch.zeros_like(log_ratio, dtype=torch.bool)
    return nowhere, nowhere


class Surrogate(NamedTuple):
    """A formula; where a token is beyond its bounds; and which ratios it is defined for."""

    formula: Callable[[Tensor, Tensor, Tensor, Bounds], Tensor]
    limits: Callable[[Tensor, Tensor, Bounds], tuple[Tensor, Tensor]] = _no_limits
    ratio_levels: tuple[str, ...] = ("token", "sequence", "sequence-token", "product")
    around: float = 1.0  # what clip_low and clip_high are offsets from: a ratio's 1, or 0
    one_by_one: bool = False  # ratios of tokens are bounded before they are averaged


SURROGATES = {
    "clip": Surrogate(clip, _ratio_limits),
    "cispo": Surrogate(cispo, _ratio_limits),
    "sapo": Surrogate(sapo),
    "plain": Surrogate(plain),
    "dppo_tv": Surrogate(dppo_tv, _tv_limits, ratio_levels=("token",), around=0.0),
    "dppo_kl": Surrogate(dppo_kl, _kl_limits, ratio_levels=("token",), around=0.0),
    "gmpo": Surrogate(gmpo, _ratio_limits, ratio_levels=("sequence",), one_by_one=True),
    "vespo": Surrogate(vespo, ratio_levels=("product",)),
}
