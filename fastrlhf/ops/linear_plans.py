"""The plans: which vocabulary matmuls an operation from hidden states does, and when.

G is one matmul of the rows with a target, 2·n·V·H operations. What needs a gradient, and what is
known when, decides:

| plan | for                                                          | forward  | backward | sum |
|------|--------------------------------------------------------------|----------|----------|-----|
| P0   | nothing needs a gradient                                     | G        |          | 1G  |
| P1   | statistics, and hidden states alone need a gradient          | G + G    |          | 2G  |
| P2   | a loss that each token has by itself                         | G + G·k  |          | 3G  |
| P3   | a loss that groups of tokens have, a group at a time         | G + G·k  |          | 3G  |
| P4   | statistics, and the weight needs a gradient                  | G        | G + G·k  | 4G  |

k is how many of hidden states and weight need a gradient: the sums are for both, and G less for
one. So P2 and P3 cost 2G where the weight is frozen, as P1 does.

P1 works because the gradient of a token's log-prob with respect to its hidden state, u, is a vector
that the forward can keep: backward, whatever the loss, is a product of u with a number. The
entropy, if its gradient is asked for, is a second such vector, and one G more. P2 and P3 learn the
loss's derivative while the logits are still there. P4 must make the logits again. A group that is
larger than a block is scored block by block, and its logits are made again once its loss is known:
G more, in bounded memory.

Only tokens that have a gradient are multiplied backward: after clipping, masks and advantages of
zero, often a fraction f of them. P2 and P3 then cost G + 2G·f, P4 G + 3G·f.
"""

from collections.abc import Callable, Iterable
from enum import Enum
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.reference import FURTHER_STATS, accumulation_dtype

from .head_gradients import Gradients, LogitGradient, as_operands, padded_rows
from .linear_head import Head
from .linear_rows import Block, Rows, Span, at, even_spans
from .shared_targets import SharedTargets, shared_statistics
from .stats_over_ranks import statistics_over_ranks
from .token_stats import all_statistics
from .transform import Transform
from .vocabulary_part import VocabularyPart


class Needs(NamedTuple):
    """What needs a gradient."""

    hidden: bool
    weights: list[bool]
    bias: bool

    @property
    def head(self) -> bool:
        """Anything whose gradient is a sum over tokens."""
        return any(self.weights) or self.bias


class Plan(Enum):
    """What is done with the logits while they are there."""

    P0 = "read the statistics"
    P1 = "keep the gradient of each statistic"
    P2 = "ask for the loss of each token, and finish its gradient"
    P3 = "ask for the loss of each group, and finish its gradient"
    P4 = "read the statistics, and make the logits again backward"


def choose_plan(needs: Needs, *, loss_known: bool, grouped: bool = False) -> Plan:
    """Choose the plan of fewest matmuls."""
    if not (needs.hidden or needs.head):
        return Plan.P0
    if loss_known:
        return Plan.P3 if grouped else Plan.P2
    return Plan.P4 if needs.head else Plan.P1


class Statistics(NamedTuple):
    """Of n tokens: what `token_stats` returns, and what its gradient needs besides; each (n,)."""

    logprob: Tensor
    entropy: Tensor  # empty unless asked for, as are the three below the lse
    lse: Tensor
    is_top1: Tensor
    mean_logit: Tensor
    log_sum_sq_probs: Tensor
    peak: Tensor
    log_norm: Tensor
    shared: SharedTargets | None = None  # where tokens share rows of logits

    @staticmethod
    def of(values: Iterable[Any], shared: SharedTargets | None = None) -> "Statistics":
        return Statistics(*values)._replace(shared=shared)

    def of_leaders(self) -> "Statistics":
        """Of the m rows that the tokens share, with the target of each that leads it; what the
        gradient does not take is empty.
        """
        assert self.shared is not None
        logprob, entropy, peak, log_norm = self.shared[-4:]
        nothing = logprob.new_empty(0)
        others = (nothing,) * 4
        return Statistics(logprob, entropy, *others, peak, log_norm)


class Slopes(NamedTuple):
    """Of n tokens: the derivatives of a loss with respect to their statistics; each (n,), or None
    where the loss does not depend on the statistic.
    """

    logprob: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None
    mean_logit: Tensor | None = None

    @staticmethod
    def of(values: Iterable[Any]) -> "Slopes":
        return Slopes(*values)

    def at(self, place: slice | Tensor) -> "Slopes":
        """Take those of some tokens."""
        others = (None if slope is None else slope[place] for slope in self[1:])
        return Slopes(self.logprob[place], *others)

    def counting(self) -> Tensor:
        """Tell which tokens have a gradient at all: (n,) bool."""
        nonzero = [slope != 0 for slope in self if slope is not None]
        return reduce(torch.logical_or, nonzero)


# Rows are left out of a matmul where so many can be, and at least one in so many: below that, what
# is launched and moved for it costs as much.
_FEWEST = 8
_ONE_IN = 8


def few_enough(wanted: Tensor) -> Tensor | None:
    """Find the indices of the wanted rows (n,), where so many are not that it is worth leaving them
    out; else None. A GPU is awaited.
    """
    index = wanted.nonzero().squeeze(1)
    left_out = wanted.shape[0] - index.shape[0]
    return index if left_out >= max(_FEWEST, wanted.shape[0] / _ONE_IN) else None


Found = tuple[Tensor, ...]  # what `token_stats` returns, of all N tokens; empty unless asked for

# Logprob, entropy, peak and log_norm of the n rows that count, which the gradient of logits takes.
Kept = tuple[Tensor, ...]


_NO_TARGET = -(2**31)  # no row is ignored where it leads

Room = Callable[[int], Tensor]  # makes room for gradients of so many rows of logits


class Workbench(NamedTuple):
    """A head, the rows that it is applied to, and how."""

    head: Head
    rows: Rows
    entropy: bool
    entropy_grad: bool
    with_stats: tuple[str, ...]
    impl: str
    part: VocabularyPart | None = None  # of a vocabulary that ranks share

    def gradients(self, needs: Needs, dtype: torch.dtype | None = None) -> Gradients:
        """Make room for what is needed, for the hidden states in their dtype or another."""
        if self.rows.shared is not None:  # several states may add to that of one hidden state
            dtype = self.head.sums
        hidden = torch.zeros_like(self.rows.hidden, dtype=dtype) if needs.hidden else None
        group = None if self.part is None else self.part.group
        return Gradients(
            self.head, self.rows.size, hidden, needs.weights, needs.bias, group,
            shared=self.rows.shared is not None,
        )  # fmt: skip

    def score(self, block: Block) -> tuple[Tensor, Statistics]:
        """Make the logits of a block, and read their statistics: G."""
        logits = self.head.logits(block.hidden.to(self.head.operands))
        asked = self.entropy, self.with_stats
        if block.states is not None:

            def of_leaders(leader: Tensor, transform: Transform) -> tuple[Tensor, ...]:
                return all_statistics(
                    logits, leader, transform, _NO_TARGET, *asked, False, self.impl
                )

            found, shared = shared_statistics(logits, block, block.states, of_leaders)
            return logits, Statistics.of(found, shared)
        if self.part is None:
            found = all_statistics(
                logits, block.targets, block.transform, self.rows.ignore_index, *asked, False,
                self.impl,
            )  # fmt: skip
        else:
            found = statistics_over_ranks(
                logits, block.targets, block.transform, self.part, *asked, self.impl
            )
        logprob, entropy, lse, peak, log_norm, top1, mean, squares = found
        return logits, Statistics(logprob, entropy, lse, top1, mean, squares, peak, log_norm)

    def d_logits(
        self, block: Block, logits: Tensor, stats: Statistics, slopes: Slopes,
        *, room: Room, overwrite: bool = True,
    ) -> LogitGradient:  # fmt: skip
        """Compute the gradient of Σ slopes·statistics, as operands, where the logits were if
        possible.
        """
        operands = self.head.operands
        if self.part is not None:
            if self.part.size == 0:
                return LogitGradient(logits.to(operands), None)
            if slopes.mean_logit is not None:  # K2 divides it by the columns that it has
                share = self.part.size / self.part.vocab
                slopes = slopes._replace(mean_logit=slopes.mean_logit * share)
        # fp16 is rounded to once the size of each row is known.
        exact = self.head.sums if operands == torch.float16 else operands
        there = room(len(logits)) if operands != logits.dtype else None
        shared, of_tokens, targets, transform = stats.shared, slopes, block.targets, block.transform
        if shared is not None and block.states is not None:
            targets, transform = shared.leader, block.states.transform
            stats = stats.of_leaders()
            slopes = Slopes.of(None if x is None else shared.sums(x) for x in of_tokens)
        arguments = (
            logits, targets, stats.logprob, stats.entropy, stats.peak, stats.log_norm,
            slopes.logprob, slopes.entropy, *transform, self.impl, slopes.lse, slopes.mean_logit,
        )  # fmt: skip
        if overwrite and logits.dtype == exact:
            torch.ops.fastrlhf.token_stats_backward_(*arguments)
            out = logits
        else:
            if there is None or exact != operands:
                out = padded_rows(len(logits), self.head.vocab, exact, logits.device)
            else:
                out = there
            torch.ops.fastrlhf.token_stats_backward_into(out, *arguments)
        if shared is not None:
            shared.add_targets(out, of_tokens.logprob)
        return as_operands(out, operands, there)

    def differentiate(
        self, block: Block, logits: Tensor, stats: Statistics, slopes: Slopes, gradients: Gradients
    ) -> None:
        """Turn the logits into their gradient and hand it on: G each for hidden states and weight,
        of the tokens that have a gradient.
        """
        dz = self.d_logits(block, logits, stats, slopes, room=gradients.room)
        counting, place = slopes.counting(), block.place
        if block.states is not None:
            place = block.states.rows
            counting = block.states.any(counting)
        some = self.few_enough(counting)
        if some is None:
            # Whatever they hold, they must not spoil the sums over rows.
            hidden = torch.where(counting.unsqueeze(1), block.hidden, 0.0)
        elif len(some) == 0:
            return
        else:
            place, hidden, dz = at(place, some), block.hidden[some], dz.leading(some)
        gradients.add(place, hidden.to(self.head.operands), dz)

    def few_enough(self, wanted: Tensor) -> Tensor | None:
        """Find the wanted rows, if it is worth leaving out the others; None too where they cannot
        be counted, and where ranks share the vocabulary, which add up blocks of one shape.
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


def statistics(bench: Workbench, spans: Iterable[Span]) -> tuple[Found, Kept]:
    """Read the statistics of all tokens: P0, and the forward of P4.

    Where ranks share the vocabulary, what backward would have to ask them again is returned too.
    """
    found = room_for_all_tokens(bench)
    parts = []
    for span in spans:
        block = bench.rows.block(span)
        stats = bench.score(block)[1]
        put(found, block, stats)
        if bench.part is not None:
            parts.append((stats.logprob, stats.entropy, stats.peak, stats.log_norm))
    return found, tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def statistics_and_slopes(bench: Workbench, spans: Iterable[Span]) -> tuple[Found, Tensor, Tensor]:
    """Read the statistics, and u = ∂logprob/∂hidden and ∂entropy/∂hidden (N, K): P1."""
    found = room_for_all_tokens(bench)
    alone = not bench.entropy_grad and bench.part is None
    u_logprob = room_for_slopes(bench.rows.hidden, alone=alone)
    u_entropy = torch.zeros_like(u_logprob if bench.entropy_grad else u_logprob[:0])
    for span in spans:
        _slopes_of_block(bench, bench.rows.block(span), found, u_logprob, u_entropy)
    return found, u_logprob, u_entropy


def room_for_slopes(hidden: Tensor, *, alone: bool) -> Tensor:
    """Make zeros (N, K) for a slope of each token with respect to its hidden state.

    fp32 where another slope is added to it, or those of other ranks, for they may cancel, and where
    the hidden states are fp16, in which a small slope would lose the places that a large upstream
    gradient shows.
    """
    keeps_its_own = alone and hidden.dtype != torch.float16
    return torch.zeros_like(
        hidden, dtype=hidden.dtype if keeps_its_own else accumulation_dtype(hidden.dtype)
    )


def _slopes_of_block(
    bench: Workbench, block: Block, found: Found, u_logprob: Tensor, u_entropy: Tensor
) -> None:
    logits, stats = bench.score(block)
    put(found, block, stats)
    one, zero = torch.ones_like(stats.logprob), torch.zeros_like(stats.logprob)
    if bench.entropy_grad:
        slopes = Slopes(zero, one)
        dz = bench.d_logits(block, logits, stats, slopes, room=bench.head.room, overwrite=False)
        u_entropy[block.place] = bench.head.pull_back(dz).to(u_entropy.dtype)
        del dz
    dz = bench.d_logits(block, logits, stats, Slopes(one), room=bench.head.room)
    u_logprob[block.place] = bench.head.pull_back(dz).to(u_logprob.dtype)


def recomputed_gradients(
    bench: Workbench, spans: Iterable[Span], slopes: Slopes, gradients: Gradients, kept: Kept = ()
) -> None:
    """Make the logits again and finish, given the gradients (N,) of the statistics: P4 backward.

    Where ranks share the vocabulary, their statistics were kept, and nobody is asked again.
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


def _statistics_kept(kept: Kept) -> Statistics:
    logprob, entropy, peak, log_norm = kept
    nothing = logprob.new_empty(0)
    return Statistics(logprob, entropy, nothing, nothing, nothing, nothing, peak, log_norm)


# Given the statistics of a span of the ordered rows, the derivatives of the loss.
Loss = Callable[[Span, Statistics], Slopes]


def loss_alone(bench: Workbench, segments: Iterable[list[Span]], loss: Loss) -> None:
    """Show each segment's statistics to the loss: P0 where there is a loss."""
    for spans in segments:
        loss(whole(spans), _statistics_of(bench, spans))


def loss_and_gradients(
    bench: Workbench, segments: Iterable[list[Span]], loss: Loss, gradients: Gradients
) -> None:
    """Show each segment's statistics to the loss and finish the gradient: P2, P3.

    A segment is what the loss must see at once: one block or, if that is too large, several.
    """
    for spans in segments:
        if len(spans) == 1:
            block = bench.rows.block(spans[0])
            logits, stats = bench.score(block)
            bench.differentiate(block, logits, stats, loss(spans[0], stats), gradients)
            del logits  # before the next block makes its own
            continue
        slopes = loss(whole(spans), _statistics_of(bench, spans))
        _differentiate_again(bench, spans, slopes, gradients)


def _differentiate_again(
    bench: Workbench, spans: list[Span], slopes: Slopes, gradients: Gradients
) -> None:
    """Make the logits of consecutive spans again, given the slopes of all their rows."""
    order = None if bench.rows.order is None else bench.rows.order[slice(*whole(spans))]
    some = bench.few_enough(slopes.counting())
    if order is not None and some is not None:
        order, slopes = order[some], slopes.at(some)
    again = bench._replace(rows=bench.rows._replace(order=order), with_stats=())
    size = max(last - first for first, last in spans)
    for span in even_spans(again.rows.size, size):
        block = again.rows.block(span)
        again.differentiate(block, *again.score(block), slopes.at(slice(*span)), gradients)


def whole(spans: list[Span]) -> Span:
    return spans[0][0], spans[-1][1]


def _statistics_of(bench: Workbench, spans: list[Span]) -> Statistics:
    """Read the statistics of some spans, one after the other."""
    parts = [bench.score(bench.rows.block(span))[1] for span in spans]
    columns = zip(*(part[:-1] for part in parts), strict=True)
    return Statistics.of(torch.cat(values) for values in columns)


def room_for_all_tokens(bench: Workbench) -> Found:
    """Make zeros, which are the statistics of ignored tokens."""
    tokens, dtype = bench.rows.targets.shape[0], bench.head.sums
    logprob, lse = (bench.rows.hidden.new_zeros(tokens, dtype=dtype) for _ in range(2))
    is_top1, mean_logit, log_squares = (
        lse.new_zeros(
            tokens if name in bench.with_stats else 0,
            dtype=torch.bool if name == "is_top1" else dtype,
        )
        for name in FURTHER_STATS
    )
    entropy = lse.new_zeros(tokens if bench.entropy else 0)
    return logprob, entropy, lse, is_top1, mean_logit, log_squares


def put(found: Found, block: Block, stats: Statistics) -> None:
    values: tuple[Any, ...] = stats[: len(found)]
    for whole, part in zip(found, values, strict=True):
        if whole.numel():
            whole[block.place] = part
