"""Rows of V logits as k + 1 buckets: one for each of k words, and one for all other words.

The last bucket is the log-sum-exp of the logits of all other words. It is summed over these, not
computed as the difference of two sums: where the k words have nearly all of the probability, the
difference would have no correct digit. The softmax of the buckets gives the probabilities that the
row gives to the words and to the rest. The gradient of a word's bucket is that of its logit; the
gradient of the last bucket is spread over the other words by their softmax.

A row may have fewer than k words. A missing word has the number V, and its bucket is -inf.

Dims: N rows, V vocabulary, k words.
"""

from typing import Any

import torch
from torch import Tensor

from fastrlhf.reference import accumulation_dtype, cap_slope, capped_logits, row_sums

from .backend import backend_of, under_transform
from .eager_rows import runs_or_chunks
from .rows import can_overwrite, of_rows, rows_of, take_rows
from .transform import Transform, check_temperatures_on_host, flat_temperature
from .vocabulary_part import IGNORED, NOT_HERE

Buckets = tuple[Tensor, Tensor, Tensor]  # (N, k + 1); peak and log_norm (N,) of the other words


def buckets_of_rows(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
) -> Buckets:
    """Define the buckets (..., k + 1) of rows (..., V) in plain PyTorch, which autograd and
    torch.func can differentiate. Also returned are peak (before the temperature) and log_norm (...)
    of the other words.

    The buckets are relative to the largest logit, which is taken as a constant, since no softmax
    depends on it. So large logits that differ by little stay accurate.
    """
    rows_t = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    capped = capped_logits(logits.to(accumulation_dtype(logits.dtype)), softcap, scale)
    nowhere = torch.full_like(capped[..., :1], -torch.inf)
    padded = torch.cat((capped, nowhere), dim=-1)
    words = padded.gather(-1, ids)
    others = padded.scatter(-1, ids, -torch.inf)
    peak = others.detach().amax(-1, keepdim=True)
    empty, base = peak == -torch.inf, _finite(peak)
    total = row_sums(((others - base) / rows_t).exp())
    log_norm = torch.where(empty, -torch.inf, torch.where(empty, 1.0, total).log())
    buckets = _relative(words, peak, log_norm, rows_t)
    return buckets, peak.squeeze(-1), log_norm.squeeze(-1)


def _finite(peak: Tensor) -> Tensor:
    return torch.where(peak == -torch.inf, 0.0, peak)


def _relative(words: Tensor, peak: Tensor, log_norm: Tensor, rows_t: float | Tensor) -> Tensor:
    """Make buckets of the logits (..., k) of words, before the temperature, and of the peak and
    log_norm (..., 1) of the other words.
    """
    base = _finite(torch.maximum(words.detach().amax(-1, keepdim=True), peak))
    return torch.cat(((words - base) / rows_t, (peak - base) / rows_t + log_norm), dim=-1)


def definition(logits: Tensor, ids: Tensor, keep: Tensor, transform: Transform) -> Tensor:
    """Define the buckets (N, k + 1) of logits (..., V); 0 where a row is not kept, whatever it
    holds.
    """
    rows_t = transform.flat(logits.dtype).of_rows
    x = torch.where(keep.unsqueeze(-1), logits.reshape(-1, logits.shape[-1]), 0.0)
    rows_t = torch.where(keep, rows_t, 1.0) if isinstance(rows_t, Tensor) else rows_t
    buckets, *_ = buckets_of_rows(
        x, ids, temperature=rows_t, softcap=transform.softcap, scale=transform.scale
    )
    return torch.where(keep.unsqueeze(-1), buckets, 0.0)


def bucket_logits(
    logits: Tensor,
    ids: Tensor,
    keep: Tensor,
    transform: Transform,
    *,
    inplace_backward: bool = False,
    impl: str,
) -> Buckets:
    """Compute the buckets (N, k + 1) of logits (..., V), differentiably; and peak and log_norm (N,)
    of the other words, which `write_bucket_gradient` needs.

    Args:
        ids: (N, k) int64, increasing in each row; V for a missing word.
        keep: (N,) bool; where it is False nothing is read, and buckets are 0.
        inplace_backward: let the backward overwrite the logits with their gradient.
    """
    return torch.ops.fastrlhf.bucket_logits(logits, ids, keep, *transform, inplace_backward, impl)


@torch.library.custom_op("fastrlhf::bucket_logits", mutates_args=())
def _forward(
    logits: Tensor,
    ids: Tensor,
    keep: Tensor,
    token_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
    inplace_backward: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(logits.dtype)
    buckets = torch.zeros(keep.shape[0], ids.shape[1] + 1, dtype=acc, device=logits.device)
    peak, log_norm = torch.full_like(buckets[:, 0], -torch.inf), torch.zeros_like(buckets[:, 0])
    check_temperatures_on_host(token_temperature, keep.view(logits.shape[:-1]))
    temperatures = flat_temperature(token_temperature, temperature, acc)
    if keep.numel() == 0:
        return buckets, peak, log_norm
    rows = rows_of(logits)
    options: dict[str, Any] = {"softcap": softcap, "scale": scale}
    if backend_of(impl, logits, logits.numel()) == "triton":
        return _by_kernel(rows, ids, keep, temperatures, options)
    for some in runs_or_chunks(keep, rows):
        parts = buckets_of_rows(
            take_rows(rows, some), ids[some], temperature=of_rows(temperatures, some), **options
        )
        for whole, part in zip((buckets, peak, log_norm), parts, strict=True):
            whole[some] = part
    return buckets, peak, log_norm


def _by_kernel(
    rows: Tensor,
    ids: Tensor,
    keep: Tensor,
    temperatures: float | Tensor,
    options: dict[str, Any],
) -> Buckets:
    from fastrlhf.kernels.token_stats import RowQuestion, token_stats_message

    targets = torch.where(keep, NOT_HERE, IGNORED)
    question = RowQuestion(
        targets, temperatures, **options, ignore_index=IGNORED, entropy=False,
        left_out=ids.int().contiguous(),
    )  # fmt: skip
    peak, rest, _ = token_stats_message(rows, question)
    log_norm = rest.log()
    words = capped_logits(_taken(rows, ids, keep, -torch.inf), **options)
    words = torch.where(_are_there(ids, keep, rows), words, -torch.inf)
    rows_t = temperatures.unsqueeze(-1) if isinstance(temperatures, Tensor) else temperatures
    buckets = _relative(words, peak.unsqueeze(-1), log_norm.unsqueeze(-1), rows_t)
    kept = keep.unsqueeze(-1)
    return torch.where(kept, buckets, 0.0), peak, torch.where(keep, log_norm, 0.0)


@_forward.register_fake
def _forward_fake(logits, ids, keep, *_):
    acc = accumulation_dtype(logits.dtype)
    buckets = logits.new_empty((keep.shape[0], ids.shape[1] + 1), dtype=acc)
    return buckets, buckets.new_empty(keep.shape), buckets.new_empty(keep.shape)


def _are_there(ids: Tensor, keep: Tensor, rows: Tensor) -> Tensor:
    return (ids < rows.shape[-1]) & keep.unsqueeze(-1)


def _taken(rows: Tensor, ids: Tensor, keep: Tensor, other: float) -> Tensor:
    """Take the logits (N, k) of words out of rows (outer, inner, V), in the accumulation dtype;
    `other` stands in for those that are missing.
    """
    index = ids.clamp(max=rows.shape[-1] - 1).view(*rows.shape[:2], -1)
    taken = rows.gather(-1, index).view(ids.shape).to(accumulation_dtype(rows.dtype))
    return torch.where(_are_there(ids, keep, rows), taken, other)


def write_bucket_gradient(
    d_logits: Tensor,
    logits: Tensor,
    ids: Tensor,
    keep: Tensor,
    stats: tuple[Tensor, Tensor],
    d_buckets: Tensor,
    transform: Transform,
    impl: str,
) -> None:
    """Write the gradient into all of d_logits (..., V), given the gradient of the buckets, and peak
    and log_norm of the other words. d_logits may be the logits themselves; otherwise it may have
    any floating dtype.

    All columns are written first as if all were other words, through their log-sum-exp; then those
    of the k words are overwritten with the words' own gradients.
    """
    d_words = _gradient_of_words(rows_of(logits), ids, keep, d_buckets, transform)
    nothing = torch.zeros_like(stats[0])
    targets = torch.full_like(keep, NOT_HERE, dtype=torch.int64).view(logits.shape[:-1])
    arguments = (
        logits, targets, nothing, nothing[:0], *stats, nothing, None, *transform, impl,
        d_buckets[:, -1].contiguous(),
    )  # fmt: skip
    if d_logits is logits:
        torch.ops.fastrlhf.token_stats_backward_(*arguments)
    else:
        torch.ops.fastrlhf.token_stats_backward_into(d_logits, *arguments)
    _put(d_logits, ids, keep, d_words)


def _gradient_of_words(
    rows: Tensor, ids: Tensor, keep: Tensor, d_buckets: Tensor, transform: Transform
) -> Tensor:
    """Compute the gradient (N, k) of the logits of words."""
    slopes = d_buckets[:, :-1] * transform.scale
    if transform.softcap is not None:
        x = _taken(rows, ids, keep, 0.0)
        slopes = slopes * cap_slope(x, transform.softcap, transform.scale)
    rows_t = transform.flat(rows.dtype).of_rows
    slopes = slopes / (rows_t.unsqueeze(-1) if isinstance(rows_t, Tensor) else rows_t)
    return torch.where(_are_there(ids, keep, rows), slopes, 0.0)


def _put(d_logits: Tensor, ids: Tensor, keep: Tensor, d_words: Tensor) -> None:
    """Put the gradients of words into their columns. All k are written: a missing word repeats the
    first word of its row with its gradient, or in a row without words writes a 0 into column 0,
    whose gradient is 0 then.
    """
    rows = rows_of(d_logits)
    there = _are_there(ids, keep, rows)
    index = torch.where(there, ids, torch.where(there[:, :1], ids[:, :1], 0))
    values = torch.where(there, d_words, d_words[:, :1])
    shape = (*rows.shape[:2], -1)
    rows.scatter_(-1, index.view(shape), values.to(rows.dtype).view(shape))


def _setup_context(ctx, inputs, output):
    logits, ids, keep, token_temperature, *options = inputs
    ctx.save_for_backward(logits, ids, keep, token_temperature, *output[1:])
    ctx.options = options


def _autograd(ctx, d_buckets, *_):
    logits, ids, keep, token_temperature, *stats = ctx.saved_tensors
    *numbers, inplace, impl = ctx.options
    transform = Transform(token_temperature, *numbers)
    if torch.is_grad_enabled() or under_transform(d_buckets):
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            view = logits.view_as(logits)
            buckets = definition(view, ids, keep, transform)
        d_logits = torch.autograd.grad(buckets, view, d_buckets, create_graph=again)[0]
    else:
        inplace = inplace and can_overwrite(logits)
        d_logits = logits if inplace else torch.empty_like(
            logits, memory_format=torch.contiguous_format
        )  # fmt: skip
        if logits.numel():
            write_bucket_gradient(
                d_logits, logits, ids, keep, (stats[0], stats[1]), d_buckets, transform, impl
            )
        d_logits = d_logits.detach()
    return d_logits, *(None for _ in range(len(ctx.options) + 3))


_forward.register_autograd(_autograd, setup_context=_setup_context)
