"""Fused kernels for preference learning and RLHF."""

from .losses import cpo_loss, dpo_loss, kto_loss, orpo_loss, sequence_logprobs, simpo_loss
from .ops import shift_targets, token_logprobs, token_stats
from .reference import TokenStats

__version__ = "0.1.0"

__all__ = [
    "TokenStats",
    "cpo_loss",
    "dpo_loss",
    "kto_loss",
    "orpo_loss",
    "sequence_logprobs",
    "shift_targets",
    "simpo_loss",
    "token_logprobs",
    "token_stats",
]
