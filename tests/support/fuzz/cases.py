"""A case of each public function: hostile arguments, the call, and the formula of `formulas.py`.

A maker draws one: those of the files `cases_of_*`, some of them twice, and so drawn twice as often.
"""

from .cases_of_divergences import kl_divergence, linear_kl_divergence, softmax_fisher_product
from .cases_of_policies import linear_policy_loss, logits_policy_loss, policy_loss
from .cases_of_preferences import dpo_loss, kto_loss, linear_dpo_loss, reference_free
from .cases_of_sequences import (
    conjugate_gradient,
    gae,
    group_advantages,
    kl_penalty,
    plackett_luce_loss,
    reward_loss,
    sequence_logprobs,
    shaped_rewards,
    shift_targets,
    value_loss,
    whiten,
)
from .cases_of_statistics import (
    fewer_rows,
    kept_token_stats,
    linear_cross_entropy,
    linear_loss,
    linear_token_stats,
    token_stats,
)
from .shared import Maker

MAKERS: tuple[Maker, ...] = (
    token_stats, token_stats, linear_token_stats, linear_token_stats, linear_loss,
    kept_token_stats, fewer_rows,
    linear_cross_entropy, kl_divergence, kl_divergence, linear_kl_divergence,
    softmax_fisher_product, dpo_loss, dpo_loss, reference_free, kto_loss, policy_loss, policy_loss,
    logits_policy_loss, logits_policy_loss, linear_policy_loss, linear_dpo_loss, value_loss, gae,
    group_advantages, shaped_rewards, kl_penalty, reward_loss, plackett_luce_loss, whiten,
    sequence_logprobs, shift_targets, conjugate_gradient,
)  # fmt: skip
