"""Where the tokens of each sequence stand: in rows (B, T), or packed, one after the other.

A loss calls `layout.sums(x)` to add up the tokens of each sequence, whichever layout they have.
Rows are `fastrlhf.reference.ROWS`. Packed tokens are `Runs`: each sequence is a run of tokens, and
the runs' borders are cu_seqlens, the cumulative lengths of FlashAttention's varlen interface.

Runs are summed by a tree. Each of its levels has the sums of 32 neighbours of the level below. A
run's sum is made of the largest cells of the tree that lie within it: a few of each level, at
either end of the run. Nothing is subtracted, which could cancel. No token of another sequence is
read, which may be infinite. There are no atomics. Every shape is known without the values of
cu_seqlens, for which the host would have to wait for a GPU. A graph is compiled anew when the tree
gets another level, at N = 32, 1024, 32768 and so on.

Dims: B sequences, N tokens of all of them, K neighbours.
"""

from typing import Any

import torch
from torch import Tensor

from fastrlhf.reference import ROWS, Layout

from .backend import is_batched, under_transform
from .checks import (
    assert_on_device,
    check_dense,
    check_same_device,
    known_on_host,
    wide_integers,
)

_NEIGHBOURS = 32


class Runs(Layout):
    """Packed sequences: tokens (N,) or (1, N), sequence i from cu_seqlens[i] to cu_seqlens[i + 1].

    `layout_of` makes one, after checks. Tensors of tokens may have either shape; results of
    `spread` and `ids` have the shape of the tokens for which the layout was made.
    """

    def __init__(self, cu_seqlens: Tensor, tokens: Tensor) -> None:
        self.cu_seqlens: Tensor = cu_seqlens  # (B + 1,) int64
        self.shape = tokens.shape
        self._found: Tensor | None = None

    @property
    def _sequence(self) -> Tensor:
        """The number (N,) of each token's sequence, computed when it is first needed."""
        if self._found is None:
            place = torch.arange(self.shape.numel(), device=self.cu_seqlens.device)
            stops = self.cu_seqlens[1:].contiguous()
            self._found = torch.searchsorted(stops, place, right=True)
        return self._found

    def sequences(self, tokens: Tensor) -> int:
        return self.cu_seqlens.shape[0] - 1

    def sums(self, x: Tensor) -> Tensor:
        return _sums(x.reshape(-1), self.cu_seqlens, self._sequence)

    def counts(self, mask: Tensor) -> Tensor:
        before = self._counted_before(mask)
        return before[self.cu_seqlens[1:]] - before[self.cu_seqlens[:-1]]

    def spread(self, x: Tensor) -> Tensor:
        return _spread(x, self.cu_seqlens, self._sequence).view(self.shape)

    def last(self, mask: Tensor) -> Tensor:
        before = self._counted_before(mask)
        is_last = before[1:] == before[self.cu_seqlens[1:]][self._sequence]
        return (mask != 0) & is_last.view(mask.shape)

    def ids(self, tokens: Tensor) -> Tensor:
        return self._sequence.view(tokens.shape)

    def tokens(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1)

    def _counted_before(self, mask: Tensor) -> Tensor:
        """Count the tokens (N + 1,) of the mask before each place, in integers: their differences,
        which give the counts of runs, are exact.
        """
        return torch.nn.functional.pad((mask != 0).reshape(-1).cumsum(0), (1, 0))


def layout_of(
    name: str, tokens: Tensor, cu_seqlens: Tensor | None = None, *, rows: str = "(B, T)"
) -> Layout:
    """Check a tensor of tokens, (B, T), or with cu_seqlens (N,) or (1, N), and return its layout.

    Raises:
        TypeError, ValueError: cu_seqlens that do not fit, or tokens of another shape; for the error
            `rows` says which shape was expected without cu_seqlens.
    """
    if cu_seqlens is None:
        if tokens.ndim != 2:
            hint = "; packed tokens (N,) need cu_seqlens" if tokens.ndim == 1 else ""
            raise ValueError(f"{name}: expected shape {rows}, got {tuple(tokens.shape)}{hint}")
        return ROWS
    return Runs(checked_cu_seqlens(name, tokens, cu_seqlens), tokens)


def checked_cu_seqlens(name: str, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return cumulative lengths as int64, if they are those of packed tokens (N,) or (1, N).

    Their values are checked at once on the CPU. On a GPU, and in a compiled graph, an assertion
    checks them when the device gets there.

    Raises:
        TypeError: cu_seqlens are not a tensor of int32 or int64.
        ValueError: cu_seqlens are not (B + 1,), do not start at 0, do not end at N, decrease, or
            are on another device; or tokens have another shape.
    """
    check_dense("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if not (tokens.ndim == 1 or (tokens.ndim == 2 and tokens.shape[0] == 1)):
        raise ValueError(
            f"cu_seqlens: expected None for {name} of shape {tuple(tokens.shape)}; packed tokens "
            "are (N,) or (1, N)"
        )
    check_same_device("cu_seqlens", cu_seqlens, name, tokens)
    cu_seqlens, end = wide_integers(cu_seqlens), tokens.numel()
    if known_on_host(cu_seqlens):
        _check_on_host(name, cu_seqlens, end)
    elif not is_batched(cu_seqlens):
        lengths = cu_seqlens.diff()
        fits = (lengths >= 0).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == end)
        assert_on_device(
            fits, f"cu_seqlens: expected to start at 0, not to decrease and to end at N of {name}"
        )
    return cu_seqlens


def _check_on_host(name: str, cu_seqlens: Tensor, end: int) -> None:
    first, last, lengths = int(cu_seqlens[0]), int(cu_seqlens[-1]), cu_seqlens.diff()
    if first != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, got {first}")
    if (lengths < 0).any():
        place = int((lengths < 0).nonzero()[0])
        steps = " after ".join(str(int(x)) for x in cu_seqlens[place : place + 2].flip(0))
        raise ValueError(f"cu_seqlens: expected not to decrease, got {steps}")
    if last != end:
        hint = ""
        if last == end + 1:
            hint = (
                "; what model_token_stats returns, (1, N - 1), is of the tokens after the first: "
                "F.pad(x, (0, 1)) is of all N, with the mask shift_targets(ids, mask, "
                "cu_seqlens=cu_seqlens) != -100"
            )
        raise ValueError(
            f"cu_seqlens: expected to end at {end}, the number of tokens of {name}, got "
            f"{last}{hint}"
        )


def _sums(values: Tensor, cu_seqlens: Tensor, sequence: Tensor) -> Tensor:
    """Sum values (N,) over each run: (B,)."""
    if under_transform(values):
        return _sums_by_tree(values, cu_seqlens)
    return _Sums.apply(values, cu_seqlens, sequence)


def _spread(values: Tensor, cu_seqlens: Tensor, sequence: Tensor) -> Tensor:
    """Give each token (N,) the value (B,) of its run."""
    if under_transform(values) or not values.is_floating_point():
        return values[sequence]
    return _Spread.apply(values, cu_seqlens, sequence)


class _Sums(torch.autograd.Function):
    """Sums of runs. `_Sums` and `_Spread` are linear and each other's transpose, so each is the
    derivative of the other, to any order. The derivative that PyTorch has for the indexing in
    `_Spread` would be a sum by atomics.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, cu_seqlens: Tensor, sequence: Tensor) -> Tensor:
        ctx.save_for_backward(cu_seqlens, sequence)
        return _sums_by_tree(values, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, d_sums: Tensor) -> tuple[Tensor, None, None]:
        return _spread(d_sums, *ctx.saved_tensors), None, None


class _Spread(torch.autograd.Function):
    """Give each token the value of its run."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, cu_seqlens: Tensor, sequence: Tensor) -> Tensor:
        ctx.save_for_backward(cu_seqlens, sequence)
        return values[sequence]

    @staticmethod
    def backward(ctx: Any, d_tokens: Tensor) -> tuple[Tensor, None, None]:
        return _sums(d_tokens, *ctx.saved_tensors), None, None


def _sums_by_tree(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum (N,) over each run: see above. Plain tensor code."""
    start, stop = cu_seqlens[:-1], cu_seqlens[1:]  # cells of this level that are not yet added
    total = values.new_zeros(start.shape)
    while values.shape[0] > _NEIGHBOURS:
        # Whole groups of K lie from `first` to `end`; `first` is beyond `end` within one group.
        first, end = (start + _NEIGHBOURS - 1) // _NEIGHBOURS, stop // _NEIGHBOURS
        across = first <= end
        total = total + _sum_of_few(values, start, torch.where(across, first * _NEIGHBOURS, stop))
        total = total + _sum_of_few(values, torch.where(across, end * _NEIGHBOURS, stop), stop)
        missing = -values.shape[0] % _NEIGHBOURS
        values = torch.nn.functional.pad(values, (0, missing)).view(-1, _NEIGHBOURS).sum(1)
        start, stop = first, torch.maximum(first, end)
    cell = torch.arange(values.shape[0], device=values.device)
    inside = (cell >= start.unsqueeze(1)) & (cell < stop.unsqueeze(1))  # (B, K)
    return total + torch.where(inside, values, 0.0).sum(1)


def _sum_of_few(values: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Sum fewer than K cells, from start to stop (B,) each."""
    cell = start.unsqueeze(1) + torch.arange(_NEIGHBOURS - 1, device=values.device)  # (B, K - 1)
    inside = cell < stop.unsqueeze(1)
    return torch.where(inside, values[cell.clamp(max=values.shape[0] - 1)], 0.0).sum(1)
