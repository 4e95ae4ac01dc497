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

    Of a head's logits z the logits are scale·z / temperature, or with a cap
    factor·tanh(scale·z) / temperature.
    """

    source: Source
    rows: Rows
    scale: float = 1.0
    capped: bool = False
    factor: float = 1.0
    temperature: Tensor | None = None  # of each token, in the shape of the rows
    constant: bool = False  # whether no gradient goes back to the logits

    def viewed(self, view: View, step: Any, *, distinct: bool) -> Distribution:
        temperature = None if self.temperature is None else view(self.temperature)
        return self._replace(
            rows=self.rows.viewed(view, step, distinct=distinct), temperature=temperature
        )

    def laid_out(self, layout: View) -> Distribution:
        """The same tokens, whose numbers lie in another way."""
        return self._replace(rows=self.rows._replace(numbers=layout(self.rows.numbers)))

    def scaled(self, by: float) -> Distribution:
        if self.capped:
            return self._replace(factor=self.factor * by)
        return self._replace(scale=self.scale * by)

    def divided(self, by: Tensor) -> Distribution:
        """With a temperature more, of each token."""
        temperature = by if self.temperature is None else self.temperature * by
        return self._replace(temperature=temperature)

    def same_as(self, other: Distribution) -> bool:
        return (
            self.source is other.source
            and self[2:5] == other[2:5]
            and self.temperature is other.temperature
            and self.constant == other.constant
            and self.rows.same_as(other.rows)
        )


class Kind(Enum):
    """A number for each word v, of distributions p, or p and q."""

    LOGITS = auto()  # z_v
    LOGPROBS = auto()  # ln p_v
    PROBS = auto()  # p_v
    LOG_RATIOS = auto()  # ln p_v - ln q_v
    ENTROPY_TERMS = auto()  # p_v ln p_v, which add up to minus the entropy
    LOGIT_TERMS = auto()  # p_v z_v
    DIVERGENCE_TERMS = auto()  # p_v (ln p_v - ln q_v), which add up to KL(p || q)


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

    def same_as(self, other: Words) -> bool:
        """Whether these are the same numbers, of whatever gradient."""
        alike = self[::2] == other[::2] and len(self.of) == len(other.of)
        pairs = zip(self.constant().of, other.constant().of, strict=False)
        return alike and all(a.same_as(b) for a, b in pairs)

    def times(self, factor: float) -> Words:
        if self.kind is Kind.LOGITS:
            return self._replace(of=(self.first.scaled(factor),))
        return self._replace(factor=self.factor * factor)

    def constant(self) -> Words:
        return self._replace(of=tuple(x._replace(constant=True) for x in self.of))
