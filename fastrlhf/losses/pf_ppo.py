"""Policy filtration: which samples a reward model is trusted about, as weights of sequences.

Dims: B samples.
"""

from typing import Literal

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_generator
from fastrlhf.losses.samples import check_batch_is_finite, counting, kept, of_all_ranks
from fastrlhf.ops.checks import check_at_least, check_one_of, check_real
from fastrlhf.ops.ranks import Group, check_group
from fastrlhf.reference import accumulation_dtype

FiltrationMethod = Literal["pow", "max_min", "max_random"]
_METHODS = ("pow", "max_min", "max_random")

# The shares of "max_random", of the best samples and of each other one, as verl has them.
_OF_BEST, _OF_OTHERS = 0.4, 0.1

# For drawing, shares are rounded to whole numbers up to this: their sums are exact, and a sample of
# share 0 is never drawn.
_FINEST_SHARE = 2.0**40


@torch.no_grad()
def pf_ppo_weights(
    scores: Tensor,
    *,
    method: FiltrationMethod = "pow",
    power: float = 2.0,
    generator: torch.Generator | None = None,
    valid: Tensor | None = None,
    group: Group | None = None,
) -> Tensor:
    """Compute how many times PF-PPO learns from each sample: on average, or as drawn.

    A reward model is more often right about samples that it scores high, or low, than about those
    between. PF-PPO draws as many samples as there are, with replacement, by these shares::

        pow: |score| ** power
        max_min: 1 for the largest and the smallest score, 0 for the others
        max_random: 0.4 for the largest score, 0.1 for each other one

    Eager equivalent: `share / share.sum() * B`, with a generator
    `torch.bincount(torch.multinomial(share, B, True, generator=generator), minlength=B)`.

    To learn from a sample w times is to multiply its advantage with w, in a loss whose denominator
    does not count its tokens (reductions "sequence-sum" and "constant", or a normalizer).

    Args:
        scores: (B,) of the reward model, floating, integer or bool.
        method: see above.
        power: at least 0, of "pow"; other methods do not look at it.
        generator: of the scores' device, to draw with; None: nothing is drawn.
        valid: (B,) bool or 0/1; a sample with 0, whose score can be anything, gets 0 and is not
            counted. None: all are.
        group: torch.distributed group whose ranks have parts of the batch, see `group_advantages`.
            Generators have to be in the same state on all ranks.

    Returns:
        (B,) fp32 (fp64 for fp64 scores), not differentiable: its sum is the number of samples that
        count. Where every share is 0, all are the same.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; an unknown method;
            power < 0; on the CPU, a score that counts and is not finite (elsewhere, all are NaN);
            a wrong group.

    Source: 2409.06957 (PF-PPO), in the form that verl has.

    Example:
        >>> fastrlhf.pf_ppo_weights(torch.tensor([1.0, 0.0, -2.0]), power=1.0)
        tensor([1., 0., 2.])
    """
    check_real("scores", scores)
    if scores.ndim != 1:
        raise ValueError(f"scores: expected shape (B,), got {tuple(scores.shape)}")
    check_one_of("method", method, _METHODS)
    power = check_at_least("power", power, 0)
    check_generator(generator, "scores", scores)
    check_group(group)
    dtype = accumulation_dtype(scores.dtype)
    parts = scores.to(dtype), counting(valid, scores, "scores").to(torch.uint8)
    (scores, counts), this_rank = of_all_ranks(parts, group)
    counts = counts != 0
    scores = kept(scores, counts)
    check_batch_is_finite(scores, "a batch that is drawn from", "scores")
    shares = _shares(scores.double(), counts, method, power)
    number = counts.sum()
    weights = shares * (number / shares.sum().clamp(min=1))
    if generator is not None:
        weights = _drawn(shares, number, generator)
    return torch.where(scores.isfinite().all(), weights, torch.nan).to(dtype)[this_rank]


def _shares(scores: Tensor, counts: Tensor, method: str, power: float) -> Tensor:
    """Compute the share by which each sample is drawn, relative to the largest, which is 1."""
    if not len(scores):
        return scores
    largest = torch.where(counts, scores, -torch.inf).amax()
    if method == "pow":
        size = scores.abs()
        shares = torch.where(size.amax() == 0, 1.0, (size / size.amax()) ** power)
    elif method == "max_min":
        smallest = torch.where(counts, scores, torch.inf).amin()
        shares = ((scores == largest) | (scores == smallest)).to(scores.dtype)
    else:
        others = torch.full_like(scores, _OF_OTHERS / _OF_BEST)
        shares = torch.where(scores == largest, 1.0, others)
    return torch.where(counts, shares, 0.0)


def _drawn(shares: Tensor, number: Tensor, generator: torch.Generator) -> Tensor:
    """Count how often each sample is drawn, in so many draws as there are samples that count."""
    upto = (shares * _FINEST_SHARE).round().long().cumsum(0)
    size, device = len(shares), shares.device
    uniform = torch.rand(size, generator=generator, dtype=torch.float64, device=device)
    total = upto[-1:].expand(size)
    place = torch.minimum((uniform * total).long(), total - 1)
    drawn = torch.searchsorted(upto, place, right=True).clamp(max=size - 1)
    counted = (torch.arange(size, device=device) < number).long()
    return torch.zeros_like(upto).scatter_add_(0, drawn, counted).to(shares.dtype)
