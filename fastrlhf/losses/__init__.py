"""Losses as pure functions of log-probs: no vocabulary dimension, no device code."""

from .linear_preference import linear_dpo_loss
from .preference import dpo_loss
from .reference_free import cpo_loss, orpo_loss, simpo_loss
from .sequences import sequence_logprobs
from .unpaired import kto_loss

__all__ = [
    "cpo_loss",
    "dpo_loss",
    "kto_loss",
    "linear_dpo_loss",
    "orpo_loss",
    "sequence_logprobs",
    "simpo_loss",
]
