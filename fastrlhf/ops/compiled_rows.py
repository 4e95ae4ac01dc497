"""The row functions of `fastrlhf.reference`, compiled: one for each pass over the vocabulary.

Each takes a matrix of logits and the numbers of the rows that count. The others are neither read
nor computed. A row is found by its number, so that none is copied, unless strides are out of the
common. Temperature, softcap and scale are tensors, so that no value of theirs is compiled in, or
absent.

Dims: N rows, of which n count, V columns.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf import reference
from fastrlhf.reference import RowParts, RowSlopes, Shares

from .compiled import STEPS, NotCompiled, NotInPlace, RowFunction
from .row_spans import few_spans

# Logits that a function is given at once (at least one row). Few large loops lose less to threads
# that wait for each other than many small ones.
_CHUNK_LOGITS = 2**24

# Columns that are added up in fp32: so few that a register's 8 or 16 sums, of which each number
# goes to one, get a hundred or so each.
_RUN = 1024

# Numbers that functions may hold in fp32 between two loops, one for each logit.
_HELD_NUMBERS = 2**22

# Gradients of so many logits wait to be put where they belong, if they cannot be written there.
_ROOM_LOGITS = 2**22

# A call of a function costs as much as to copy the gradients of about so many logits.
_WORTH_A_CALL = 2**20

# No loop takes more numbers at a time than this: two registers of 16.
_WHOLE_VECTORS = 32

# In nats. Above it, a divergence need not be computed as a sum of what is never negative. Values
# would have their places from 0.03 on, but not the small entries of gradients, p·(ln p/q - KL).
_LARGE_DIVERGENCE = 0.5


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
    rows_t = _column(temperature)
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


def _column(temperature: Tensor | None) -> Tensor | float:
    """The temperatures (n, 1) of rows, 1 for none."""
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


def _log_ratio_moments(
    matrix_p: Tensor,
    numbers_p: Tensor,
    matrix_q: Tensor,
    numbers_q: Tensor,
    temperature: Tensor | None,
    softcap: Tensor | None,
    scale: Tensor | None,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    softcap_and_scale = softcap, 1.0 if scale is None else scale
    p, q = (
        reference.capped_logits(rows.to(dtype), *softcap_and_scale)
        for rows in (matrix_p[numbers_p], matrix_q[numbers_q])
    )
    peaks = p.amax(-1, keepdim=True), q.amax(-1, keepdim=True)
    sums = sums_in_parts(reference.log_ratio_terms, (*peaks, _column(temperature)), p, q)
    return *(x.view(-1) for x in peaks), *sums


def _divergence_sums(
    matrix_p: Tensor,
    numbers_p: Tensor,
    matrix_q: Tensor,
    numbers_q: Tensor,
    peak_p: Tensor,
    log_norm_p: Tensor,
    peak_q: Tensor,
    log_norm_q: Tensor,
    of_q: Tensor | None,
    of_p: Tensor | None,
    temperature: Tensor | None,
    softcap: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, ...]:
    norms = (peak_p, log_norm_p), (peak_q, log_norm_q)
    return reference.divergence_sums(
        matrix_p[numbers_p], matrix_q[numbers_q], norms, share=_shares(of_q, of_p),
        **Scaling(temperature, softcap, scale).as_options(),
    )  # fmt: skip


def _divergence_gradient(
    out: Tensor,
    own: Tensor,
    numbers: Tensor,
    other: Tensor,
    numbers_of_other: Tensor,
    d_values: Tensor,
    peak_p: Tensor,
    log_norm_p: Tensor,
    peak_q: Tensor,
    log_norm_q: Tensor,
    mean_p: Tensor,
    mean_q: Tensor,
    share_of_q: Tensor | None,
    share_of_p: Tensor | None,
    temperature: Tensor | None,
    softcap: Tensor | None,
    scale: Tensor | None,
    *,
    of_p: bool,
) -> tuple[Tensor, ...]:
    gradient = reference.divergence_backward(
        own[numbers], other[numbers_of_other], d_values, of_p=of_p,
        share=_shares(share_of_q, share_of_p),
        stats=(peak_p, log_norm_p, peak_q, log_norm_q, mean_p, mean_q),
        **Scaling(temperature, softcap, scale).as_options(),
    )  # fmt: skip
    out.copy_(gradient)
    return ()


def _shares(of_q: Tensor | None, of_p: Tensor | None) -> Shares | None:
    return None if of_q is None or of_p is None else Shares(of_q, of_p)


def _fisher_product(
    out: Tensor,
    logits: Tensor,
    numbers: Tensor,
    tangent: Tensor,
    numbers_of_tangent: Tensor,
    temperature: Tensor | None,
) -> tuple[Tensor, ...]:
    z, u = _sides(logits, numbers, tangent, numbers_of_tangent)
    peak, rows_t = z.amax(-1, keepdim=True), _column(temperature)
    sums = sums_in_parts(_fisher_moments, (peak, rows_t), z, u)
    total, moment, _ = (x.unsqueeze(-1) for x in added(sums))
    weight = reference.fisher_weight(z, peak, rows_t)
    out.copy_(reference.fisher_product_of_sums(weight, u, rows_t, total, moment)[0])
    return peak.view(-1), *sums


def _fisher_moments(
    z: Tensor, u: Tensor, peak: Tensor, rows_t: float | Tensor
) -> tuple[Tensor, ...]:
    weight = reference.fisher_weight(z, peak, rows_t)
    moment = reference.fisher_moment(weight, u)
    return weight, moment, moment * reference.where_likely(weight, u)


def _fisher_quadratic(
    logits: Tensor,
    numbers: Tensor,
    tangent: Tensor,
    numbers_of_tangent: Tensor,
    peak: Tensor,
    total: Tensor,
    moment: Tensor,
    temperature: Tensor | None,
) -> tuple[Tensor, ...]:
    z, u = _sides(logits, numbers, tangent, numbers_of_tangent)
    of_rows = peak.unsqueeze(-1), _column(temperature), total.unsqueeze(-1), moment.unsqueeze(-1)
    return sums_in_parts(_fisher_squares, of_rows, z, u)


def _fisher_squares(
    z: Tensor,
    u: Tensor,
    peak: Tensor,
    rows_t: float | Tensor,
    total: Tensor,
    moment: Tensor,
) -> tuple[Tensor]:
    weight = reference.fisher_weight(z, peak, rows_t)
    product, centred = reference.fisher_product_of_sums(weight, u, rows_t, total, moment)
    return (product * centred,)


def _sides(
    matrix: Tensor, numbers: Tensor, other: Tensor, numbers_of_other: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulation_dtype(torch.promote_types(matrix.dtype, other.dtype))
    return matrix[numbers].to(dtype), other[numbers_of_other].to(dtype)


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
LOG_RATIO_MOMENTS = RowFunction(_log_ratio_moments, "mv n mv n n . .")
# Long formulas, parts of which are used several times: computed anew for each use, not held, they
# took the compiler two to five times as long.
DIVERGENCE_SUMS = RowFunction(
    _divergence_sums, "mv n mv n n n n n . . n . .", realize_reads_threshold=4
)
DIVERGENCE_GRADIENT = RowFunction(
    _divergence_gradient, "NV mv n mv n n n n n n n n . . n . .", realize_reads_threshold=4
)
ADVANTAGES = RowFunction(_advantages, "ns ns ns n n . n")
FISHER_PRODUCT = RowFunction(_fisher_product, "NV mv n mv n n")
FISHER_QUADRATIC = RowFunction(_fisher_quadratic, "mv n mv n n n n n")


def chunks(
    selected: Tensor, vocab: int, *, held: bool = False, mixed: bool = False
) -> tuple[Tensor, ...]:
    """Indices of the selected rows (N,), in pieces of a bounded number of logits: fewer where a
    function may have to hold a number for each. For mixtures, see `_whole_vectors`.
    """
    found = selected.nonzero().squeeze(1)
    return _pieces(found, vocab, _HELD_NUMBERS if held else _CHUNK_LOGITS, mixed=mixed)


def _pieces(index: Tensor, vocab: int, logits: int, *, mixed: bool = False) -> tuple[Tensor, ...]:
    rows = max(1, logits // max(1, vocab))
    if mixed:
        rows = max(_WHOLE_VECTORS, rows // _WHOLE_VECTORS * _WHOLE_VECTORS)
    return index.split(rows) if len(index) else ()


def row_parts(
    rows: Tensor,
    index: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
    entropy: bool,
    with_stats: tuple[str, ...],
) -> RowParts:
    """Compute `reference.row_parts` of some rows of an (outer, inner, V) view; what there is of
    each row is given of all N.
    """
    scaled = _scaling(temperature, softcap, scale, index, reference.accumulation_dtype(rows.dtype))
    peak, target, before, *sums = ROW_PARTS(
        *_found_by_number(rows, index), targets[index], _columns(rows), *scaled,
        entropy=entropy, with_stats=with_stats,
    )  # fmt: skip
    return reference.named_parts(peak, target, before, added(sums), entropy, with_stats)


def write_gradient(
    d_rows: Tensor,
    rows: Tensor,
    index: Tensor,
    targets: Tensor,
    stats: tuple[Tensor | None, Tensor, Tensor],
    slopes: RowSlopes,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
) -> None:
    """Write `reference.logits_gradient` of some rows to where they are in d_rows."""
    columns = _columns(rows)

    def write(out: Tensor, places: Tensor, where: tuple[Tensor, Tensor], some: Tensor) -> None:
        of_rows = (None if x is None else x[some] for x in (*stats, *slopes))
        scaled = _scaling(temperature, softcap, scale, some, stats[1].dtype)
        LOGITS_GRADIENT(out, places, *where, targets[some], columns, *of_rows, *scaled)

    def write_apart(out: Tensor, some: Tensor) -> None:
        in_order = torch.arange(len(some), device=rows.device)
        write(out, in_order, _found_by_number(rows, some), some)

    there = _view_by_number(d_rows, index)
    if there is not None:
        with contextlib.suppress(NotInPlace):
            write(*there, there if d_rows is rows else _found_by_number(rows, index), index)
            return
    _by_way_of_room(d_rows, index, write_apart)


def divergence(
    rows_p: Tensor,
    rows_q: Tensor,
    index: Tensor,
    *,
    share: float | None,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """Compute `reference.divergence_and_stats` of some rows.

    A KL divergence that is no small number has its places from one pass. The second one, which
    gives the others theirs, costs as much again.
    """
    dtype = reference.accumulation_dtype(torch.promote_types(rows_p.dtype, rows_q.dtype))
    some = index if share is None else _whole_vectors(index)
    scaled = _scaling(temperature, softcap, scale, some, dtype)
    p, q = (_found_by_number(rows, some) for rows in (rows_p, rows_q))
    if share is not None:
        both = (*NORM(*p, *scaled, dtype=dtype), *NORM(*q, *scaled, dtype=dtype))
        shares = _number(share, both[0]), _number(1 - share, both[0])
        sums = DIVERGENCE_SUMS(*p, *q, *both, *shares, *scaled)
        found = reference.divergence_of_sums(sums, both, share)
        return tuple(x[: len(index)] for x in found)
    peak_p, peak_q, a, b, c, d, e, f = LOG_RATIO_MOMENTS(*p, *q, *scaled, dtype=dtype)
    # In fp64, since ln V is large beside the divergence.
    in_fp64 = reference.log_ratio_of_sums(peak_p, peak_q, a + d, b + e, c + f)
    *norms, value = (x.to(dtype) for x in in_fp64)
    # NaN and infinity take the second pass too: the first adds up e^(z - peak) times a log-ratio,
    # and where that ratio is infinite, the exponential may not have come to 0, as p does.
    sure = (value > _LARGE_DIVERGENCE) & (value != torch.inf)
    small = (~sure).nonzero().squeeze(1)
    found = value, *norms, value, value
    if len(small):
        of_some = [None if x is None else x[small] for x in scaled[:1]]
        sums = DIVERGENCE_SUMS(
            p[0], p[1][small], q[0], q[1][small], *(x[small] for x in norms), None, None,
            *of_some, *scaled[1:],
        )  # fmt: skip
        exactly = reference.divergence_of_sums(sums, tuple(x[small] for x in norms), None)
        found = tuple(x.index_copy(0, small, y) for x, y in zip(found, exactly, strict=True))
    return found


def write_divergence_gradient(
    d_rows: Tensor,
    own: Tensor,
    other: Tensor,
    index: Tensor,
    d_values: Tensor,
    stats: Tensor,
    *,
    of_p: bool,
    share: float | None,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
) -> None:
    """Write `reference.divergence_backward` of some rows to where they are in d_rows; the stats of
    all N are given.
    """
    shares = _number(share, d_values), _number(None if share is None else 1 - share, d_values)

    def write(out: Tensor, some: Tensor) -> None:
        scaled = _scaling(temperature, softcap, scale, some, d_values.dtype)
        where = *_found_by_number(own, some), *_found_by_number(other, some)
        of_rows = d_values[some], *stats[:, some]
        DIVERGENCE_GRADIENT(out, *where, *of_rows, *shares, *scaled, of_p=of_p)

    def write_more(out: Tensor, some: Tensor) -> None:
        more = _whole_vectors(some)
        room = out.new_empty(len(more), out.shape[1])
        write(room, more)
        out.copy_(room[: len(some)])

    if share is None:
        _into_rows(d_rows, index, write)
    else:
        _by_way_of_room(d_rows, index, write_more, mixed=True)


def write_fisher_product(
    out_rows: Tensor,
    logits: Tensor,
    tangent: Tensor,
    index: Tensor,
    temperature: float | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Write the products of `reference.fisher_product` of some rows to where they are in out_rows,
    and return the quadratic forms (n,).

    Those are (E[u²] - E[u]²)/T², unless too much of it cancels: then it takes a second pass.
    """
    quadratic: list[Tensor] = []

    def write(out: Tensor, some: Tensor) -> None:
        scaled = _scaling(temperature, None, 1.0, some, dtype)
        (z, numbers), (u, numbers_of_u) = (_found_by_number(x, some) for x in (logits, tangent))
        peak, *sums = FISHER_PRODUCT(out, z, numbers, u, numbers_of_u, scaled.temperature)
        total, moment, squares = added(sums)
        mean = moment / total
        found = squares / total - mean.square()
        sure = (found > mean.square()) & (found != torch.inf)  # squares may be too large to add up
        unsure = (~sure).nonzero().squeeze(1)
        if scaled.temperature is not None:
            found /= scaled.temperature.square()
        if len(unsure):
            of_rows = (None if x is None else x[unsure] for x in (peak, total, moment, *scaled[:1]))
            exactly = FISHER_QUADRATIC(z, numbers[unsure], u, numbers_of_u[unsure], *of_rows)
            found[unsure] = added(exactly)[0]
        quadratic.append(found)

    _into_rows(out_rows, index, write)
    return torch.cat(quadratic)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `reference.gae`."""
    dtype = reference.accumulation_dtype(torch.promote_types(rewards.dtype, values.dtype))
    keep = mask != 0
    rewards, values = (torch.where(keep, x, 0.0).to(dtype) for x in (rewards, values))
    steps = -(-rewards.shape[1] // STEPS)
    # Whole blocks of steps: tokens after the end, which do not count, change nothing.
    missing = steps * STEPS - rewards.shape[1]
    padded = (F.pad(x, (0, missing)).split(STEPS, dim=1) for x in (rewards, values, keep))
    padded = ([x.contiguous() for x in blocks] for blocks in padded)
    after, *following = values.new_zeros(2, len(values)).unbind()
    following = [after if last_values is None else last_values.to(dtype), *following]
    factor = reference.decay(gamma, lam, dtype)
    factors = factor if isinstance(factor, Tensor) else values.new_full((len(values),), factor)
    numbers = _number(gamma, values), factors
    found = []
    for block in zip(*(reversed(x) for x in padded), strict=True):
        advantages, *following = ADVANTAGES(*block, *following, *numbers)
        found.append(advantages)
    everywhere = torch.cat(found[::-1], dim=1)[:, : rewards.shape[1]]
    advantages = torch.where(keep, everywhere, 0.0)
    return advantages, advantages + values


def _whole_vectors(index: Tensor) -> Tensor:
    """Repeat the last of some rows, so that their numbers fill vector registers.

    What the compiler holds of a mixture it computes in a loop over all rows as if they were one,
    whose last numbers, one by one, have other bits than those that fill a register.
    """
    missing = -len(index) % _WHOLE_VECTORS
    return torch.cat((index, index[-1:].expand(missing)))


def _into_rows(rows: Tensor, index: Tensor, write: Callable[[Tensor, Tensor], None]) -> None:
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


def _by_way_of_room(
    rows: Tensor,
    index: Tensor,
    write: Callable[[Tensor, Tensor], None],
    *,
    mixed: bool = False,
) -> None:
    """Let it write elsewhere, a few rows at a time, and put them where they belong."""
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


def _found_by_number(rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
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
    """The same without a copy; None where strides do not allow it."""
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


def _scaling(
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
    index: Tensor,
    dtype: torch.dtype,
) -> Scaling:
    """Make the arguments of the temperature of all rows, or those (N,) of each."""
    of_rows = torch.empty(index.shape, dtype=dtype, device=index.device)
    if isinstance(temperature, Tensor):
        of_rows.copy_(temperature[index])
    else:
        of_rows.fill_(temperature)
    plain = not isinstance(temperature, Tensor) and temperature == 1
    unscaled = scale == 1 and softcap is None
    return Scaling(
        None if plain else of_rows,
        _number(softcap, of_rows),
        None if unscaled else _number(scale, of_rows),
    )


def _number(value: float | None, like: Tensor) -> Tensor | None:
    return None if value is None else like.new_full((), value)


def _columns(rows: Tensor) -> Tensor:
    return torch.arange(rows.shape[2], dtype=torch.int32, device=rows.device)
