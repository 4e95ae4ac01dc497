"""Row work of `kl_divergence` in eager PyTorch.

Launchers take the logits of both sides as (outer, inner, V), and work on a bounded number of rows
at a time. The forward has the arguments of its namesake in `kernels/divergence.py`. The backward is
told by `of_p` with respect to which side it differentiates; `divergence.py` says what the kernel's
backward takes instead.

Dims: N rows, V vocabulary.
"""

import torch
from torch import Tensor

from fastrlhf import reference

from .eager_rows import chunks, copied_rows
from .rows import of_rows, zero_inactive


def wider(logits_p: Tensor, logits_q: Tensor) -> torch.dtype:
    """Return the dtype in which the divergence of two sides is computed."""
    return reference.accumulation_dtype(torch.promote_types(logits_p.dtype, logits_q.dtype))


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
    """Compute values (N,) and statistics (6, N), 0 where the mask is 0."""
    values, stats = no_divergence(logits_p, logits_q, mask)
    for index in chunks(mask, logits_p.shape[2]):
        values[index], *of_chunk = reference.divergence_and_stats(
            copied_rows(logits_p, index), copied_rows(logits_q, index),
            temperature=of_rows(temperature, index), share=share, softcap=softcap, scale=scale,
        )  # fmt: skip
        stats[:, index] = torch.stack(of_chunk)
    return values, stats


def no_divergence(logits_p: Tensor, logits_q: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Make values (N,) and statistics (6, N) of zeros, as they are where the mask is 0; the caller
    overwrites those of the other rows.
    """
    values = torch.zeros(mask.numel(), dtype=wider(logits_p, logits_q), device=mask.device)
    return values, values.new_zeros(len(reference.DivergenceStats._fields), mask.numel())


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
    """Write the gradient with respect to one side into all of d_own (N, V)."""
    active = mask & (d_values != 0)
    zero_inactive(d_own, active)
    for index in chunks(active, own.shape[2]):
        d_own[index] = reference.divergence_backward(
            copied_rows(own, index), copied_rows(other, index), d_values[index],
            of_p=of_p, share=share, stats=stats[:, index],
            temperature=of_rows(temperature, index), softcap=softcap, scale=scale,
        ).to(d_own.dtype)  # fmt: skip
