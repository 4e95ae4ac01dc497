"""The formulas in plain PyTorch, as trainers write them: in fp64, or in fp32 from other dtypes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokens import Tokens

BETA, CLIP, SOFTCAP = 0.1, 0.2, 30.0


def log_softmax(
    logits: Tensor, temperature: float | Tensor = 1.0, softcap: float | None = None
) -> Tensor:
    """Compute log-probs (..., V) of logits with a softcap and a temperature."""
    z = wide(logits)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None]
    return (z / temperature).log_softmax(-1)


def wide(logits: Tensor) -> Tensor:
    """Convert to fp32, except for fp64, which stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def logprobs(log_p: Tensor, tokens: Tokens) -> Tensor:
    """Select the log-probs of the targets; 0 where there is no target."""
    return log_p.gather(-1, tokens.picked)[..., 0] * tokens.live


def entropy(log_p: Tensor) -> Tensor:
    """Compute the entropy in nats, with 0·ln 0 = 0."""
    return -(log_p.exp() * log_p.masked_fill(log_p.isinf(), 0.0)).sum(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute KL(p‖q). Terms with p = 0 are 0."""
    return (log_p.exp() * (log_p - log_q).masked_fill(log_p.isinf(), 0.0)).sum(-1)


def divergence(log_p: Tensor, log_q: Tensor, direction: str, beta: float) -> Tensor:
    """Compute a divergence between the policy p and the reference q."""
    if direction == "reverse":
        return kl(log_p, log_q)
    if direction == "forward":
        return kl(log_q, log_p)
    mixture = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return beta * kl(log_q, mixture) + (1 - beta) * kl(log_p, mixture)


def clipped(logp: Tensor, tokens: Tokens) -> Tensor:
    """Compute PPO's clipped loss of each token."""
    ratio, advantages = (logp - tokens.old).exp(), tokens.advantages[:, None]
    return -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)


def divergence_clipped(logp: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Compute DPPO's loss of each token, and the ratio."""
    ratio, advantages = (logp - tokens.old).exp(), tokens.advantages[:, None]
    moved = logp.detach().exp() - tokens.old.exp()
    gone = torch.where(advantages > 0, moved > CLIP, moved < -CLIP)
    return torch.where(gone, 0.0, -ratio * advantages), ratio


def k3(logp: Tensor, tokens: Tokens) -> Tensor:
    """Compute k3, the estimator of the KL to the reference that is never negative."""
    ratio = tokens.ref - logp
    return ratio.exp() - 1 - ratio


def mean(values: Tensor, tokens: Tokens) -> Tensor:
    """Average values over the tokens with a target."""
    return (values * tokens.live).sum() / tokens.live.sum()


def dpo(logp: Tensor, tokens: Tokens) -> Tensor:
    """Compute DPO's mean loss, with the first half of the sequences chosen over the second."""
    chosen, rejected = (logp * tokens.live).sum(-1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()
