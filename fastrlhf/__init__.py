"""Fused kernels for preference learning and RLHF."""

from .hf import LMHead, lm_head, model_token_stats
from .losses import (
    cpo_loss,
    dpo_loss,
    kto_loss,
    linear_dpo_loss,
    orpo_loss,
    sequence_logprobs,
    simpo_loss,
)
from .ops import (
    ChunkStats,
    QuantizedWeight,
    linear_loss,
    linear_token_logprobs,
    linear_token_stats,
    shift_targets,
    token_logprobs,
    token_stats,
)
from .reference import TokenStats

__version__ = "0.1.0"

__all__ = [
    "ChunkStats",
    "LMHead",
    "QuantizedWeight",
    "TokenStats",
    "cpo_loss",
    "dpo_loss",
    "kto_loss",
    "linear_dpo_loss",
    "linear_loss",
    "linear_token_logprobs",
    "linear_token_stats",
    "lm_head",
    "model_token_stats",
    "orpo_loss",
    "sequence_logprobs",
    "shift_targets",
    "simpo_loss",
    "token_logprobs",
    "token_stats",
]
