"""Rows that follow each other among those that are selected: a view, where others are a copy.

What a mask selects of a batch are mostly a few long runs: the answers, after their prompts.

`rows.py` and `compiled_rows.py` look for spans; `linear_rows.py` cuts rows into blocks by them.
"""

from torch import Tensor

Span = tuple[int, int]  # first and last (exclusive)


def few_spans(index: Tensor, at_most: int) -> list[Span] | None:
    """Cut increasing indices (n,) into spans; None if that makes more of them than that."""
    if len(index) == 0:
        return []
    ends = (index.diff() != 1).nonzero().squeeze(1)
    if len(ends) >= at_most:
        return None
    first = [int(index[0]), *index[ends + 1].tolist()]
    last = [*index[ends].tolist(), int(index[-1])]
    return [(a, b + 1) for a, b in zip(first, last, strict=True)]
