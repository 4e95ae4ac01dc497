"""How compiled functions are given rows; each function is one pass over the vocabulary.

A function takes a matrix of logits and the numbers of the rows that count. Other rows are neither
read nor computed. Because rows are given by their numbers, none is copied, except where strides
are unusual. Temperature, softcap and scale are given as tensors, so that their values are not
compiled in; None stands for no such transform, and another function is compiled for that.

Here is what all of them share: how many rows a call gets, how a sum over a row is made, where rows
are found and where a gradient is written; and the functions of `token_stats` and `gae`. The
launchers of these are in `compiled_token_stats` and `compiled_gae`. Other operations have their
functions beside their launchers: `compiled_divergence`, `compiled_fisher`, `compiled_kept`.
`compiled` says what a `RowFunction` is, and when it is compiled.

Dims: N rows, of which n count, V columns.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.reference import RowSlopes

from .compiled import NotCompiled, NotInPlace, RowFunction
from .row_spans import few_spans

# How many logits a function is given at once (at least one row). Threads wait for each other at the
# end of each loop, so few large loops lose less time than many small ones.
_CHUNK_LOGITS = 2**24

# How many columns are added up in fp32 before the sum goes on in fp64. A vector register holds 8 or
# 16 sums, and each of them gets about a hundred of these columns.
_RUN = 1024

# How many numbers in fp32, one for each logit, a function may hold in memory between two loops.
_HELD_NUMBERS = 2**22

# Where gradients cannot be written to their places at once, those of this many logits are computed
# into other memory, and then copied.
_ROOM_LOGITS = 2**22

# A call of a function costs about as much as copying the gradients of this many logits.
_WORTH_A_CALL = 2**20

# A loop takes at most this many numbers at a time: two vector registers of 16.
_WHOLE_VECTORS = 32


class Scaling(NamedTuple):
    """The transform of the logits as arguments of the functions; None where there is none."""

    temperature: Tensor | None  # (n,)
    softcap: Tensor | None  # 0-d
    scale: Tensor | None  # 0-d

    def as_options(self) -> dict:
        """Return them as keywords of the formulas in `fastrlhf.reference`."""
        temperature, scale = (1.0 if x is None else x for x in (self.temperature, self.scale))
        return {"temperature": temperature, "softcap": self.softcap, "scale": scale}


def _row_parts(
    matrix: Tensor,
    numbers: Tensor,
    targets: Tensor,
    columns: Tensor,
    temperature: Tensor | None,
    softcap: Tensor | None,
    scale: Tensor | None,
    *,
    entropy: bool,
    with_stats: tuple[str, ...],
) -> tuple[Tensor, ...]:
    rows = matrix[numbers].to(reference.accumulation_dtype(matrix.dtype))
    capped = reference.capped_logits(rows, softcap, 1.0 if scale is None else scale)
    index, peak = targets.unsqueeze(-1), capped.amax(-1, keepdim=True)
    rows_t = column(temperature)
    terms = functools.partial(reference.row_terms, entropy=entropy, with_stats=with_stats)
    sums = sums_in_parts(terms, (peak, index, rows_t), capped, columns)
    return peak.view(-1), *reference.target_parts(capped, peak, index, with_stats), *sums


def sums_in_parts(
    terms: Callable[..., Iterable[Tensor]],
    of_rows: Sequence[Tensor | float],
    *rows: Tensor,
) -> tuple[Tensor, ...]:
    """Sum the terms of rows over the columns. `terms` makes them from `rows`, (n, V) each or (V,)
    if the same for all rows, and from `of_rows`, which has (n, 1) for each row.

    Each sum comes in two parts, (n,) and (n,): of the columns in whole runs (`_RUN`), and of the
    rest. All first parts are returned before all second ones; `added` adds them up.

    The parts are for accuracy: the compiler adds up thousands of numbers one after the other, where
    PyTorch adds up sums of parts. The columns are cut before the terms are made from them, because
    cut afterwards the terms would have to be in memory. The parts are not added up here, because a
    loop over rows that does only that would keep the compiler from doing all other work on a row
    while the row is in the cache.
    """
    whole = rows[0].shape[1] // _RUN * _RUN

    def in_runs(x: Tensor) -> Tensor:
        return x[..., :whole].unflatten(-1, (-1, _RUN))

    of_runs = (x.unsqueeze(1) if isinstance(x, Tensor) else x for x in of_rows)
    first = terms(*(in_runs(x) for x in rows), *of_runs)
    rest = terms(*(x[..., whole:] for x in rows), *of_rows)
    return (
        *(x.sum(-1).sum(-1, dtype=torch.float64) for x in first),
        *(x.sum(-1) for x in rest),
    )


def column(temperature: Tensor | None) -> Tensor | float:
    """Return the temperatures (n,) of rows as (n, 1); 1 if there is none."""
    return 1.0 if temperature is None else temperature.unsqueeze(-1)


def added(parts: Sequence[Tensor]) -> list[Tensor]:
    """Add up the two parts of each sum that `sums_in_parts` returns."""
    half = len(parts) // 2
    return [(a + b).to(b.dtype) for a, b in zip(parts[:half], parts[half:], strict=True)]


def _logits_gradient(
    out: Tensor,
    places: Tensor,
    matrix: Tensor,
    numbers: Tensor,
    targets: Tensor,
    columns: Tensor,
    entropy: Tensor | None,
    peak: Tensor,
    log_norm: Tensor,
    of_others: Tensor,
    of_target: Tensor,
    of_entropy: Tensor | None,
    of_mean: Tensor | None,
    temperature: Tensor | None,
    softcap: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, ...]:
    gradient = reference.logits_gradient(
        matrix[numbers], targets, (entropy, peak, log_norm),
        RowSlopes(of_others, of_target, of_entropy, of_mean), columns=columns,
        **Scaling(temperature, softcap, scale).as_options(),
    )  # fmt: skip
    out[places] = gradient.to(out.dtype)
    return ()


def _norm(
    matrix: Tensor,
    numbers: Tensor,
    temperature: Tensor | None,
    softcap: Tensor | None,
    scale: Tensor | None,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    return reference.row_norm(
        matrix[numbers].to(dtype), **Scaling(temperature, softcap, scale).as_options()
    )


def _advantages(
    rewards: Tensor,
    values: Tensor,
    keep: Tensor,
    next_value: Tensor,
    next_advantage: Tensor,
    gamma: Tensor,
    decay: Tensor,
) -> tuple[Tensor, ...]:
    return reference.advantages_backwards(
        rewards, values, keep, next_value, next_advantage, gamma=gamma, decay=decay
    )


ROW_PARTS = RowFunction(_row_parts, "mv n n v n . .")
LOGITS_GRADIENT = RowFunction(_logits_gradient, "MV n mv n n v n n n n n n n n . .")
NORM = RowFunction(_norm, "mv n n . .")
ADVANTAGES = RowFunction(_advantages, "ns ns ns n n . n")


def chunks(
    selected: Tensor, vocab: int, *, held: bool = False, mixed: bool = False
) -> tuple[Tensor, ...]:
    """Return the indices of the selected rows (N,) in pieces of a bounded number of logits. With
    `held`, pieces are smaller, because the function may hold a number for each logit. `mixed` is
    for divergences to a mixture, whose pieces are multiples of a vector: see `whole_vectors`.
    """
    numbers = selected.nonzero().squeeze(1)
    return _pieces(numbers, vocab, _HELD_NUMBERS if held else _CHUNK_LOGITS, mixed=mixed)


def _pieces(index: Tensor, vocab: int, logits: int, *, mixed: bool = False) -> tuple[Tensor, ...]:
    rows = max(1, logits // max(1, vocab))
    if mixed:
        rows = max(_WHOLE_VECTORS, rows // _WHOLE_VECTORS * _WHOLE_VECTORS)
    return index.split(rows) if len(index) else ()


def whole_vectors(index: Tensor) -> Tensor:
    """Repeat the last of some rows until their number is a multiple of a vector.

    For a divergence to a mixture the compiler holds numbers in memory, which it computes in one
    loop over the numbers of all rows. Numbers at the end of that loop that do not fill a register
    are computed one by one, and would have other bits than they have elsewhere.
    """
    missing = -len(index) % _WHOLE_VECTORS
    return torch.cat((index, index[-1:].expand(missing)))


def into_rows(rows: Tensor, index: Tensor, write: Callable[[Tensor, Tensor], None]) -> None:
    """Let a function write its results for some rows of an (outer, inner, V) view. Where the rows
    form few spans, it writes them directly into the view, a span at a time. Otherwise it writes
    into other memory, from which they are copied: the compiler makes better loops for rows that
    follow each other than for rows each of which has a place of its own.
    """
    worth_it = max(1, len(index) * rows.shape[2] // _WORTH_A_CALL)
    spans = few_spans(index, worth_it) if rows.shape[0] == 1 else None
    if spans is None:
        _by_way_of_room(rows, index, write)
        return
    done = 0
    for first, last in spans:
        some = index[done : done + last - first]
        write(rows[0, first:last], some)
        done += len(some)


def where_they_are(
    d_rows: Tensor,
    rows: Tensor,
    index: Tensor,
    write: Callable[[Tensor, Tensor, tuple[Tensor, Tensor], Tensor], None],
) -> None:
    """Let a function write its results for some rows to their places in d_rows, which may be the
    rows themselves. Where it cannot, it writes into other memory, from which they are copied.

    `write` is given the matrix to write into and the numbers of the rows in it; the matrix to read
    and the numbers of the rows in that; and the numbers of these rows among all N.
    """

    def write_apart(out: Tensor, some: Tensor) -> None:
        in_order = torch.arange(len(some), device=rows.device)
        write(out, in_order, by_number(rows, some), some)

    there = _view_by_number(d_rows, index)
    if there is not None:
        with contextlib.suppress(NotInPlace):
            write(*there, there if d_rows is rows else by_number(rows, index), index)
            return
    _by_way_of_room(d_rows, index, write_apart)


def into_mixed_rows(rows: Tensor, index: Tensor, write: Callable[[Tensor, Tensor], None]) -> None:
    """Do as `into_rows` for divergences to a mixture: the function always writes into other memory,
    which has room for the repeated rows of `whole_vectors`.
    """

    def write_more(out: Tensor, some: Tensor) -> None:
        more = whole_vectors(some)
        room = out.new_empty(len(more), out.shape[1])
        write(room, more)
        out.copy_(room[: len(some)])

    _by_way_of_room(rows, index, write_more, mixed=True)


def _by_way_of_room(
    rows: Tensor,
    index: Tensor,
    write: Callable[[Tensor, Tensor], None],
    *,
    mixed: bool = False,
) -> None:
    """Let a function write into other memory, a few rows at a time, and put them in place."""
    outer, inner, vocab = rows.shape
    first, *more = _pieces(index, vocab, _ROOM_LOGITS, mixed=mixed)
    for some in (first, *more):
        out = rows.new_empty(len(some), vocab)
        try:
            write(out, some)
        except NotCompiled as error:
            if some is first:
                raise
            # Rows before these are written already, perhaps over the logits that they were computed
            # from, so that nobody can start again eagerly.
            raise RuntimeError("PyTorch's compiler was turned off during a call") from error
        if outer == 1:
            rows[0].index_copy_(0, some, out)
        else:
            rows[some // inner, some % inner] = out


def by_number(rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """View (outer, inner, V) as a matrix, and return it with the numbers that the rows of `index`
    have in it. Where strides do not allow a view, the matrix is a copy of these rows.

    Raises:
        NotCompiled: V < 2.
    """
    view = _view_by_number(rows, index)
    if view is not None:
        return view
    inner = rows.shape[1]
    copies = rows[index // inner, index % inner]
    return copies, torch.arange(len(index), device=index.device)


def _view_by_number(rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor] | None:
    """View rows as `by_number` does; None where strides do not allow it without a copy."""
    outer, inner, vocab = rows.shape
    across, down, along = rows.stride()
    if vocab < 2:
        raise NotCompiled
    if inner == 1:
        rows, inner, outer, down = rows.transpose(0, 1), outer, 1, across
    if along == 1 and outer == 1 and down == 0:  # an expanded row, the same for all
        return rows[0, :1], torch.zeros_like(index)
    if along == 1 and outer == 1:
        return rows[0], index
    if along == 1 and down >= vocab and across % down == 0 and across >= down * inner:
        step = across // down
        matrix = rows.as_strided((step * (outer - 1) + inner, vocab), (down, 1))
        return matrix, index if step == inner else index // inner * step + index % inner
    return None


def scaling(
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
    index: Tensor,
    dtype: torch.dtype,
) -> Scaling:
    """Make the arguments for some rows; the temperature is one number, or (N,) one for each row."""
    of_rows = torch.empty(index.shape, dtype=dtype, device=index.device)
    if isinstance(temperature, Tensor):
        of_rows.copy_(temperature[index])
    else:
        of_rows.fill_(temperature)
    plain = not isinstance(temperature, Tensor) and temperature == 1
    unscaled = scale == 1 and softcap is None
    return Scaling(
        None if plain else of_rows,
        number(softcap, of_rows),
        None if unscaled else number(scale, of_rows),
    )


def number(value: float | None, like: Tensor) -> Tensor | None:
    """Return a number as a 0-d tensor, so that its value is not compiled in; None stays None."""
    return None if value is None else like.new_full((), value)


def columns_of(rows: Tensor) -> Tensor:
    """Return the numbers (V,) of the columns: see `reference.row_terms`."""
    return torch.arange(rows.shape[2], dtype=torch.int32, device=rows.device)
