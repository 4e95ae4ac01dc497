"""How kernels are launched: where, and on tiles of which shape.

`SHAPES` holds what can be tuned, a line for each kernel. It changes how fast a kernel is, and in
which order it adds up, so the last bits of its sums; never by more than rounding. What a row is cut
into depends on its vocabulary and dtype alone, not on how many rows there are, which is what makes
results batch invariant.

Every launcher of this folder uses it. Of the kernels, begin with `rows.py`, then `token_stats.py`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def on_their_device(launcher: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make the device of a launcher's first tensor the current one while it launches.

    Triton launches on the current device, whatever tensors it is given.
    """

    @functools.wraps(launcher)
    def launch(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
        on_host = device.type in ("cpu", "meta")
        with torch.accelerator.device_index(None if on_host else device.index):
            return launcher(*arguments, **options)

    return launch


class TileShape(NamedTuple):
    """The tile that a kernel works on at once, at large vocabularies."""

    warps: int
    thread_bytes: int  # of a row that one thread loads: 16 are one 128-bit load
    # How many tiles of a sweep are in flight. With 1 a sweep loads, waits and computes, and other
    # programs of the multiprocessor hide the wait; with more, the compiler loads ahead into shared
    # memory by asynchronous copies.
    stages: int


SHAPES = {
    # A program has a few tiles of a row, and many programs share a multiprocessor.
    "token_stats": TileShape(warps=8, thread_bytes=32, stages=1),
    "token_stats_backward": TileShape(warps=8, thread_bytes=32, stages=1),
    # A program sweeps a whole row, twice: registers let two or three share a multiprocessor.
    "policy_loss": TileShape(warps=8, thread_bytes=32, stages=1),
    "divergence": TileShape(warps=8, thread_bytes=32, stages=1),
    "fisher": TileShape(warps=8, thread_bytes=32, stages=1),
    # A program has one tile of two rows.
    "divergence_backward": TileShape(warps=8, thread_bytes=32, stages=1),
}
_HOLDS_MUCH = ("policy_loss", "divergence", "divergence_backward", "fisher")
_HAS_TWO_ROWS = ("divergence", "divergence_backward")

_MAX_VEC = 8


class RowPlan(NamedTuple):
    """How a row is cut: tiles of `lanes` x `vec` tokens, and how many warps share a tile."""

    lanes: int
    vec: int
    lane_stride: int
    vec_stride: int
    warps: int
    stages: int

    @property
    def tile(self) -> int:
        return self.lanes * self.vec

    def options(self) -> dict[str, Any]:
        """Launch options of a kernel that has one tile."""
        return {
            "LANES": self.lanes,
            "VEC": self.vec,
            "LANE_STRIDE": self.lane_stride,
            "VEC_STRIDE": self.vec_stride,
            "num_warps": self.warps,
        }

    def sweep_options(self) -> dict[str, Any]:
        """Launch options of a kernel that sweeps over tiles."""
        return self.options() | {"STAGES": self.stages}


def row_plan(kernel: str, vocab: int, dtype: torch.dtype, *, capped: bool = False) -> RowPlan:
    """Choose how `kernel` cuts a row of `vocab` logits. `dtype` is the widest of the rows that it
    reads, and `capped` says whether their logits have a softcap.
    """
    shape = SHAPES[kernel]
    aligned = vocab % 16 == 0
    # Registers: rows that start anywhere take an address for every token, fp64 takes two a number,
    # and a softcap a few while it is computed.
    scarce = not aligned or (kernel in _HAS_TWO_ROWS and (dtype == torch.float64 or capped))
    thread_bytes = 16 if scarce and kernel in _HOLDS_MUCH else shape.thread_bytes
    warp_tokens = 32 * thread_bytes // dtype.itemsize
    vec = min(_MAX_VEC, thread_bytes // dtype.itemsize)
    tile = max(vec, min(shape.warps * warp_tokens, triton.next_power_of_2(vocab)))
    lanes = tile // vec
    # A thread owns the vectors of its lanes. Rows that all start at 16 bytes let it load neighbours
    # at once; other rows are loaded an element at a time, and then neighbouring threads take
    # neighbours.
    strides: tuple[int, int] = (vec, 1) if aligned else (1, lanes)
    return RowPlan(lanes, vec, *strides, max(1, tile // warp_tokens), shape.stages)
