"""Losses of log-probs, scores and values, as pure functions of tensors.

Most know one number for each token or sequence, and neither a vocabulary nor a device. Those that
start from logits or hidden states do have a vocabulary, which they leave to `fastrlhf.ops`; the
formulas that they apply to the log-probs are the same as those of the others:

- `cross_entropy`, `linear_cross_entropy` in `cross_entropy.py`;
- `logits_policy_loss`, `linear_policy_loss` in `fused_policy.py`, with formulas in `policy.py`;
- `linear_dpo_loss` in `linear_preference.py`, with formulas in `preference.py` and
  `reference_free.py`; `linear_kto_loss` in `linear_unpaired.py`, with those of `unpaired.py`; both
  by way of `fused_sequences.py`.

Nothing here launches a kernel or writes a backward by itself: that is what `fastrlhf.ops` is for.
"""

from .advantages import shaped_rewards, whiten
from .controllers import AdaptiveEntropyCoefficient, AdaptiveKLController, FixedKLController
from .covariance import clip_cov_mask, kl_cov_mask
from .cross_entropy import cross_entropy, linear_cross_entropy
from .fused_policy import linear_policy_loss, logits_policy_loss
from .gdpo import gdpo_advantages
from .groups import group_advantages
from .grpo import grpo_loss, grpo_options
from .linear_preference import LinearDPOOptions, linear_dpo_loss
from .linear_unpaired import KTOOptions, linear_kto_loss
from .penalties import kl_penalty
from .pf_ppo import pf_ppo_weights
from .policy import policy_loss, ppo_loss
from .policy_options import PolicyLossOptions
from .preference import dpo_loss
from .preference_options import DPOOptions
from .process_reward import process_reward_loss, process_reward_scores
from .rankings import plackett_luce_dpo_loss, ranked_pairs
from .ranks import global_normalizer
from .reference_free import cpo_loss, orpo_loss, simpo_loss
from .rejection import rollout_rejection
from .returns import length_adaptive_lambda, monte_carlo_returns, outcome_rewards
from .reward import plackett_luce_loss, reward_loss
from .rollout import rollout_correction
from .rollout_metrics import rollout_metrics
from .selection import top_entropy_mask
from .sequences import sequence_logprobs
from .triple import tpo_loss
from .unpaired import kto_kl, kto_loss
from .value import value_loss
from .wpo import wpo_weights

__all__ = [
    "AdaptiveEntropyCoefficient",
    "AdaptiveKLController",
    "DPOOptions",
    "FixedKLController",
    "KTOOptions",
    "LinearDPOOptions",
    "PolicyLossOptions",
    "clip_cov_mask",
    "cpo_loss",
    "cross_entropy",
    "dpo_loss",
    "gdpo_advantages",
    "global_normalizer",
    "group_advantages",
    "grpo_loss",
    "grpo_options",
    "kl_cov_mask",
    "kl_penalty",
    "kto_kl",
    "kto_loss",
    "length_adaptive_lambda",
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_kto_loss",
    "linear_policy_loss",
    "logits_policy_loss",
    "monte_carlo_returns",
    "orpo_loss",
    "outcome_rewards",
    "pf_ppo_weights",
    "plackett_luce_dpo_loss",
    "plackett_luce_loss",
    "policy_loss",
    "ppo_loss",
    "process_reward_loss",
    "process_reward_scores",
    "ranked_pairs",
    "reward_loss",
    "rollout_correction",
    "rollout_metrics",
    "rollout_rejection",
    "sequence_logprobs",
    "shaped_rewards",
    "simpo_loss",
    "top_entropy_mask",
    "tpo_loss",
    "value_loss",
    "whiten",
    "wpo_weights",
]
