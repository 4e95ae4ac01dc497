"""Preferences among more than two completions: Plackett–Luce DPO, and rankings as pairs.

The pairs go into `dpo_loss` (`preference.py`); the loss of a ranking is `plackett_luce_loss` of
`reward.py`, applied to implicit rewards.

Dims: B sequences, P pairs, K rankings.
"""

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_like
from fastrlhf.losses.reward import plackett_luce_loss
from fastrlhf.losses.unpaired import check_unpaired
from fastrlhf.ops.checks import (
    check_integer,
    check_positive,
)
from fastrlhf.reference import sequence_scores


def plackett_luce_dpo_loss(
    pi_logps: Tensor, ref_logps: Tensor, groups: Tensor, ranks: Tensor, beta: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Compute the DPO loss of each ranking of completions.

    Eager equivalent, for the completions of one ranking, best first: with r = beta * (pi_logps -
    ref_logps), `sum(logsumexp(r[k:]) - r[k] for k in range(len(r)))`.

    Args:
        pi_logps, ref_logps: (B,) log-probs of whole sequences under policy and reference, in nats;
            the sequences of all rankings, in any order.
        groups: (B,) integer, which ranking a sequence belongs to; rankings may differ in length.
        ranks: (B,) integer, the sequence's place in its ranking, the best the smallest; no two
            alike.
        beta: positive strength of the KL regularisation.

    Returns:
        losses (K,), one for each ranking in ascending order of their ids, and rewards (B,) = β·s,
        detached; fp32 (fp64 for fp64 log-probs). Differentiable with respect to pi_logps and
        ref_logps, twice too. A ranking of two has the loss of `dpo_loss`. On a GPU, the number of
        rankings is awaited.

    Raises:
        TypeError, ValueError, RuntimeError: as `dpo_loss` and `plackett_luce_loss`.

    Source: 2305.18290 appendix A.3, Eq. 20.

    Example:
        >>> pi_logps = torch.tensor([-10.0, -12.0, -14.0])  # of one prompt, the best first
        >>> ref_logps = torch.tensor([-11.0, -12.0, -13.0])
        >>> groups, ranks = torch.tensor([0, 0, 0]), torch.tensor([1, 2, 3])
        >>> losses, rewards = fastrlhf.plackett_luce_dpo_loss(pi_logps, ref_logps, groups, ranks)
        >>> losses, rewards
        (tensor([1.6463]), tensor([ 0.1000,  0.0000, -0.1000]))
    """
    check_unpaired(pi_logps, ref_logps)
    rewards = check_positive("beta", beta) * sequence_scores(pi_logps, ref_logps, None)
    return plackett_luce_loss(rewards, groups, ranks), rewards.detach()


@torch.no_grad()
def ranked_pairs(groups: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Make all pairs of each ranking, for `dpo_loss` and its relatives.

    Eager equivalent::

        one_ranking = groups.unsqueeze(1) == groups
        (one_ranking & (ranks.unsqueeze(1) < ranks)).nonzero(as_tuple=True)

    Args:
        groups: (B,) integer, which ranking a sequence belongs to.
        ranks: (B,) integer, the sequence's place in its ranking, the best the smallest. Two of one
            rank make no pair.

    Returns:
        yw_idxs, yl_idxs: (P,) int64, in ascending order of the first, then of the second; k
        sequences of different ranks have k (k - 1) / 2 pairs. Not differentiable. On a GPU,
        their number is awaited.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit.

    Source: 2203.02155 Eq. 1, whose sum is over all pairs of a ranking.

    Example:
        >>> groups, ranks = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 2, 3, 2, 1])
        >>> chosen, rejected = fastrlhf.ranked_pairs(groups, ranks)
        >>> chosen, rejected
        (tensor([0, 0, 1, 4]), tensor([1, 2, 2, 3]))
    """
    for name, x in (("groups", groups), ("ranks", ranks)):
        check_integer(name, x)
    if groups.ndim != 1:
        raise ValueError(f"groups: expected shape (B,), got {tuple(groups.shape)}")
    check_like("ranks", ranks, "groups", groups)
    better = (groups[:, None] == groups) & (ranks[:, None] < ranks)
    yw_idxs, yl_idxs = better.nonzero(as_tuple=True)
    return yw_idxs, yl_idxs
