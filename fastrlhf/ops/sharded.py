"""This rank's part of tensors that torch.distributed spreads over a mesh (DTensor).

Two kinds of DTensors are served: those whose vocabulary is cut by one dimension of the mesh, and
replicated ones. Along all other dimensions of the mesh, ranks must have the same tokens, because
gradients of a replicated tensor are taken to be equal, and are not added up. The gradient of a part
goes back to the DTensor of which it is a part.

Dims: W ranks, V vocabulary.
"""

import sys
from typing import Any, NamedTuple

from torch import Tensor

from .backend import outside_of_graphs
from .checks import check_floating
from .linear_head import QuantizedWeight, Weight
from .ranks import Group, check_group, refuse_transforms_of_ranks
from .tracing import replaced
from .vocabulary_part import VocabularyPart, agreed_part, part_of


class HeadPart(NamedTuple):
    """Hidden states and a head, whole or of a part of the vocabulary, as plain tensors."""

    hidden: Tensor
    weights: list[Weight]
    bias: Tensor | None
    part: VocabularyPart | None


def is_dtensor(x: Any) -> bool:
    """Whether x is a DTensor. Where nothing has imported that class yet, x cannot be one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def head_part(
    hidden: Tensor,
    weights: list[Weight],
    bias: Tensor | None,
    group: Group | None,
    *,
    prefix: str = "",
) -> HeadPart:
    """Find out which part of the vocabulary this rank has of a head (V, H).

    With a group, the host waits for the other ranks.

    Raises:
        TypeError, ValueError: DTensors of other placements, a group beside them, or as `part_of`.
    """
    group = check_group(group)
    weight = weights[0]
    if group is not None or is_dtensor(weight):
        refuse_transforms_of_ranks("an operation from hidden states")
    hidden = replicated(f"{prefix}hidden", hidden)
    if not is_dtensor(weight):
        if group is None or not isinstance(weight, Tensor | QuantizedWeight) or weight.ndim != 2:
            return HeadPart(hidden, weights, bias, None)  # later checks refuse what is not a weight
        check_floating(f"{prefix}hidden", hidden)
        return HeadPart(
            hidden, weights, bias, outside_of_graphs(part_of)(group, weight.shape[0], hidden.device)
        )
    refuse_group(f"{prefix}weight", group)
    local, part = vocabulary_part(f"{prefix}weight", weight, 0)
    locals_: list[Weight] = [local]
    for other in weights[1:]:
        locals_.append(_alike(f"{prefix}weight", other, weight))
    if bias is not None:
        bias = _alike(f"{prefix}bias", bias, weight)
    return HeadPart(hidden, locals_, bias, part)


def same_head_part(
    hidden: Tensor,
    weights: list[Weight],
    bias: Tensor | None,
    part: VocabularyPart | None,
    *,
    prefix: str,
) -> HeadPart:
    """Find this rank's part of a further head, which has to be the same part of the vocabulary.

    Raises:
        TypeError, ValueError: it is another part.
    """
    own_part = head_part(hidden, weights, bias, None, prefix=prefix)
    weight: Any = weights[0]
    if is_dtensor(weight) and not _same(own_part.part, part):
        raise ValueError(
            f"{prefix}weight: expected a DTensor cut as weight is, got {tuple(weight.placements)}"
        )
    return replaced(own_part, part=part)


class LogitsPart(NamedTuple):
    """This rank's columns of logits (..., V), as a plain tensor."""

    logits: Any
    group: Group | None  # of the ranks that share the vocabulary
    part: VocabularyPart | None  # where it is known which columns these are
    of_dtensor: bool = False

    def agreed(
        self, tokens: Tensor, asked: dict[str, int], temperature: Tensor | None = None
    ) -> VocabularyPart | None:
        """Check that all ranks have the same tokens and ask the same of them (`agreed_part`), and
        return which part this is.
        """
        if self.group is None:
            return None
        columns = self.logits.shape[-1]
        return agreed_part(self.group, columns, tokens, asked, self.part, temperature)


def logits_part(logits: Any, group: Group | None) -> LogitsPart:
    """Find this rank's columns of logits (..., V).

    Raises:
        TypeError, ValueError: DTensors of other placements, or a group beside them.
    """
    group = check_group(group)
    if not is_dtensor(logits):
        return LogitsPart(logits, group, None)
    refuse_group("logits", group)
    local, part = vocabulary_part("logits", logits, -1)
    return LogitsPart(local, None if part is None else part.group, part, of_dtensor=True)


def same_part(name: str, x: Any, part: VocabularyPart | None) -> Any:
    """Return this rank's part of further logits, which has to be the same part of the vocabulary.

    Raises:
        ValueError: it is another part.
    """
    if not is_dtensor(x):
        return x
    local, own = vocabulary_part(name, x, -1)
    if not _same(own, part):
        raise ValueError(f"{name}: expected a DTensor cut as logits are, got {tuple(x.placements)}")
    return local


def _same(own: VocabularyPart | None, other: VocabularyPart | None) -> bool:
    if own is None or other is None:
        return own is other
    return own.is_that_of(other)


def refuse_group(name: str, group: Group | None) -> None:
    if group is not None:
        raise ValueError(
            f"group: expected None where {name} is a DTensor, whose mesh says who has what"
        )


def vocabulary_part(name: str, x: Any, dim: int) -> tuple[Tensor, VocabularyPart | None]:
    """Return this rank's part of a DTensor whose dimension `dim` is the vocabulary, and which part
    that is; None if it is all of it.

    Raises:
        ValueError: placements that are not served.
    """
    from torch.distributed.tensor import Replicate, Shard

    dim = dim % x.ndim
    cutting = [
        i for i, placement in enumerate(x.placements)
        if type(placement) is Shard and placement.dim % x.ndim == dim
    ]  # fmt: skip
    others = [placement for i, placement in enumerate(x.placements) if i not in cutting]
    if len(cutting) > 1 or not all(type(placement) is Replicate for placement in others):
        raise ValueError(
            f"{name}: expected a DTensor of which one dimension of the mesh cuts the vocabulary "
            f"(Shard({dim})) and the others have copies (Replicate()), got {tuple(x.placements)}"
        )
    local = x.to_local(grad_placements=x.placements)
    if not cutting:
        return local, None
    mesh, (mesh_dim,) = x.device_mesh, cutting
    vocab, ranks = x.shape[dim], mesh.size(mesh_dim)
    # DTensors are cut as torch.chunk does: the last ranks may have fewer columns, or none.
    largest = -(-vocab // ranks)
    start = min(mesh.get_local_rank(mesh_dim) * largest, vocab)
    size = min(largest, vocab - start)
    if local.shape[dim] != size:
        raise ValueError(
            f"{name}: expected {size} of {vocab} columns on this rank, as a DTensor is cut by "
            f"distribute_tensor, got {local.shape[dim]}"
        )
    return local, VocabularyPart(mesh.get_group(mesh_dim), start, size, vocab, largest)


def replicated(name: str, x: Any) -> Any:
    """Return this rank's copy of a DTensor; anything else is returned as it is.

    Raises:
        ValueError: a DTensor of which each rank has only a part.
    """
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Replicate

    if not all(type(placement) is Replicate for placement in x.placements):
        raise ValueError(
            f"{name}: expected a plain tensor or a DTensor that is replicated, got placements "
            f"{tuple(x.placements)}; x.redistribute(placements=[Replicate()]) makes it so"
        )
    return x.to_local(grad_placements=x.placements)


def _alike(name: str, x: Any, weight: Any) -> Tensor:
    """Return this rank's part of a DTensor that has to be cut as the weight is."""
    if (
        not is_dtensor(x)
        or x.placements != weight.placements
        or x.device_mesh != weight.device_mesh
    ):
        got = tuple(x.placements) if is_dtensor(x) else type(x).__name__
        raise ValueError(
            f"{name}: expected a DTensor cut as the weight is, {tuple(weight.placements)} on one "
            f"mesh, got {got}"
        )
    return x.to_local(grad_placements=x.placements)
