"""A language model's head on a block of rows: hidden states → logits, and gradients back.

The matrix of a head may come in column blocks, [W | sB], that are never put together: hidden states
are then as wide as all blocks. A low-rank adapter is one more block, since W·h + s·B·A·h is
[W | sB]·[h; A·h].

Precision: logits, and sums over the vocabulary or over tokens, are fp32 (fp64 for fp64 inputs),
whatever the inputs are. On CUDA, bf16 and fp16 operands stay as they are and cuBLAS adds up in
fp32, so that only the gradient of the logits is rounded, once, to the operands' dtype. Elsewhere
operands are converted to fp32, the weight in slices of a few MiB; a quantized weight likewise.

Dims: n rows of a block, K width of the hidden states, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fastrlhf.reference import accumulation_dtype

# Elements of a weight that are converted, or on a CPU multiplied, at a time. A slice of 8 MiB in
# fp32 stays in a CPU's last cache while a block of rows passes over it.
_SLICE_ELEMENTS = 2**21


@dataclass(frozen=True)
class QuantizedWeight:
    """A frozen (V, K) matrix in codes: `table[code]`, or the code itself, times a scale."""

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
        """Dequantize some rows."""
        codes = self.codes[rows]
        if self.table is None:
            values = codes.float()
        else:
            nibbles = torch.stack((codes >> 4, codes & 15), dim=-1).int()
            values = self.table.float()[nibbles].flatten(1)
        first, last = (bound * values.shape[1] for bound in (rows.start, rows.stop))
        run = torch.arange(first, last, device=self.device) // self.run
        return (values * self.scales[run].view(values.shape)).to(self.dtype)


Weight = Tensor | QuantizedWeight


class Gradients:
    """What is asked for of the gradients of hidden states (N, K), weights (V, K) and bias (V,).

    A gradient that nobody wants stays None; so does that of a weight before its first block of
    rows, which then overwrites.
    """

    def __init__(self, hidden: Tensor | None, weights: list[bool], bias: bool):
        self.hidden = hidden  # zeros to write into
        self.wants_weights = weights
        self.wants_bias = bias
        self.weights: list[Tensor | None] = [None] * len(weights)
        self.bias: Tensor | None = None

    def totals(
        self, hidden: Tensor, bias: Tensor | None, weights: list[Weight]
    ) -> list[Tensor | None]:
        """Gradients of the given tensors, in their shapes; zero where no row contributed, None
        where not asked for.
        """
        found = [None if self.hidden is None else self.hidden.view(hidden.shape)]
        for wanted, total, of in (
            (self.wants_bias, self.bias, bias),
            *zip(self.wants_weights, self.weights, weights, strict=True),
        ):
            if wanted and total is None:
                assert isinstance(of, Tensor)
                total = torch.zeros_like(of)
            found.append(total)
        return found


class Head:
    """Column blocks of a weight and a bias, multiplied as `dtype`."""

    def __init__(self, weights: list[Weight], bias: Tensor | None, dtype: torch.dtype):
        device = weights[0].device
        self.sums = accumulation_dtype(dtype)
        # What the matmuls take: the dtype itself where they add up in fp32 by themselves.
        self.operands = dtype if device.type == "cuda" else self.sums
        self.weights, self.bias, self.dtype = weights, bias, dtype
        self.vocab = weights[0].shape[0]
        ends = list(accumulate(weight.shape[1] for weight in weights))
        self.columns = [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        as_they_are = all(
            isinstance(weight, Tensor) and weight.dtype == self.operands for weight in weights
        )
        whole = as_they_are and device.type != "cpu"
        self.slice_rows = self.vocab if whole else max(1, _SLICE_ELEMENTS // ends[-1])

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states (n, K) to raw logits (n, V)."""
        logits = hidden.new_empty((hidden.shape[0], self.vocab), dtype=self.sums)
        for rows, block, weight in self._slices():
            _add_product(logits[:, rows], hidden[:, block], weight.T, fresh=block.start == 0)
        return logits if self.bias is None else logits.add_(self.bias)

    def pull_back(self, d_logits: Tensor) -> Tensor:
        """Multiply (n, V) gradients of raw logits by the weight: (n, K), of hidden states."""
        width = self.columns[-1].stop
        d_hidden = d_logits.new_empty((d_logits.shape[0], width), dtype=self.sums)
        for rows, block, weight in self._slices():
            _add_product(d_hidden[:, block], d_logits[:, rows], weight, fresh=rows.start == 0)
        return d_hidden

    def accumulate(self, gradients: Gradients, hidden: Tensor, d_logits: Tensor) -> None:
        """Add the share of a block of rows to the gradients of weights and bias."""
        for i, block in enumerate(self.columns):
            if not gradients.wants_weights[i]:
                continue
            total, fresh = gradients.weights[i], gradients.weights[i] is None
            if total is None:
                shape = (self.vocab, block.stop - block.start)
                total = gradients.weights[i] = hidden.new_empty(shape, dtype=self.sums)
            _add_product(total, d_logits.T, hidden[:, block], fresh)
        if gradients.wants_bias:
            share = d_logits.sum(0, dtype=self.sums)
            gradients.bias = share if gradients.bias is None else gradients.bias.add_(share)

    def _slices(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows and columns of the weight, and the weight there, as operands."""
        for first in range(0, self.vocab, self.slice_rows):
            rows = slice(first, min(first + self.slice_rows, self.vocab))
            for block, weight in zip(self.columns, self.weights, strict=True):
                yield rows, block, weight[rows].to(self.dtype).to(self.operands)


def _add_product(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """Do `total += a @ b`, or `total = a @ b` if fresh, in the precision of the total."""
    beta = 0 if fresh else 1
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    else:  # bf16 or fp16 on CUDA: fp32 sums
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
