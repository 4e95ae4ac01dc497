"""Changes of policy losses, advantages, and corrections of rollouts."""

from mutant import Mutant, mutants_of

MUTANTS = [
    *mutants_of(
        "fastrlhf/losses/policy_arguments.py", "test_packed.py",
        (
            "packed: of tokens or of sequences, as it happens",
            "of_tokens = self.layout is not ROWS and tuple(x.shape) == shape", "of_tokens = False",
            "tokens_shape_is_of_tokens",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/reduce.py", "test_packed.py",
        (
            "packed: a mean over as many sequences as there are tokens",
            "max(layout.sequences(mask), 1)", "max(mask.shape[0], 1)",
            "every_reduction",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/reduce.py", "test_policy_loss_hostile.py",
        (
            "reduction: a metric of no tokens",
            "/ layout.total(mask).clamp(min=1)", "/ layout.total(mask)",
            "without_tokens",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/reduce.py", "test_policy_loss.py",
        (
            "reduction: sequences by their length",
            "layout.spread(denominator * lengths)",
            "layout.spread(denominator * torch.ones_like(lengths))",
            "those_of_the_papers",
        ),
    ),
    Mutant(
        "reduction: no clamp of the number of tokens",
        "fastrlhf/losses/reduce.py",
        "denominator = layout.total(mask).to(dtype).clamp(min=1)",
        "denominator = layout.total(mask).to(dtype)",
        "test_policy_loss_hostile.py", "without_tokens",
        "1/0 is taken only where the mask has no token, and then the where gives every token 0",
    ),
    *mutants_of(
        "fastrlhf/losses/reduce.py", "test_losses_over_ranks.py",
        (
            "ranks: the mean over tokens has this rank's count",
            "layout.total(mask).to(dtype)", "mask.sum().to(dtype)",
            "of_the_whole and policy_calls and 2-False",
        ),
        (
            "ranks: means of metrics have this rank's count",
            "/ layout.total(mask).clamp(min=1)", "/ mask.sum().clamp(min=1)",
            "of_the_whole and policy_calls and 2-False",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/wpo.py", "test_preference_options.py",
        (
            "wpo: tokens are not aligned",
            "logprobs = logprobs - log_sum_sq_probs.detach()", "pass",
            "papers and WPO",
        ),
        (
            "wpo: sums for means",
            "torch.exp(sums / sequence_lengths(mask, None, sums.dtype, layout))", "torch.exp(sums)",
            "papers and WPO",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/fused_sequences.py", "test_linear_preference_options.py",
        (
            "fused sequences: the tokens of a group are all there are",
            "losses, _ = self.loss.of_tokens(SequenceTokens(of_chunk, self.mask, **in_place))",
            "losses, _ = self.loss.of_tokens(SequenceTokens(of_chunk, of_chunk, **in_place))",
            "from_hidden_states and MPO and True",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/policy.py", "test_logits_policy_loss_hostile.py",
        (
            "policy: a forbidden token without old log-probs",
            "logprobs = torch.where(logprobs == -torch.inf, 0.0, logprobs)",
            "logprobs = logprobs * 1.0",
            "forbidden_tokens_and",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/policy.py", "test_policy_loss.py",
        (
            "policy: the sum for the mean of a sequence's log-ratios",
            "mean = total / sums(torch.ones_like(log_ratio)).clamp(min=1)", "mean = total",
            "those_of_the_papers",
        ),
        (
            "policy: GSPO-token has the gradient of the whole sequence",
            "return mean.detach() + finite - finite.detach()", "return mean",
            "those_of_the_papers and sequence-token",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/policy.py", "test_policy_loss*.py",
        (
            "policy: the off-policy mask keeps what has drifted",
            "(drift > threshold) & (tokens.advantages < 0)",
            "(drift < threshold) & (tokens.advantages < 0)",
            "off_policy_mask",
        ),
        (
            "policy: the off-policy mask is of good tokens too",
            "(drift > threshold) & (tokens.advantages < 0)", "drift > threshold",
            "off_policy_mask",
        ),
        (
            "policy: clipped sequences counted by tokens",
            "counts(clipped).to(dtype) / lengths.clamp(min=1)",
            "counts(clipped).to(dtype) / clipped.shape[-1]",
            "sequences_that_are_clipped",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/policy.py", "test_policy_loss_hostile.py",
        (
            "policy: infinity times the weight 0 of a penalty",
            "counts = tokens.kl_weights != 0", "counts = tokens.kl_weights == tokens.kl_weights",
            "weight_zero_can_be_infinite",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/policy.py", "test_kl_penalty.py",
        (
            "policy: a constant leaves its rounding in the corrected gradient",
            "            log_product = log_product.detach()", "            pass",
            "corrected_k3_keeps",
        ),
    ),
    Mutant(
        "policy: the ratio of a sequence without tokens",
        "fastrlhf/losses/policy.py",
        "mean = total / sums(torch.ones_like(log_ratio)).clamp(min=1)",
        "mean = total / sums(torch.ones_like(log_ratio))",
        "test_policy_loss*.py", "those_of_the_papers or without_tokens",
        "0/0 is the log-ratio of tokens outside of the mask alone, whose advantage is 0, which "
        "replaces it by 0; a where drops its gradient, and the metrics look at no such token",
    ),
    *mutants_of(
        "fastrlhf/losses/policy.py", "test_losses_over_ranks.py",
        (
            "ranks: the distance from the sampler is that of this rank's tokens",
            "masked_mean(token_log_ratios.square() / 2, scored, layout)",
            "masked_mean(token_log_ratios.square() / 2, scored)",
            "of_the_whole and policy_calls and 2-False",
        ),
        (
            "ranks: the divergence is that of this rank's tokens",
            "masked_mean(kl, mask, layout)", "masked_mean(kl, mask)",
            "of_the_whole and policy_calls and 2-False",
        ),
        (
            "ranks: the entropy is that of this rank's tokens",
            "masked_mean(entropy, mask, layout)", "masked_mean(entropy, mask)",
            "of_the_whole and policy_calls and 2-False",
        ),
        (
            "ranks: shares of clipped tokens are those of this rank",
            "masked_mean(clipped.to(dtype), batch.mask, batch.layout)",
            "masked_mean(clipped.to(dtype), batch.mask)",
            "of_the_whole and policy_calls and 2-False",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/ratios.py", "test_policy_loss_hostile.py",
        (
            "ratios: the gradient of NaN is 0",
            "return torch.where(x > bound, bound, x)", "return x.clamp(max=bound)",
            "its_token_alone",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/segments.py", "test_advantages.py",
        (
            "segments: sums run over their ends",
            "joined = torch.where(same, joined, head)",
            "joined = torch.where(same, joined, joined)",
            "of_the_papers or own_group",
        ),
        (
            "segments: inf * 0 from the segment before",
            "torch.where(has_previous, before[:-1], 0.0)", "before[:-1] * has_previous",
            "own_group",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/segments.py", "test_reward.py",
        (
            "segments: the gradient of what is dropped",
            "torch.where(same, x, 0.0) for x in (head, ahead)", "x for x in (head, ahead)",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/fused_policy.py", "test_linear_policy_loss.py",
        (
            "policy: the sums of a sequence are off by a trifle",
            "return segment_sums(x, stats.groups)", "return segment_sums(x, stats.groups) * 1.0001",
            "it_is_the_loss and float32 and product",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/surrogates.py", "test_policy_loss_hostile.py",
        (
            "policy: a ratio on its bound counts as clipped",
            "return ratio < bounds.low,", "return ratio <= bounds.low,",
            "on_its_bound",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/surrogates.py", "test_policy_loss*.py",
        (
            "policy: DPPO leaves out what comes back",
            "too_far = torch.where(advantage > 0, too_high, too_low)",
            "too_far = torch.where(advantage > 0, too_low, too_high)",
            "those_of_the_papers and dppo or certain_tokens",
        ),
        (
            "policy: GMPO bounds the other side",
            "return torch.where(advantage < 0, from_below, from_above)",
            "return torch.where(advantage < 0, from_above, from_below)",
            "those_of_the_papers and gmpo",
        ),
        (
            "policy: VESPO's weight has a gradient",
            "constant = saturated(log_ratio).detach()", "constant = saturated(log_ratio)",
            "those_of_the_papers and vespo",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/penalties.py", "test_kl_penalty.py",
        (
            "penalties: k3+ has the gradient of k3",
            '"k3+": lambda x: _with_gradient_of_k2(expm1_minus(saturated(x)), x)',
            '"k3+": lambda x: expm1_minus(saturated(x))',
            "divergence_in_the_docstring",
        ),
        (
            "penalties: the corrected k3 of a forbidden token",
            "forbidden = x == torch.inf", "forbidden = x == torch.nan",
            "has_no_corrected_penalty",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/penalties.py", "test_kl_penalty.py",
        (
            "penalties: the corrected k3 loses its digits",
            "return torch.where(near, close, far)", "return far",
            "corrected_k3_keeps",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/value.py", "test_value.py",
        (
            "value: equal losses count as clipped",
            "clipped = of_bounded > losses", "clipped = of_bounded >= losses",
            "clipped",
        ),
        (
            "value: twice the loss",
            "losses = losses / 2 * token_weights(", "losses = losses * token_weights(",
            "of_the_formula",
        ),
        (
            "value: the old values are trained too",
            "torch.where(inside, old_values.detach(), 0.0)", "torch.where(inside, old_values, 0.0)",
            "constants",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/value.py", "test_value_reductions.py",
        (
            "value: tokens whatever the reduction",
            "token_weights(inside, reduction,", "token_weights(inside, \"token-mean\",",
            "of_the_formula",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/value.py", "test_losses_over_ranks.py",
        (
            "ranks: the mean of the values' losses has this rank's count",
            "token_weights(inside, reduction, normalizer, dtype, layout)",
            "token_weights(inside, reduction, normalizer, dtype)",
            "of_the_whole and other_calls and 2-False",
        ),
        (
            "ranks: the share of clipped values is that of this rank",
            "masked_mean(clipped.to(dtype), inside, layout)",
            "masked_mean(clipped.to(dtype), inside)",
            "of_the_whole and other_calls and 2-False",
        ),
        (
            "values: the normalizer of a step is not looked at",
            "normalizer = check_reduction(reduction, normalizer, may_be_none=True)",
            "normalizer = None",
            "one_large_batch and value and 2",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/advantages.py", "test_whiten.py",
        (
            "whiten: the variance of a single entry",
            "group) / divisor.clamp(min=1)", "group) / divisor",
            "fewer_than_two",
        ),
        (
            "whiten: equal large entries",
            "mean = mean + shared_by_ranks(correction, group)", "mean = mean * 1.0",
            "no_deviation",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/advantages.py", "test_losses_over_ranks.py",
        (
            "whiten: the sums of this rank",
            "return sum_over_ranks(entries.sum(), group) /", "return entries.sum() /",
            "whitened and 2",
        ),
        (
            "whiten: the count of this rank",
            "count = sum_over_ranks(inside.sum(), group)", "count = inside.sum()",
            "whitened and 2",
        ),
        (
            "whiten: the gradient of the mean is that of this rank",
            "mean = shared_by_ranks(over_batch(x, count), group)", "mean = over_batch(x, count)",
            "whitened and 3",
        ),
        (
            "whiten: the gradient of the rounding of the mean is that of this rank",
            "mean = mean + shared_by_ranks(correction, group)", "mean = mean + correction",
            "whitened and 3",
        ),
        (
            "whiten: the gradient of the variance is that of this rank",
            "variance = shared_by_ranks(over_batch(centred.square(), count - 1), group)",
            "variance = over_batch(centred.square(), count - 1)",
            "whitened and 3",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/samples.py", "test_advantages.py",
        (
            "groups: equal rewards leave a trace",
            "values - values[torch.searchsorted(ids, ids)]", "values * 1.0",
            "exactly_zero",
        ),
        (
            "groups: rewards of other samples",
            "torch.where(counts, rewards[order], 0.0)", "torch.where(counts, rewards, 0.0)",
            "where_they_lie or of_the_papers",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/samples.py", "test_group_advantages.py",
        (
            "samples: the deviation of the batch divided by n",
            "(squares / (number - 1).clamp(min=1)).sqrt()", "(squares / number).sqrt()",
            "of_the_papers",
        ),
        (
            "samples: what does not count is in the sums",
            "segment_sums(torch.where(self.counts, x, 0.0), self.ids)", "segment_sums(x, self.ids)",
            "counts_nowhere",
        ),
        (
            "samples: the largest of those that do not count",
            "x = torch.where(self.counts, x, -torch.inf)", "x = x * 1.0",
            "second_best",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/advantage_kinds.py", "test_group_advantages.py",
        (
            "advantages: the batch's deviation is that of what is centred",
            "batch_deviation(samples.raw, samples.counts)",
            "batch_deviation(samples.centred(), samples.counts)",
            "of_the_papers and batch",
        ),
        (
            "opo: groups without tokens",
            "torch.where(samples.sums(samples.lengths) > 0, samples.lengths, 1.0)",
            "samples.lengths", "of_the_papers and opo",
        ),
        (
            "gpg: samples of equal rewards count",
            "(unequal & samples.counts).sum()", "samples.counts.sum()", "of_the_papers and gpg",
        ),
        (
            "pass@k: with replacement",
            "(number.unsqueeze(1) - drawn).clamp(min=1)", "(number.unsqueeze(1) - 0 * drawn)",
            "pass_at_k",
        ),
        (
            "pass@k: other rewards pass",
            "torch.where(strange, torch.nan, advantages)", "advantages * 1.0", "zeros_and_ones",
        ),
        (
            "grpo_passk: several best ones",
            "torch.where(is_best & alone, samples", "torch.where(is_best, samples", "exactly_zero",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/pf_ppo.py", "test_pf_ppo.py",
        (
            "pf-ppo: signed scores",
            "size = scores.abs()", "size = scores.clamp(min=0)", "shares_of",
        ),
        (
            "pf-ppo: the largest score alone",
            "(scores == largest) | (scores == smallest)", "(scores == largest)", "shares_of",
        ),
        (
            "pf-ppo: the smallest of those that are not valid too",
            "torch.where(counts, scores, torch.inf).amin()", "scores.amin()", "nor_the_worst",
        ),
        (
            "pf-ppo: a sample without a share is drawn",
            "torch.searchsorted(upto, place, right=True)", "torch.searchsorted(upto, place)",
            "every_number",
        ),
        (
            "pf-ppo: as many draws as there are samples",
            "(torch.arange(size, device=device) < number)",
            "(torch.arange(size, device=device) < size)", "never_learnt",
        ),
        (
            "pf-ppo: a NaN is a weight like others",
            "torch.where(scores.isfinite().all(), weights, torch.nan)", "weights.nan_to_num()",
            "not_hidden",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/returns.py", "test_returns.py",
        (
            "returns: one-step returns",
            "gamma=gamma, lam=1.0", "gamma=gamma, lam=0.0", "what_follows and eager",
        ),
        (
            "returns: nothing follows what was cut",
            "lam=1.0, last_values=last_values", "lam=1.0, last_values=None",
            "what_follows and eager",
        ),
        (
            "outcome: the score of every token",
            "inside if every_token else layout.last(inside)", "inside", "the_last_token",
        ),
        (
            "length-adaptive: negative for the shortest",
            "scaled.clamp(min=1)", "scaled", "grows_with",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/groups.py", "test_group_advantages.py",
        (
            "advantages: the floor is a constant",
            "check_positive(\"eps\", eps)", "1e-4", "of_the_papers and eps",
        ),
        (
            "remax: the baseline is added",
            "kept(rewards, counts) - kept(baselines, counts)",
            "kept(rewards, counts) + kept(baselines, counts)", "of_the_papers and remax",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/groups.py", "test_losses_over_ranks.py",
        (
            "advantages: groups are what this rank has of them",
            "this_rank = of_all_ranks(parts, group)", "this_rank = parts, slice(None)",
            "several_ranks and 2",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/gdpo.py", "test_group_advantages.py",
        (
            "gdpo: samples that no function has scored are of the batch",
            "batch_deviation(total, counts.any(1))",
            "batch_deviation(total, torch.ones_like(counts.any(1)))", "missing",
        ),
        (
            "gdpo: unweighted",
            "total = total + weight * (", "total = total + (", "gdpo_is_that",
        ),
        (
            "gdpo: rewards are only centred",
            "(samples.centred() / (samples.deviation() + eps))[places]",
            "samples.centred()[places]", "gdpo_is_that",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/gdpo.py", "test_losses_over_ranks.py",
        (
            "gdpo: groups are what this rank has of them",
            "this_rank = of_all_ranks(parts, group)", "this_rank = parts, slice(None)",
            "comparisons and 2",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/rollout_tokens.py", "test_rollout_correction.py",
        (
            "rollouts: what both sides rule out is NaN",
            "torch.where(ours == engines, 0.0, ours - engines)", "ours - engines",
            "rules_out",
        ),
        (
            "rollouts: one infinite ratio makes NaN of another that is 0",
            "torch.where(log_ratio == torch.inf, _LARGEST, log_ratio)", "log_ratio",
            "rules_out",
        ),
        (
            "rollouts: packed tokens pass for sequences",
            "        if not self.are_sequences:\n            return x\n",
            "        if x.shape == self.tokens.inside.shape:\n            return x\n",
            "packed_tokens",
        ),
        (
            "rollouts: sequences without tokens count",
            "there = tokens.lengths > 0", "there = tokens.lengths >= 0",
            "definitions and float64",
        ),
        (
            "rollouts: the sum overflows before it is divided",
            "self.total(torch.where(self.there, x, 0.0) / self.number.clamp(min=1))",
            "self.total(torch.where(self.there, x, 0.0)) / self.number.clamp(min=1)",
            "far_apart and float32",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/rollout_tokens.py", "test_losses_over_ranks.py",
        (
            "rollouts: the largest of this rank alone",
            "largest = gathered(largest, self.tokens.group).amax()", "pass",
            "rollout_weights",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/rollout.py", "test_rollout_correction.py",
        (
            "rollouts: ratios that overflow",
            "ratio = saturated(log_ratio).exp()", "ratio = log_ratio.exp()",
            "far_apart and float32",
        ),
        (
            "rollouts: a mask truncates",
            "else (0.0, 0.0)", "else (least, most)",
            "definitions and float64",
        ),
        (
            "rollouts: metrics of what the weights were",
            "of_weights = moments(ratio, units), moments(weights, units)",
            "of_weights = moments(ratio, units), moments(ratio, units)",
            "definitions and float64",
        ),
        (
            "rollouts: bounds in any order",
            "if not 0 <= low <= high:", "if not 0 <= low:",
            "does_not_fit_a_correction",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/rollout_metrics.py", "test_rollout_correction.py",
        (
            "rollouts: k3 by subtraction", "expm1_minus(x)", "x.exp() - 1 - 1 * x", "nearly_agree",
        ),
        (
            "rollouts: squares of the largest ratios overflow",
            "torch.where(largest > 0, largest, 1.0)", "torch.ones_like(largest)",
            "far_apart and float32",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/rejection.py", "test_rollout_correction.py",
        (
            "rejection: a sequence stays for one token that is within",
            "complete = tokens.layout.counts(tokens.inside & ~keep) == 0",
            "complete = tokens.layout.counts(keep) > 0",
            "within_the_bounds",
        ),
        (
            "rejection: k1 has no lower bound of its own",
            'return -check_positive("upper", upper), high', "return -math.inf, high",
            "symmetric",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/selection.py", "test_selection.py",
        (
            "selection: one token less", "inside.sum(), group) - 1).clamp",
            "inside.sum(), group)).clamp", "highest",
        ),
        (
            "selection: a share of 0.29 is less",
            " * (1 + 1e-12)", "", "highest or largest",
        ),
        (
            "selection: the host waits",
            "in_order.gather(0, before.unsqueeze(0))", "in_order[before]",
            "nobody_waits",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/covariance.py", "test_selection.py",
        (
            "selection: advantages are not centred",
            "return centred(advantages) * centred(logprobs), inside",
            "return torch.where(inside, advantages, 0.0) * centred(logprobs), inside",
            "largest_covariances",
        ),
        (
            "selection: the first candidates, not random ones",
            "torch.where(candidates, draws, -torch.inf)",
            "torch.where(candidates, 1.0 + 0 * draws, -torch.inf)",
            "as_likely",
        ),
        (
            "selection: what is no candidate is dropped",
            " & (scores > -torch.inf)", "", "as_many_as_wanted",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/controllers.py", "test_controllers.py",
        (
            "controllers: the error is not cut", "min(0.2, max(-0.2, kl / self.target - 1))",
            "max(-0.2, kl / self.target - 1)", "paper",
        ),
        (
            "controllers: a coefficient that turns negative",
            "if steps >= 5 * self.horizon:", "if steps > 5 * self.horizon:", "no_number",
        ),
        (
            "controllers: the bonus stays above the target",
            "return self.coefficient if self.entropy <= self.target else 0.0",
            "return self.coefficient", "trl or holds",
        ),
        (
            "controllers: a resumed run has forgotten the entropy",
            'self.coefficient, self.entropy = coefficient, _number("entropy", state["entropy"])',
            'self.coefficient, _ = coefficient, _number("entropy", state["entropy"])', "resumes",
        ),
    ),
]  # fmt: skip
