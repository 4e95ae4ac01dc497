"""Several targets of one row of logits: in a tree of sequences, where they part.

What the tokens of a row share is computed once: the norm of the row, and in the backward the term
of its gradient that is proportional to p, whose coefficient is the sum of the tokens' coefficients.
Each token adds its own target, which is one number of the row.

The row's *leader* is that of its targets which has the largest logit. The row's statistics are
computed with the leader as their target, in a way that keeps the log-prob accurate where p → 1, and
the gradient g·(1 - p) where it would cancel. No other target of the row can come close to p = 1, so
none needs that.

Dims: n tokens of a block, m rows of logits, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.reference import cap_slope, capped_logits

from .add_at import add_at
from .linear_rows import Block, BlockStates
from .transform import Transform

# Takes a target of each row and the transform of the rows; returns what `all_statistics` does.
StatisticsOf = Callable[[Tensor, Transform], tuple[Tensor, ...]]


class SharedTargets(NamedTuple):
    """The targets of a block of tokens among the rows of logits that they share."""

    of_token: Tensor  # (n,) the row of each token
    targets: Tensor  # (n,)
    leader: Tensor  # (m,) a target of each row
    leads: Tensor  # (n,) whether a token's target is the leader of its row
    factor: Tensor  # (n,) derivative of a target's effective logit with respect to its logit
    # Statistics (m,) of the rows with their leaders as targets, which the gradient needs.
    logprob: Tensor
    entropy: Tensor
    peak: Tensor
    log_norm: Tensor

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Factors (n,) by which the upstream gradient of a token's log-prob is multiplied, to be
        added at the logit of its own target, and subtracted at that of its row's leader. Both are 0
        for leaders, and where there is no distribution.
        """
        rows = torch.where(self.leads, self.of_token, len(self.leader))
        of_leaders = self.factor.new_zeros(len(self.leader) + 1).scatter(0, rows, self.factor)
        follows = ~self.leads & (self.peak != -torch.inf)[self.of_token]
        both = self.factor, of_leaders[self.of_token]
        of_target, of_leader = (torch.where(follows, x, 0.0) for x in both)
        return of_target, of_leader

    def sums(self, of_tokens: Tensor) -> Tensor:
        """Add up numbers (n,) of tokens over the tokens of each row: (m,)."""
        return add_at(of_tokens.new_zeros(len(self.leader)), self.of_token, of_tokens)

    def add_targets(self, d_logits: Tensor, d_logprob: Tensor) -> None:
        """Complete gradients (m, V) that were computed as if all targets were leaders."""
        of_target, of_leader = self.factors
        rows = self.of_token.repeat(2)
        columns = torch.cat((self.targets, self.leader[self.of_token]))
        values = torch.cat((d_logprob * of_target, -d_logprob * of_leader)).to(d_logits.dtype)
        if d_logits.device.type == "cpu" and d_logits.is_contiguous():
            d_logits.view(-1).index_add_(0, rows * d_logits.shape[1] + columns, values)
        else:
            d_logits.index_put_((rows, columns), values, accumulate=True)


def shared_statistics(
    logits: Tensor, block: Block, states: BlockStates, statistics_of: StatisticsOf
) -> tuple[tuple[Tensor, ...], SharedTargets]:
    """Compute the statistics (n,) of tokens from the rows (m, V) that they share, in the order of
    `Statistics`; and with them what their gradient needs.
    """
    of_token, targets, transform = states.of_token, block.targets, block.transform
    target_logits = logits[of_token, targets]
    leader = _leaders(target_logits, of_token, targets, len(logits))
    leads = targets == leader[of_token]
    logprob, entropy, lse, peak, log_norm, top1, mean, squares = statistics_of(
        leader, states.transform
    )
    factor = _factor(target_logits, transform)
    of_leaders = logprob, entropy, peak, log_norm
    shared = SharedTargets(of_token, targets, leader, leads, factor, *of_leaders)

    def of_tokens(x: Tensor) -> Tensor:
        return x[of_token] if x.numel() else x

    peaks, norms = of_tokens(peak), of_tokens(log_norm)
    capped = capped_logits(target_logits, transform.softcap, transform.scale)
    of_followers = (capped - peaks) / transform.of_rows - norms
    as_leader = leads | (peaks == -torch.inf)
    logprobs = torch.where(as_leader, of_tokens(logprob), of_followers)
    tops = of_tokens(top1) & leads if top1.numel() else top1
    others = (of_tokens(x) for x in (mean, squares))
    return (logprobs, of_tokens(entropy), of_tokens(lse), tops, *others, peaks, norms), shared


def _factor(logits: Tensor, transform: Transform) -> Tensor:
    """The derivative of effective logits with respect to logits (n,)."""
    slope = torch.full_like(logits, transform.scale)
    if transform.softcap is not None:
        slope *= cap_slope(logits, transform.softcap, transform.scale)
    return slope / transform.of_rows


def _leaders(target_logits: Tensor, of_token: Tensor, targets: Tensor, rows: int) -> Tensor:
    """Find the leader (m,) of each row: of its targets, the one with the largest logit; of equal
    ones the lowest id. NaN counts as larger than any number.
    """
    lowest = target_logits.new_full((rows,), -torch.inf)
    largest = lowest.scatter_reduce(0, of_token, target_logits, "amax")
    ahead = (target_logits == largest[of_token]) | target_logits.isnan()
    beyond = torch.iinfo(targets.dtype).max
    candidates = torch.where(ahead, targets, beyond)
    return targets.new_full((rows,), beyond).scatter_reduce(0, of_token, candidates, "amin")
