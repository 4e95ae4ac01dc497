"""Batches of dpo_loss, of sums and of tokens, and their comparison with the formulas of the
papers.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf import dpo_loss
from support.preference_formulas import (
    GRADIENT_RTOL,
    LOSS_TYPES,
    Expectation,
    expected_dpo,
    expected_rewards,
)

MARGIN_TYPES = ["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm"]  # those with a kernel
AVERAGED_TYPES = ["ipo", "sigmoid_norm"]
SMOOTHED_TYPES = ["sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"]
IMPLS = ["eager", "triton"]

WITH_IMPL = [(name, impl) for name in LOSS_TYPES for impl in IMPLS if name in MARGIN_TYPES] + [
    (name, "eager") for name in LOSS_TYPES if name not in MARGIN_TYPES
]


class Batch(NamedTuple):
    """Arguments of dpo_loss, (B,) sums without a mask, tokens (B, T) with one."""

    pi_logps: Tensor
    ref_logps: Tensor
    yw_idxs: Tensor
    yl_idxs: Tensor
    mask: Tensor | None = None
    lengths: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        return Batch(*(None if x is None else x.to(device) for x in self))

    def loss(self, **options: Any) -> tuple[Tensor, Tensor]:
        """Losses and rewards of the batch."""
        pi, ref, yw, yl, mask, lengths = self
        return dpo_loss(pi, ref, yw, yl, mask=mask, lengths=lengths, **options)

    def expected(self, **options: Any) -> Expectation:
        """What the losses must be."""
        pi, ref, yw, yl, mask, lengths = self
        return expected_dpo(pi, ref, yw, yl, mask=mask, lengths=lengths, **options)

    def expected_rewards(self, beta: float = 0.1) -> Expectation:
        """What the rewards must be."""
        return expected_rewards(self.pi_logps, self.ref_logps, beta, self.mask)


def pairs_batch(dtype: torch.dtype, device: torch.device | str = "cpu") -> Batch:
    """Sums of 7 sequences; some in several pairs, one pair twice, sequence 6 in none."""
    ref = -60 * torch.rand(7, dtype=torch.float64)
    pi = ref + 6 * torch.randn(7, dtype=torch.float64)
    lengths = torch.tensor([3, 7, 1, 12, 9, 30, 5], device=device)
    yw = torch.tensor([0, 1, 2, 4, 0, 1], device=device)
    yl = torch.tensor([3, 0, 5, 3, 3, 0], device=device)
    return Batch(
        pi.to(device, dtype).requires_grad_(),
        ref.to(device, dtype).requires_grad_(),
        yw,
        yl,
        lengths=lengths,
    )


def tokens_batch(
    tokens: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    *,
    ref_per_token: bool = True,
    garbage: float = math.nan,
    mask_dtype: torch.dtype = torch.bool,
) -> Batch:
    """Token log-probs of 6 sequences with garbage outside the mask; sequence 4 is masked
    altogether, sequence 5 in no pair.
    """
    generator = torch.Generator().manual_seed(tokens)
    # Sums of the order of one, so that every slope counts.
    scale = tokens**-0.5
    pi = -scale * torch.rand(6, tokens, dtype=torch.float64, generator=generator)
    ref = pi + 0.5 * scale * torch.randn(6, tokens, dtype=torch.float64, generator=generator)
    mask = torch.rand(6, tokens, generator=generator) < 0.7
    mask[:, 0], mask[4] = True, False
    pi = torch.where(mask, pi, garbage)
    ref = torch.where(mask, ref, garbage) if ref_per_token else torch.where(mask, ref, 0.0).sum(-1)
    return Batch(
        pi.to(device, dtype).requires_grad_(),
        ref.to(device, dtype).requires_grad_(),
        torch.tensor([0, 1, 2, 0, 4], device=device),
        torch.tensor([1, 2, 3, 3, 0], device=device),
        mask.to(device, mask_dtype),
    )


def gradients(
    batch: Batch, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, rewards and the gradients of policy and reference."""
    losses, rewards = batch.loss(**options)
    upstream = torch.ones_like(losses) if upstream is None else upstream
    return (
        losses,
        rewards,
        *torch.autograd.grad(losses, (batch.pi_logps, batch.ref_logps), upstream),
    )


def of_sums(d_tokens: Tensor, mask: Tensor | None, dead: list[int]) -> Tensor:
    """The gradient of each sum, after checking that every kept token carries it and no other.

    A sequence without tokens carries none; its place is filled with NaN and listed in `dead`.
    """
    if d_tokens.ndim == 1:
        return d_tokens
    assert mask is not None
    keep = mask != 0
    assert (d_tokens[~keep] == 0).all()
    values = []
    for i, (row, kept) in enumerate(zip(d_tokens, keep, strict=True)):
        if not kept.any():
            dead.append(i)
        assert len(row[kept].unique()) <= 1
        values.append(row[kept][0] if kept.any() else row.new_tensor(math.nan))
    return torch.stack(values)


def assert_right(
    batch: Batch, *, impl: str, upstream: Tensor | None = None, **options: Any
) -> None:
    """Compare losses, rewards and all gradients with the oracle."""
    losses, rewards, d_pi, d_ref = gradients(batch, upstream, impl=impl, **options)
    accumulated = torch.promote_types(batch.pi_logps.dtype, torch.float32)
    assert (losses.dtype, rewards.dtype) == (accumulated, accumulated)
    assert (d_pi.dtype, d_ref.dtype) == (batch.pi_logps.dtype, batch.ref_logps.dtype)
    beta, loss_type = options.get("beta", 0.1), options.get("loss_type", "sigmoid")
    expected = batch.expected(**options)
    expected.assert_losses(losses, floor=float(loss_type == "exo_pair"))
    batch.expected_rewards(beta).assert_losses(rewards)
    assert not rewards.requires_grad
    dead: list[int] = []
    found = [of_sums(d_pi, batch.mask, dead), of_sums(d_ref, batch.mask, [])]
    live = [
        (i, j, len(expected.jacobian) // 2)
        for i in range(len(found[0]))
        for j in (0, 1)
        if i not in dead or (batch.ref_logps.ndim == 1 and j == 1)
    ]
    rows = [expected.jacobian[i + j * half] for j in (0, 1) for i, k, half in live if k == j]
    values = [torch.stack([found[j][i] for i, k, _ in live if k == j]) for j in (0, 1)]
    expected.jacobian = rows
    expected.assert_gradients(
        *values,
        weights=None if upstream is None else upstream.tolist(),
        rtol=gradient_rtol(batch.pi_logps.dtype, loss_type),
        floor=beta if cancels(loss_type, options.get("label_smoothing", 0.0)) else 0.0,
    )


def cancels(loss_type: str, label_smoothing: float) -> bool:
    """Whether the slope is a difference of terms of the order of beta, so that its last digits are
    those of the terms.
    """
    smoothed = loss_type in SMOOTHED_TYPES and label_smoothing > 0
    # aot sorts the reference alone as well, and what it adds up for that cancels.
    return smoothed or loss_type in ("exo_pair", "apo_zero", "apo_down", "aot")


def gradient_rtol(dtype: torch.dtype, loss_type: str) -> float:
    """The gate of discopop multiplies the rounding error of the margin by 1/τ = 20."""
    return GRADIENT_RTOL[dtype] * (20 if loss_type == "discopop" else 1)
