"""The statistics of a block of tokens, and a loss's derivatives with respect to them, its slopes.

The gradient of the logits is computed from these two and the logits; nothing else has to be kept.
See `Workbench.d_logits` in `linear_plans.py`.

Dims: n tokens of a block, m rows of logits where tokens share them.
"""

from collections.abc import Iterable
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .shared_targets import SharedTargets


class Statistics(NamedTuple):
    """The statistics of n tokens that `token_stats` returns, and what the gradient needs in
    addition; each (n,).
    """

    logprob: Tensor
    entropy: Tensor  # empty unless asked for; so are the three fields that follow the lse
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
        """Return the statistics of the m rows that the tokens share, with the leader of each row
        (see `shared_targets.py`) as its target. Fields that the gradient does not need are empty.
        """
        assert self.shared is not None
        logprob, entropy, peak, log_norm = self.shared[-4:]
        nothing = logprob.new_empty(0)
        others = (nothing,) * 4
        return Statistics(logprob, entropy, *others, peak, log_norm)


class Slopes(NamedTuple):
    """The derivatives of a loss with respect to the statistics of n tokens; each (n,), or None if
    the loss does not depend on the statistic.
    """

    logprob: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None
    mean_logit: Tensor | None = None

    @staticmethod
    def of(values: Iterable[Any]) -> "Slopes":
        return Slopes(*values)

    def at(self, place: slice | Tensor) -> "Slopes":
        """Take the slopes of some tokens."""
        others = (None if slope is None else slope[place] for slope in self[1:])
        return Slopes(self.logprob[place], *others)

    def counting(self) -> Tensor:
        """Tell which tokens have a gradient at all: (n,) bool."""
        nonzero = [slope != 0 for slope in self if slope is not None]
        return reduce(torch.logical_or, nonzero)
