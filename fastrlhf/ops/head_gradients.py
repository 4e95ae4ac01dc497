"""From gradients of logits, a block of rows at a time, to those of hidden states, weights and bias.

The plans (`linear_plans.py`) make the gradient of a block's logits and hand it to `Gradients`,
which multiplies it by the head (`linear_head.py`) and by the hidden states.

Two things stand between the two on a GPU, where matmuls take 16-bit operands:

- fp16 ends at 6e-8. The gradient of a mean over thousands of tokens is smaller than that in most of
  the vocabulary, so fp16 holds each row relative to a power of two of its own (`unit`), by which
  sums over the vocabulary are multiplied afterwards. In sums over tokens, the hidden states carry
  it, relative to a power of two of all rows.
- The sum over tokens that is a weight's gradient is as large as the weight, and in fp32: adding a
  block of a thousand rows to it moves four times the bytes of the block's logits. So gradients of
  logits wait for each other, and are added together.

Where ranks share the vocabulary, the gradient of a hidden state is the sum of theirs: that of a
block is on its way, in fp32, while the matmuls of the next one run.

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

# Bytes of gradients of logits that wait to be added to that of a weight; one block at least.
_WAITING_BYTES = 2**29
# Rows are moved to the front of a block in so many parts, each of which is copied.
_MOVES = 8
# Rows start at multiples of so many numbers.
_ROW_ALIGNMENT = {"cpu": 1}
_GPU_ROW_ALIGNMENT = 64
# fp16 ends at 2^16. What is scaled ends below 2^14, so 2^-28 of the largest is a normal number.
_LARGEST_EXPONENT = 14
_SMALLEST_EXPONENT = -100  # of a unit, which is a normal number of fp32


def padded_rows(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make room for (n, V) numbers, whose rows on a GPU start at 16 bytes: what its fast matmuls
    load at once.
    """
    alignment = _ROW_ALIGNMENT.get(device.type, _GPU_ROW_ALIGNMENT)
    if being_traced():
        alignment = 1  # the compiler takes no `out=` with gaps
    width = -(-vocab // alignment) * alignment
    return torch.empty((rows, width), dtype=dtype, device=device)[:, :vocab]


class LogitGradient(NamedTuple):
    """The gradient of a block's logits, as operands of matmuls."""

    values: Tensor  # (n, V)
    unit: Tensor | None  # (n, 1) powers of two that the values are relative to; None: 1

    def leading(self, some: Tensor) -> LogitGradient:
        """Move some rows, by increasing indices, to the front, and leave out the others.

        A row never moves behind its place, so that a few at a time overwrite none that is still to
        be moved.
        """
        count = some.shape[0]
        at_a_time = max(1, len(self.values) // _MOVES)
        for first in range(0, count, at_a_time):
            rows = some[first : first + at_a_time]
            self.values[first : first + len(rows)] = self.values[rows]
        return LogitGradient(self.values[:count], None if self.unit is None else self.unit[some])


def as_operands(d_logits: Tensor, operands: torch.dtype, room: Tensor | None) -> LogitGradient:
    """Round the gradient of logits to the dtype of the matmuls, into `room` unless it is that
    already.
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
    """Powers of two, relative to which numbers fit into fp16 whose largest is given, in fp32."""
    exponent = (largest.frexp().exponent - _LARGEST_EXPONENT).clamp(min=_SMALLEST_EXPONENT)
    # Rows of zeros, inf or NaN are what they are in any unit, and must not decide that of the sums.
    plain = (largest > 0) & largest.isfinite()
    exponent = torch.where(plain, exponent, _SMALLEST_EXPONENT)
    # From its bits: a power that is computed may be off by a rounding.
    return ((exponent + 127) << 23).view(torch.float32)


def _carrying(rows: Tensor, units: Tensor, least: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows (n, K) times the units of their rows of logits, relative to a unit of all of them, which
    is at least so much.
    """
    unit = _unit((_largest(rows.float()) * units).amax())
    if least is not None:
        unit = torch.maximum(unit, least)
    return (rows * (units / unit)).to(rows.dtype), unit


class Gradients:
    """What is asked for of the gradients of hidden states (N, K), weights (V, K) and bias (V,).

    A gradient that nobody wants stays None; so does that of a weight before its first rows, which
    then overwrite.
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
        self.head, self.rows = head, rows  # how many of them there will be
        self.hidden = hidden  # zeros to write into
        self.shared = shared  # whether a hidden state may come several times
        self.over_ranks = None if group is None or hidden is None else SumsOnTheirWay(group, hidden)
        self.wants_weights, self.wants_bias = weights, bias
        self.weights: list[Tensor | None] = [None] * len(weights)
        self.bias: Tensor | None = None
        self.unit: Tensor | None = None  # 0-d power of two that those of weights are relative to
        self._room: Tensor | None = None
        self._waiting: list[tuple[Tensor, LogitGradient]] = []

    def room(self, rows: int) -> Tensor:
        """Make room for the gradient of so many rows of logits, as operands."""
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
        """Take in a block of rows, given their hidden states as operands, and where they belong."""
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
        """Gradients of the given tensors, in their shapes; zero where no row contributed, None
        where not asked for.
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
        """Add what waits to the gradients of weights and bias."""
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
        """Sum over the rows."""
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
