"""The plans: which vocabulary matmuls an operation from hidden states does, and when.

G is the cost of one matmul of the rows with a target: 2·n·V·H operations. The plan depends on what
needs a gradient, and on whether the loss is known while the logits are there:

| `Plan`      | for                                                 | forward | backward | sum |
|-------------|-----------------------------------------------------|---------|----------|-----|
| READ_ONLY   | nothing needs a gradient                            | G       |          | 1G  |
| KEEP_SLOPES | statistics, and hidden alone needs a gradient       | G + G   |          | 2G  |
| WITH_LOSS   | a loss that is known block by block                 | G + G·k |          | 3G  |
| RECOMPUTE   | statistics, and the weight needs a gradient         | G       | G + G·k  | 4G  |

k is 2 if both the hidden states and the weight need a gradient, and 1 if one of them does. The
column of sums is for k = 2; with k = 1 the last two plans cost G less. So WITH_LOSS costs 2G where
the weight is frozen, as KEEP_SLOPES does. (Tests and benchmarks number the plans: P0 is READ_ONLY,
P1 KEEP_SLOPES, P2 WITH_LOSS of single tokens, P3 WITH_LOSS of groups of tokens, P4 RECOMPUTE.)

KEEP_SLOPES works because the gradient u of a token's log-prob with respect to its hidden state is a
vector that the forward can keep: whatever the loss is, the backward multiplies u by a number. If
the gradient of the entropy is asked for, it takes a second such vector, and one G more. WITH_LOSS
learns the loss's derivative while the logits are still there (`linear_loss_plans.py`). RECOMPUTE
must make the logits again.

The matmuls of a gradient are done only for tokens whose upstream gradient is not 0: after clipping,
masks and advantages of zero, often a fraction f of all. WITH_LOSS then costs G + 2G·f, RECOMPUTE
G + 3G·f.

Dims: N tokens, n of a block, K width of the hidden states, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.reference import FURTHER_STATS, accumulation_dtype

from .head_gradients import Gradients, LogitGradient, as_operands, padded_rows
from .linear_head import Head
from .linear_question import TokenQuestion
from .linear_rows import Block, Rows, Span, at
from .linear_statistics import Slopes, Statistics
from .shared_targets import shared_statistics
from .stats_over_ranks import statistics_over_ranks
from .token_stats import all_statistics
from .transform import Transform
from .vocabulary_part import VocabularyPart


class Needs(NamedTuple):
    """Which of the inputs need a gradient."""

    hidden: bool
    weights: list[bool]
    bias: bool

    @staticmethod
    def of(wanted: Sequence[bool]) -> "Needs":
        """Make it from `needs_input_grad` of the tensors of a `LinearProblem`."""
        hidden, bias, _, _, *weights = wanted
        return Needs(hidden, weights, bias)

    @property
    def head(self) -> bool:
        """Whether the head (a weight or the bias) needs a gradient, which is a sum over tokens."""
        return any(self.weights) or self.bias


class Plan(Enum):
    """The work that is done on a block of logits before they are dropped."""

    READ_ONLY = "read the statistics"
    KEEP_SLOPES = "keep the gradient of each statistic"
    WITH_LOSS = "ask for the loss of tokens or groups of them, and finish its gradient"
    RECOMPUTE = "read the statistics, and make the logits again backward"


def choose_plan(needs: Needs, *, loss_known: bool) -> Plan:
    """Choose the plan with the fewest matmuls."""
    if not (needs.hidden or needs.head):
        return Plan.READ_ONLY
    if loss_known:
        return Plan.WITH_LOSS
    return Plan.RECOMPUTE if needs.head else Plan.KEEP_SLOPES


# Rows without a gradient are left out of a matmul if there are at least _FEWEST of them, and at
# least one row in _ONE_IN is one. With fewer of them, to move the other rows together costs as much
# as it saves.
_FEWEST = 8
_ONE_IN = 8


def few_enough(wanted: Tensor) -> Tensor | None:
    """Return the indices of the wanted rows, given (n,) bool; None if so few are unwanted that
    leaving them out is not worth it. On a GPU, the host waits for their number.
    """
    index = wanted.nonzero().squeeze(1)
    left_out = wanted.shape[0] - index.shape[0]
    return index if left_out >= max(_FEWEST, wanted.shape[0] / _ONE_IN) else None


# The statistics that `token_stats` returns, of all N tokens; those not asked for are empty.
AllStats = tuple[Tensor, ...]

# Logprob, entropy, peak and log_norm of the n rows that count, which the gradient of their logits
# needs.
KeptStatistics = tuple[Tensor, ...]

Room = Callable[[int], Tensor]  # makes room for gradients of so many rows of logits

_NO_TARGET = -(2**31)  # an ignore_index for rows that all have a target


class Workbench(NamedTuple):
    """A head, the rows that it is applied to, and what is asked about their logits."""

    head: Head
    rows: Rows
    question: TokenQuestion
    impl: str
    part: VocabularyPart | None = None  # of a vocabulary that ranks share

    def gradients(self, needs: Needs, dtype: torch.dtype | None = None) -> Gradients:
        """Make room for the gradients that are needed; that of hidden states has their dtype unless
        another is given.
        """
        if self.rows.shared is not None:  # several states may add to one hidden state's gradient
            dtype = self.head.sums
        hidden = torch.zeros_like(self.rows.hidden, dtype=dtype) if needs.hidden else None
        group = None if self.part is None else self.part.group
        return Gradients(
            self.head, self.rows.size, hidden, needs.weights, needs.bias, group,
            shared=self.rows.shared is not None,
        )  # fmt: skip

    def score(self, block: Block) -> tuple[Tensor, Statistics]:
        """Make the logits of a block, and read their statistics: G, one vocabulary matmul."""
        logits = self.head.logits(block.hidden.to(self.head.operands))
        if block.states is not None:
            values, shared = shared_statistics(
                logits, block, block.states, partial(self._read, logits)
            )
            return logits, Statistics.of(values, shared)
        targets, transform, question = block.targets, block.transform, self.question
        if self.part is None:
            values = self._read(logits, targets, transform, self.rows.ignore_index)
        else:
            values = statistics_over_ranks(
                logits, targets, transform, self.part, question.entropy, question.with_stats,
                self.impl,
            )  # fmt: skip
        logprob, entropy, lse, peak, log_norm, top1, mean, squares = values
        return logits, Statistics(logprob, entropy, lse, top1, mean, squares, peak, log_norm)

    def _read(
        self, logits: Tensor, targets: Tensor, transform: Transform, ignore_index: int = _NO_TARGET
    ) -> tuple[Tensor, ...]:
        """Read the statistics of rows of logits, each with a target."""
        return all_statistics(
            logits, targets, transform, ignore_index, self.question.entropy,
            self.question.with_stats, False, self.impl,
        )  # fmt: skip

    def d_logits(
        self, block: Block, logits: Tensor, stats: Statistics, slopes: Slopes,
        *, room: Room, overwrite: bool = True,
    ) -> LogitGradient:  # fmt: skip
        """Compute the gradient of Σ slopes·statistics with respect to the logits, in the dtype of
        the matmuls; where possible it overwrites the logits.
        """
        operands = self.head.operands
        if self.part is not None:
            if self.part.size == 0:
                return LogitGradient(logits.to(operands), None)
            if slopes.mean_logit is not None:  # the operator divides by its own number of columns
                share = self.part.size / self.part.vocab
                slopes = slopes._replace(mean_logit=slopes.mean_logit * share)
        # The gradient can be written in the operands' dtype at once, except in fp16, to which it is
        # rounded when the largest number of each row is known.
        dtype = self.head.sums if operands == torch.float16 else operands
        rounded = room(len(logits)) if operands != logits.dtype else None
        in_place = overwrite and logits.dtype == dtype
        if in_place:
            out = logits
        elif rounded is None or dtype != operands:
            out = padded_rows(len(logits), self.head.vocab, dtype, logits.device)
        else:
            out = rounded
        self._write_gradient(out, in_place, block, logits, stats, slopes)
        return as_operands(out, operands, rounded)

    def _write_gradient(
        self, out: Tensor, in_place: bool, block: Block, logits: Tensor, stats: Statistics,
        of_tokens: Slopes,
    ) -> None:  # fmt: skip
        """Write the gradient (n, V) of Σ slopes·statistics; if in_place, over the logits."""
        slopes, targets, transform = of_tokens, block.targets, block.transform
        shared = stats.shared
        if shared is not None and block.states is not None:
            targets, transform = shared.leader, block.states.transform
            stats = stats.of_leaders()
            slopes = Slopes.of(None if x is None else shared.sums(x) for x in of_tokens)
        arguments = (
            logits, targets, stats.logprob, stats.entropy, stats.peak, stats.log_norm,
            slopes.logprob, slopes.entropy, *transform, self.impl, slopes.lse, slopes.mean_logit,
        )  # fmt: skip
        if in_place:
            torch.ops.fastrlhf.token_stats_backward_(*arguments)
        else:
            torch.ops.fastrlhf.token_stats_backward_into(out, *arguments)
        if shared is not None:
            shared.add_targets(out, of_tokens.logprob)

    def differentiate(
        self, block: Block, logits: Tensor, stats: Statistics, slopes: Slopes, gradients: Gradients
    ) -> None:
        """Turn the logits into their gradient and add it to `gradients`. For the tokens that have a
        gradient, this costs G for hidden states and G for the weight.
        """
        d_logits = self.d_logits(block, logits, stats, slopes, room=gradients.room)
        counting, place = slopes.counting(), block.place
        if block.states is not None:
            place = block.states.rows
            counting = block.states.any(counting)
        some = self.few_enough(counting)
        if some is None:
            # Rows without a gradient add 0 times their hidden state to the sums over rows, which
            # would be NaN where the hidden state is infinite.
            hidden = torch.where(counting.unsqueeze(1), block.hidden, 0.0)
        elif len(some) == 0:
            return
        else:
            place, hidden = at(place, some), block.hidden[some]
            d_logits = d_logits.leading(some)
        gradients.add(place, hidden.to(self.head.operands), d_logits)

    def few_enough(self, wanted: Tensor) -> Tensor | None:
        """Find the wanted rows, if it is worth leaving out the others. None also where they cannot
        be counted, and where ranks share the vocabulary: all ranks have to send blocks of the same
        shape.
        """
        if self.rows.order is None or self.part is not None:
            return None
        return few_enough(wanted)

    def with_gradient_alone(self, slopes: Slopes) -> "Workbench":
        """Leave out the rows that have no gradient, given the slopes (N,) of all tokens."""
        order = self.rows.order
        some = None if order is None else self.few_enough(slopes.at(order).counting())
        if order is None or some is None:
            return self
        return self._replace(rows=self.rows._replace(order=order[some]))


def statistics(bench: Workbench, spans: Iterable[Span]) -> tuple[AllStats, KeptStatistics]:
    """Read the statistics of all tokens: READ_ONLY, and the forward of RECOMPUTE.

    Where ranks share the vocabulary, the statistics that the gradient needs are returned too, so
    that the backward need not gather them again.
    """
    all_stats = room_for_all_tokens(bench)
    parts = []
    for span in spans:
        block = bench.rows.block(span)
        stats = bench.score(block)[1]
        put(all_stats, block, stats)
        if bench.part is not None:
            parts.append((stats.logprob, stats.entropy, stats.peak, stats.log_norm))
    return all_stats, tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def statistics_and_slopes(
    bench: Workbench, spans: Iterable[Span]
) -> tuple[AllStats, Tensor, Tensor]:
    """Read the statistics, and compute u = ∂logprob/∂hidden and ∂entropy/∂hidden (N, K):
    KEEP_SLOPES.
    """
    all_stats = room_for_all_tokens(bench)
    alone = not bench.question.entropy_grad and bench.part is None
    u_logprob = room_for_slopes(bench.rows.hidden, alone=alone)
    u_entropy = torch.zeros_like(u_logprob if bench.question.entropy_grad else u_logprob[:0])
    for span in spans:
        _slopes_of_block(bench, bench.rows.block(span), all_stats, u_logprob, u_entropy)
    return all_stats, u_logprob, u_entropy


def room_for_slopes(hidden: Tensor, *, alone: bool) -> Tensor:
    """Make zeros (N, K) for the derivative of a statistic of each token with respect to its hidden
    state. Their dtype is that of the hidden states, but fp32 in two cases: unless this slope stands
    `alone`, since another slope, or those of other ranks, are added to it, and may cancel; and for
    fp16, in which a small slope would lose digits that a large upstream gradient makes visible.
    """
    keeps_its_own = alone and hidden.dtype != torch.float16
    return torch.zeros_like(
        hidden, dtype=hidden.dtype if keeps_its_own else accumulation_dtype(hidden.dtype)
    )


def _slopes_of_block(
    bench: Workbench, block: Block, all_stats: AllStats, u_logprob: Tensor, u_entropy: Tensor
) -> None:
    logits, stats = bench.score(block)
    put(all_stats, block, stats)
    one, zero = torch.ones_like(stats.logprob), torch.zeros_like(stats.logprob)
    if bench.question.entropy_grad:
        slopes = Slopes(zero, one)
        d_logits = bench.d_logits(
            block, logits, stats, slopes, room=bench.head.room, overwrite=False
        )
        u_entropy[block.place] = bench.head.pull_back(d_logits).to(u_entropy.dtype)
        del d_logits
    d_logits = bench.d_logits(block, logits, stats, Slopes(one), room=bench.head.room)
    u_logprob[block.place] = bench.head.pull_back(d_logits).to(u_logprob.dtype)


def recomputed_gradients(
    bench: Workbench,
    spans: Iterable[Span],
    slopes: Slopes,
    gradients: Gradients,
    kept: KeptStatistics = (),
) -> None:
    """Make the logits again, and compute the gradients from them, given the upstream gradients (N,)
    of the statistics: the backward of RECOMPUTE.

    Where ranks share the vocabulary, the statistics were kept, and are not gathered again.
    """
    for first, last in spans:
        block = bench.rows.block((first, last))
        if kept:
            logits = bench.head.logits(block.hidden.to(bench.head.operands))
            stats = _statistics_kept(tuple(x[first:last] for x in kept))
        else:
            logits, stats = bench.score(block)
        bench.differentiate(block, logits, stats, slopes.at(block.place), gradients)
        del logits  # before the next block makes its own


def _statistics_kept(kept: KeptStatistics) -> Statistics:
    logprob, entropy, peak, log_norm = kept
    nothing = logprob.new_empty(0)
    return Statistics(logprob, entropy, nothing, nothing, nothing, nothing, peak, log_norm)


def room_for_all_tokens(bench: Workbench) -> AllStats:
    """Make zeros for the statistics of all tokens; those of ignored tokens stay so."""
    tokens, dtype = bench.rows.targets.shape[0], bench.head.sums
    logprob, lse = (bench.rows.hidden.new_zeros(tokens, dtype=dtype) for _ in range(2))
    is_top1, mean_logit, log_squares = (
        lse.new_zeros(
            tokens if name in bench.question.with_stats else 0,
            dtype=torch.bool if name == "is_top1" else dtype,
        )
        for name in FURTHER_STATS
    )
    entropy = lse.new_zeros(tokens if bench.question.entropy else 0)
    return logprob, entropy, lse, is_top1, mean_logit, log_squares


def put(all_stats: AllStats, block: Block, stats: Statistics) -> None:
    """Write the statistics of a block to the places of its tokens."""
    values: tuple[Any, ...] = stats[: len(all_stats)]
    for of_all, of_block in zip(all_stats, values, strict=True):
        if of_all.numel():
            of_all[block.place] = of_block
