"""A vocabulary that ranks share, each of which has the columns of a part of it.

Targets are numbered anew, from the first column of the part: below 0 for earlier columns, from its
size on for later ones.
"""

import struct
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import assert_on_device
from .ranks import Group, gathered, rank_in

# Of targets that are numbered from the first column of a part: one in earlier columns, or in none.
NOT_HERE = -1
# One that is ignored.
IGNORED = -2

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class VocabularyPart(NamedTuple):
    """This rank's columns of a vocabulary that the ranks of a group share."""

    group: Group
    start: int | Tensor  # the first of them; on a GPU possibly 0-d, so that nobody waits for it
    size: int  # how many they are
    vocab: int | Tensor  # how many all ranks have
    largest: int | None = None  # of the sizes of all ranks, where it is known

    @property
    def columns(self) -> slice:
        """Where the part stands in the whole vocabulary, where that is known."""
        first = int(self.start)
        return slice(first, first + self.size)

    def is_that_of(self, other: "VocabularyPart") -> bool:
        """Whether another part is of the same columns among the same ranks."""
        ranks = (dist.get_process_group_ranks(part.group) for part in (self, other))
        return len(set(map(tuple, ranks))) == 1 and self[1:] == other[1:]

    def own_targets(self, targets: Tensor, ignore_index: int) -> Tensor:
        """Number targets of the whole vocabulary from the first column of this part.

        Raises:
            ValueError: one that is outside of the whole vocabulary; on a GPU, by an assertion.
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
    """Tell the others how many columns this rank has, and learn where they begin.

    Waits for the answer.

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
    """Tell the others which tokens are scored and what is asked of them, which has to be the same
    on all ranks, for what they send each other depends on it. And learn where the columns of this
    rank begin, unless that is known.

    The tokens are their targets, with one number for all that are ignored, or a mask.

    On a GPU, nobody waits for the answer, and an assertion says what is wrong.

    Raises:
        ValueError: on every rank, what is not the same; an empty vocabulary.
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
    """A number (1,) that is hardly ever that of other tokens, or temperatures of tokens, or of the
    same in another order.
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
    """What is asked, by yes and no, the dtype of the logits, and options, as numbers to compare."""
    asked = sum(2**i for i, wanted in enumerate(question) if wanted)
    bits = [struct.unpack("q", struct.pack("d", x or 0.0))[0] for x in options]
    options_mixed = sum((2 * i + 1) * number for i, number in enumerate(bits)) % 2**62
    return {
        "question (entropy, with_stats, gradients)": asked,
        "dtype": _DTYPES.index(dtype),
        "temperature, softcap, scale or beta": options_mixed,
    }
