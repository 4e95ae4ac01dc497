"""What each kind of advantage is, of samples in order of their groups: see `group_advantages`.

Dims: B samples, k of one draw.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastrlhf.losses.samples import Samples, batch_deviation

Formula = Callable[[Samples, float], Tensor]


def centred(samples: Samples, eps: float) -> Tensor:
    return samples.centred()


def standardised(samples: Samples, eps: float) -> Tensor:
    return samples.centred() / (samples.deviation() + eps)


def scaled_by_batch(samples: Samples, eps: float) -> Tensor:
    return samples.centred() / (batch_deviation(samples.raw, samples.counts) + eps)


def _leave_one_out(samples: Samples, eps: float) -> Tensor:
    number = samples.number()
    return samples.centred() * number / (number - 1).clamp(min=1)


def whitened(samples: Samples, eps: float) -> Tensor:
    # Each group has mean 0 once it is centred, and so has the batch. Subtracting its mean would
    # only add the rounding of that.
    rewards = samples.centred()
    return rewards / (batch_deviation(rewards, samples.counts) + eps)


def _optimal_baseline(samples: Samples, eps: float) -> Tensor:
    lengths = torch.where(samples.sums(samples.lengths) > 0, samples.lengths, 1.0)
    baseline = samples.sums(lengths * samples.rewards) / samples.sums(lengths).clamp(min=1)
    return torch.where(samples.counts, samples.rewards - baseline, 0.0)


def _of_those_with_gradient(samples: Samples, eps: float) -> Tensor:
    dtype = samples.rewards.dtype
    unequal = samples.sums((samples.rewards != 0).to(dtype)) > 0
    with_gradient = (unequal & samples.counts).sum().clamp(min=1)
    return samples.centred() * (samples.counts.sum().to(dtype) / with_gradient)


def _best_of_k(samples: Samples, eps: float) -> Tensor:
    # C(w, k) / C(n, k) as a product of ratios, which neither overflow nor cancel. The paper's
    # C(w - 1, k - 1) / C(n - 1, k - 1) is n/w times that, so that nothing is left to be subtracted.
    right, number = samples.sums(samples.raw).double(), samples.number().double()
    drawn = torch.arange(samples.k, dtype=torch.float64, device=right.device)
    remaining = (number.unsqueeze(1) - drawn).clamp(min=1)
    log_q = torch.log1p(-(right.unsqueeze(1) / remaining).clamp(max=1)).sum(1)
    of_right = torch.expm1(-log_q).rsqrt()
    of_wrong = -right / (number - right).clamp(min=1) * of_right
    advantages = torch.where(samples.raw == 1, of_right, of_wrong)
    advantages = torch.where(samples.counts & (right > 0), advantages, 0.0)
    strange = samples.sums(((samples.raw != 0) & (samples.raw != 1)).double()) > 0
    return torch.where(strange, torch.nan, advantages).to(samples.raw.dtype)


def _best_over_second(samples: Samples, eps: float) -> Tensor:
    is_best = samples.counts & (samples.rewards == samples.largest(samples.rewards))
    alone = (samples.sums(is_best.to(samples.rewards.dtype)) == 1) & (samples.number() > 1)
    second = samples.largest(torch.where(is_best, -torch.inf, samples.rewards))
    margin = torch.where(is_best & alone, samples.rewards - second, 0.0)
    return torch.where(samples.counts, margin / (samples.deviation() + eps), 0.0)


FORMULAS: dict[str, Formula] = {
    "grpo": standardised,
    "dr_grpo": centred,
    "rloo": _leave_one_out,
    "reinforce++": standardised,  # with the batch as its one group
    "reinforce++-baseline": whitened,
    "remax": centred,  # not used, since the baselines are given
    "opo": _optimal_baseline,
    "gpg": _of_those_with_gradient,
    "pass@k": _best_of_k,
    "grpo_passk": _best_over_second,
}
SCALED: dict[str, Formula] = {
    "group": standardised, "batch": scaled_by_batch, "none": centred,
}  # fmt: skip
