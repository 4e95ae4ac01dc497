"""Gradients of values that are returned one by one, finished while their logits are there.

The gradient of a token's value with respect to its hidden state is a vector that forward can keep,
whatever comes of the value: backward multiplies it by a number. That with respect to a head is a
sum over tokens: it is computed as if all values weighed the same, as in a sum or a mean. If they
turn out not to, backward has to make the logits again.

`linear_divergence.py` and `linear_topk_divergence.py` do so block by block; `summed_gradient.py`
does it for losses, whose sum has a graph already.

Dims: N tokens, n tokens of a block, K width of the hidden states.
"""

from typing import NamedTuple

from torch import Tensor

from .head_gradients import Gradients, LogitGradient
from .linear_head import Head, Weight


class ValueGradients(NamedTuple):
    """Gradients that the forward finishes for one head; None where no gradient is needed."""

    head: Head
    hidden: Tensor  # (N, K)
    slopes: Tensor | None  # (N, K) of each value with respect to its hidden state
    of_sum: Gradients | None  # of the sum of all values with respect to weights and bias

    @property
    def wanted(self) -> bool:
        return self.slopes is not None or self.of_sum is not None

    def room(self, rows: int) -> Tensor:
        """Make room for the gradient of so many rows of logits, as operands."""
        return (self.head if self.of_sum is None else self.of_sum).room(rows)

    def add(self, rows: Tensor, d_logits: LogitGradient) -> None:
        """Take in the gradient of the logits of some tokens (n,)."""
        if self.slopes is not None:
            self.slopes[rows] = self.head.pull_back(d_logits).to(self.slopes.dtype)
        if self.of_sum is not None:
            self.of_sum.add(rows, self.hidden[rows].to(self.head.operands), d_logits)

    def of_head(self, bias: Tensor | None, weights: list[Weight]) -> list[Tensor | None]:
        """Gradients of bias and weights, None where none were asked for."""
        if self.of_sum is None:
            return [None] * (1 + len(weights))
        return self.of_sum.totals(self.hidden, bias, weights)[1:]


def weigh_alike(upstream: Tensor) -> bool:
    """Whether all values have one upstream gradient (n,). A GPU is awaited."""
    return not upstream.numel() or bool((upstream == upstream[0]).all())
