"""Rows as compiled functions take them: each function is one pass over the vocabulary.

A function takes a matrix of logits and the numbers of the rows that count. The others are neither
read nor computed. A row is given by its number, so that none is copied, unless strides are out of
the common. Temperature, softcap and scale are tensors, so that no value of theirs is compiled in;
None says that there is none, and then the function is another one.

Here is what all of them share: how many rows a call gets, how a sum over a row is made, where rows
are found, where a gradient is written, and the functions of `token_stats` and `gae`. Those of other
operations are beside their launchers: `compiled_token_stats` (launchers alone),
`compiled_divergence`, `compiled_fisher`, `compiled_kept`, `compiled_gae`. What a `RowFunction` is
and when it is compiled, `compiled` says.

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

# Logits that a function is given at once (at least one row). Few large loops lose less to threads
# that wait for each other than many small ones.
_CHUNK_LOGITS = 2**24

# Columns that are added up in fp32: so few that a register's 8 or 16 sums, of which each number
# goes to one, get a hundred or so each.
_RUN = 1024

# Numbers that functions may hold in fp32 between two loops, one for each logit.
_HELD_NUMBERS = 2**22

# Where gradients cannot be written to where they belong, those of so many logits are computed apart
# before they are copied there.
_ROOM_LOGITS = 2**22

# A call of a function costs as much as to copy the gradients of about so many logits.
_WORTH_A_CALL = 2**20

# No loop takes more numbers at a time than this: two registers of 16.
_WHOLE_VECTORS = 32


class Scaling(NamedTuple):
    """What happens to logits, as arguments of the functions: None where nothing does."""

    temperature: Tensor | None  # (n,)
    softcap: Tensor | None  # 0-d
    scale: Tensor | None  # 0-d

    def as_options(self) -> dict:
        """As arguments of the formulas."""
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
    """Sum what a function makes of rows (n, V), of which some are the same for all (V,), and of
    what there is of each row, (n, 1): in two parts each, (n,) and (n,), first those of whole runs,
    for `added`.

    The compiler adds up thousands of numbers one after the other, where PyTorch adds up sums of
    parts. The function is applied to the parts, because its results would have to be in memory to
    be cut; and they are not added here, because a loop over rows that does only that would keep the
    compiler from doing all else of a row while that is in the cache.
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
    """Return the temperatures (n,) of rows as (n, 1), and 1 for none."""
    return 1.0 if temperature is None else temperature.unsqueeze(-1)


def added(parts: Sequence[Tensor]) -> list[Tensor]:
    """Add up the parts of sums."""
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
    """Indices of the selected rows (N,), in pieces of a bounded number of logits: fewer where a
    function may have to hold a number for each. For mixtures, see `whole_vectors`.
    """
    found = selected.nonzero().squeeze(1)
    return _pieces(found, vocab, _HELD_NUMBERS if held else _CHUNK_LOGITS, mixed=mixed)


def _pieces(index: Tensor, vocab: int, logits: int, *, mixed: bool = False) -> tuple[Tensor, ...]:
    rows = max(1, logits // max(1, vocab))
    if mixed:
        rows = max(_WHOLE_VECTORS, rows // _WHOLE_VECTORS * _WHOLE_VECTORS)
    return index.split(rows) if len(index) else ()


def whole_vectors(index: Tensor) -> Tensor:
    """Repeat the last of some rows, so that their numbers fill vector registers.

    What the compiler holds of a mixture it computes in a loop over all rows as if they were one,
    whose last numbers, one by one, have other bits than those that fill a register.
    """
    missing = -len(index) % _WHOLE_VECTORS
    return torch.cat((index, index[-1:].expand(missing)))


def into_rows(rows: Tensor, index: Tensor, write: Callable[[Tensor, Tensor], None]) -> None:
    """Let a function write what belongs to some rows of an (outer, inner, V) view: right there,
    a span of rows at a time, where they are few spans. Of rows that follow each other the compiler
    makes better loops than of those that each have a place of their own.
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
    """Let a function write what it computes of some rows to where they are in d_rows, which may be
    the rows themselves; by way of room where it cannot.

    It is given the matrix to write into and the numbers of rows there; the matrix and the numbers
    of what it reads; and which of all N these are.
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
    """As `into_rows`, of mixtures: by way of room for rows that fill vector registers."""

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
    """Let a function write elsewhere, a few rows at a time, and put them where they belong."""
    outer, inner, vocab = rows.shape
    first, *more = _pieces(index, vocab, _ROOM_LOGITS, mixed=mixed)
    for some in (first, *more):
        out = rows.new_empty(len(some), vocab)
        try:
            write(out, some)
        except NotCompiled as error:
            if some is first:
                raise
            # Those before it are written, perhaps over what they were computed from.
            raise RuntimeError("PyTorch's compiler was turned off during a call") from error
        if outer == 1:
            rows[0].index_copy_(0, some, out)
        else:
            rows[some // inner, some % inner] = out


def by_number(rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """View (outer, inner, V) as a matrix, in which the rows of that index have the numbers that are
    returned with it; where strides do not allow it, copy them. Raise `NotCompiled` for V < 2.
    """
    found = _view_by_number(rows, index)
    if found is not None:
        return found
    inner = rows.shape[1]
    copies = rows[index // inner, index % inner]
    return copies, torch.arange(len(index), device=index.device)


def _view_by_number(rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor] | None:
    """View rows as `by_number` does, without a copy; None where strides do not allow it."""
    outer, inner, vocab = rows.shape
    across, down, along = rows.stride()
    if vocab < 2:
        raise NotCompiled
    if inner == 1:
        rows, inner, outer, down = rows.transpose(0, 1), outer, 1, across
    if along == 1 and outer == 1 and down == 0:  # all the same
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
    """Make the arguments of some rows from the temperature of all rows, or those (N,) of each."""
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
    """Return a number as a 0-d tensor, whose value is not compiled in."""
    return None if value is None else like.new_full((), value)


def columns_of(rows: Tensor) -> Tensor:
    """Return the numbers (V,) of the columns: see `reference.row_terms`."""
    return torch.arange(rows.shape[2], dtype=torch.int32, device=rows.device)
