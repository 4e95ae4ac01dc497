"""The two models of a divergence, and their logits on a block of tokens.

`linear_divergence.py` makes two `Side`s, the policy (called ours) and the reference. For each block
of tokens it makes `BothLogits`, from which it takes values, entropies and gradients.

Dims: N tokens, n tokens of a block, H hidden (of each model its own), V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.reference import cap_slope

from .divergence import Measure, divergence_backward_into
from .divergence_over_ranks import divergence_over_ranks
from .head_gradients import Gradients, LogitGradient, as_operands, padded_rows
from .linear_head import Head
from .linear_plans import Needs, Room
from .ranks import Group
from .stats_over_ranks import statistics_over_ranks
from .transform import Transform
from .vocabulary_part import NOT_HERE, VocabularyPart


class Side(NamedTuple):
    """One model: hidden states (N, H), the head, and which of these need a gradient."""

    hidden: Tensor
    head: Head
    wants: Needs
    group: Group | None  # of ranks that share the vocabulary

    @property
    def trained(self) -> bool:
        """Whether weight or bias needs a gradient."""
        return self.wants.head

    def gradients(self, rows: int, hidden: Tensor | None) -> Gradients:
        return Gradients(self.head, rows, hidden, self.wants.weights, self.wants.bias, self.group)

    def logits(self, rows: Tensor) -> Tensor:
        return self.head.logits(self.hidden[rows].to(self.head.operands))


class DivergenceOptions(NamedTuple):
    """The arguments that are not tensors."""

    measure: Measure
    temperature: float
    caps: tuple[float | None, float | None]  # of the two sides
    scales: tuple[float, float]
    chunk: int
    impl: str
    dtypes: tuple[torch.dtype, torch.dtype]  # of the matmuls of the two sides
    blocks: tuple[int, int]  # column blocks of the weights of the two sides
    sum_expected: bool  # whether a loss is expected to be the sum of the values: `divergence_of`
    entropy: bool  # whether our entropy is asked for
    part: VocabularyPart | None  # of a vocabulary that ranks share

    @property
    def one_transform(self) -> bool:
        """Whether both sides have the same scale and softcap, as the kernel expects."""
        return self.caps[0] == self.caps[1] and self.scales[0] == self.scales[1]


def of_side(options: DivergenceOptions, tensors: Sequence[Any], side: int) -> list[Any]:
    """Take the hidden states, bias and column blocks of the weight of a side."""
    first = 2 + options.blocks[0]
    return list(tensors[:first] if side == 0 else tensors[first:])


def sides_of(
    options: DivergenceOptions, tensors: Sequence[Any], wanted: Sequence[bool]
) -> list[Side]:
    """Make the policy and the reference from the tensors of both, and from which of these need a
    gradient.
    """
    sides = []
    for i, dtype in enumerate(options.dtypes):
        hidden, bias, *weights = of_side(options, tensors, i)
        wants_hidden, wants_bias, *wants_weights = of_side(options, wanted, i)
        head = Head(weights, bias, dtype)
        needs = Needs(wants_hidden, wants_weights, wants_bias)
        group = None if options.part is None else options.part.group
        sides.append(Side(hidden.reshape(-1, hidden.shape[-1]), head, needs, group))
    return sides


class BothLogits:
    """The logits of both models on some tokens, and their divergence."""

    def __init__(
        self,
        options: DivergenceOptions,
        sides: list[Side],
        rows: Tensor,
        token_temperature: Tensor | None,
        known: Tensor | None = None,
    ):
        logits = [side.logits(rows) for side in sides]
        cap, scale = options.caps[0], options.scales[0]
        # Where the sides differ in scale or softcap, logits are scaled and capped before the kernel
        # gets them, and their gradients are multiplied by these slopes afterwards.
        self.slopes: list[Tensor | float] = [1.0, 1.0]
        if not options.one_transform:
            for i in range(2):
                self.slopes[i] = _scale_and_cap(logits[i], options.caps[i], options.scales[i])
            cap, scale = None, 1.0
        self.swapped, share = options.measure
        self.pair = logits[::-1] if self.swapped else logits
        self.mask = torch.ones_like(rows, dtype=torch.bool)
        if token_temperature is not None:
            token_temperature = token_temperature.reshape(-1)[rows]
        self.transform = Transform(token_temperature, options.temperature, cap, scale)
        self.share, self.impl = share, options.impl
        self.operands = [side.head.operands for side in sides]
        self.sums = [side.head.sums for side in sides]
        self.part = options.part
        if self.part is None:
            self.values, self.stats = torch.ops.fastrlhf.divergence(
                *self.pair, self.mask, *self.transform, share, options.impl
            )
        elif known is not None:  # the forward has kept them
            self.values, self.stats = known[0], known[1:]
        else:
            self.values, self.stats = divergence_over_ranks(
                self.pair[0],
                self.pair[1],
                self.mask,
                self.transform,
                share,
                self.part,
                options.impl,
            )

    def of_ranks(self) -> Tensor:
        """Values and statistics (7, n). The forward keeps them, so that the backward need not
        gather them from the other ranks again.
        """
        return torch.cat((self.values.unsqueeze(0), self.stats))

    def entropy(self) -> Tensor:
        """Compute our entropy of each token."""
        ours = self.pair[1 if self.swapped else 0]
        if self.part is not None:
            nowhere = torch.full_like(self.mask, NOT_HERE, dtype=torch.int64)
            return statistics_over_ranks(
                ours, nowhere, self.transform, self.part, True, (), self.impl
            )[1]
        targets = torch.zeros_like(self.mask, dtype=torch.int64)
        return torch.ops.fastrlhf.token_stats(
            ours, targets, *self.transform, -100, True, False, self.impl
        )[1]

    def d_logits(self, side: int, d_values: Tensor, room: Room) -> LogitGradient:
        """Compute the gradient of the logits of a side, in the dtype of its matmuls."""
        of_p, (logits_p, logits_q) = (side == 0) != self.swapped, self.pair
        if logits_p.shape[1] == 0:  # this rank has no column of the vocabulary
            return LogitGradient(logits_p.to(self.operands[side]), None)
        slope, operands = self.slopes[side], self.operands[side]
        unscaled = isinstance(slope, float) and slope == 1.0
        rounded = None if operands == self.sums[side] else room(len(d_values))
        # The gradient can be written in the operands' dtype at once, except in fp16, to which it is
        # rounded when the largest number of each row is known.
        if rounded is not None and unscaled and operands != torch.float16:
            out = rounded
        else:
            out = padded_rows(len(d_values), logits_p.shape[1], self.sums[side], d_values.device)
        divergence_backward_into(
            out, logits_p, logits_q, self.mask, self.stats, d_values.to(self.values.dtype),
            self.transform, self.share, of_p, self.impl,
        )  # fmt: skip
        if not unscaled:
            out.mul_(slope)
        return as_operands(out, operands, rounded)


def _scale_and_cap(logits: Tensor, softcap: float | None, scale: float) -> Tensor | float:
    """Scale and cap logits in place, and return the derivative of that."""
    if softcap is None:
        logits.mul_(scale)
        return scale
    slope = cap_slope(logits, softcap, scale).mul_(scale)
    logits.mul_(scale / softcap).tanh_().mul_(softcap)
    return slope
