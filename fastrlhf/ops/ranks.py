"""Collectives among the processes (ranks) of a torch.distributed group.

A sum over ranks is made by gathering all terms in the order of the ranks. Every rank then adds them
up in the same way, so that all have the same bits, in each run. Only a few numbers a token, or a
sequence, are gathered like that. The gradient of hidden states, which is large, goes through an
all-reduce instead.

Dims: W ranks of the group.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .backend import under_transform

if TYPE_CHECKING:
    Group: TypeAlias = dist.ProcessGroup
else:  # a build of torch without torch.distributed has no class of groups
    Group = Any


def check_group(group: Group | None) -> Group | None:
    """Return the group.

    Raises:
        TypeError: anything but a process group, or None.
        ValueError: a group that this process is not a member of.
    """
    if group is None:
        return None
    if dist.is_available():
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group: expected one that this process is in, got one of others")
        if isinstance(group, dist.ProcessGroup):
            return group
    raise TypeError(
        "group: expected a torch.distributed.ProcessGroup (torch.distributed.group.WORLD, or one "
        f"of new_group or of a DeviceMesh), or None, got {type(group).__name__}"
    )


def size_of(group: Group) -> int:
    return dist.get_world_size(group)


def rank_in(group: Group) -> int:
    return dist.get_rank(group)


def gathered(x: Tensor, group: Group) -> Tensor:
    """Gather every rank's tensor, of one shape and dtype, in the order of ranks: (W, ...). Without
    a gradient.
    """
    x = x.detach().contiguous()
    parts = x.new_empty((size_of(group), *x.shape))
    if x.numel():
        # The name that it has from torch 2.13 on, which warns about the older one.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(parts.view(-1), x.view(-1), group)  # flat, since x may be 0-d
    return parts


def summed(x: Tensor, group: Group) -> Tensor:
    """Sum every rank's tensor, with the same bits on all ranks. Without a gradient."""
    return gathered(x, group).sum(0, dtype=x.dtype)


def concatenated(tensors: Sequence[Tensor], group: Group) -> tuple[list[Tensor], slice]:
    """Join every rank's tensors along their first dimension, in the order of ranks, and tell which
    rows are this rank's. Without a gradient.

    All tensors of a rank have one length, but ranks may have different ones, and the host waits to
    learn these.
    """
    length, rank = tensors[0].shape[0], rank_in(group)
    lengths = gathered(tensors[0].new_full((), length, dtype=torch.int64), group).tolist()
    start = sum(lengths[:rank])
    return [_joined(x, lengths, group) for x in tensors], slice(start, start + length)


def _joined(x: Tensor, lengths: list[int], group: Group) -> Tensor:
    padded = x.new_zeros((max(lengths), *x.shape[1:]))
    padded[: x.shape[0]] = x
    parts = gathered(padded, group)
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])


def sum_over_ranks(x: Tensor, group: Group | None) -> Tensor:
    """Sum every rank's tensor. In the backward, the gradient of the sum is passed on unchanged as
    that of this rank's term.

    So where every rank computes the same loss from the sum, this rank's tensor gets the gradient of
    that one loss. (`torch.distributed.nn.functional.all_reduce` adds up the gradients of all ranks'
    losses, as if they were different losses.)
    """
    return x if group is None else _SumOverRanks.apply(x, group)


def shared_by_ranks(x: Tensor, group: Group | None) -> Tensor:
    """Return a tensor that is the same on every rank, from which each rank computes something of
    its own. Its gradient is the sum of the gradients that come back on all ranks.
    """
    return x if group is None else _SharedByRanks.apply(x, group)


class _SumOverRanks(torch.autograd.Function):
    """`_SumOverRanks` and `_SharedByRanks` are linear and each other's transpose. So each is the
    derivative of the other, to any order.
    """

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return summed(x, group)

    @staticmethod
    def backward(ctx, d_sum):
        return shared_by_ranks(d_sum, ctx.group), None


class _SharedByRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d_shared):
        return sum_over_ranks(d_shared, ctx.group), None


def all_reduced_rows(x: Tensor, rows: Tensor | None, group: Group) -> Tensor:
    """Replace rows of a tensor (N, K) by their sums over ranks; all rows if `rows` is None."""
    sums = x if rows is None else x[rows]
    if sums.numel():
        dist.all_reduce(sums, group=group)
    return sums if rows is None else x.index_put_((rows,), sums)


class SumsOnTheirWay:
    """Sums over ranks of one block of rows after the other. While a block is on its way, the next
    one is computed.
    """

    def __init__(self, group: Group, total: Tensor):
        self.group, self.total = group, total  # to write into
        self._sent: tuple[Tensor | slice, Tensor, Any] | None = None

    def send(self, place: Tensor | slice, part: Tensor) -> None:
        """Send this rank's term of some rows, after the block before has arrived."""
        self.receive()
        if part.numel():
            work = dist.all_reduce(part, group=self.group, async_op=True)
            self._sent = place, part, work

    def receive(self) -> None:
        """Wait for the block that is on its way. On a GPU the stream waits, not the host."""
        if self._sent is not None:
            place, part, work = self._sent
            work.wait()
            self.total[place] = part.to(self.total.dtype)
            self._sent = None


def refuse_derivatives_of_ranks(function: str, *upstream: Tensor | None) -> None:
    """Raise in a backward whose own derivative is asked for: no collective is written for that."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}: where ranks share the vocabulary, its gradient cannot be differentiated "
            "again (create_graph=True)"
        )
    refuse_transforms_of_ranks(f"{function}'s backward", *upstream)


def refuse_transforms_of_ranks(function: str, *upstream: Tensor | None) -> None:
    """Raise under a transform of torch.func or forward mode, which knows no collective."""
    if under_transform(*upstream):
        raise RuntimeError(
            f"{function}: where ranks share the vocabulary, does not work under torch.func "
            "transforms or forward-mode differentiation"
        )
