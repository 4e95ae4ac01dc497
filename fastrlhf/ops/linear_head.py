"""A language model's head on a block of rows: hidden states → logits, and gradients back.

The matrix of a head may come in column blocks, such as [W | sB], which are never copied into one
matrix. Hidden states are then as wide as all blocks together. So a low-rank adapter is one more
block, since W·h + s·B·A·h is [W | sB]·[h; A·h].

Precision: logits, and sums over the vocabulary or over tokens, are fp32 (fp64 for fp64 inputs),
whatever the inputs are. On CUDA, bf16 and fp16 operands stay as they are and cuBLAS adds up in
fp32, so that only the gradient of the logits is rounded, once, to the operands' dtype. Elsewhere
operands are converted to fp32, the weight one slice of rows at a time. A quantized weight is
dequantized in slices, too.

Dims: n rows of a block, K width of the hidden states, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fastrlhf.reference import accumulation_dtype

from .head_gradients import LogitGradient, padded_rows

# How many elements of a weight are converted at a time. On a CPU a slice of 8 MiB in fp32 stays in
# the last cache until it is multiplied; a GPU needs larger slices to be busy.
_SLICE_ELEMENTS = 2**21
_GPU_SLICE_ELEMENTS = 2**26


@dataclass(frozen=True)
class QuantizedWeight:
    """A frozen (V, K) matrix in codes: `table[code]`, or the code itself, times a scale.

    Example:
        >>> codes = torch.tensor([[2, -1], [0, 4], [1, 1]], dtype=torch.int8)
        >>> weight = fastrlhf.QuantizedWeight(codes, torch.full((3,), 0.5), 2, None, torch.float32)
        >>> fastrlhf.linear_token_logprobs(torch.ones(1, 2), weight, torch.tensor([1]))
        tensor([-0.4644])
    """

    codes: Tensor  # (V, K) integer; with a table (V, K/2) uint8, two codes each, the high one first
    scales: Tensor  # (runs,) one for each run of weights, in row-major order
    run: int  # weights that share a scale
    table: Tensor | None  # (16,) what the codes stand for
    dtype: torch.dtype  # of the weights that the codes stand for

    @property
    def shape(self) -> tuple[int, int]:
        """(V, K)."""
        rows, columns = self.codes.shape
        return rows, columns if self.table is None else 2 * columns

    @property
    def ndim(self) -> int:
        return 2

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def __getitem__(self, rows: slice) -> Tensor:
        """Dequantize consecutive rows."""
        values = self._values(self.codes[rows])
        first, last = (bound * values.shape[1] for bound in (rows.start, rows.stop))
        runs = slice(first // self.run, -(-last // self.run))
        sizes = torch.full((runs.stop - runs.start,), self.run, device=self.device)
        sizes[0] -= first % self.run
        sizes[-1] -= -last % self.run
        of_runs = self.scales[runs].to(values.dtype)
        scales = of_runs.repeat_interleave(sizes, output_size=values.numel())
        return values.mul_(scales.view(values.shape)).to(self.dtype)

    def rows_at(self, index: Tensor) -> Tensor:
        """Dequantize some rows, by their numbers."""
        values = self._values(self.codes[index])
        column = torch.arange(values.shape[1], device=self.device)
        run = (index.unsqueeze(1) * values.shape[1] + column) // self.run
        return values.mul_(self.scales[run].to(values.dtype)).to(self.dtype)

    def _values(self, codes: Tensor) -> Tensor:
        """Decode codes of rows into numbers that are still to be multiplied by the scales."""
        if self.table is None:
            return codes.float()
        table = self.table.float()
        # For each of the 256 bytes, the two numbers that its two codes stand for.
        pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=-1)
        return pairs[codes.int()].flatten(1)


Weight = Tensor | QuantizedWeight


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the operands of matmuls: the dtype itself on devices whose matmuls of it
    add up in fp32, otherwise fp32 (or fp64).
    """
    return dtype if device.type == "cuda" else accumulation_dtype(dtype)


class Head:
    """Column blocks of a weight and a bias, multiplied as `dtype`."""

    def __init__(self, weights: list[Weight], bias: Tensor | None, dtype: torch.dtype):
        self.device = device = weights[0].device
        self.sums = accumulation_dtype(dtype)
        self.operands = operand_dtype(dtype, device)
        self.weights, self.bias, self.dtype = weights, bias, dtype
        self.vocab = weights[0].shape[0]
        ends = list(accumulate(weight.shape[1] for weight in weights))
        self.columns = [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        as_they_are = dtype == self.operands and all(
            isinstance(weight, Tensor) and weight.dtype == self.operands for weight in weights
        )
        on_cpu = device.type == "cpu"
        elements = _SLICE_ELEMENTS if on_cpu else _GPU_SLICE_ELEMENTS
        rows = elements // ends[-1]
        if not on_cpu:  # slices begin at multiples of 16 bytes, as rows of logits do
            rows = rows // 64 * 64 or rows
        # At least 1: where ranks share the vocabulary, this one may have no row of it.
        self.slice_rows = max(1, self.vocab if as_they_are else rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states (n, K) to raw logits (n, V)."""
        logits = padded_rows(hidden.shape[0], self.vocab, self.sums, self.device)
        for rows, block, weight in self._slices():
            _add_product(logits[:, rows], hidden[:, block], weight.T, fresh=block.start == 0)
        return logits if self.bias is None else logits.add_(self.bias)

    def room(self, rows: int) -> Tensor:
        """Make room for the gradient of so many rows of logits, in the dtype of the operands."""
        return padded_rows(rows, self.vocab, self.operands, self.device)

    def pull_back(self, d_logits: LogitGradient) -> Tensor:
        """Multiply gradients of raw logits (n, V) by the weight, which gives those of hidden states
        (n, K).
        """
        values, unit = d_logits
        width = self.columns[-1].stop
        d_hidden = values.new_empty((values.shape[0], width), dtype=self.sums)
        if self.vocab == 0:
            return d_hidden.zero_()
        for rows, block, weight in self._slices():
            _add_product(d_hidden[:, block], values[:, rows], weight, fresh=rows.start == 0)
        return d_hidden if unit is None else d_hidden.mul_(unit)

    def added(self, total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        """Do `total += a @ b` in the precision of sums. Without a total, make one of `a @ b`."""
        fresh = total is None
        if total is None:
            total = a.new_empty((a.shape[0], b.shape[1]), dtype=self.sums)
        _add_product(total, a, b, fresh)
        return total

    def _slices(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield a slice of the weight at a time: its rows, its columns, and the weight there in the
        dtype of the operands.
        """
        for first in range(0, self.vocab, self.slice_rows):
            rows = slice(first, min(first + self.slice_rows, self.vocab))
            for block, weight in zip(self.columns, self.weights, strict=True):
                yield rows, block, weight[rows].to(self.dtype).to(self.operands)


def _add_product(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """Do `total += a @ b`, or if `fresh`, `total = a @ b`, in the precision of the total."""
    beta = 0 if fresh else 1
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    else:  # bf16 or fp16 on CUDA: fp32 sums
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
