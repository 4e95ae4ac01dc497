"""What a tensor over the vocabulary stands for, in terms of the logits that a head would make.

Dims: V vocabulary, U hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .source import Source

View = Callable[[Tensor], Tensor]


class Rows(NamedTuple):
    """Which of the hidden states of a head each token is of."""

    numbers: Tensor  # (...) int64, numbers of hidden states
    distinct: bool = True  # whether none comes twice
    # How these rows were made from all: two sets of rows that were made alike are the same. A GPU
    # would have to be awaited to compare numbers.
    path: tuple[Any, ...] = ()

    def viewed(self, view: View, step: Any, *, distinct: bool) -> Rows:
        return Rows(view(self.numbers), self.distinct and distinct, (*self.path, step))

    def same_as(self, other: Rows) -> bool:
        if self.numbers is other.numbers or self.path == other.path:
            return self.numbers.shape == other.numbers.shape
        on_host = self.numbers.device.type == other.numbers.device.type == "cpu"
        return on_host and torch.equal(self.numbers, other.numbers)


class Distribution(NamedTuple):
    """The softmax of logits of some tokens.

    Of a head's logits z the logits are (scale·z + offset) / temperature, or with a cap
    factor·tanh(scale·z) / temperature.
    """

    source: Source
    rows: Rows
    scale: float = 1.0
    capped: bool = False
    factor: float = 1.0
    temperature: Tensor | None = None  # of each token, in the shape of the rows
    constant: bool = False  # whether no gradient goes back to the logits
    offset: Tensor | None = None  # (V,) of each word, a constant

    def viewed(self, view: View, step: Any, *, distinct: bool) -> Distribution:
        temperature = None if self.temperature is None else view(self.temperature)
        return self._replace(
            rows=self.rows.viewed(view, step, distinct=distinct), temperature=temperature
        )

    def scaled(self, by: float) -> Distribution:
        if self.capped:
            return self._replace(factor=self.factor * by)
        offset = None if self.offset is None else self.offset * by
        return self._replace(scale=self.scale * by, offset=offset)

    def divided(self, by: Tensor) -> Distribution:
        """With a temperature more, of each token."""
        temperature = by if self.temperature is None else self.temperature * by
        return self._replace(temperature=temperature)

    def added(self, offset: Tensor) -> Distribution:
        return self._replace(offset=offset if self.offset is None else self.offset + offset)

    def same_as(self, other: Distribution) -> bool:
        return (
            self.source is other.source
            and self[2:5] == other[2:5]
            and self.temperature is other.temperature
            and self.offset is other.offset
            and self.constant == other.constant
            and self.rows.same_as(other.rows)
        )


class Kind(Enum):
    """A number for each word v, of distributions p, or p and q."""

    LOGITS = auto()  # z_v
    LOGPROBS = auto()  # ln p_v
    FLOORED_LOGPROBS = auto()  # ln p_v, which is no less than the least number of its dtype
    PROBS = auto()  # p_v
    LOG_RATIOS = auto()  # ln p_v - ln q_v
    ENTROPY_TERMS = auto()  # p_v ln p_v, which add up to minus the entropy
    LOGIT_TERMS = auto()  # p_v z_v
    DIVERGENCE_TERMS = auto()  # p_v (ln p_v - ln q_v), which add up to KL(p || q)
    CROSS_TERMS = auto()  # p_v ln q_v, which add up to minus the cross-entropy


class Words(NamedTuple):
    """A number for each word of each token, times a factor."""

    kind: Kind
    of: tuple[Distribution, ...]
    factor: float = 1.0

    @property
    def first(self) -> Distribution:
        return self.of[0]

    def viewed(self, view: View, step: Any, *, distinct: bool = True) -> Words:
        """The same of other tokens: those that a view of the tokens has."""
        return self._replace(of=tuple(x.viewed(view, step, distinct=distinct) for x in self.of))

    def contiguous(self) -> Words:
        """The same of tokens whose numbers lie one after the other."""

        def laid_out(of: Distribution) -> Distribution:
            return of._replace(rows=of.rows._replace(numbers=of.rows.numbers.contiguous()))

        return self._replace(of=tuple(map(laid_out, self.of)))

    def times(self, factor: float) -> Words:
        if self.kind is Kind.LOGITS:
            return self._replace(of=(self.first.scaled(factor),))
        return self._replace(factor=self.factor * factor)

    def constant(self) -> Words:
        return self._replace(of=tuple(x._replace(constant=True) for x in self.of))
