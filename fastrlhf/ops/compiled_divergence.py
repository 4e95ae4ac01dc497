"""Row work of `kl_divergence` by compiled functions (see `compiled_rows.py`).

The launchers are named as those of `eager_divergence`, which do all of the work where a function
cannot be compiled.

Dims: N rows, of which n count, V columns.
"""

import contextlib

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.reference import Shares

from . import compiled_rows, eager_divergence
from .compiled import NotCompiled, RowFunction
from .compiled_rows import (
    Scaling,
    by_number,
    chunks,
    column,
    into_mixed_rows,
    into_rows,
    number,
    scaling,
    sums_in_parts,
    whole_vectors,
)
from .eager_divergence import no_divergence, wider
from .rows import zero_inactive

# In nats. A KL divergence above this is accurate as E_p[ln p/q], though some of the terms are
# negative; below, it is computed as a sum of terms that are never negative. Values would be
# accurate from 0.03 on, but not the small entries of gradients, p·(ln p/q - KL).
_LARGE_DIVERGENCE = 0.5


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
    sums = sums_in_parts(reference.log_ratio_terms, (*peaks, column(temperature)), p, q)
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


_LOG_RATIO_MOMENTS = RowFunction(_log_ratio_moments, "mv n mv n n . .")
# The formulas are long, and parts of them are used several times. With a low threshold the compiler
# keeps these parts in memory; computed anew for each use, they took two to five times as long.
_DIVERGENCE_SUMS = RowFunction(
    _divergence_sums, "mv n mv n n n n n . . n . .", realize_reads_threshold=4
)
_DIVERGENCE_GRADIENT = RowFunction(
    _divergence_gradient, "NV mv n mv n n n n n n n n . . n . .", realize_reads_threshold=4
)


def divergence_forward(
    logits_p: Tensor,
    logits_q: Tensor,
    mask: Tensor,
    *,
    share: float | None,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute values (N,) and statistics (6, N), 0 where the mask is 0; without a compiler,
    eagerly.
    """
    values, stats = no_divergence(logits_p, logits_q, mask)
    with contextlib.suppress(NotCompiled):
        for index in chunks(mask, logits_p.shape[2], held=True, mixed=share is not None):
            values[index], *of_chunk = _divergence(
                logits_p, logits_q, index, share=share, temperature=temperature, softcap=softcap,
                scale=scale,
            )  # fmt: skip
            stats[:, index] = torch.stack(of_chunk)
        return values, stats
    return eager_divergence.divergence_forward(
        logits_p, logits_q, mask, share=share, temperature=temperature, softcap=softcap,
        scale=scale,
    )  # fmt: skip


def divergence_backward(
    d_own: Tensor,
    own: Tensor,
    other: Tensor,
    mask: Tensor,
    stats: Tensor,
    d_values: Tensor,
    *,
    of_p: bool,
    share: float | None,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
) -> None:
    """Write the gradient with respect to one side into all of d_own (N, V); without a compiler,
    eagerly.
    """
    active = mask & (d_values != 0)
    zero_inactive(d_own, active)
    with contextlib.suppress(NotCompiled):
        for index in chunks(active, own.shape[2], held=True, mixed=share is not None):
            _write_gradient(
                d_own.unsqueeze(0), own, other, index, d_values, stats, of_p=of_p, share=share,
                temperature=temperature, softcap=softcap, scale=scale,
            )  # fmt: skip
        return
    eager_divergence.divergence_backward(
        d_own, own, other, mask, stats, d_values, of_p=of_p, share=share,
        temperature=temperature, softcap=softcap, scale=scale,
    )  # fmt: skip


def _divergence(
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

    One pass over the rows makes a KL divergence accurate that is not small (`_LARGE_DIVERGENCE`).
    Rows of which that is not known take a second pass, which costs as much again.
    """
    dtype = wider(rows_p, rows_q)
    some = index if share is None else whole_vectors(index)
    scaled = scaling(temperature, softcap, scale, some, dtype)
    p, q = (by_number(rows, some) for rows in (rows_p, rows_q))
    if share is not None:
        both = (
            *compiled_rows.NORM(*p, *scaled, dtype=dtype),
            *compiled_rows.NORM(*q, *scaled, dtype=dtype),
        )
        shares = number(share, both[0]), number(1 - share, both[0])
        sums = _DIVERGENCE_SUMS(*p, *q, *both, *shares, *scaled)
        results = reference.divergence_of_sums(sums, both, share)
        return tuple(x[: len(index)] for x in results)
    peak_p, peak_q, a, b, c, d, e, f = _LOG_RATIO_MOMENTS(*p, *q, *scaled, dtype=dtype)
    # In fp64, since the logarithms of the sums, up to ln V, are large beside the divergence.
    in_fp64 = reference.log_ratio_of_sums(peak_p, peak_q, a + d, b + e, c + f)
    *norms, value = (x.to(dtype) for x in in_fp64)
    # Rows with NaN or infinity take the second pass too. The first adds up e^(z - peak) times a
    # log-ratio; where the log-ratio is infinite, this exponential may not be 0 although p is.
    sure = (value > _LARGE_DIVERGENCE) & (value != torch.inf)
    small = (~sure).nonzero().squeeze(1)
    results = value, *norms, value, value
    if len(small):
        of_some = [None if x is None else x[small] for x in scaled[:1]]
        sums = _DIVERGENCE_SUMS(
            p[0], p[1][small], q[0], q[1][small], *(x[small] for x in norms), None, None,
            *of_some, *scaled[1:],
        )  # fmt: skip
        exactly = reference.divergence_of_sums(sums, tuple(x[small] for x in norms), None)
        results = tuple(x.index_copy(0, small, y) for x, y in zip(results, exactly, strict=True))
    return results


def _write_gradient(
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
    """Write `reference.divergence_backward` of some rows to their places in d_rows; `stats` are of
    all N rows.
    """
    shares = number(share, d_values), number(None if share is None else 1 - share, d_values)

    def write(out: Tensor, some: Tensor) -> None:
        scaled = scaling(temperature, softcap, scale, some, d_values.dtype)
        where = *by_number(own, some), *by_number(other, some)
        of_rows = d_values[some], *stats[:, some]
        _DIVERGENCE_GRADIENT(out, *where, *of_rows, *shares, *scaled, of_p=of_p)

    into = into_rows if share is None else into_mixed_rows
    into(d_rows, index, write)
