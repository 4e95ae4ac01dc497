"""The vocabulary-sized operations, and the sequence-sized ones that have a kernel."""

from .linear_head import QuantizedWeight, Weight
from .linear_loss import ChunkStats, linear_loss
from .linear_token_stats import linear_token_logprobs, linear_token_stats
from .preference_loss import preference_loss
from .targets import shift_targets
from .token_stats import token_logprobs, token_stats

__all__ = [
    "ChunkStats",
    "QuantizedWeight",
    "Weight",
    "linear_loss",
    "linear_token_logprobs",
    "linear_token_stats",
    "preference_loss",
    "shift_targets",
    "token_logprobs",
    "token_stats",
]
