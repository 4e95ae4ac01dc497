"""Losses as pure functions of log-probs: no vocabulary dimension, no device code."""

from .advantages import group_advantages, shaped_rewards, whiten
from .cross_entropy import cross_entropy, linear_cross_entropy
from .fused_policy import linear_policy_loss, logits_policy_loss
from .linear_preference import linear_dpo_loss
from .penalties import kl_penalty
from .policy import grpo_loss, grpo_options, policy_loss, ppo_loss
from .preference import dpo_loss
from .process_reward import process_reward_loss, process_reward_scores
from .ranks import global_normalizer
from .reference_free import cpo_loss, orpo_loss, simpo_loss
from .reward import plackett_luce_loss, reward_loss
from .sequences import sequence_logprobs
from .unpaired import kto_loss
from .value import value_loss

__all__ = [
    "cpo_loss",
    "cross_entropy",
    "dpo_loss",
    "global_normalizer",
    "group_advantages",
    "grpo_loss",
    "grpo_options",
    "kl_penalty",
    "kto_loss",
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_policy_loss",
    "logits_policy_loss",
    "orpo_loss",
    "plackett_luce_loss",
    "policy_loss",
    "ppo_loss",
    "process_reward_loss",
    "process_reward_scores",
    "reward_loss",
    "sequence_logprobs",
    "shaped_rewards",
    "simpo_loss",
    "value_loss",
    "whiten",
]
