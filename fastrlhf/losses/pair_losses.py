"""The losses of preference pairs that have no kernel; those that have one are `MARGIN_LOSSES`.

Each is a function of the scores of a batch of pairs, and a row of `PAIR_LOSSES`. In formulas,
a = β·s_w and b = β·s_l are β times the scores of the chosen and the rejected sequence, d is β times
the margin between them, ℓ(x) is -ln σ(x), and ε is the label smoothing. `pair_scores.py` makes the
scores from log-probs.

Dims: P pairs.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.losses.preference_options import PreferenceOptions
from fastrlhf.reference import MARGIN_LOSSES, log_sigmoid, sigmoid, sigmoid_loss


class Pairs(NamedTuple):
    """Scores of each pair, (P,): s = ln π - ln π_ref, and ln π_ref by itself, for losses that sort
    it apart from s.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_ref: Tensor
    rejected_ref: Tensor
    margin: Tensor  # between the two scores: s, or what an f-divergence makes of it
    mean_margin: Tensor  # the same of scores per token, where the numbers of tokens are known
    # -ln π of the chosen sequence over the mean number of tokens of the chosen ones, if asked for.
    nll: Tensor | None


def _exo_pair(pairs: Pairs, beta: float, options: PreferenceOptions) -> Tensor:
    """KL(σ(d) ‖ 1-ε) of the policy's preference from the smoothed label: EXO, 2402.00856 Eq. 16."""
    d = beta * pairs.margin
    of_label = _negative_entropy(d) - sigmoid(d) * math.log1p(-options.label_smoothing)
    return of_label + _negative_entropy(-d) - sigmoid(-d) * math.log(options.label_smoothing)


def _negative_entropy(d: Tensor) -> Tensor:
    """σ(d)·ln σ(d), which is 0 where σ(d) is, an infinite d included."""
    possible = d != -torch.inf
    d = torch.where(possible, d, 0.0)
    return torch.where(possible, sigmoid(d) * log_sigmoid(d), 0.0)


def _nca_pair(pairs: Pairs, beta: float, options: PreferenceOptions) -> Tensor:
    """ℓ(a) + ½ℓ(-a) + ½ℓ(-b): NCA, 2402.05369."""
    a, b = beta * pairs.chosen, beta * pairs.rejected
    return -log_sigmoid(a) - 0.5 * log_sigmoid(-a) - 0.5 * log_sigmoid(-b)


def _bco_pair(pairs: Pairs, beta: float, options: PreferenceOptions) -> Tensor:
    """ℓ(a) + ℓ(-b), without the reward shift: BCO, 2404.04656."""
    return -log_sigmoid(beta * pairs.chosen) - log_sigmoid(-beta * pairs.rejected)


def _sppo_hard(pairs: Pairs, beta: float, options: PreferenceOptions) -> Tensor:
    """(s_w - 1/(2β))² + (s_l + 1/(2β))²: SPPO with hard labels, 2405.00675."""
    half = 0.5 / beta
    return (pairs.chosen - half).square() + (pairs.rejected + half).square()


def _apo_zero(pairs: Pairs, beta: float, options: PreferenceOptions) -> Tensor:
    """1 - σ(a) + σ(b): APO-zero, 2408.06266 Eq. 7."""
    return sigmoid(-beta * pairs.chosen) + sigmoid(beta * pairs.rejected)


def _apo_down(pairs: Pairs, beta: float, options: PreferenceOptions) -> Tensor:
    """σ(a) + 1 - σ(a - b): APO-down, 2408.06266 Eq. 8."""
    d = beta * (pairs.chosen - pairs.rejected)
    return sigmoid(beta * pairs.chosen) + sigmoid(-d)


def _discopop(pairs: Pairs, beta: float, options: PreferenceOptions) -> Tensor:
    """ℓ(d)·(1-m) + e^-d·m with m = σ(d/τ): DiscoPOP, 2406.08414 Eq. 5."""
    d = beta * pairs.margin
    gate = d / options.discopop_tau
    # e^-d·m is computed as one power of e, since its factors are inf and 0 for a strongly negative
    # d. ln m is gate - ln(1 + e^gate), which is also -ln(1 + e^-gate): of the two, the one whose
    # logarithm is small. Where d < 0, gate - d is one product of d, so that neither is infinite.
    negative = d < 0
    rate = torch.where(negative, 1 / options.discopop_tau - 1, d.new_full((), -1.0))
    small = torch.log1p(torch.exp(torch.where(negative, gate, -gate)))
    power = torch.where(rate == 0, 0.0, rate * d)  # for τ = 1 too, where 0·inf would be NaN
    return -log_sigmoid(d) * sigmoid(-gate) + torch.exp(power - small)


def _aot(pairs: Pairs, beta: float, options: PreferenceOptions) -> Tensor:
    """Sigmoid loss between sorted policy margins and sorted reference margins: AOT, 2406.05882."""
    policy = (pairs.chosen + pairs.chosen_ref) - (pairs.rejected + pairs.rejected_ref)
    ref = pairs.chosen_ref - pairs.rejected_ref
    margin = policy.sort(0).values - ref.sort(0).values
    return sigmoid_loss(margin, beta, options.label_smoothing)


def _aot_unpaired(pairs: Pairs, beta: float, options: PreferenceOptions) -> Tensor:
    """Sigmoid loss between sorted scores of chosen and of rejected sequences: unpaired AOT,
    2406.05882.
    """
    margin = pairs.chosen.sort(0).values - pairs.rejected.sort(0).values
    return sigmoid_loss(margin, beta, options.label_smoothing)


def _sft(pairs: Pairs, beta: float, options: PreferenceOptions) -> Tensor:
    """-ln π of the preferred sequences, whose mean over pairs is that over their tokens, as in
    MPO, 2411.10442.
    """
    assert pairs.nll is not None
    return pairs.nll


PAIR_LOSSES: dict[str, Callable[[Pairs, float, PreferenceOptions], Tensor]] = {
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "sft": _sft,
}

LOSS_TYPES = (*MARGIN_LOSSES, *PAIR_LOSSES)


def loss_of_pairs(name: str, pairs: Pairs, beta: float, options: PreferenceOptions) -> Tensor:
    """Compute the loss of a type of `LOSS_TYPES` for each pair, (P,)."""
    if name not in MARGIN_LOSSES:
        return PAIR_LOSSES[name](pairs, beta, options)
    loss = MARGIN_LOSSES[name]
    smoothing = options.label_smoothing if loss.smoothed else 0.0
    return loss.formula(pairs.mean_margin if loss.average else pairs.margin, beta, smoothing)
