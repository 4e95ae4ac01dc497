"""What knows the models of transformers, peft and bitsandbytes. To import it imports none of them.

`model_token_stats` and the losses of models (`model_losses.py`, `model_preference.py`,
`model_policy.py`, `model_divergence.py`) run a model's own forward with something else in the place
of its head, by way of `at_head.py`. `lm_head.py` gives the head and the hidden states to whoever
calls the operations on them directly, and `check.py` looks at a batch.
"""

from .check import check
from .lm_head import LMHead, head_inputs, lm_head
from .model_divergence import model_kl_divergence
from .model_losses import model_cross_entropy, model_linear_loss
from .model_policy import model_policy_loss
from .model_preference import model_dpo_loss, model_kto_loss
from .model_token_stats import model_token_stats
from .moving_reference import update_reference

__all__ = [
    "LMHead",
    "check",
    "head_inputs",
    "lm_head",
    "model_cross_entropy",
    "model_dpo_loss",
    "model_kl_divergence",
    "model_kto_loss",
    "model_linear_loss",
    "model_policy_loss",
    "model_token_stats",
    "update_reference",
]
