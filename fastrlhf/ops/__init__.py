"""The vocabulary-sized operations, and the sequence-sized ones that have a kernel."""

from .preference_loss import preference_loss
from .targets import shift_targets
from .token_stats import token_logprobs, token_stats

__all__ = ["preference_loss", "shift_targets", "token_logprobs", "token_stats"]
