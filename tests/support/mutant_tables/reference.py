"""Changes of the definitions of all operations."""

from mutant import Mutant, mutants_of

MUTANTS = [
    *mutants_of(
        "fastrlhf/reference/advantages.py", "test_packed.py",
        (
            "packed: an eager scan steps over borders",
            "same = ids[step:] == ids[:-step]", "same = ids[step:] >= ids[:-step]",
            "stop_at_the_borders and eager",
        ),
        (
            "packed: an eager scan takes the next sequence's value",
            "torch.where(follows & is_there.roll(-1), nearest.roll(-1), after",
            "torch.where(is_there.roll(-1), nearest.roll(-1), after",
            "stop_at_the_borders and eager",
        ),
    ),
    *mutants_of(
        "fastrlhf/reference/row_gradient.py", "test_token_stats_lse.py",
        (
            "eager: the lse has no slope at the target",
            "target + d_lse * logprob.exp()", "target",
            "gradient_of_the_lse and eager and 33",
        ),
        (
            "eager: the slope of the lse with the other sign",
            "d_lse - d_logprob, target", "-d_lse - d_logprob, target",
            "gradient_of_the_lse and eager and 33",
        ),
    ),
    Mutant(
        "compiled: fp32 sums",
        "fastrlhf/reference/effective_logits.py",
        "return x.sum(-1, keepdim=True, dtype=torch.float64).to(x.dtype)",
        "return x.sum(-1, keepdim=True)",
        "test_compiled.py", "equal_numbers",
    ),
    Mutant(
        "reference: the excess of the mixture where the sides are near alone",
        "fastrlhf/reference/divergence_terms.py",
        "small = gap < 40\n", "small = gap.abs() < 0.5\n",
        "test_divergence_accuracy.py", "nearly_one_side and eager",
    ),
    *mutants_of(
        "fastrlhf/reference/advantages.py", "test_returns.py",
        (
            "gae: the last value of rows follows nothing",
            "after_the_end = nothing if last_values is None else last_values.to(dtype)\n",
            "after_the_end = nothing\n", "each_sequence and eager",
        ),
        (
            "gae: packed sequences have the last value of the first",
            "last_values.to(dtype)[ids]", "last_values.to(dtype)[0 * ids]",
            "packed_sequences and eager",
        ),
    ),
    *mutants_of(
        "fastrlhf/reference/layout.py", "test_shaped_rewards.py",
        (
            "rewards: the score on every token",
            "(counts.flip(-1).cumsum(-1).flip(-1) == 1)",
            "(counts.flip(-1).cumsum(-1).flip(-1) >= 1)",
            "at_the_last",
        ),
    ),
    *mutants_of(
        "fastrlhf/reference/row_statistics.py", "test_linear_cross_entropy.py",
        (
            "eager token_stats forward: a mean logit without temperature",
            "mean_logit = total / vocab / temperature", "mean_logit = total / vocab",
            "loss_is_that and smoothed and warm",
        ),
        (
            "eager token_stats forward: a mean of logits that are neither scaled nor capped",
            "yield capped\n", "yield logits.to(capped)\n",
            "loss_is_that and smoothed and (scaled or capped)",
        ),
    ),
    *mutants_of(
        "fastrlhf/reference/row_statistics.py", "test_with_stats.py",
        (
            "eager token_stats forward: a top token beside NaN",
            "& ~log_norm.isnan() & ~empty", "& ~empty",
            "without_a_distribution and eager",
        ),
        (
            "eager token_stats forward: the top of a row of nothing",
            "& ~log_norm.isnan() & ~empty", "& ~log_norm.isnan()",
            "masked_vocabulary and eager",
        ),
        (
            "eager token_stats forward: weights for their squares",
            "yield weight.square()", "yield weight",
            "match_the_oracle and eager and plain and 33",
        ),
        (
            "eager token_stats forward: the square of a likely target cancels",
            "heavy = square > 0.25", "heavy = square > 4.0",
            "nearly_all_probability and eager",
        ),
        (
            "eager token_stats forward: the target's square is left out",
            "(squares + square).log() - 2 * log_norm", "squares.log() - 2 * log_norm",
            "unlikely_target and eager",
        ),
        (
            "eager token_stats forward: squares of a row of nothing",
            "log_squares = torch.where(empty, 0.0, log_squares)", "log_squares = log_squares * 1.0",
            "masked_vocabulary and eager",
        ),
    ),
    Mutant(
        "eager token_stats backward: no slope of the mean logit",
        "fastrlhf/reference/row_gradient.py",
        "dz.add_(slopes.mean.unsqueeze(-1))", "pass",
        "test_linear_cross_entropy.py", "loss_is_that and smoothed and all",
    ),
    *mutants_of(
        "fastrlhf/reference/row_statistics.py", "test_vocabulary_over_ranks.py",
        (
            "shared: sums of ranks do not fade",
            "peak, (parts.rest * fade).sum(0),",
            "peak, parts.rest.sum(0),",
            "of_the_whole and token_stats and eager and uneven",
        ),
        (
            "shared: moments of ranks are relative to their own peaks",
            "moment = moment + parts.rest * torch.where(fade > 0, shift, 0.0)",
            "moment = moment * 1.0",
            "of_the_whole and token_stats and eager and uneven",
        ),
        (
            "shared: squares of ranks fade half",
            "(squares * fade.square()).sum(0)",
            "(squares * fade).sum(0)",
            "options_mean and token_stats and eager and sum_sq",
        ),
        (
            "shared: the smallest peak before the target",
            "before.amax(0) if before.numel()",
            "before.amin(0) if before.numel()",
            "on_top and eager",
        ),
        (
            "shared: eager ranks without the target add to it",
            "target = torch.where(held, parts.target, 0.0).sum(0)",
            "target = torch.where(held, parts.target, 1.0).sum(0)",
            "of_the_whole and token_stats and eager and uneven",
        ),
    ),
    *mutants_of(
        "fastrlhf/reference/scalars.py", "test_reports.py",
        (
            "reference: a sigmoid that saturates",
            "    return torch.where(small, tail, 1 - tail)\n", "    return torch.sigmoid(x)\n",
            "saturated",
        ),
        (
            "reference: a log-sigmoid whose second derivative is PyTorch's",
            "    return torch.where(negative, x, 0.0) - torch.log1p(decay)\n",
            "    return F.logsigmoid(x)\n",
            "saturated",
        ),
        (
            "reference: PyTorch's logaddexp",
            "torch.where(first, a, b) + torch.log1p(torch.exp(torch.where(first, b - a, a - b)))",
            "torch.logaddexp(a, b)",
            "distant",
        ),
        (
            "reference: a slope that is one more than the value",
            "    return torch.where(near, torch.expm1(torch.where(near, x, 0.0)), far)\n",
            "    return torch.expm1(x)\n",
            "nearly_zero",
        ),
    ),
    *mutants_of(
        "fastrlhf/reference/layout.py", "test_reports.py",
        (
            "reference: sums in the dtype of the policy",
            "dtype = accumulation_dtype(torch.promote_types(policy.dtype, reference.dtype))",
            "dtype = accumulation_dtype(policy.dtype)",
            "token_sums",
        ),
    ),
    *mutants_of(
        "fastrlhf/reference/token_statistics.py", "test_with_stats.py",
        (
            "definition: an entropy that has a gradient all the same",
            "row_entropy if entropy_grad else row_entropy.detach()", "row_entropy",
            "under_transforms",
        ),
        (
            "statistics: further ones seem differentiable",
            "further = {name: named[name].detach() for", "further = {name: named[name] for",
            "requires_one",
        ),
        (
            "statistics: an lse that seems differentiable",
            "stats.entropy, stats.lse.detach(), further)", "stats.entropy, stats.lse, further)",
            "requires_one or under_transforms",
        ),
        (
            "definition: an ignored token on top",
            "& (lse < torch.inf) & live & ~empty", "& (lse < torch.inf) & ~empty",
            "under_transforms",
        ),
    ),
]  # fmt: skip
