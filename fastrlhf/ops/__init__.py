"""The vocabulary-sized operations, and the sequence-sized ones that have a kernel."""

from .gae import gae
from .linear_head import QuantizedWeight, Weight
from .linear_loss import ChunkStats, linear_loss
from .linear_token_stats import linear_token_logprobs, linear_token_stats
from .policy_loss import PolicyFormula, PolicyTokens, policy_loss
from .preference_loss import preference_loss
from .targets import shift_targets
from .token_stats import token_logprobs, token_stats

__all__ = [
    "ChunkStats",
    "PolicyFormula",
    "PolicyTokens",
    "QuantizedWeight",
    "Weight",
    "gae",
    "linear_loss",
    "linear_token_logprobs",
    "linear_token_stats",
    "policy_loss",
    "preference_loss",
    "shift_targets",
    "token_logprobs",
    "token_stats",
]
