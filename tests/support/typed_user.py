"""What a user writes, for a type checker alone, which `test_packaging` runs on it.

`# error: code` is a mistake that the checker must find, by mypy's name of it. Every other line is
right and must pass its strict mode; so results have the types that `assert_type` names, and none is
`Any`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fastrlhf
from fastrlhf import ChunkStats, LazyUse, LMHead, PolicyLossOptions, TokenStats


def log_probs(logits: Tensor, targets: Tensor) -> None:
    stats = fastrlhf.token_stats(logits, targets, entropy=True, temperature=0.7)
    assert_type(stats, TokenStats)
    assert_type(stats.logprob, Tensor)
    assert_type(stats.entropy, Tensor | None)
    assert_type(fastrlhf.token_logprobs(logits, targets), Tensor)
    assert_type(fastrlhf.cross_entropy(logits, targets, label_smoothing=0.1), Tensor)
    assert_type(fastrlhf.shift_targets(targets), Tensor)
    fastrlhf.token_stats(logits, targets, temperature="hot")  # error: arg-type
    fastrlhf.token_logprobs(logits)  # error: call-arg
    fastrlhf.token_logprobs(logits, targets, softcap=[30.0])  # error: arg-type
    fastrlhf.cross_entropy(logits, targets, loss_type="mse")  # error: arg-type


def preferences(logps: Tensor, ref_logps: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    losses, rewards = fastrlhf.dpo_loss(logps, ref_logps, chosen, rejected, 0.1, loss_type="ipo")
    assert_type(losses, Tensor)
    assert_type(rewards, Tensor)
    fastrlhf.dpo_loss(logps, ref_logps, chosen, rejected, loss_type="dpo")  # error: arg-type
    fastrlhf.dpo_loss(logps, ref_logps, chosen, rejected, smoothing=0.1)  # error: call-arg
    fastrlhf.dpo_loss(logps, ref_logps, [0], [1])  # error: arg-type
    kl = fastrlhf.kto_kl(logps, ref_logps)
    pair = fastrlhf.kto_loss(logps, ref_logps, torch.ones(4, dtype=torch.bool), kl)
    assert_type(pair, tuple[Tensor, Tensor])
    fastrlhf.simpo_loss(logps, chosen, rejected)  # error: call-arg
    return losses.mean()


def policies(logprobs: Tensor, old: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    advantages = fastrlhf.group_advantages(scores, mask)
    options = fastrlhf.grpo_options("dapo", clip_high=0.3)
    assert_type(options, PolicyLossOptions)
    loss, metrics = fastrlhf.policy_loss(logprobs, old, advantages, mask, **options)
    assert_type(loss, Tensor)
    assert_type(metrics, dict[str, Tensor])
    mine: PolicyLossOptions = {"clip_low": 0.2, "kl_coef": 0.1}
    fastrlhf.policy_loss(logprobs, old, advantages, mask, **mine)
    fastrlhf.ppo_loss(logprobs, old, advantages, mask, clip_low="0.2")  # error: arg-type
    fastrlhf.policy_loss(logprobs, old, advantages, mask, surrogate="trpo")  # error: arg-type
    fastrlhf.grpo_loss("dapo", logprobs, old, advantages)  # error: arg-type
    estimates = fastrlhf.gae(logprobs, old, mask, gamma=1.0, lam=0.95)
    assert_type(estimates, tuple[Tensor, Tensor])
    fastrlhf.gae(logprobs, old, mask, 1.0, 0.95)  # error: call-arg
    assert_type(fastrlhf.global_normalizer([mask, mask]), Tensor)
    fastrlhf.whiten(advantages, mask, group="world")  # error: arg-type
    return loss


def from_hidden_states(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    assert_type(fastrlhf.linear_token_stats(hidden, weight, targets), TokenStats)

    def loss_of(stats: ChunkStats) -> tuple[Tensor, dict[str, Tensor]]:
        return -stats.logprob.sum(), {"tokens": torch.tensor(stats.logprob.numel())}

    found = fastrlhf.linear_loss(loss_of, hidden, weight, targets)
    assert_type(found, tuple[Tensor, dict[str, Tensor]])
    fastrlhf.linear_loss("nll", hidden, weight, targets)  # error: arg-type
    models = hidden, weight, hidden, weight
    assert_type(fastrlhf.linear_kl_divergence(*models), Tensor)
    both = fastrlhf.linear_kl_divergence(*models, entropy=True)
    assert_type(both, tuple[Tensor, Tensor])


def of_models(model: nn.Module, teacher: nn.Module, ids: Tensor, mask: Tensor) -> Iterator[Tensor]:
    loss, metrics = fastrlhf.sft_loss(model, ids, mask=mask, label_smoothing=0.1)
    assert_type(loss, Tensor)
    assert_type(metrics, dict[str, Tensor])
    with_outputs = fastrlhf.sft_loss(model, ids, mask=mask, return_outputs=True)
    assert_type(with_outputs, tuple[Tensor, dict[str, Tensor], Any])  # what the model returns
    fastrlhf.sft_loss(model, ids, label_smoothing="little")  # error: call-overload
    assert_type(fastrlhf.model_token_stats(model, ids, position_ids=ids), TokenStats)
    policy = fastrlhf.model_policy_loss(model, ids, None, None, loss, mask=mask, kl_coef=0.1)
    assert_type(policy, tuple[Tensor, dict[str, Tensor]])
    pairs = fastrlhf.model_dpo_loss(model, ids, None, None, ids, ids, mask=mask, loss_type="simpo")
    assert_type(pairs, tuple[Tensor, Tensor])
    unpaired = fastrlhf.model_kto_loss(model, ids, None, loss, mask, 0.0, mask=mask)
    assert_type(unpaired, tuple[Tensor, Tensor])
    own = fastrlhf.model_linear_loss(lambda stats: -stats.logprob.sum(), model, ids)
    assert_type(own, tuple[Tensor, dict[str, Tensor]])
    assert_type(fastrlhf.model_kl_divergence(model, teacher, ids), Tensor)
    both = fastrlhf.model_kl_divergence(model, teacher, ids, entropy=True)
    assert_type(both, tuple[Tensor, Tensor])
    hidden, head = fastrlhf.head_inputs(model, ids)
    assert_type(hidden, Tensor)
    assert_type(head, LMHead)
    assert_type(fastrlhf.check(model, {"input_ids": ids}), list[str])
    with fastrlhf.lazy_logits(model):
        model(ids)
    assert_type(fastrlhf.lazy_report().built, tuple[LazyUse, ...])
    with fastrlhf.lazy_logits(ids):  # error: arg-type
        yield loss
