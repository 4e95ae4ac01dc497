"""A vocabulary that ranks share, each of which has the columns of a part of it.

Targets are numbered anew, from the first column of the part: below 0 for earlier columns, from its
size on for later ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .ranks import Group, gathered, rank_in

# Of targets that are numbered from the first column of a part: one in earlier columns, or in none.
NOT_HERE = -1
# One that is ignored.
IGNORED = -2


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

    def own_targets(self, targets: Tensor, ignore_index: int) -> Tensor:
        """Number targets of the whole vocabulary from the first column of this part.

        Raises:
            ValueError: one that is outside of the whole vocabulary; on a GPU, by an assertion.
        """
        live = targets != ignore_index
        known = ((targets >= 0) & (targets < self.vocab)) | ~live
        if targets.device.type == "cpu":
            if not known.all():
                worst = targets[~known][0].item()
                raise ValueError(
                    f"targets: expected numbers in [0, {self.vocab}), the vocabulary of all ranks, "
                    f"or ignore_index {ignore_index}, got {worst}"
                )
        else:
            torch._assert_async(known.all(), "fastrlhf: a target is outside [0, vocabulary)")
        own = (targets - self.start).clamp(NOT_HERE, self.size)
        return torch.where(live, own, IGNORED)


def part_of(
    group: Group, size: int, device: torch.device, agreed: dict[str, int]
) -> VocabularyPart:
    """Tell the others how many columns this rank has, and learn where they begin.

    Waits for the answer. What is `agreed` must be the same on every rank.

    Raises:
        ValueError: an empty vocabulary; something that is not the same on every rank.
    """
    own = torch.tensor([size, *agreed.values()], device=device)
    of_ranks = gathered(own, group).tolist()
    sizes = [numbers[0] for numbers in of_ranks]
    for i, name in enumerate(agreed, start=1):
        found = [numbers[i] for numbers in of_ranks]
        if len(set(found)) > 1:
            raise ValueError(f"group: expected the same {name} on every rank, got {found}")
    if sum(sizes) == 0:
        raise ValueError("group: expected a vocabulary, got 0 columns on every rank")
    return VocabularyPart(group, sum(sizes[: rank_in(group)]), size, sum(sizes), max(sizes))


def part_of_rows(group: Group, size: int, tokens: int, device: torch.device) -> VocabularyPart:
    """The same for logits that are there already; where those are on a GPU, nobody waits."""
    if device.type == "cpu":
        return part_of(group, size, device, {"number of tokens": tokens})
    # Filled on the device, which a copy of the number would have to wait for.
    sizes = gathered(torch.full((1,), size, device=device), group).view(-1)
    return VocabularyPart(group, sizes[: rank_in(group)].sum(), size, sizes.sum())
