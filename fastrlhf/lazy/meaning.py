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


LAID_OUT = "laid out anew"  # the step of a view that leaves tokens in their order


class Rows(NamedTuple):
    """The number of each token's hidden state, among those that entered a head."""

    numbers: Tensor  # (...) int64, numbers of hidden states
    distinct: bool = True  # whether no hidden state comes twice
    # The steps that made these rows from all: two sets of rows with the same steps are the same. To
    # compare numbers instead, a GPU would have to be awaited.
    path: tuple[Any, ...] = ()

    def viewed(self, view: View, step: Any, *, distinct: bool) -> Rows:
        return Rows(view(self.numbers), self.distinct and distinct, (*self.path, step))

    def flat(self) -> Rows:
        """The same rows in one dimension; their path forgets how they were laid out last."""
        path = self.path
        while path and path[-1][0] == LAID_OUT:
            path = path[:-1]
        return Rows(self.numbers.reshape(-1), self.distinct, path)

    def same_as(self, other: Rows) -> bool:
        if self.numbers is other.numbers or self.path == other.path:
            return self.numbers.shape == other.numbers.shape
        on_host = self.numbers.device.type == other.numbers.device.type == "cpu"
        return on_host and torch.equal(self.numbers, other.numbers)


class OfSource(NamedTuple):
    """The fields by which distributions of one source differ."""

    rows: Rows
    scale: float
    capped: bool
    factor: float
    temperature: Tensor | None
    constant: bool
    offset: Tensor | None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, OfSource)
            and self[1:4] == other[1:4]
            and are_same(self.temperature, other.temperature)
            and are_same(self.offset, other.offset)
            and self.constant == other.constant
            and self.rows.same_as(other.rows)
        )


class Distribution(NamedTuple):
    """The softmax of logits of some tokens.

    From a head's logits z, these logits are (scale·z + offset) / temperature, or with a cap
    factor·tanh(scale·z) / temperature.
    """

    source: Source
    rows: Rows
    scale: float = 1.0
    capped: bool = False
    factor: float = 1.0
    temperature: Tensor | None = None  # of each token, in the shape of the rows
    constant: bool = False  # whether no gradient goes back to the logits
    # Where a loop goes through the parts of a tensor one by one: the whole, and the places (...) of
    # these tokens in it. Statistics of the whole are computed at once when the first part is asked
    # for.
    part_of: tuple[Distribution, Tensor] | None = None
    offset: Tensor | None = None  # (V,) of each word, a constant

    def viewed(self, view: View, step: Any, *, distinct: bool) -> Distribution:
        part_of = self.part_of
        if part_of is not None:
            part_of = part_of[0], view(part_of[1])
        return self._replace(
            rows=self.rows.viewed(view, step, distinct=distinct), part_of=part_of,
            temperature=None if self.temperature is None else view(self.temperature),
        )  # fmt: skip

    def marked_as_whole(self) -> Distribution:
        """Return the same distribution, whose views will know that they are parts of it."""
        numbers = self.rows.numbers
        places = torch.arange(numbers.numel(), device=numbers.device).view(numbers.shape)
        return self if self.part_of is not None else self._replace(part_of=(self.flat(), places))

    def flat(self) -> Distribution:
        """Return the same distribution with its tokens in one dimension."""
        temperature = None if self.temperature is None else self.temperature.reshape(-1)
        return self._replace(rows=self.rows.flat(), temperature=temperature)

    def laid_out(self, layout: View) -> Distribution:
        """Return the same distribution with its tokens laid out as by the view."""
        return self._replace(rows=self.rows._replace(numbers=layout(self.rows.numbers)))

    def scaled(self, by: float) -> Distribution:
        if self.capped:
            return self._changed(factor=self.factor * by)
        if self.offset is None:
            return self._changed(scale=self.scale * by)
        return self._alone(scale=self.scale * by, offset=self.offset * by)

    def tanh(self) -> Distribution:
        return self._changed(capped=True)

    def divided(self, by: Tensor) -> Distribution:
        """Return the distribution with the logits of each token divided by `by` as well."""
        temperature = by if self.temperature is None else self.temperature * by
        return self._alone(temperature=temperature)

    def with_gradient(self, wanted: bool) -> Distribution:
        return self._changed(constant=not wanted)

    def _changed(self, **changes: Any) -> Distribution:
        """Change what holds for all tokens alike, here and in the whole that these are part of."""
        changed = self._replace(**changes)
        if self.part_of is None:
            return changed
        whole, places = self.part_of
        return changed._replace(part_of=(whole._changed(**changes), places))

    def _alone(self, **changes: Any) -> Distribution:
        """Change what a tensor determines. A loop over parts has another tensor for each part, so
        the result is no longer part of a whole.
        """
        return self._replace(**changes, part_of=None)

    def added(self, offset: Tensor) -> Distribution:
        return self._alone(offset=offset if self.offset is None else self.offset + offset)

    @property
    def rules_out(self) -> bool:
        """Whether a word is ruled out, by an offset of -inf. PyTorch's sums over the words then
        contain 0·ln 0, which is not a number.
        """
        return self.offset is not None and not bool(self.offset.isfinite().all())

    def same_as(self, other: Distribution) -> bool:
        return self.source is other.source and self.of_source() == other.of_source()

    def of_source(self) -> OfSource:
        """Return the fields by which it differs from others of its source, without the source."""
        return OfSource(
            self.rows,
            self.scale,
            self.capped,
            self.factor,
            self.temperature,
            self.constant,
            self.offset,
        )


def are_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors, into which nobody writes, are the same numbers in the same memory."""
    if a is None or b is None or a is b:
        return a is b
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


class Kind(Enum):
    """The meaning of the number of each word v, in terms of a distribution p, or of p and q."""

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
        """Return the numbers of those tokens that a view of the tokens chooses."""
        return self._replace(of=tuple(x.viewed(view, step, distinct=distinct) for x in self.of))

    def same_as(self, other: Words) -> bool:
        """Whether these are the same numbers, with or without a gradient."""
        alike = self[::2] == other[::2] and len(self.of) == len(other.of)
        pairs = zip(self.constant().of, other.constant().of, strict=False)
        return alike and all(a.same_as(b) for a, b in pairs)

    def times(self, factor: float) -> Words:
        if self.kind is Kind.LOGITS:
            return self._replace(of=(self.first.scaled(factor),))
        return self._replace(factor=self.factor * factor)

    def constant(self) -> Words:
        return self._replace(of=tuple(x.with_gradient(False) for x in self.of))

    def marked_as_whole(self) -> Words:
        return self._replace(of=tuple(x.marked_as_whole() for x in self.of))
