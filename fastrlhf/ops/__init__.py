"""The vocabulary-sized operations, and the sequence-sized ones that have a kernel.

`token_stats.py` is the one to read first: `divergence.py`, `fisher.py` and `policy_loss.py` are
built in the same way. Each checks its arguments (`logits_arguments.py`), chooses a backend
(`backend.py`), and calls `fastrlhf/kernels`, or `compiled_*.py` or `eager_*.py` here, which run the
formulas of `fastrlhf/reference`. The operations from hidden states begin with
`linear_token_stats.py`, and `linear_plans.py` says what they cost. `scorer.py` is what
`fastrlhf/losses` asks for statistics.
"""

from .backend import get_backend, set_backend
from .divergence import kl_divergence
from .fisher import linear_softmax_fisher_product, softmax_fisher_product
from .gae import gae
from .linear_divergence import linear_kl_divergence
from .linear_head import QuantizedWeight, Weight
from .linear_loss import ChunkStats, linear_loss
from .linear_token_stats import linear_token_logprobs, linear_token_stats
from .linear_topk_divergence import linear_topk_kl_divergence
from .policy_loss import PolicyFormula, PolicyTokens, policy_loss
from .preference_loss import preference_loss
from .targets import shift_targets
from .token_stats import token_logprobs, token_stats
from .topk_divergence import topk_kl_divergence
from .warm_up import warm_up

__all__ = [
    "ChunkStats",
    "PolicyFormula",
    "PolicyTokens",
    "QuantizedWeight",
    "Weight",
    "gae",
    "get_backend",
    "kl_divergence",
    "linear_kl_divergence",
    "linear_loss",
    "linear_softmax_fisher_product",
    "linear_token_logprobs",
    "linear_token_stats",
    "linear_topk_kl_divergence",
    "policy_loss",
    "preference_loss",
    "set_backend",
    "shift_targets",
    "softmax_fisher_product",
    "token_logprobs",
    "token_stats",
    "topk_kl_divergence",
    "warm_up",
]
