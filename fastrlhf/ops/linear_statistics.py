"""Of a block of tokens: the statistics of their logits, and what a loss makes of these, its slopes.

The gradient of the logits takes both, and nothing else that would have to be kept: see
`Workbench.d_logits` in `linear_plans.py`.

Dims: n tokens of a block, m rows of logits where tokens share them.
"""

from collections.abc import Iterable
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .shared_targets import SharedTargets


class Statistics(NamedTuple):
    """Of n tokens: what `token_stats` returns, and what its gradient needs besides; each (n,)."""

    logprob: Tensor
    entropy: Tensor  # empty unless asked for, as are the three below the lse
    lse: Tensor
    is_top1: Tensor
    mean_logit: Tensor
    log_sum_sq_probs: Tensor
    peak: Tensor
    log_norm: Tensor
    shared: SharedTargets | None = None  # where tokens share rows of logits

    @staticmethod
    def of(values: Iterable[Any], shared: SharedTargets | None = None) -> "Statistics":
        return Statistics(*values)._replace(shared=shared)

    def of_leaders(self) -> "Statistics":
        """Of the m rows that the tokens share, with the target of each that leads it; what the
        gradient does not take is empty.
        """
        assert self.shared is not None
        logprob, entropy, peak, log_norm = self.shared[-4:]
        nothing = logprob.new_empty(0)
        others = (nothing,) * 4
        return Statistics(logprob, entropy, *others, peak, log_norm)


class Slopes(NamedTuple):
    """Of n tokens: the derivatives of a loss with respect to their statistics; each (n,), or None
    where the loss does not depend on the statistic.
    """

    logprob: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None
    mean_logit: Tensor | None = None

    @staticmethod
    def of(values: Iterable[Any]) -> "Slopes":
        return Slopes(*values)

    def at(self, place: slice | Tensor) -> "Slopes":
        """Take those of some tokens."""
        others = (None if slope is None else slope[place] for slope in self[1:])
        return Slopes(self.logprob[place], *others)

    def counting(self) -> Tensor:
        """Tell which tokens have a gradient at all: (n,) bool."""
        nonzero = [slope != 0 for slope in self if slope is not None]
        return reduce(torch.logical_or, nonzero)
