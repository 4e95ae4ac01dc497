"""What knows the models of transformers, peft and bitsandbytes; it imports none of them."""

from .check import check
from .lm_head import LMHead, head_inputs, lm_head
from .model_token_stats import model_token_stats

__all__ = ["LMHead", "check", "head_inputs", "lm_head", "model_token_stats"]
