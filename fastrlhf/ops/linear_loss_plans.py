"""The plan WITH_LOSS: the loss is known block by block, and its gradient is finished while the
logits of the block are there.

A loss of single tokens is given a block at a time. A loss of groups of tokens (the pair of a
preference, a sequence) needs whole groups, so a block consists of whole groups. A group that is
larger than a block is scored in several blocks, and its logits are made again once its loss is
known. For that group it costs G more, one vocabulary matmul, but memory stays bounded.
`linear_plans.py` says why this plan costs 3G, and what other plans there are.
"""

from collections.abc import Callable, Iterable

import torch

from .head_gradients import Gradients
from .linear_plans import Workbench
from .linear_rows import Span, even_spans
from .linear_statistics import Slopes, Statistics

# A function that is given the statistics of a span of the ordered rows, and returns the
# derivatives of the loss with respect to them.
Loss = Callable[[Span, Statistics], Slopes]


def loss_alone(bench: Workbench, segments: Iterable[list[Span]], loss: Loss) -> None:
    """Call the loss on each segment's statistics, without gradients: READ_ONLY with a loss."""
    for spans in segments:
        loss(whole(spans), _statistics_of(bench, spans))


def loss_and_gradients(
    bench: Workbench, segments: Iterable[list[Span]], loss: Loss, gradients: Gradients
) -> None:
    """Call the loss on each segment's statistics, and finish the gradient: WITH_LOSS.

    A segment is what the loss must be given at once: one block, or several if a group is larger.
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
    question = bench.question._replace(with_stats=())
    again = bench._replace(rows=bench.rows._replace(order=order), question=question)
    size = max(last - first for first, last in spans)
    for span in even_spans(again.rows.size, size):
        block = again.rows.block(span)
        again.differentiate(block, *again.score(block), slopes.at(slice(*span)), gradients)


def whole(spans: list[Span]) -> Span:
    """Join consecutive spans."""
    return spans[0][0], spans[-1][1]


def _statistics_of(bench: Workbench, spans: list[Span]) -> Statistics:
    """Read the statistics of some spans, one after the other."""
    parts = [bench.score(bench.rows.block(span))[1] for span in spans]
    columns = zip(*(part[:-1] for part in parts), strict=True)
    return Statistics.of(torch.cat(values) for values in columns)
