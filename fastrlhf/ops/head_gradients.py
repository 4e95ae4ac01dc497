"""From gradients of logits, a block of rows at a time, to those of hidden states, weights and bias.

Two things stand between the two on a GPU, where matmuls take 16-bit operands:

- fp16 ends at 6e-8. The gradient of a mean over thousands of tokens is smaller than that in most of
  the vocabulary, so fp16 holds each row relative to a power of two of its own (`unit`), by which
  sums over the vocabulary are multiplied afterwards. In sums over tokens, the hidden states carry
  it.
- The sum over tokens that is a weight's gradient is as large as the weight, and in fp32: adding a
  block of a thousand rows to it moves four times the bytes of the block's logits. So gradients of
  logits wait for each other, and are added together.

Dims: n rows of a block, K width of the hidden states, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .linear_head import Head, Weight

# Bytes of gradients of logits that wait to be added to that of a weight; one block at least.
_WAITING_BYTES = 2**29
# Rows start at multiples of so many numbers.
_ROW_ALIGNMENT = {"cpu": 1}
_GPU_ROW_ALIGNMENT = 64
# fp16 ends at 2^16. Rows are scaled to end below 2^12, which leaves 2^-26 to their smallest normal
# number.
_LARGEST_EXPONENT = 12
_SMALLEST_EXPONENT = -100  # of a unit, which is a number of fp32, as is its inverse


def padded_rows(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make room for (n, V) numbers, whose rows on a GPU start at 16 bytes: what its fast matmuls
    load at once.
    """
    alignment = _ROW_ALIGNMENT.get(device.type, _GPU_ROW_ALIGNMENT)
    width = -(-vocab // alignment) * alignment
    return torch.empty((rows, width), dtype=dtype, device=device)[:, :vocab]


class LogitGradient(NamedTuple):
    """The gradient of a block's logits, as operands of matmuls."""

    values: Tensor  # (n, V)
    unit: Tensor | None  # (n, 1) powers of two that the values are relative to; None: 1


def as_operands(d_logits: Tensor, operands: torch.dtype, room: Tensor | None) -> LogitGradient:
    """Round the gradient of logits to the dtype of the matmuls, into `room` unless it is that
    already.
    """
    if d_logits.dtype == operands:
        return LogitGradient(d_logits, None)
    assert room is not None
    if operands != torch.float16:
        return LogitGradient(room.copy_(d_logits), None)
    largest = torch.linalg.vector_norm(d_logits, torch.inf, dim=1, keepdim=True)
    exponent = (largest.frexp().exponent - _LARGEST_EXPONENT).clamp(min=_SMALLEST_EXPONENT)
    # Rows of zeros, inf or NaN are what they are in any unit, and must not decide that of the sums.
    plain = (largest > 0) & largest.isfinite()
    exponent = torch.where(plain, exponent, _SMALLEST_EXPONENT)
    values = torch.mul(d_logits, torch.ldexp(torch.ones_like(largest), -exponent), out=room)
    return LogitGradient(values, torch.ldexp(torch.ones_like(largest), exponent))


class Gradients:
    """What is asked for of the gradients of hidden states (N, K), weights (V, K) and bias (V,).

    A gradient that nobody wants stays None; so does that of a weight before its first rows, which
    then overwrite.
    """

    def __init__(
        self, head: Head, rows: int, hidden: Tensor | None, weights: list[bool], bias: bool
    ):
        self.head, self.rows = head, rows  # how many of them there will be
        self.hidden = hidden  # zeros to write into
        self.wants_weights, self.wants_bias = weights, bias
        self.weights: list[Tensor | None] = [None] * len(weights)
        self.bias: Tensor | None = None
        self.unit: Tensor | None = None  # 0-d power of two that weights and bias are relative to
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
        if self.hidden is not None:
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
        found = [None if self.hidden is None else self.hidden.view(hidden.shape)]
        for wanted, total, of in (
            (self.wants_bias, self.bias, bias),
            *zip(self.wants_weights, self.weights, weights, strict=True),
        ):
            if wanted and total is None:
                assert isinstance(of, Tensor)
                total = torch.zeros_like(of)
            elif total is not None and self.unit is not None:
                total.mul_(self.unit)
            found.append(total)
        return found

    def _add_waiting(self) -> None:
        """Add what waits to the gradients of weights and bias."""
        if not self._waiting:
            return
        hidden = _joined([hidden for hidden, _ in self._waiting])
        values, share = self._waiting[0][1].values, None
        if self._room is not None:
            values = self._room[: len(hidden)]
        units = [d_logits.unit for _, d_logits in self._waiting if d_logits.unit is not None]
        if units:
            share = self._shares(_joined(units)).to(hidden.dtype)
            hidden = hidden * share
        for i, block in enumerate(self.head.columns):
            if self.wants_weights[i]:
                self.weights[i] = self.head.added(self.weights[i], values.T, hidden[:, block])
        if self.wants_bias:
            if share is None:
                part = values.sum(0, dtype=self.head.sums)
            else:
                part = self.head.added(None, values.T, share).squeeze(1)
            self.bias = part if self.bias is None else self.bias.add_(part)
        self._waiting = []

    def _shares(self, units: Tensor) -> Tensor:
        """Express the units of rows in that of the sums, which is the largest so far."""
        largest = units.amax()
        if self.unit is not None:
            largest = torch.maximum(largest, self.unit)
            for total in (*self.weights, self.bias):
                if total is not None:
                    total.mul_(self.unit / largest)
        self.unit = largest
        return units / largest


def _joined(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
