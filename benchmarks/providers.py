"""Who computes token log-probs: this library, PyTorch as trainers write it, its compiler, and
TRL.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastrlhf

TokenLogprobs = Callable[[Tensor, Tensor], Tensor]


def fused(logits: Tensor, targets: Tensor) -> Tensor:
    return fastrlhf.token_logprobs(logits, targets)


def fused_inplace(logits: Tensor, targets: Tensor) -> Tensor:
    # Through a view, so that a leaf stands for the output of a head.
    return fastrlhf.token_logprobs(logits.view_as(logits), targets, inplace_backward=True)


def eager(logits: Tensor, targets: Tensor) -> Tensor:
    live = targets != -100
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, torch.where(live, targets, 0)[..., None])[..., 0] * live


def compiled() -> TokenLogprobs:
    return torch.compile(eager, dynamic=False)


def trl() -> TokenLogprobs:
    selective_log_softmax = pytest.importorskip("trl.trainer.utils").selective_log_softmax

    def selected(logits: Tensor, targets: Tensor) -> Tensor:
        live = targets != -100
        return selective_log_softmax(logits, torch.where(live, targets, 0)) * live

    return selected


# Made when asked for, since some need an optional package or a compiler.
TOKEN_LOGPROBS: dict[str, Callable[[], TokenLogprobs]] = {
    "fastrlhf": lambda: fused,
    "fastrlhf in place": lambda: fused_inplace,
    "eager": lambda: eager,
    "torch.compile": compiled,
    "trl": trl,
}


# Loss of logits, targets, old log-probs, advantages and a mask, all (B, T) but the logits.
PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def ppo_one_launch(logits: Tensor, targets, old, advantages, mask) -> Tensor:
    return fastrlhf.logits_policy_loss(logits, targets, old, advantages, mask)[0]


def ppo_one_launch_inplace(logits: Tensor, targets, old, advantages, mask) -> Tensor:
    # Through a view, so that a leaf stands for the output of a head.
    return fastrlhf.logits_policy_loss(
        logits.view_as(logits), targets, old, advantages, mask, inplace_backward=True
    )[0]


def ppo_two_steps(logits: Tensor, targets, old, advantages, mask) -> Tensor:
    logprobs = fastrlhf.token_logprobs(logits, torch.where(mask, targets, -100))
    return fastrlhf.ppo_loss(logprobs, old, advantages, mask)[0]


def ppo_eager(logits: Tensor, targets, old, advantages, mask) -> Tensor:
    logprobs = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    ratio = (logprobs - old).exp()
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return (losses * mask).sum() / mask.sum()


PPO_FROM_LOGITS: dict[str, Callable[[], PolicyLoss]] = {
    "fastrlhf": lambda: ppo_one_launch,
    "fastrlhf in place": lambda: ppo_one_launch_inplace,
    "fastrlhf in two steps": lambda: ppo_two_steps,
    "eager": lambda: ppo_eager,
    "torch.compile": lambda: torch.compile(ppo_eager, dynamic=False),
}


def dpo_from_tokens(name: str) -> Callable[..., Tensor]:
    """Mean DPO loss from token log-probs, a mask and reference sums, by a provider's name."""

    def plain(logprobs: Tensor, mask: Tensor, ref: Tensor) -> Tensor:
        score = (logprobs * mask).sum(-1) - ref
        chosen, rejected = score.chunk(2)
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()

    def ours(logprobs: Tensor, mask: Tensor, ref: Tensor) -> Tensor:
        chosen, rejected = torch.arange(len(ref), device=ref.device).chunk(2)
        return fastrlhf.dpo_loss(logprobs, ref, chosen, rejected, mask=mask)[0].mean()

    return {"fastrlhf": ours, "eager": plain, "torch.compile": torch.compile(plain)}[name]
