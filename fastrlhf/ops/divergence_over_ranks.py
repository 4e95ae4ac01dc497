"""Divergences of tokens whose logits are spread over ranks, each with a part of the vocabulary.

The kernel of `kl_divergence` passes twice over both rows; here there is an all-gather after each
pass. The first is of the largest logit and the sum of exponentials of each side, which give the
normalisers. The second is of the sums of the divergence's terms over a rank's columns, which need
the normalisers. Each rank sends 28 bytes a token in fp32, and sums are added in the order of ranks.
Given these sums, the gradient of the logits needs nothing from other ranks.

Dims: N rows, V columns of this rank, W ranks.
"""

import torch
from torch import Tensor

from fastrlhf import reference

from .backend import use_triton, wanted_or_detached
from .divergence import Measure, divergence_backward_into
from .eager_divergence import wider
from .eager_rows import chunks, copied_rows
from .ranks import (
    gathered,
    refuse_derivatives_of_ranks,
    refuse_transforms_of_ranks,
    summed,
)
from .rows import of_rows, rows_of
from .sharded import LogitsPart
from .transform import Transform, check_temperatures_on_host, flat_temperature
from .vocabulary_part import IGNORED, NOT_HERE, VocabularyPart, numbered


def kl_divergence_over_ranks(
    own: LogitsPart,
    ref_logits: Tensor,
    mask: Tensor,
    transform: Transform,
    measure: Measure,
    impl: str,
) -> Tensor:
    """Compute `kl_divergence` of checked logits (..., V) whose other columns are on other ranks."""
    refuse_transforms_of_ranks("kl_divergence")
    question = (use_triton(impl, own.logits), measure.swapped, measure.share is not None)
    asked = numbered(question, wider(own.logits, ref_logits), *transform[1:], measure.share)
    part = own.agreed(mask, asked, transform.token_temperature)
    sides = (ref_logits, own.logits) if measure.swapped else (own.logits, ref_logits)
    values = _DivergenceOverRanks.apply(
        *wanted_or_detached(*sides), mask, transform.token_temperature, transform, measure.share,
        part, impl,
    )  # fmt: skip
    return values.view(mask.shape)


class _DivergenceOverRanks(torch.autograd.Function):
    """Values (N,) of logits (..., V) of p and of q, differentiable with respect to both."""

    @staticmethod
    def forward(ctx, logits_p, logits_q, mask, token_temperature, transform, share, part, impl):
        values, stats = divergence_over_ranks(
            logits_p, logits_q, mask, transform, share, part, impl
        )
        ctx.save_for_backward(logits_p, logits_q, mask, token_temperature, stats)
        ctx.options = transform, share, impl
        return values

    @staticmethod
    def backward(ctx, d_values):
        refuse_derivatives_of_ranks("kl_divergence", d_values)
        logits_p, logits_q, mask, _, stats = ctx.saved_tensors
        transform, share, impl = ctx.options
        gradients: list[Tensor | None] = [None, None]
        for i, x in enumerate((logits_p, logits_q)):
            if ctx.needs_input_grad[i]:
                gradients[i] = d_own = torch.empty_like(x, memory_format=torch.contiguous_format)
                divergence_backward_into(
                    d_own, logits_p, logits_q, mask, stats, d_values, transform, share, i == 0, impl
                )
        return *gradients, *(None,) * 6


def divergence_over_ranks(
    logits_p: Tensor,
    logits_q: Tensor,
    mask: Tensor,
    transform: Transform,
    share: float | None,
    part: VocabularyPart,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Compute the values (N,), and the statistics (6, N) that `divergence_backward_into` takes, for
    logits (..., V) whose other columns are on other ranks; without a gradient.
    """
    acc, keep = wider(logits_p, logits_q), mask.reshape(-1).contiguous()
    check_temperatures_on_host(transform.token_temperature, mask)
    temperature = flat_temperature(transform.token_temperature, transform.temperature, acc)
    sides, cap = (logits_p, logits_q), (transform.softcap, transform.scale)
    triton = use_triton(impl, logits_p) and part.size > 0
    peaks_and_rests = torch.cat([_parts(x, keep, temperature, cap, acc, triton) for x in sides])
    of_ranks = gathered(peaks_and_rests, part.group)  # (W, 4, N)
    norms = torch.cat([_norm(of_ranks[:, i : i + 2], temperature) for i in (0, 2)])
    norms = torch.where(keep, norms, 0.0)
    own = norms.new_zeros(4, keep.numel())
    if triton and keep.numel():
        from fastrlhf.kernels.divergence import divergence_sums

        own = divergence_sums(
            rows_of(logits_p), rows_of(logits_q), keep, norms, share=share, temperature=temperature,
            softcap=transform.softcap, scale=transform.scale,
        )  # fmt: skip
    elif part.size:
        for rows in chunks(keep, part.size):
            sums_of_rows = reference.divergence_sums(
                copied_rows(logits_p, rows), copied_rows(logits_q, rows),
                ((norms[0, rows], norms[1, rows]), (norms[3, rows], norms[4, rows])),
                share=share, temperature=of_rows(temperature, rows), softcap=transform.softcap,
                scale=transform.scale,
            )  # fmt: skip
            own[:, rows] = torch.stack(sums_of_rows)
    # Without a mixture, the mean log-ratio of q equals that of p, and is not sent.
    sums = summed(own if share is not None else own[:3], part.group)
    p_is_empty, q_is_empty = (norms[i] == -torch.inf for i in (0, 3))
    values = reference.of_sums_of_terms(sums[0], sums[1], p_is_empty, q_is_empty, share)
    stats = reference.DivergenceStats(norms[0], norms[1], norms[3], norms[4], sums[2], sums[-1])
    return torch.where(keep, values, 0.0), torch.stack(stats)


def _parts(
    logits: Tensor,
    keep: Tensor,
    temperature: float | Tensor,
    cap: tuple[float | None, float],
    acc: torch.dtype,
    triton: bool,
) -> Tensor:
    """Compute peak and Σ e^(z - peak) (2, N) of this rank's columns of the rows that count."""
    nothing = torch.stack(
        [logits.new_full(keep.shape, x, dtype=acc) for x in (-torch.inf, 0.0)]
    )  # fmt: skip
    if logits.shape[-1] == 0 or not keep.numel():
        return nothing
    softcap, scale = cap
    if acc == torch.float64:  # the other side may be in fp64, and the kernel is given this one only
        logits = logits.to(acc)
    if triton:
        from fastrlhf.kernels.token_stats import RowQuestion, token_stats_message

        nowhere = torch.where(keep, NOT_HERE, IGNORED)
        question = RowQuestion(nowhere, temperature, softcap, scale, IGNORED, False)
        return torch.where(keep, token_stats_message(rows_of(logits), question)[:2], nothing)
    for rows in chunks(keep, logits.shape[-1]):
        parts = reference.row_parts(
            copied_rows(logits, rows).to(acc), torch.full_like(rows, NOT_HERE),
            temperature=of_rows(temperature, rows), softcap=softcap, scale=scale, entropy=False,
        )  # fmt: skip
        nothing[0, rows], nothing[1, rows] = parts.peak, parts.rest
    return nothing


def _norm(of_ranks: Tensor, temperature: float | Tensor) -> Tensor:
    """Compute peak, log_norm and e^log_norm (3, N) of whole rows from all ranks' peaks and sums
    (W, 2, N).
    """
    peak, shift = reference.merged_peaks(of_ranks[:, 0], temperature)
    rest = (of_ranks[:, 1] * shift.exp()).sum(0)
    return torch.stack((peak, rest.log(), rest))
