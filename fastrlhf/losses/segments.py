"""Sums over segments, runs of equal ids, without atomics and without knowing how many there are.

By doubling: after k steps a cell holds what lies within 2^k cells to one side, so that log2(M)
steps of plain tensor code do, autograd follows them, and the bits do not depend on scheduling.

Dims: M elements in order of their segments.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def suffix_scan(combine: Callable[[Tensor, Tensor], Tensor], values: Tensor, ids: Tensor) -> Tensor:
    """Combine each value (M,) with those that follow in its segment; ids (M,) are in order."""
    step = 1
    while step < values.shape[0]:
        same = ids[step:] == ids[:-step]
        head, ahead = values[:-step], values[step:]
        # Where nothing follows in the segment, what `combine` makes is dropped, and its gradient,
        # times 0, must not be NaN: it combines zeros, where the gradient is finite.
        joined = combine(*(torch.where(same, x, 0.0) for x in (head, ahead)))
        joined = torch.where(same, joined, head)
        values = torch.cat((joined, values[-step:]))
        step *= 2
    return values


def segment_sums(values: Tensor, ids: Tensor) -> Tensor:
    """Give each element (M,) the sum of its segment."""
    after = suffix_scan(torch.add, values, ids)
    before = suffix_scan(torch.add, values.flip(0), ids.flip(0)).flip(0)
    # The sum of what stands before an element is that up to the element before. Subtracting the
    # element from the sum up to it would give NaN where it is infinite.
    has_previous = ids[1:] == ids[:-1]
    return torch.cat((after[:1], after[1:] + torch.where(has_previous, before[:-1], 0.0)))
