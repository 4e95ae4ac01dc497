"""Which part of a vocabulary a rank has, where several ranks share it.

A rank numbers targets from the first column of its part: those in earlier columns are below 0, and
those in later columns are not below the size of the part.

`part_of` and `agreed_part` find out about the part by an exchange with the other ranks.
`sharded.py` reads it from DTensors.
"""

import struct
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import assert_on_device
from .ranks import Group, gathered, rank_in

# Two targets in the numbering of a part: NOT_HERE is one in an earlier column, or in no column at
# all; IGNORED is one that is not scored.
NOT_HERE = -1
IGNORED = -2

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class VocabularyPart(NamedTuple):
    """This rank's columns of a vocabulary that the ranks of a group share."""

    group: Group
    # `start` and `vocab` may be 0-d tensors on a GPU, so that the host does not wait for them.
    start: int | Tensor  # number of the first column of this rank
    size: int  # how many columns this rank has
    vocab: int | Tensor  # how many columns all ranks have together
    largest: int | None = None  # the largest size of all ranks' parts, where it is known

    @property
    def columns(self) -> slice:
        """The part's columns in the whole vocabulary. The host waits where `start` is a tensor."""
        first = int(self.start)
        return slice(first, first + self.size)

    def is_that_of(self, other: "VocabularyPart") -> bool:
        """Whether another part has the same columns, among the same ranks."""
        ranks = (dist.get_process_group_ranks(part.group) for part in (self, other))
        return len(set(map(tuple, ranks))) == 1 and self[1:] == other[1:]

    def own_targets(self, targets: Tensor, ignore_index: int) -> Tensor:
        """Number targets of the whole vocabulary from the first column of this part.

        Raises:
            ValueError: a target outside of the whole vocabulary; on a GPU, an assertion instead.
        """
        live = targets != ignore_index
        known = ((targets >= 0) & (targets < self.vocab)) | ~live
        if targets.device.type == "cpu" and not known.all():
            worst = targets[~known][0].item()
            raise ValueError(
                f"targets: expected numbers in [0, {self.vocab}), the vocabulary of all ranks, or "
                f"ignore_index {ignore_index}, got {worst}"
            )
        assert_on_device(known.all(), "a target is outside [0, vocabulary)")
        own = (targets - self.start).clamp(NOT_HERE, self.size)
        return torch.where(live, own, IGNORED)


def part_of(group: Group, size: int, device: torch.device) -> VocabularyPart:
    """Tell the other ranks how many columns this one has, and learn at which column they begin.

    The host waits for the answer.

    Raises:
        ValueError: an empty vocabulary.
    """
    sizes = gathered(torch.full((1,), size, device=device), group).view(-1)
    return _among(group, size, sizes.tolist())


def agreed_part(
    group: Group,
    size: int,
    tokens: Tensor,
    asked: dict[str, int],
    known: VocabularyPart | None = None,
    temperature: Tensor | None = None,
) -> VocabularyPart:
    """Check with the other ranks that all score the same tokens and ask the same of them, since
    what they send each other afterwards depends on that. Unless it is known already, learn at which
    column those of this rank begin.

    `tokens` are the targets, with one number for all ignored ones, or a mask. `asked` are numbers
    that have to be the same on all ranks, by the name that an error gives them.

    On a GPU, the host does not wait for the answer, and an assertion replaces the error.

    Raises:
        ValueError: raised on every rank, if something is not the same; an empty vocabulary.
    """
    if tokens.is_cuda and torch.cuda.is_current_stream_capturing() and known is not None:
        return known
    numbers = torch.tensor([size, tokens.numel(), *asked.values()])
    numbers = numbers.to(tokens.device, non_blocking=True)
    own = torch.cat((numbers, fingerprint(tokens, temperature)))
    of_ranks = gathered(own, group)
    sizes, others = of_ranks[:, 0], of_ranks[:, 1:]
    alike = (others == others[0]).all(0)
    if tokens.is_cuda:
        assert_on_device(alike.all(), "ranks that share a vocabulary differ in what they ask")
        assert_on_device(sizes.sum() > 0, "ranks share a vocabulary of 0 columns")
        rank = rank_in(group)
        return known or VocabularyPart(group, sizes[:rank].sum(), size, sizes.sum())
    for i, name in enumerate(("number of tokens", *asked, "tokens to score")):
        if not alike[i]:
            counts = name in ("number of tokens", "chunk_size")
            got = f", got {others[:, i].tolist()}" if counts else ""
            raise ValueError(
                f"group: expected the same {name} on every rank that shares the vocabulary{got}"
            )
    return known or _among(group, size, sizes.tolist())


def fingerprint(tokens: Tensor, temperature: Tensor | None) -> Tensor:
    """Compute a number (1,) that almost surely changes with the tokens, with their temperatures,
    and with the order of either.
    """
    flat = tokens.reshape(-1).long()
    place = torch.arange(1, flat.shape[0] + 1, device=flat.device)
    mixed = (flat + 3) * (place * 2654435761 % 2**31)
    if temperature is not None:
        bits = temperature.detach().float().reshape(-1).view(torch.int32)
        mixed = mixed + bits * (place * 40503 % 2**31)
    return mixed.sum().view(1)


def _among(group: Group, size: int, sizes: list[int]) -> VocabularyPart:
    if sum(sizes) == 0:
        raise ValueError("group: expected a vocabulary, got 0 columns on every rank")
    return VocabularyPart(group, sum(sizes[: rank_in(group)]), size, sum(sizes), max(sizes))


def numbered(
    question: Iterable[bool], dtype: torch.dtype, *options: float | None
) -> dict[str, int]:
    """Turn what is asked (answers yes or no, the dtype of the logits, and options) into numbers
    that ranks can compare.
    """
    asked = sum(2**i for i, wanted in enumerate(question) if wanted)
    bits = [struct.unpack("q", struct.pack("d", x or 0.0))[0] for x in options]
    options_mixed = sum((2 * i + 1) * number for i, number in enumerate(bits)) % 2**62
    return {
        "question (entropy, with_stats, gradients)": asked,
        "dtype": _DTYPES.index(dtype),
        "temperature, softcap, scale or beta": options_mixed,
    }
