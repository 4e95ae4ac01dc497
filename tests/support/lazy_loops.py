"""Losses of training loops, written as the field writes them, of a model that may be lazy or not.

None of them knows of this library. What frameworks do to logits is written again after verl's and
OpenRLHF's helpers.
"""

from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrlhf
from support.compare import budget, relative_error
from support.tiny_models import make

STEPS = 3
TEMPERATURE = 0.7


class Batch(NamedTuple):
    """Prompts with responses, and what a rollout and a reward model said of them."""

    ids: Tensor  # (B, T)
    labels: Tensor  # (B, T), -100 in prompts and padding
    mask: Tensor  # (B, T - 1) of tokens that are predicted and count
    old: Tensor  # (B, T - 1) log-probs of the rollout
    advantages: Tensor  # (B, T - 1)

    @property
    def responses(self) -> int:
        """How many tokens at the end of each sequence may be of a response."""
        return self.ids.shape[1] // 2


class Models(NamedTuple):
    """A policy, and a model that is not trained: a reference or a teacher."""

    policy: nn.Module
    other: nn.Module


Loss = Callable[[Models, Batch], Tensor]


def batch(policy: nn.Module, rows: int = 8, length: int = 20) -> Batch:
    """Random words, of which the policy had made the responses some steps ago."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, policy.config.vocab_size, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, : length // 2] = -100
    labels[1::2, -2:] = -100  # padding
    with torch.no_grad():
        logprobs = policy(ids).logits[:, :-1].float().log_softmax(-1)
    old = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    old += 0.2 * torch.randn(old.shape, generator=generator)
    advantages = torch.randn(rows, length - 1, generator=generator)
    return Batch(ids, labels, labels[:, 1:] != -100, old, advantages)


# Supervised


def sft_of_labels(models: Models, batch: Batch) -> Tensor:
    return models.policy(input_ids=batch.ids, labels=batch.labels).loss


def sft_shifted(models: Models, batch: Batch) -> Tensor:
    logits = models.policy(input_ids=batch.ids).logits
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = batch.labels[..., 1:].contiguous()
    vocab = shift_logits.size(-1)
    return F.cross_entropy(shift_logits.view(-1, vocab), shift_labels.view(-1), ignore_index=-100)


def sft_float(models: Models, batch: Batch) -> Tensor:
    """In fp32, with a sum that the global number of tokens divides."""
    logits = models.policy(batch.ids).logits.float()
    labels = F.pad(batch.labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels, reduction="sum")
    return loss / 16


def sft_of_a_module(models: Models, batch: Batch) -> Tensor:
    """torch.nn.CrossEntropyLoss of each token, smoothed, those that do not count among them."""
    logits = models.policy(batch.ids).logits[:, :-1]
    loss_function = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    losses = loss_function(logits.flatten(0, 1), batch.ids[:, 1:].flatten())
    mask = batch.mask.flatten()
    return (losses * mask).sum() / mask.sum()


# Preferences: the first half of a batch is chosen, the other rejected


def sequence_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch.ids).logits[:, :-1, :]
    labels = batch.labels[:, 1:].clone()
    loss_mask = labels != -100
    labels[labels == -100] = 0
    per_token = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    return (per_token * loss_mask).sum(-1)


def dpo(models: Models, batch: Batch) -> Tensor:
    chosen, rejected = sequence_logprobs(models.policy, batch).chunk(2)
    with torch.no_grad():
        of_chosen, of_rejected = sequence_logprobs(models.other, batch).chunk(2)
    return -F.logsigmoid(0.1 * ((chosen - rejected) - (of_chosen - of_rejected))).mean()


# verl


def logprobs_from_logits_naive(logits: Tensor, labels: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def logprobs_from_logits_v2(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.dtype in [torch.float32, torch.float64]:
        of_labels = torch.gather(logits, dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)
        return of_labels - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    found = []
    for row_logits, row_labels in zip(logits, labels, strict=True):
        row_logprobs = F.log_softmax(row_logits, dim=-1)
        found.append(row_logprobs.gather(dim=-1, index=row_labels.unsqueeze(-1)).squeeze(-1))
    return torch.stack(found)


def entropy_from_logits(logits: Tensor) -> Tensor:
    probs = torch.nn.functional.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - torch.sum(probs * logits, dim=-1)


def clipped(logprobs: Tensor, entropy: Tensor, batch: Batch, last: int) -> Tensor:
    """The policy loss of the last tokens, less a bonus for entropy."""
    old, advantages, mask = (
        x[:, -last:] for x in (batch.old.to(logprobs.dtype), batch.advantages, batch.mask)
    )
    ratio = torch.exp(logprobs - old)
    losses = torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2))
    mean = (losses * mask).sum() / mask.sum()
    return mean - 0.01 * (entropy * mask).sum() / mask.sum()


def verl(of_labels: Callable[[Tensor, Tensor], Tensor], models: Models, batch: Batch) -> Tensor:
    """Padded: divided in place, then cut to the responses."""
    last = batch.responses
    logits = models.policy(input_ids=batch.ids, use_cache=False).logits
    logits.div_(TEMPERATURE)
    logits = logits[:, -last - 1 : -1, :]
    logprobs = of_labels(logits, batch.ids[:, -last:])
    return clipped(logprobs, entropy_from_logits(logits), batch, last)


def verl_without_padding(
    of_labels: Callable[[Tensor, Tensor], Tensor], models: Models, batch: Batch
) -> Tensor:
    """All sequences in one, whose logits are (tokens, V)."""
    packed = batch.ids.reshape(1, -1)
    rolled = torch.roll(packed, shifts=-1, dims=1).squeeze(0)
    positions = torch.arange(batch.ids.shape[1]).repeat(len(batch.ids)).unsqueeze(0)
    output = models.policy(input_ids=packed, position_ids=positions, use_cache=False)
    logits = output.logits.squeeze(0)
    logits.div_(TEMPERATURE)
    found = of_labels(logits, rolled), entropy_from_logits(logits)
    logprobs, entropy = (x.view(batch.ids.shape)[:, :-1] for x in found)
    return clipped(logprobs, entropy, batch, logprobs.shape[1])


# OpenRLHF


def logsumexp_by_chunk(logits: Tensor, chunk_size: int = 128) -> Tensor:
    found = torch.zeros(logits.shape[0], dtype=logits.dtype)
    for start in range(0, logits.shape[0], chunk_size):
        stop = min(start + chunk_size, logits.shape[0])
        found[start:stop] = torch.logsumexp(logits[start:stop], dim=-1)
    return found


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    if temperature != 1.0:
        logits.div_(temperature)
    if logits.dtype not in [torch.float32, torch.float64]:
        return logprobs_from_logits_v2(logits, labels)
    of_labels = torch.gather(logits, dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)
    sums = logsumexp_by_chunk(logits.reshape(-1, logits.shape[-1])).view(logits.shape[:-1])
    return of_labels - sums


def openrlhf(in_float: bool, models: Models, batch: Batch) -> Tensor:
    """An actor: of all tokens, each predicting the next, the last one nothing."""
    rolled = torch.roll(batch.ids, shifts=-1, dims=1)
    logits = models.policy(batch.ids).logits
    if in_float and logits.dtype is not torch.float64:
        logits = logits.to(torch.float32)
    logprobs = log_probs_from_logits(logits, rolled, TEMPERATURE)
    entropy = entropy_from_logits(logits)[:, :-1]
    return clipped(logprobs[:, :-1], entropy, batch, batch.ids.shape[1] - 1)


# Powers of the probabilities: weights of WPO, and a sharpened policy


def weighted_dpo(models: Models, batch: Batch) -> Tensor:
    logits = models.policy(input_ids=batch.ids).logits[:, :-1]
    logprobs = F.log_softmax(logits, dim=-1)
    of_labels = logprobs.gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
    aligned = of_labels - torch.logsumexp(2.0 * logprobs, dim=-1)
    sharpened = torch.log_softmax(logprobs / 0.5, dim=-1).gather(-1, batch.ids[:, 1:, None])
    of_tokens = aligned + 0.1 * sharpened.squeeze(-1)
    chosen, rejected = (of_tokens * batch.mask).sum(-1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


# Distillation


def both(models: Models, batch: Batch) -> tuple[Tensor, Tensor]:
    student = models.policy(input_ids=batch.ids).logits
    with torch.no_grad():
        teacher = models.other(input_ids=batch.ids).logits
    return student, teacher


def distillation(models: Models, batch: Batch) -> Tensor:
    """Hinton's, of soft and of hard labels."""
    student, teacher = both(models, batch)
    t = 2.0
    soft = F.kl_div(
        F.log_softmax(student / t, dim=-1), F.softmax(teacher / t, dim=-1), reduction="batchmean"
    )
    hard = F.cross_entropy(student[:, :-1].transpose(1, 2), batch.labels[:, 1:])
    return 0.5 * soft * t * t + 0.5 * hard


def distillation_log_target(models: Models, batch: Batch) -> Tensor:
    """Of the tokens that count, each with its own sum over the vocabulary."""
    student, teacher = (x[:, :-1][batch.mask] for x in both(models, batch))
    losses = F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    )
    return losses.sum(-1).mean()


def forward_divergence(models: Models, batch: Batch) -> Tensor:
    student, teacher = (x[:, :-1] for x in both(models, batch))
    p, logp, logq = teacher.softmax(-1), teacher.log_softmax(-1), student.log_softmax(-1)
    return ((p * (logp - logq)).sum(-1) * batch.mask).sum() / batch.mask.sum()


def reverse_divergence(models: Models, batch: Batch) -> Tensor:
    student, teacher = (x[:, :-1] for x in both(models, batch))
    logq, logp = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    return ((logq.exp() * (logq - logp)).sum(dim=-1) * batch.mask).sum() / batch.mask.sum()


def soft_cross_entropy(models: Models, batch: Batch) -> Tensor:
    student, teacher = (x[:, :-1] for x in both(models, batch))
    losses = -(F.softmax(teacher, dim=-1) * F.log_softmax(student, dim=-1)).sum(dim=-1)
    return losses[batch.mask].mean()


def cross_entropy_of_probs(models: Models, batch: Batch) -> Tensor:
    student, teacher = (x[:, :-1][batch.mask] for x in both(models, batch))
    return F.cross_entropy(student, teacher.softmax(-1))


def self_distillation(models: Models, batch: Batch) -> Tensor:
    """Towards its own detached, sharper distribution, by the reverse and by the forward KL."""
    logits = models.policy(input_ids=batch.ids).logits[:, :-1]
    logq, logp = logits.log_softmax(-1), (logits.detach() / TEMPERATURE).log_softmax(-1)
    reverse, forward = logq.exp() * (logq - logp), logp.exp() * (logp - logq)
    return (reverse.sum(-1) + 0.5 * forward.sum(-1))[batch.mask].mean()


# PPO with an entropy bonus


def ppo(models: Models, batch: Batch) -> Tensor:
    logits = models.policy(input_ids=batch.ids).logits[:, :-1] / TEMPERATURE
    logp, p = F.log_softmax(logits, dim=-1), F.softmax(logits, dim=-1)
    entropy = -(p * logp).sum(-1)
    logprobs = logp.gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
    return clipped(logprobs, entropy, batch, logprobs.shape[1])


def ppo_categorical(validate_args: bool, models: Models, batch: Batch) -> Tensor:
    logits = models.policy(input_ids=batch.ids).logits[:, :-1]
    chosen = torch.distributions.Categorical(logits=logits, validate_args=validate_args)
    logprobs, entropy = chosen.log_prob(batch.ids[:, 1:]), chosen.entropy()
    return clipped(logprobs, entropy, batch, logprobs.shape[1])


LOOPS: dict[str, Loss] = {
    "SFT, labels": sft_of_labels,
    "SFT, shifted": sft_shifted,
    "SFT, float": sft_float,
    "SFT, smoothed": sft_of_a_module,
    "DPO": dpo,
    "WPO": weighted_dpo,
    "verl, naive": partial(verl, logprobs_from_logits_naive),
    "verl, v2": partial(verl, logprobs_from_logits_v2),
    "verl, no padding, naive": partial(verl_without_padding, logprobs_from_logits_naive),
    "verl, no padding, v2": partial(verl_without_padding, logprobs_from_logits_v2),
    "OpenRLHF, fp32": partial(openrlhf, True),
    "OpenRLHF": partial(openrlhf, False),
    "distillation": distillation,
    "distillation, log target": distillation_log_target,
    "forward KL": forward_divergence,
    "reverse KL": reverse_divergence,
    "soft cross-entropy": soft_cross_entropy,
    "cross-entropy of probabilities": cross_entropy_of_probs,
    "self-distillation": self_distillation,
    "PPO": ppo,
    "PPO, Categorical": partial(ppo_categorical, False),
    "PPO, Categorical, validated": partial(ppo_categorical, True),
}


@dataclass
class Trained:
    """What some steps of a loop gave."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step


def models(name: str, dtype: torch.dtype, **changes) -> Models:
    """A policy and a model of other weights, that is not trained."""
    policy, other = make(name, **changes).to(dtype), make(name, **changes).to(dtype)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return Models(policy, other.requires_grad_(False))


def train(loss_of: Loss, models: Models, batch: Batch, *, lazy: bool) -> Trained:
    """Take steps from the models as they are, which stay so."""
    models, found = Models(*map(deepcopy, models)), Trained()
    optimizer = torch.optim.SGD(models.policy.parameters(), lr=0.05)
    with ExitStack() as modes:
        if lazy:
            for model in models:
                modes.enter_context(fastrlhf.lazy_logits(model))
        for step in range(STEPS):
            loss = loss_of(models, batch)
            loss.backward()
            found.losses.append(loss.item())
            if step == 0:
                named = models.policy.named_parameters()
                found.gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
    return found


def assert_same_training(lazy: Trained, plain: Trained, exact: Trained, dtype: torch.dtype) -> None:
    """Losses of all steps, and gradients of the first, are as near to fp64 as the plain loop's."""
    a, b, c = (torch.tensor(x.losses, dtype=torch.float64) for x in (lazy, plain, exact))
    of_plain = float((b - c).abs().max())
    bound = budget(of_plain, dtype, float(c.abs().max()))
    assert (a - c).abs().max() <= bound, f"losses {a.tolist()}, not {c.tolist()} ± {bound:.1e}"
    assert lazy.gradients.keys() == plain.gradients.keys() == exact.gradients.keys() != set()
    for name, exactly in exact.gradients.items():
        error, of_plain = (relative_error(x.gradients[name], exactly) for x in (lazy, plain))
        bound = budget(of_plain, dtype)
        assert error <= bound, f"{name}: error {error:.2e}, not {bound:.2e} (plain {of_plain:.2e})"
