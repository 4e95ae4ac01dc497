"""The oracle of the policy losses: the papers' formulas, one token at a time, in 60 digits.

Nothing here is written for accuracy or speed, and nothing comes from the library or from torch.
Derivatives are central differences, exact to 20 digits. What a paper holds constant (`sg`) is taken
from a second copy of the log-probs, which no difference moves.

Dims: B sequences, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

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
    ratio_floor: float = 0.0
    vespo_shape: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0)
    kl_reference: str = "ref"
    kl_bias_correction: bool = False
    kl_weights: Tensor | None = None
    off_policy_mask_threshold: float | None = None


# The surrogates with the ratios that each is defined for.
_LEVELS = ("token", "sequence", "sequence-token", "product")
FORMS = [
    *product(("clip", "cispo", "sapo", "plain"), _LEVELS),
    ("dppo_tv", "token"), ("dppo_kl", "token"), ("gmpo", "sequence"), ("vespo", "product"),
]  # fmt: skip
ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+")


@dataclass(frozen=True)
class PolicyExpectation:
    """The loss, and its gradients with respect to log-probs and entropies (B, T), in fp64; and the
    size of the tokens' losses, which may cancel in it.
    """

    loss: float
    size: float
    d_logprobs: Tensor
    d_entropy: Tensor


@dataclass(frozen=True)
class _Token:
    """What the loss of a token is made of; `held` is what no derivative is taken of."""

    ratio: mpf
    held_ratio: mpf
    lp: mpf
    held_lp: mpf
    old: mpf
    advantage: mpf


def _surrogate(case: PolicyCase, token: _Token) -> mpf:
    """The loss of one token, without penalties."""
    ratio, held_ratio, advantage = token.ratio, token.held_ratio, token.advantage
    low, high = 1 - mpf(case.clip_low), 1 + mpf(case.clip_high)
    if case.surrogate == "clip":
        objective = min(ratio * advantage, min(max(ratio, low), high) * advantage)
        if case.dual_clip is not None and advantage < 0:
            objective = max(objective, mpf(case.dual_clip) * advantage)
        return -objective
    if case.surrogate == "cispo":
        return -max(min(held_ratio, high), mpf(case.ratio_floor)) * advantage * token.lp
    if case.surrogate == "sapo":
        tau = mpf(case.sapo_temperatures[0 if advantage > 0 else 1])
        return -(4 / tau) / (1 + mp.exp(-tau * (ratio - 1))) * advantage
    if case.surrogate in ("dppo_tv", "dppo_kl"):
        if _moved_too_far(case, token):
            return mpf(0)
        most = mp.inf if case.dual_clip is None else mpf(case.dual_clip)
        return -min(held_ratio, most) * (ratio / held_ratio) * advantage
    if case.surrogate == "gmpo":
        return -ratio * advantage
    if case.surrogate == "vespo":
        k, rate = case.vespo_shape[:2] if advantage > 0 else case.vespo_shape[2:]
        weight = held_ratio ** mpf(k) * mp.exp(mpf(rate) * (1 - held_ratio))
        return -weight * advantage * token.lp
    assert case.surrogate == "plain"
    return -advantage * token.lp


def _moved_too_far(case: PolicyCase, token: _Token) -> bool:
    """Whether the advantage drives a token further from the old policy than DPPO allows."""
    p, q = mp.exp(token.held_lp), mp.exp(token.old)
    if case.surrogate == "dppo_tv":
        distance = abs(p - q)
    else:
        distance = q * mp.log(q / p) + (1 - q) * mp.log((1 - q) / (1 - p))
    if token.advantage > 0:
        return p > q and distance > mpf(case.clip_high)
    return p < q and distance > mpf(case.clip_low)


def _estimate(kind: str, x: mpf) -> mpf:
    return {"k1": -x, "k2": x * x / 2, "k3": mp.exp(x) - 1 - x, "abs": abs(x)}[kind]


def _penalty(case: PolicyCase, token: _Token, ref: mpf) -> mpf:
    x, held_x, kind = ref - token.lp, ref - token.held_lp, case.kl_estimator
    if kind.endswith("+"):
        value = _estimate(kind[:-1], held_x) + _estimate("k2", x) - _estimate("k2", held_x)
    else:
        value = _estimate(kind, x)
    return value * token.ratio if case.kl_bias_correction else value


def _at(x: Tensor, b: int, t: int) -> mpf:
    return mpf(float(x[b, t] if x.ndim == 2 else x[b]))


def _log_ratios(case: PolicyCase, b: int, kept: list[int], lps: Sequence, held: Sequence) -> list:
    """The log-ratio that the loss of each token of a sequence is of."""
    own = [lps[t] - _at(case.old_logprobs, b, t) for t in kept]
    if case.ratio_level == "token":
        return own
    if case.surrogate == "gmpo":
        low, high = mp.log(1 - mpf(case.clip_low)), mp.log(1 + mpf(case.clip_high))
        good = [_at(case.advantages, b, t) >= 0 for t in kept]
        own = [min(x, high) if up else max(x, low) for x, up in zip(own, good, strict=True)]
    if case.ratio_level == "product":
        return [sum(own)] * len(own)
    if case.ratio_level == "sequence":
        return [sum(own) / len(own)] * len(own)
    mean = sum(held[t] - _at(case.old_logprobs, b, t) for t in kept) / len(own)
    return [mean + lps[t] - held[t] for t in kept]


def _sequence_losses(case: PolicyCase, b: int, lps: Sequence[mpf], held: Sequence[mpf]) -> list:
    """Losses of the tokens of one sequence that count, by their positions."""
    kept = [t for t in range(case.mask.shape[1]) if case.mask[b, t]]
    log_ratios = _log_ratios(case, b, kept, lps, held) if kept else []
    held_log_ratios = _log_ratios(case, b, kept, held, held) if kept else []
    drift = sum(_at(case.old_logprobs, b, t) - held[t] for t in kept) / max(len(kept), 1)
    losses = []
    for t, log_ratio, held_log_ratio in zip(kept, log_ratios, held_log_ratios, strict=True):
        old, advantage = _at(case.old_logprobs, b, t), _at(case.advantages, b, t)
        token = _Token(mp.exp(log_ratio), mp.exp(held_log_ratio), lps[t], held[t], old, advantage)
        loss = _surrogate(case, token)
        if case.off_policy_mask_threshold is not None and advantage < 0:
            loss = mpf(0) if drift > mpf(case.off_policy_mask_threshold) else loss
        if case.rollout_weights is not None:
            loss *= _at(case.rollout_weights, b, t)
        if case.kl_coef:
            ref = old if case.kl_reference == "old" else _at(case.ref_logprobs, b, t)
            weight = mpf(1) if case.kl_weights is None else _at(case.kl_weights, b, t)
            loss += mpf(case.kl_coef) * weight * _penalty(case, token, ref)
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
