"""The formulas of the operations that have a kernel, in eager PyTorch and any floating dtype.

Those of the policy loss alone are elsewhere: beside the policy losses without a kernel, in
`fastrlhf/losses/policy.py` and `fastrlhf/losses/surrogates.py`.

`token_stats`, `preference_loss`, `divergence`, `fisher_product` and `gae` are definitions: plain
tensor code that autograd can differentiate any number of times. Tests evaluate them in fp64.
`token_stats_forward`, `token_stats_backward` and others like them compute the same numbers and
their gradients in closed form, as the kernels do, for a few rows at a time. Backends without
kernels run these (`fastrlhf/ops/eager_*.py`, `compiled_*.py`).

Operations call them as `reference.x`, through this module. It imports only torch.

    scalars, effective_logits            what all others are made of
    token_statistics                     the definition of token_stats
    row_statistics, row_gradient         its closed forms
    layout, preference, advantages       sequences of tokens
    distributions, divergence_terms, divergences    divergences of two distributions
    fisher_information                   products of the Fisher information with a tangent
"""

from .advantages import advantages_backwards, decay, gae, packed_gae
from .distributions import Distribution, distribution, log_ratio_of_sums, log_ratio_terms, row_norm
from .divergence_terms import Shares, log_to_mixture
from .divergences import (
    DivergenceStats,
    divergence,
    divergence_and_stats,
    divergence_backward,
    divergence_of_sums,
    divergence_sums,
    of_sums_of_terms,
)
from .effective_logits import cap_slope, capped_logits, row_sums
from .fisher_information import (
    fisher_moment,
    fisher_product,
    fisher_product_of_sums,
    fisher_weight,
    where_likely,
)
from .layout import ROWS, Layout, masked_sum, sequence_lengths, sequence_scores
from .preference import MARGIN_LOSSES, preference_loss, sigmoid_loss
from .row_gradient import RowSlopes, logits_gradient, row_slopes, token_stats_backward
from .row_statistics import (
    RowParts,
    RowStats,
    merged_parts,
    merged_peaks,
    named_parts,
    row_parts,
    row_terms,
    statistics_of_parts,
    target_parts,
    token_stats_forward,
)
from .scalars import accumulation_dtype, expm1, expm1_minus, log_add_exp, log_sigmoid, sigmoid
from .token_statistics import (
    FURTHER_STATS,
    FurtherTokenStats,
    TokenStats,
    differentiable_stats,
    kept_token_stats,
    linear_token_stats,
    public_stats,
    stats_tuple,
    token_stats,
)

__all__ = [
    "FURTHER_STATS",
    "MARGIN_LOSSES",
    "ROWS",
    "Distribution",
    "DivergenceStats",
    "FurtherTokenStats",
    "Layout",
    "RowParts",
    "RowSlopes",
    "RowStats",
    "Shares",
    "TokenStats",
    "accumulation_dtype",
    "advantages_backwards",
    "cap_slope",
    "capped_logits",
    "decay",
    "differentiable_stats",
    "distribution",
    "divergence",
    "divergence_and_stats",
    "divergence_backward",
    "divergence_of_sums",
    "divergence_sums",
    "expm1",
    "expm1_minus",
    "fisher_moment",
    "fisher_product",
    "fisher_product_of_sums",
    "fisher_weight",
    "gae",
    "kept_token_stats",
    "linear_token_stats",
    "log_add_exp",
    "log_ratio_of_sums",
    "log_ratio_terms",
    "log_sigmoid",
    "log_to_mixture",
    "logits_gradient",
    "masked_sum",
    "merged_parts",
    "merged_peaks",
    "named_parts",
    "of_sums_of_terms",
    "packed_gae",
    "preference_loss",
    "public_stats",
    "row_norm",
    "row_parts",
    "row_slopes",
    "row_sums",
    "row_terms",
    "sequence_lengths",
    "sequence_scores",
    "sigmoid",
    "sigmoid_loss",
    "statistics_of_parts",
    "stats_tuple",
    "target_parts",
    "token_stats",
    "token_stats_backward",
    "token_stats_forward",
    "where_likely",
]
