"""The losses that are benchmarked, as a trainer writes them in plain PyTorch from log-probs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from batch import Batch
from torch import Tensor

import fastrlhf

BETA, CLIP = 0.1, 0.2


def dpo(logprobs: Tensor, batch: Batch) -> Tensor:
    """DPO's mean loss; the reference's log-probs are taken as 0, which changes no cost."""
    chosen, rejected = (logprobs * batch.mask).sum(-1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """Indices of the chosen and of the rejected sequences."""
    count = batch.shape.sequences
    chosen, rejected = torch.arange(count, device=batch.targets.device).chunk(2)
    return chosen, rejected


def fused_dpo(logprobs: Tensor, batch: Batch) -> Tensor:
    """The same by this library."""
    ref = logprobs.new_zeros(batch.shape.sequences)
    return fastrlhf.dpo_loss(logprobs, ref, *pairs(batch), BETA, mask=batch.mask)[0].mean()


def clipped(logprobs: Tensor, batch: Batch) -> Tensor:
    """PPO's and GRPO's clipped loss, the mean over tokens."""
    ratio, advantages = (logprobs - batch.old).exp(), batch.advantages[:, None]
    losses = -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return (losses * batch.mask).sum() / batch.mask.sum()


def fused_clipped(logprobs: Tensor, batch: Batch) -> Tensor:
    """The same by this library."""
    return fastrlhf.ppo_loss(logprobs, batch.old, batch.advantages, batch.mask)[0]


def nll(logprobs: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy, the mean over tokens."""
    return -(logprobs * batch.mask).sum() / batch.mask.sum()
