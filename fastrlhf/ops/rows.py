"""Rows of logits: how they are viewed, taken, written and zeroed, whatever backend works on them.

Operations are given logits (..., V) with any strides. Their row work takes a view (outer, inner, V)
of N = outer·inner rows, since one stride between rows is not enough for a slice of the positions of
each sequence, `logits[:, :-1]`, which is not to be copied. What belongs to rows, such as targets
and temperatures, is (N,), and some of the rows are an `Index`.

Dims: N rows, V vocabulary.
"""

from torch import Tensor

from fastrlhf.reference import accumulation_dtype

from .checks import wide_integers
from .row_spans import few_spans
from .transform import flat_temperature

Index = Tensor | slice  # numbers of some rows, or a run of them

# Spans of rows are zeroed one by one where they are no more than this.
_FEW_SPANS = 256


def flat_rows(
    logits: Tensor, targets: Tensor, token_temperature: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Return logits as (outer, inner, V), targets and temperatures as contiguous (N,)."""
    targets = wide_integers(targets).reshape(-1).contiguous()
    acc = accumulation_dtype(logits.dtype)
    return rows_of(logits), targets, flat_temperature(token_temperature, temperature, acc)


def rows_of(logits: Tensor) -> Tensor:
    """View logits as (outer, inner, V), copied if their strides do not allow it."""
    rows = _row_view(logits)
    return logits.contiguous().view(1, -1, logits.shape[-1]) if rows is None else rows


def _row_view(logits: Tensor) -> Tensor | None:
    """View logits as (outer, inner, V) without a copy: whole, or a slice of the positions of each
    sequence. None where neither is possible.
    """
    vocab = logits.shape[-1]
    if logits.numel() == 0:
        return logits.new_empty(1, 0, vocab)
    for shape in ((1, -1, vocab), (-1, logits.shape[-2] if logits.ndim > 1 else 1, vocab)):
        try:
            return logits.view(shape)
        except RuntimeError:  # the strides do not allow it
            continue
    return None


def can_overwrite(logits: Tensor) -> bool:
    """Whether each logit has a memory cell of its own, reachable without a copy."""
    rows = _row_view(logits)
    if rows is None:
        return False
    span = 1
    for stride, size in sorted(zip(rows.stride(), rows.shape, strict=True)):
        if size > 1 and stride < span:
            return False
        span = max(span, stride * (size - 1) + span)
    return True


def take_rows(rows: Tensor, index: Index) -> Tensor:
    """Take some rows of an (outer, inner, V) view: a view if they are a slice, else a copy."""
    if isinstance(index, slice):
        return rows[0, index]
    if rows.shape[0] == 1:
        # Several times faster than indexing, which does the rows one after the other.
        return rows[0].gather(0, index.unsqueeze(1).expand(-1, rows.shape[2]))
    return rows[index // rows.shape[1], index % rows.shape[1]]


def put_rows(rows: Tensor, index: Index, values: Tensor | float) -> None:
    """Write values (n, V), or one number, into some rows of an (outer, inner, V) view."""
    if isinstance(index, slice):
        rows[0, index] = values
    else:
        rows[index // rows.shape[1], index % rows.shape[1]] = values


def of_rows(value: float | Tensor, index: Index) -> float | Tensor:
    """Take what belongs to some rows out of (N,); a number is that of all rows."""
    return value[index] if isinstance(value, Tensor) else value


def zero_inactive(rows: Tensor, active: Tensor) -> None:
    """Put zeros into the rows (N, V), or (outer, inner, V), that are not active.

    All rows are zeroed, for the active ones to be written afterwards, where the others are many
    spans, or rows have no single stride (outer > 1).
    """
    inactive = (~active).nonzero().squeeze(1)
    spans = few_spans(inactive, _FEW_SPANS)
    if spans is None or (spans and rows.ndim == 3 and rows.shape[0] > 1):
        rows.zero_()
        return
    for first, last in spans:
        rows[..., first:last, :].zero_()
