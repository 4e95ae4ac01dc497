"""Training and evaluation loops on a model's logits, as people write them in plain PyTorch.

None of them uses this library. `bench_lazy_logits.py` times each unchanged, and within
`fastrlhf.lazy_logits`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from batch import IGNORED
from model_step import Step, clipped_loss, dpo_loss, logits_of
from torch import Tensor
from trainer_step import TrainerStep

TEMPERATURE = 0.9
ENTROPY_BONUS = 0.01
_SHARPER = 2.0  # factor by which the teacher is more certain than the student


@dataclass(frozen=True)
class Evaluated(TrainerStep):
    """A step of an evaluation, in which nothing is trained."""

    def gradients(self) -> dict[str, Tensor | None]:
        return {}


def _sft_by_labels(step: TrainerStep) -> Tensor:
    return step.model(
        input_ids=step.ids, attention_mask=step.attention, labels=step.labels, use_cache=False
    ).loss  # fmt: skip


def _sft_by_hand(step: TrainerStep) -> Tensor:
    logits = logits_of(step)
    shifted, labels = logits[..., :-1, :].contiguous(), step.targets.contiguous()
    vocab = shifted.shape[-1]
    return F.cross_entropy(shifted.view(-1, vocab), labels.view(-1), ignore_index=IGNORED)


def _logprobs(logits: Tensor, step: Step) -> Tensor:
    found = logits[:, :-1].float().log_softmax(-1)
    return found.gather(-1, step.ids[:, 1:, None]).squeeze(-1) * step.mask[:, 1:]


def _dpo(step: TrainerStep) -> Tensor:
    return dpo_loss(_logprobs(logits_of(step), step), step)


def _chosen_and_entropy(step: TrainerStep) -> tuple[Tensor, Callable[[], Tensor]]:
    """Return log-probs at a temperature, and a function that computes each token's entropy."""
    logits = logits_of(step)[:, :-1] / TEMPERATURE
    chosen = logits.gather(-1, step.ids[:, 1:, None]).squeeze(-1)

    def entropy() -> Tensor:
        log_p = logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    return (chosen - logits.logsumexp(-1)).float(), entropy


def _grpo_with_entropy(step: TrainerStep) -> Tensor:
    """Compute a GRPO loss, with the entropy as a metric."""
    logprobs, entropy = _chosen_and_entropy(step)
    with torch.no_grad():
        entropy()
    return clipped_loss(logprobs, step)


def _grpo_with_bonus(step: TrainerStep) -> Tensor:
    """Compute a GRPO loss with an entropy bonus."""
    logprobs, entropy = _chosen_and_entropy(step)
    return clipped_loss(logprobs, step) - ENTROPY_BONUS * _mean(entropy(), step)


def _mean(of_tokens: Tensor, step: Step) -> Tensor:
    return (of_tokens * step.mask[:, 1:]).sum() / step.mask.sum()


def _distillation(step: TrainerStep) -> Tensor:
    with step.asking_reference() as teacher:
        taught = logits_of(teacher)[:, :-1].float().log_softmax(-1)
    own = logits_of(step)[:, :-1].float().log_softmax(-1)
    divergence = F.kl_div(own, taught, reduction="none", log_target=True).sum(-1)
    return _mean(divergence, step)


@torch.no_grad()
def _evaluation(step: TrainerStep) -> Tensor:
    logits = logits_of(step)[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), step.targets.flatten(), ignore_index=IGNORED)
    right = (logits.argmax(-1) == step.targets) & step.mask[:, 1:]
    return torch.stack((loss.float(), right.sum() / step.mask.sum()))


def _dpo_with_sigmoid(step: TrainerStep) -> Tensor:
    """Compute a DPO loss with a function that lazy logits do not know, so they build the logits."""
    logits = logits_of(step)
    odds = logits[:, :-1].sigmoid().mean(-1).float()
    return dpo_loss(_logprobs(logits, step), step) + _mean(odds, step)


def with_teacher(step: Step) -> TrainerStep:
    """Add a teacher. It differs enough from the student that fp32 resolves their divergence."""
    teacher = copy.deepcopy(step.base).requires_grad_(False).eval()
    with torch.no_grad():
        teacher.model.norm.weight.mul_(_SHARPER)
    return TrainerStep(**vars(step), reference=teacher)


class Loop(NamedTuple):
    """A loop in plain PyTorch: a loss, or the result of an evaluation."""

    compute: Callable[[Any], Tensor]
    evaluates: bool = False

    def step(self, step: TrainerStep) -> TrainerStep:
        """Return the step for the contest, which looks for no gradients in an evaluation."""
        return Evaluated(**vars(step)) if self.evaluates else step


LOOPS = {
    "SFT, labels=": Loop(_sft_by_labels),
    "SFT, cross_entropy": Loop(_sft_by_hand),
    "DPO, log_softmax and gather": Loop(_dpo),
    "GRPO, and entropy as a metric": Loop(_grpo_with_entropy),
    "GRPO, and entropy bonus": Loop(_grpo_with_bonus),
    "distillation, kl_div": Loop(_distillation),
    "evaluation, loss and argmax": Loop(_evaluation, evaluates=True),
    "sigmoid, which builds": Loop(_dpo_with_sigmoid),
}
