"""The fused DPO loss beside the one that trainers write, on the same logits."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from fastrlhf import dpo_loss, token_logprobs

from .memory import peak_memory
from .preference import Batch, model_logits


class Comparison(NamedTuple):
    """Both losses, their largest differences, and the bytes that each held, the logits included."""

    shape: tuple[int, ...]  # of the logits: (B, T, V)
    dtype: str
    fused_loss: float
    plain_loss: float
    loss_difference: float
    fused_gradient: float  # the largest |d loss / d logits|
    plain_gradient: float
    gradient_difference: float  # the largest absolute difference of the two
    logits_bytes: int
    fused_bytes: int
    plain_bytes: int


def fused_loss(logits: Tensor, batch: Batch, reference: Tensor, beta: float) -> Tensor:
    """Compute the mean DPO loss with the operations of this package."""
    logprobs = token_logprobs(logits, batch.targets, inplace_backward=True)
    mask = batch.targets != -100
    losses, _ = dpo_loss(logprobs, reference, batch.chosen, batch.rejected, beta, mask=mask)
    return losses.mean()


def plain_loss(logits: Tensor, batch: Batch, reference: Tensor, beta: float) -> Tensor:
    """Compute the mean DPO loss in plain PyTorch, as trainers write it."""
    mask = batch.targets != -100
    targets = batch.targets.masked_fill(~mask, 0)
    logprobs = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    log_ratios = (logprobs * mask).sum(-1) - reference
    margins = log_ratios[batch.chosen] - log_ratios[batch.rejected]
    return -F.logsigmoid(beta * margins).mean()


def compare(model: PeftModel, batch: Batch, reference: Tensor, beta: float) -> Comparison:
    """Run both losses forward and backward from the same logits, and measure what they need."""
    with torch.no_grad():
        logits = model_logits(model, batch)

    def measure(loss_fn: Callable[..., Tensor]) -> tuple[float, Tensor, int]:
        leaf = logits.clone().requires_grad_()
        work = partial(_forward_backward, loss_fn, leaf, batch, reference, beta)
        (loss, gradient), peak = peak_memory(work, logits.device)
        return loss, gradient, peak + logits.nbytes

    # The first runs also pay for what is set up once: workspaces, compiled kernels.
    measure(fused_loss)
    measure(plain_loss)
    fused, fused_gradient, fused_bytes = measure(fused_loss)
    plain, plain_gradient, plain_bytes = measure(plain_loss)
    return Comparison(
        shape=tuple(logits.shape),
        dtype=str(logits.dtype).removeprefix("torch."),
        fused_loss=fused,
        plain_loss=plain,
        loss_difference=abs(fused - plain),
        fused_gradient=fused_gradient.abs().max().item(),
        plain_gradient=plain_gradient.abs().max().item(),
        gradient_difference=(fused_gradient - plain_gradient).abs().max().item(),
        logits_bytes=logits.nbytes,
        fused_bytes=fused_bytes,
        plain_bytes=plain_bytes,
    )


def _forward_backward(
    loss_fn: Callable[..., Tensor], logits: Tensor, batch: Batch, reference: Tensor, beta: float
) -> tuple[float, Tensor]:
    loss = loss_fn(logits, batch, reference, beta)
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad
