"""From gradients of logits, a block of rows at a time, to those of hidden states, weights and bias.

The plans (`linear_plans.py`) make the gradient of a block's logits and hand it to `Gradients`,
which multiplies it by the head (`linear_head.py`) and by the hidden states.

On a GPU, where matmuls take 16-bit operands, two more things have to be done:

- The smallest number of fp16 is 6e-8. The gradient of a mean over thousands of tokens is smaller
  than that in most of the vocabulary. So in fp16 the gradient of each row of logits is held
  relative to a power of two, the row's `unit`. Sums over the vocabulary are multiplied by the
  unit afterwards. In sums over tokens, hidden states are multiplied by the units of their rows
  beforehand, relative to one power of two for all rows.
- The gradient of a weight is a sum over tokens, in fp32 and as large as the weight: adding a block
  of a thousand rows to it moves four times the bytes of the block's logits. So the gradients of
  several blocks wait, and are added together.

Where ranks share the vocabulary, the gradient of a hidden state is a sum over ranks. That of a
block is sent, in fp32, while the matmuls of the next block run.

Dims: n rows of a block, K width of the hidden states, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .add_at import add_at
from .ranks import Group, SumsOnTheirWay
from .tracing import being_traced

if TYPE_CHECKING:
    from .linear_head import Head, Weight

# How many bytes of gradients of logits wait to be added to the gradient of a weight; at least one
# block does.
_WAITING_BYTES = 2**29
# Rows are moved to the front of a block in this many parts; each part is copied on the way.
_MOVES = 8
# Rows start at multiples of this many numbers.
_ROW_ALIGNMENT = {"cpu": 1}
_GPU_ROW_ALIGNMENT = 64
# The largest fp16 is just below 2^16. Scaled numbers are below 2^14, so that 2^-28 times the
# largest of them is still a normal number of fp16.
_LARGEST_EXPONENT = 14
_SMALLEST_EXPONENT = -100  # of a unit, so that it is a normal number of fp32


def padded_rows(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make room for (n, V) numbers. On a GPU rows start at multiples of at least 16 bytes, which
    its fast matmuls load at once.
    """
    alignment = _ROW_ALIGNMENT.get(device.type, _GPU_ROW_ALIGNMENT)
    if being_traced():
        alignment = 1  # the compiler does not accept an `out=` tensor with gaps between rows
    width = -(-vocab // alignment) * alignment
    return torch.empty((rows, width), dtype=dtype, device=device)[:, :vocab]


class LogitGradient(NamedTuple):
    """The gradient of a block's logits, as operands of matmuls."""

    values: Tensor  # (n, V)
    unit: Tensor | None  # (n, 1) powers of two by which the values are divided; None: all 1

    def leading(self, some: Tensor) -> LogitGradient:
        """Move some rows, given by increasing indices, to the front, and drop the others.

        No row moves towards the end, so when a few are moved at a time, they overwrite no row that
        is still to be moved.
        """
        count = some.shape[0]
        at_a_time = max(1, len(self.values) // _MOVES)
        for first in range(0, count, at_a_time):
            rows = some[first : first + at_a_time]
            self.values[first : first + len(rows)] = self.values[rows]
        return LogitGradient(self.values[:count], None if self.unit is None else self.unit[some])


def as_operands(d_logits: Tensor, operands: torch.dtype, room: Tensor | None) -> LogitGradient:
    """Round the gradient of logits to the dtype of the matmuls and write it into `room`; if it has
    that dtype already, it is returned as it is.
    """
    if d_logits.dtype == operands:
        return LogitGradient(d_logits, None)
    assert room is not None
    if operands != torch.float16:
        return LogitGradient(room.copy_(d_logits), None)
    unit = _unit(_largest(d_logits))
    return LogitGradient(torch.div(d_logits, unit, out=room), unit)


def _largest(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True)


def _unit(largest: Tensor) -> Tensor:
    """Compute powers of two, in fp32, such that numbers divided by them fit into fp16, given the
    largest of these numbers.
    """
    exponent = (largest.frexp().exponent - _LARGEST_EXPONENT).clamp(min=_SMALLEST_EXPONENT)
    # Rows of zeros, inf or NaN are the same in any unit. They get the smallest, so that they do not
    # determine the common unit of the sums.
    plain = (largest > 0) & largest.isfinite()
    exponent = torch.where(plain, exponent, _SMALLEST_EXPONENT)
    # The power is made from its bits, because a computed power may be off by a rounding.
    return ((exponent + 127) << 23).view(torch.float32)


def _carrying(rows: Tensor, units: Tensor, least: Tensor | None) -> tuple[Tensor, Tensor]:
    """Multiply rows (n, K) by the units of their rows of logits, and divide them by one common
    unit, which is not less than `least`. Returns both.
    """
    unit = _unit((_largest(rows.float()) * units).amax())
    if least is not None:
        unit = torch.maximum(unit, least)
    return (rows * (units / unit)).to(rows.dtype), unit


class Gradients:
    """The gradients of hidden states (N, K), weights (V, K) and bias (V,), as far as they are
    asked for.

    A gradient that is not asked for stays None. That of a weight is None until the first rows
    come, which make it; later ones are added.
    """

    def __init__(
        self,
        head: Head,
        rows: int,
        hidden: Tensor | None,
        weights: list[bool],
        bias: bool,
        group: Group | None = None,
        shared: bool = False,
    ):
        self.head, self.rows = head, rows  # `rows`: how many rows there will be in all blocks
        self.hidden = hidden  # zeros, into which the gradient of hidden states is written
        self.shared = shared  # whether several rows may belong to one hidden state
        self.over_ranks = None if group is None or hidden is None else SumsOnTheirWay(group, hidden)
        self.wants_weights, self.wants_bias = weights, bias
        self.weights: list[Tensor | None] = [None] * len(weights)
        self.bias: Tensor | None = None
        self.unit: Tensor | None = None  # 0-d power of two by which those of weights are divided
        self._room: Tensor | None = None
        self._waiting: list[tuple[Tensor, LogitGradient]] = []

    def room(self, rows: int) -> Tensor:
        """Make room for the gradient of so many rows of logits, in the dtype of the matmuls."""
        waiting = sum(len(hidden) for hidden, _ in self._waiting)
        if self._room is not None and waiting + rows > len(self._room):
            self._add_waiting()
            waiting = 0
        if self._room is None or rows > len(self._room):
            vocab, dtype = self.head.vocab, self.head.operands
            capacity = rows
            if any(self.wants_weights):
                waiting_rows = _WAITING_BYTES // (vocab * dtype.itemsize)
                capacity = max(rows, min(self.rows, waiting_rows // rows * rows))
            self._room = padded_rows(capacity, vocab, dtype, self.head.device)
        return self._room[waiting : waiting + rows]

    def add(self, place: Tensor | slice, hidden: Tensor, d_logits: LogitGradient) -> None:
        """Take in a block of rows: their places among all tokens, their hidden states in the dtype
        of the matmuls, and the gradient of their logits.
        """
        if self.over_ranks is not None:
            self.over_ranks.send(place, self.head.pull_back(d_logits))
        elif self.hidden is not None and self.shared:
            assert isinstance(place, Tensor)
            add_at(self.hidden, place, self.head.pull_back(d_logits).to(self.hidden.dtype))
        elif self.hidden is not None:
            self.hidden[place] = self.head.pull_back(d_logits).to(self.hidden.dtype)
        if any(self.wants_weights) or self.wants_bias:
            self._waiting.append((hidden, d_logits))
            in_place_of_logits = self._room is None
            if in_place_of_logits:
                self._add_waiting()

    def totals(
        self, hidden: Tensor, bias: Tensor | None, weights: list[Weight]
    ) -> list[Tensor | None]:
        """Return the gradients of the given tensors, in their shapes: zeros where no row
        contributed, None where it is not asked for.
        """
        self._add_waiting()
        self._room = None
        if self.over_ranks is not None:
            self.over_ranks.receive()
        for total in self.weights:
            if total is not None and self.unit is not None:
                total.mul_(self.unit)
        totals = [None if self.hidden is None else self.hidden.view(hidden.shape)]
        for wanted, total, of in (
            (self.wants_bias, self.bias, bias),
            *zip(self.wants_weights, self.weights, weights, strict=True),
        ):
            if wanted and total is None:
                assert isinstance(of, Tensor)
                total = torch.zeros_like(of)
            totals.append(total)
        return totals

    def _add_waiting(self) -> None:
        """Add the waiting blocks to the gradients of weights and bias."""
        if not self._waiting:
            return
        hidden = _joined([hidden for hidden, _ in self._waiting])
        values = self._waiting[0][1].values if self._room is None else self._room[: len(hidden)]
        units = [d_logits.unit for _, d_logits in self._waiting if d_logits.unit is not None]
        if self.wants_bias:
            part = self._sum(values, _joined(units) if units else None)
            self.bias = part if self.bias is None else self.bias.add_(part)
        if units:
            hidden, unit = _carrying(hidden, _joined(units), self.unit)
            self._move_to(unit)
        for i, block in enumerate(self.head.columns):
            if self.wants_weights[i]:
                self.weights[i] = self.head.added(self.weights[i], values.T, hidden[:, block])
        self._waiting = []

    def _sum(self, values: Tensor, units: Tensor | None) -> Tensor:
        """Sum the gradients of logits over the rows, which gives that of the bias: (V,)."""
        if units is None:
            return values.sum(0, dtype=self.head.sums)
        ones, unit = _carrying(torch.ones_like(values[:, :1]), units, None)
        return self.head.added(None, values.T, ones).squeeze(1).mul_(unit)

    def _move_to(self, unit: Tensor) -> None:
        """Express the gradients of weights relative to another unit."""
        for total in self.weights:
            if total is not None and self.unit is not None:
                total.mul_(self.unit / unit)
        self.unit = unit


def _joined(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
