"""What processes of a torch.distributed group say to each other.

Everything that is added up is gathered first, in the order of the ranks, and added by every rank in
the same way, so that all have the same bits, and have them at each run. What is gathered is a few
numbers a token, or a sequence. Only the gradient of hidden states, which is large, goes through an
all-reduce.

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
else:  # a build of torch without distributed has no type of groups
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
    """Every rank's tensor of one shape and dtype, in the order of ranks: (W, ...). No gradient."""
    x = x.detach().contiguous()
    parts = x.new_empty((size_of(group), *x.shape))
    if x.numel():
        # Its name of torch 2.13 on, where the older one warns.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(parts.view(-1), x.view(-1), group)  # 0-d ones included
    return parts


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum of every rank's tensor, in the same bits on all. No gradient."""
    return gathered(x, group).sum(0, dtype=x.dtype)


def concatenated(tensors: Sequence[Tensor], group: Group) -> tuple[list[Tensor], slice]:
    """Every rank's tensors, in the order of ranks along their first dimension, and where those of
    this rank stand. No gradient.

    The tensors of a rank have one length, which may be another on each rank: all wait for it.
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
    """The sum of every rank's tensor, of which each rank differentiates its own term: the gradient
    passes as it is.

    So where every rank computes the same loss from the sum, its gradient is that of this loss with
    respect to what this rank has. (`torch.distributed.nn.functional.all_reduce` adds up the
    gradients of all ranks' losses, as if they were different.)
    """
    return x if group is None else _SumOverRanks.apply(x, group)


def shared_by_ranks(x: Tensor, group: Group | None) -> Tensor:
    """The tensor that every rank has, for each to compute something of its own from: its gradient
    is the sum of what comes back on all ranks.
    """
    return x if group is None else _SharedByRanks.apply(x, group)


class _SumOverRanks(torch.autograd.Function):
    """Each of the two maps is the other's transpose, and so its derivative, to any order."""

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
    """Replace some rows of a tensor (N, K), all if None, by their sums over ranks."""
    sums = x if rows is None else x[rows]
    if sums.numel():
        dist.all_reduce(sums, group=group)
    return sums if rows is None else x.index_put_((rows,), sums)


class SumsOnTheirWay:
    """Sums over ranks of one block of rows after the other, each sent while the next is made."""

    def __init__(self, group: Group, total: Tensor):
        self.group, self.total = group, total  # to write into
        self._sent: tuple[Tensor | slice, Tensor, Any] | None = None

    def send(self, place: Tensor | slice, part: Tensor) -> None:
        """Send this rank's part of some rows, once those of the block before have come."""
        self.receive()
        if part.numel():
            work = dist.all_reduce(part, group=self.group, async_op=True)
            self._sent = place, part, work

    def receive(self) -> None:
        """Wait for what is on its way, which on a GPU only the stream does."""
        if self._sent is not None:
            place, part, work = self._sent
            work.wait()
            self.total[place] = part.to(self.total.dtype)
            self._sent = None


def refuse_derivatives_of_ranks(function: str, *upstream: Tensor | None) -> None:
    """Raise in a backward whose own derivative is asked for: nobody sends it on."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}: where ranks share the vocabulary, its gradient cannot be differentiated "
            "again (create_graph=True)"
        )
    refuse_transforms_of_ranks(f"{function}'s backward", *upstream)


def refuse_transforms_of_ranks(function: str, *upstream: Tensor | None) -> None:
    """Raise under a transform, which knows no collective."""
    if under_transform(*upstream):
        raise RuntimeError(
            f"{function}: where ranks share the vocabulary, does not work under torch.func "
            "transforms or forward-mode differentiation"
        )
