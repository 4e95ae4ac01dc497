"""The oracle of the policy losses: the papers' formulas, one token at a time, in 60 digits.

Nothing here is written for accuracy or speed, and nothing comes from the library or from torch.
Derivatives are central differences, exact to 20 digits. What a paper holds constant (`sg`) is taken
from a second copy of the log-probs, which no difference moves.

Dims: B sequences, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mpmath import mp, mpf
from torch import Tensor

mp.dps = 60
_STEP = mpf("1e-25")

Rows = list[list[mpf]]


@dataclass(frozen=True)
class PolicyCase:
    """A batch and the options of `policy_loss`, by the same names."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    surrogate: str = "clip"
    ratio_level: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ref_logprobs: Tensor | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy: Tensor | None = None
    entropy_coef: float = 0.0
    rollout_weights: Tensor | None = None
    reduction: str = "token-mean"
    normalizer: float | None = None
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)


@dataclass(frozen=True)
class PolicyExpectation:
    """The loss, and its gradients with respect to log-probs and entropies (B, T), in fp64; and the
    size of the tokens' losses, which may cancel in it.
    """

    loss: float
    size: float
    d_logprobs: Tensor
    d_entropy: Tensor


def _surrogate(case: PolicyCase, ratio: mpf, held_ratio: mpf, lp: mpf, advantage: mpf) -> mpf:
    """The loss of one token, without penalties."""
    low, high = 1 - mpf(case.clip_low), 1 + mpf(case.clip_high)
    if case.surrogate == "clip":
        objective = min(ratio * advantage, min(max(ratio, low), high) * advantage)
        if case.dual_clip is not None and advantage < 0:
            objective = max(objective, mpf(case.dual_clip) * advantage)
        return -objective
    if case.surrogate == "cispo":
        return -min(held_ratio, high) * advantage * lp
    if case.surrogate == "sapo":
        tau = mpf(case.sapo_temperatures[0 if advantage > 0 else 1])
        return -(4 / tau) / (1 + mp.exp(-tau * (ratio - 1))) * advantage
    assert case.surrogate == "plain"
    return -advantage * lp


def _penalty(estimator: str, lp: mpf, ref: mpf) -> mpf:
    x = ref - lp
    return {"k1": -x, "k2": x * x / 2, "k3": mp.exp(x) - 1 - x, "abs": abs(x)}[estimator]


def _at(x: Tensor, b: int, t: int) -> mpf:
    return mpf(float(x[b, t] if x.ndim == 2 else x[b]))


def _sequence_losses(case: PolicyCase, b: int, lps: Sequence[mpf], held: Sequence[mpf]) -> list:
    """Losses of the tokens of one sequence that count, by their positions."""
    kept = [t for t in range(case.mask.shape[1]) if case.mask[b, t]]
    mean = held_mean = mpf(0)
    if kept:
        old = [_at(case.old_logprobs, b, t) for t in kept]
        mean = sum(lps[t] - o for t, o in zip(kept, old, strict=True)) / len(kept)
        held_mean = sum(held[t] - o for t, o in zip(kept, old, strict=True)) / len(kept)
    losses = []
    for t in kept:
        old = _at(case.old_logprobs, b, t)
        by_token = case.ratio_level == "token"
        ratio = mp.exp(lps[t] - old if by_token else mean)
        held_ratio = mp.exp(held[t] - old if by_token else held_mean)
        loss = _surrogate(case, ratio, held_ratio, lps[t], _at(case.advantages, b, t))
        if case.rollout_weights is not None:
            loss *= _at(case.rollout_weights, b, t)
        if case.kl_coef:
            loss += mpf(case.kl_coef) * _penalty(
                case.kl_estimator, lps[t], _at(case.ref_logprobs, b, t)
            )
        if case.entropy_coef:
            loss -= mpf(case.entropy_coef) * _at(case.entropy, b, t)
        losses.append(loss)
    return losses


def _share(case: PolicyCase, b: int) -> mpf:
    """What the sum of a sequence's losses is multiplied by."""
    counts = [int(row.sum()) for row in case.mask.bool()]
    given = None if case.normalizer is None else mpf(case.normalizer)
    if case.reduction == "token-mean":
        return 1 / (given or mpf(max(sum(counts), 1)))
    if case.reduction == "sequence-mean":
        return 1 / (given or mpf(len(counts))) / max(counts[b], 1)
    if case.reduction == "sequence-sum":
        return 1 / (given or mpf(len(counts)))
    assert case.reduction == "constant" and given
    return 1 / given


def expected_policy(case: PolicyCase) -> PolicyExpectation:
    """Evaluate the loss and its derivatives."""
    shape = tuple(case.mask.shape)
    total = size = mpf(0)
    d_logprobs, d_entropy = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    for b in range(shape[0]):
        # What is masked may be no number, and is never looked at.
        held = [_at(case.logprobs, b, t) if case.mask[b, t] else mpf(0) for t in range(shape[1])]
        share = _share(case, b)
        losses = [share * x for x in _sequence_losses(case, b, held, held)]
        total, size = total + sum(losses), size + sum(map(abs, losses))
        for t in range(shape[1]):
            if not case.mask[b, t]:
                continue
            sides = []
            for step in (_STEP, -_STEP):
                moved = [*held[:t], held[t] + step, *held[t + 1 :]]
                sides.append(sum(_sequence_losses(case, b, moved, held)))
            d_logprobs[b, t] = float(share * (sides[0] - sides[1]) / (2 * _STEP))
            d_entropy[b, t] = float(-share * mpf(case.entropy_coef))
    return PolicyExpectation(float(total), float(size), d_logprobs, d_entropy)
