"""Losses as pure functions of log-probs: no vocabulary dimension, no device code."""

from .advantages import shaped_rewards, whiten
from .cross_entropy import linear_cross_entropy
from .fused_policy import linear_policy_loss, logits_policy_loss
from .gdpo import gdpo_advantages
from .groups import group_advantages
from .linear_preference import linear_dpo_loss
from .penalties import kl_penalty
from .pf_ppo import pf_ppo_weights
from .policy import grpo_loss, grpo_options, policy_loss, ppo_loss
from .preference import dpo_loss
from .ranks import global_normalizer
from .reference_free import cpo_loss, orpo_loss, simpo_loss
from .returns import length_adaptive_lambda, monte_carlo_returns, outcome_rewards
from .reward import plackett_luce_loss, reward_loss
from .sequences import sequence_logprobs
from .unpaired import kto_loss
from .value import value_loss

__all__ = [
    "cpo_loss",
    "dpo_loss",
    "gdpo_advantages",
    "global_normalizer",
    "group_advantages",
    "grpo_loss",
    "grpo_options",
    "kl_penalty",
    "kto_loss",
    "length_adaptive_lambda",
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_policy_loss",
    "logits_policy_loss",
    "monte_carlo_returns",
    "orpo_loss",
    "outcome_rewards",
    "pf_ppo_weights",
    "plackett_luce_loss",
    "policy_loss",
    "ppo_loss",
    "reward_loss",
    "sequence_logprobs",
    "shaped_rewards",
    "simpo_loss",
    "value_loss",
    "whiten",
]
