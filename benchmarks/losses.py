"""The losses that are benchmarked, from log-probs: as trainers write them, and by this library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from batch import Batch
from torch import Tensor

import fastrlhf

BETA, CLIP = 0.1, 0.2


def dpo(logprobs: Tensor, batch: Batch) -> Tensor:
    """Compute DPO's mean loss. The reference's log-probs are taken as 0, which changes no cost."""
    chosen, rejected = (logprobs * batch.mask).sum(-1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the indices of the chosen and of the rejected sequences."""
    count = batch.shape.sequences
    chosen, rejected = torch.arange(count, device=batch.targets.device).chunk(2)
    return chosen, rejected


def fused_dpo(logprobs: Tensor, batch: Batch) -> Tensor:
    """Compute the loss of `dpo` with this library."""
    ref = logprobs.new_zeros(batch.shape.sequences)
    return fastrlhf.dpo_loss(logprobs, ref, *pairs(batch), BETA, mask=batch.mask)[0].mean()


def clipped(logprobs: Tensor, batch: Batch) -> Tensor:
    """Compute the clipped loss of PPO and GRPO, as a mean over tokens."""
    ratio, advantages = (logprobs - batch.old).exp(), batch.advantages[:, None]
    losses = -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return (losses * batch.mask).sum() / batch.mask.sum()


def fused_clipped(logprobs: Tensor, batch: Batch) -> Tensor:
    """Compute the loss of `clipped` with this library."""
    return fastrlhf.ppo_loss(logprobs, batch.old, batch.advantages, batch.mask)[0]


def nll(logprobs: Tensor, batch: Batch) -> Tensor:
    """Compute the cross-entropy, as a mean over tokens."""
    return -(logprobs * batch.mask).sum() / batch.mask.sum()
