"""Changes of preference, supervised and reward losses, and of trust-region steps."""

from mutant import mutants_of

MUTANTS = [
    *mutants_of(
        "fastrlhf/losses/preference.py", "test_packed.py",
        (
            "packed: a reference of tokens is taken for one of sequences",
            "ref_logps.ndim == 2 or ref_logps.shape == pi_logps.shape", "ref_logps.ndim == 2",
            "every_type or tokens_shape",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/preference.py", "test_preference.py",
        (
            "preference: rewards that are not scaled",
            "    return losses, (beta * scores).detach()\n", "    return losses, scores.detach()\n",
            "values_rewards",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/preference.py", "test_losses_over_ranks.py",
        (
            "ranks: pairs are averaged over this rank's tokens",
            "lengths = logps.layout.counts(logps.mask)",
            "lengths = logps.layout.here.counts(logps.mask)",
            "of_the_whole and preference_calls and 2-False",
        ),
        (
            "ranks: sums are taken for tokens of ranks",
            "if spread and self.cu_seqlens is None:",
            "if False:",
            "named",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/pair_losses.py", "test_preference.py",
        (
            "preference: 0·inf in discopop",
            "power = torch.where(rate == 0, 0.0, rate * d)", "power = rate * d",
            "discopop_of_an_impossible",
        ),
        (
            "preference: aot sorts one side",
            "margin = policy.sort(0).values - ref.sort(0).values",
            "margin = policy.sort(0).values - ref",
            "values_rewards and aot",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/pair_scores.py", "test_preference_options.py",
        (
            "pair scores: DPOP's penalty is a bonus",
            "chosen - options.dpop_lambda * torch", "chosen + options.dpop_lambda * torch",
            "papers and DPOP",
        ),
        (
            "pair scores: the likelihood of all pairs is divided by their tokens alone",
            "nll * (chosen.shape[0] / counts[chosen]", "nll * (1 / counts[chosen]",
            "papers and (MPO or sft)",
        ),
        (
            "pair scores: a likelihood that is not averaged",
            "* _nll(logps, pair[0]) / counts[0]", "* _nll(logps, pair[0])",
            "papers and RPO",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/public_length.py", "test_preference_options.py",
        (
            "public length: that of the longer sequence",
            "public = torch.minimum(", "public = torch.maximum(",
            "papers and LD",
        ),
        (
            "public length: one token more",
            "before[i] + count) + 1 for", "before[i] + count + 1) + 1 for",
            "papers and LD",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/f_divergence.py", "test_preference_options.py",
        (
            "f-divergence: a mixture of unlike shares",
            "-log_to_mixture(-s, 0.5, 0.5)", "-log_to_mixture(-s, 0.4, 0.6)",
            "papers and JS",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/triple.py", "test_reference_free_options.py",
        (
            "tpo: the preferred sequence is the gold one",
            "-sums[gold_idxs.long()]", "-sums[yw_idxs.long()]",
            "types_of_tpo",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/rankings.py", "test_rankings.py",
        (
            "rankings: pairs across rankings",
            "(groups[:, None] == groups) & (ranks[:, None] < ranks)", "ranks[:, None] < ranks",
            "all_its_pairs",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/unpaired.py", "test_unpaired_options.py",
        (
            "kto: a baseline of apo",
            "return scores.new_zeros(())", "return scores.new_ones(())",
            "apo_zero_of_single",
        ),
        (
            "kto: a mean that may be negative",
            "return (total / count.clamp(min=1)).clamp(min=0)", "return total / count.clamp(min=1)",
            "not_negative",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/unpaired.py", "test_unpaired.py",
        (
            "kto: a baseline below 0",
            "return kl.detach().to(scores).clamp(min=0)", "return kl.detach().to(scores)",
        ),
        (
            "kto: weights change places",
            "desirable_weight * sigmoid(-above),\n        undesirable_weight",
            "undesirable_weight * sigmoid(-above),\n        desirable_weight",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/reference_free.py", "test_reference_free.py",
        (
            "simpo: the target margin helps",
            "mean[yl_idxs.long()]) - gamma\n", "mean[yl_idxs.long()]) + gamma\n",
        ),
        (
            "cpo: the likelihood is not weighed",
            "losses + alpha * chosen_nll", "losses + chosen_nll",
        ),
        ("orpo: probabilities for odds", "log_odds = mean - _log1mexp(mean)", "log_odds = mean"),
    ),
    *mutants_of(
        "fastrlhf/losses/reward.py", "test_reward.py",
        ("reward: the margin helps", "else difference - margin)", "else difference + margin)"),
    ),
    *mutants_of(
        "fastrlhf/losses/linear_preference.py", "test_linear_dpo_loss.py",
        (
            "linear dpo: a pair with an empty sequence is dropped",
            "sequences[self.yw_idxs.long()] | sequences[self.yl_idxs.long()]",
            "sequences[self.yw_idxs.long()] & sequences[self.yl_idxs.long()]",
            "one_sequence_has_no",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/cross_entropy_options.py", "test_linear_cross_entropy.py",
        (
            "cross-entropy: smoothing beside the whole likelihood",
            "losses = (1 - self.label_smoothing) * losses + self", "losses = losses + self",
            "loss_is_that and smoothed",
        ),
        (
            "cross-entropy: a z-loss that is not squared",
            "self.z_loss * lse.square()", "self.z_loss * lse.abs()",
            "loss_is_that and loss",
        ),
        (
            "cross-entropy: a mean over ignored tokens too",
            "by = live.sum().clamp(min=1) if", "by = live.numel() if",
            "loss_is_that and plain",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/cross_entropy_options.py", "test_losses_over_ranks.py",
        (
            "cross-entropy: the normalizer is not looked at",
            "by = live.sum().clamp(min=1) if normalizer is None else normalizer",
            "by = live.sum().clamp(min=1)",
            "one_large_batch and cross and 2",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/cross_entropy_options.py", "test_cross_entropy.py",
        (
            "supervised: the weight of dft has a gradient",
            "logprob.detach().exp()", "logprob.exp()", "of_the_formula and dft and eager",
        ),
        (
            "supervised: dft of a token without probability",
            "torch.where(p != 0, losses, 0.0) * p", "losses * p", "without_probability",
        ),
        (
            "supervised: a z-loss that is weighed by p",
            "            losses = losses + self.z_losses(lse)\n",
            "            losses = losses + self.z_losses(lse) * logprob.detach().exp()\n",
            "of_the_formula and dft and loss and eager",
        ),
        (
            "supervised: a weight of 0 times what is infinite",
            "torch.where(counts, x, 0.0) for x in fields", "x for x in fields",
            "weight_zero and eager",
        ),
        (
            "supervised: weights have a gradient", "return weights.detach()", "return weights",
            "any_kind",
        ),
        (
            "supervised: a smooth label goes with dft",
            'if smoothing != 0 and self.loss_type == "dft":', "if False:", "errors_name",
        ),
    ),
    *mutants_of(
        "fastrlhf/trpo/step.py", "test_trpo.py",
        (
            "trpo: ratios overflow",
            "return saturated(logprobs - batch.old).exp() * batch.advantages",
            "return (logprobs - batch.old).exp() * batch.advantages",
            "far_away",
        ),
        (
            "trpo: the first step is shortened already",
            "step = full_step * backtrack_ratio**i",
            "step = full_step * backtrack_ratio ** (i + 1)",
            "natural_gradient or realised_kl",
        ),
        (
            "trpo: half of the trust region",
            "math.sqrt(2 * max_kl / length)", "math.sqrt(max_kl / length)",
            "natural_gradient or realised_kl",
        ),
        (
            "trpo: the old policy moves along",
            "return output.clone() if shared else output", "return output",
            "parameters_themselves",
        ),
    ),
    *mutants_of(
        "fastrlhf/trpo/parameters.py", "test_trpo.py",
        (
            "trpo: steps add up",
            "p.copy_(wide(old) + part)", "p.copy_(wide(p) + part)",
            "is_shortened",
        ),
    ),
    *mutants_of(
        "fastrlhf/trpo/policy.py", "test_trpo.py",
        (
            "trpo: no token counts",
            "return self.summed(here).clamp(min=1)", "return self.summed(here)", "without_tokens",
        ),
        (
            "trpo: tokens are counted in the dtype of the mask",
            "here = (self.mask != 0).sum()", "here = self.mask.sum()", "counted_exactly",
        ),
        (
            "trpo: the temperature is forgotten",
            'return head | {"temperature": self.temperature}', 'return head | {"temperature": 1.0}',
            "natural_gradient",
        ),
    ),
    *mutants_of(
        "fastrlhf/trpo/policy.py", "test_trpo_over_ranks.py",
        (
            "trpo: without a group every process is alone",
            "return dist.group.WORLD", "return None",
            "two_processes",
        ),
    ),
    *mutants_of(
        "fastrlhf/trpo/policy.py", "test_losses_over_ranks.py",
        (
            "trpo: ranks of a group go their own ways",
            "dist.all_reduce(x, group=self.group)", "pass",
            "trust_region and 2",
        ),
    ),
    *mutants_of(
        "fastrlhf/trpo/conjugate_gradient.py", "test_conjugate_gradient.py",
        (
            "trpo: an operator that is not definite",
            "going = (square > floor) & (curvature > 0)", "going = square > floor",
            "not_definite",
        ),
        (
            "trpo: steepest descent",
            "torch.where(going, residual + share * direction, direction)",
            "torch.where(going, residual, direction)",
            "as_many_steps",
        ),
        (
            "trpo: the solution of a target of size one",
            "return (x * (size / first_product_size)).to(",
            "return (x * (1 / first_product_size)).to(",
            "scales_with or solved_at_once",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/ranks.py", "test_losses_over_ranks.py",
        (
            "ranks: a sequence is what this rank has of it",
            "return sum_over_ranks(self.here.sums(x), self.group)", "return self.here.sums(x)",
            "of_the_whole and other_calls and 2-False",
        ),
        (
            "ranks: a sequence is as long as this rank's part of it",
            "return summed(self.here.counts(mask), self.group)", "return self.here.counts(mask)",
            "of_the_whole and other_calls and 2-False",
        ),
        (
            "ranks: the loss is that of this rank's tokens",
            "return sum_over_ranks(x.sum(), self.group)", "return x.sum()",
            "of_the_whole and other_calls and 2-False",
        ),
        (
            "ranks: a ratio of sequences has the gradient of this rank's tokens",
            "self.here.spread(shared_by_ranks(x, self.group))", "self.here.spread(x)",
            "of_the_whole and policy_calls and 2-False",
        ),
        (
            "ranks: the normalizer is that of the first micro-batch",
            "for x in masks]).sum()", "for x in masks[:1]]).sum()",
            "normalizer_counts and 3",
        ),
        (
            "ranks: the normalizer is that of this rank",
            "count = summed(count, group)", "count = count + 0",
            "normalizer_counts and 3",
        ),
        (
            "ranks: the normalizer does not know that DDP takes the mean",
            "else count.double() / ranks", "else count.double()",
            "one_large_batch and DPO and 2",
        ),
        (
            "ranks: the normalizer of nothing is 0",
            "count = count.clamp(min=1)", "count = count + 0",
            "counts_what_is_here",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/arguments.py", "test_losses_over_ranks.py",
        (
            "ranks: packed tokens may be taken for sequences",
            "if logps.ndim == 1:  # on one rank", "if False:  # on one rank",
            "named",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/cross_entropy.py", "test_cross_entropy.py",
        (
            "supervised: weights of ignored tokens",
            "        weights = torch.where(live, weights, 0)\n", "        pass\n",
            "of_the_formula and eager",
        ),
        (
            "supervised: a second pass without weights",
            "scorer, targets, options, weights, d_losses, ignore_index",
            "scorer, targets, options, None, d_losses, ignore_index", "both_forms and none",
        ),
    ),
    *mutants_of(
        "fastrlhf/losses/process_reward.py", "test_process_reward.py",
        (
            "process reward: the other class",
            "scores.ndim == like.ndim else scores[..., 1] - scores[..., 0]",
            "scores.ndim == like.ndim else scores[..., 0] - scores[..., 1]", "of_the_formula",
        ),
        (
            "process reward: labels of 0 and 1 alone", "(y - 1) * log_sigmoid(-s)",
            "-log_sigmoid(-s)", "of_the_formula",
        ),
        (
            "process reward: a term that is 0 times infinity",
            "torch.where(y > 0, -y * log_sigmoid(s), 0.0)", "-y * log_sigmoid(s)", "one_term",
        ),
        (
            "process reward: a tie is right", "(s.detach() > 0) == positive",
            "(s.detach() >= 0) == positive", "accuracies or a_tie",
        ),
        (
            "process reward: the mean of what is nearly certain",
            "return torch.where(near, torch.log1p(-missing.clamp(max=0.5)), far)", "return far",
            "tails and mean",
        ),
        (
            "process reward: the mean of what is nearly impossible",
            "return torch.where(near, torch.log1p(-missing.clamp(max=0.5)), far)",
            "return torch.log1p(-missing)", "tails and mean",
        ),
        (
            "process reward: a sequence without steps is certain",
            "log_scores = torch.where(counts > 0, log_scores, -torch.inf)", "pass", "without_steps",
        ),
        (
            "process reward: the least of all tokens",
            "values = torch.where(inside, x, without).reshape(-1)", "values = x.reshape(-1)",
            "no_step and min",
        ),
    ),
]  # fmt: skip
