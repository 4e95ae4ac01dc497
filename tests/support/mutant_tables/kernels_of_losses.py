"""Changes of the kernels of divergences, losses, Fisher products and scans."""

from mutant import Mutant, mutants_of

MUTANTS = [
    *mutants_of(
        "kernels/scan.py", "test_gae.py",
        (
            "gae: found only if both sides are",
            "return far_found | near_found,", "return far_found & near_found,",
            "masked_altogether or recurrence",
        ),
        (
            "gae: functions composed in the other order",
            "near_scale * far_shift + near_shift", "far_scale * near_shift + far_shift",
            "recurrence",
        ),
        (
            "gae: a token that does not count hands on no value",
            "tl.where(first, tl.where(keep, value, next_value), 0.0)",
            "tl.where(first, value, 0.0)",
            "masked_altogether or recurrence",
        ),
        (
            "gae: a token that does not count decays",
            "tl.where(keep, decay, 1.0)", "tl.where(keep, decay, decay)",
            "recurrence",
        ),
        (
            "gae: returns outside of the mask",
            "tl.where(keep, advantage + value, 0.0)", "advantage + value",
            "changes_no_bit or recurrence",
        ),
        (
            "gae: the next value without a discount",
            "reward.to(acc) + gamma * next_value - value", "reward.to(acc) + next_value - value",
            "recurrence",
        ),
        (
            "gae: results in the dtype of the rewards",
            "torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)",
            "torch.promote_types(rewards.dtype, torch.float32)",
            "wider_dtype",
        ),
    ),
    *mutants_of(
        "kernels/scan.py", "test_packed.py",
        (
            "packed: the value of the next sequence follows",
            "(neighbour < stop) & (offsets", "(neighbour < tokens) & (offsets",
            "bits_are_those_of_rows",
        ),
        (
            "packed: blocks of a scan begin at the first token",
            "token = start + (blocks - 1 - done)", "token = 0 * start + (blocks - 1 - done)",
            "bits_are_those_of_rows",
        ),
    ),
    Mutant(
        "launch: a launcher without its device",
        "kernels/scan.py",
        "@on_their_device\ndef gae(", "def gae(",
        "test_launch.py", "device_of_its_tensors",
    ),
    *mutants_of(
        "kernels/scan.py", "test_returns.py",
        (
            "gae: the last value of the first sequence",
            "tl.load(last_values + sequence)", "tl.load(last_values)", "each_sequence and triton",
        ),
        (
            "gae: lambda of the first sequence",
            "gamma * tl.load(lams + sequence)", "gamma * tl.load(lams)", "each_sequence and triton",
        ),
    ),
    *mutants_of(
        "kernels/preference_loss.py", "test_preference*.py",
        (
            "pairs: the slope without beta",
            "return loss, beta * slope", "return loss, slope",
            "sigmoid and triton",
        ),
        (
            "pairs: 0 * -inf without smoothing",
            "return tl.where(label_smoothing > 0, label_smoothing * log_sigmoid(-d), 0.0)",
            "return label_smoothing * log_sigmoid(-d)",
            "impossible_rejected and triton",
        ),
        (
            "pairs: the slope of a hinge at its corner",
            "0.0, shortfall), tl.where(shortfall <= 0, 0.0, -beta)",
            "0.0, shortfall), tl.where(shortfall < 0, 0.0, -beta)",
            "triton and hinge",
        ),
        (
            "pairs: the gradient of a sum for that of a mean",
            "d_sum *= tl.load(weights + sequence)", "d_sum *= 1.0",
            "triton and (ipo or summed_over)",
        ),
    ),
    *mutants_of(
        "kernels/preference_loss.py", "test_preference*.py",
        (
            "pairs: a mean over no tokens",
            "return score, tl.maximum(count, 1.0)", "return score, count",
            "triton and (without_any_token or empty)",
        ),
        (
            "pairs: the mask is not looked at backward",
            "tl.where(keep, d_sum, 0.0)", "tl.where(token >= 0, d_sum, 0.0)",
            "triton and outside_the_mask",
        ),
        (
            "pairs: a reference per token of the first sequence",
            "place = of.reference + row * of.reference_stride + token",
            "place = of.reference + token + 0 * row * of.reference_stride",
            "triton and summed_over",
        ),
        (
            "pairs: results in the dtype of the policy",
            "acc = torch.promote_types(torch.promote_types(policy.dtype, reference.dtype), "
            "torch.float32)",
            "acc = torch.promote_types(policy.dtype, torch.float32)",
            "promote_mixed or precision_of_the_reference",
        ),
    ),
    *mutants_of(
        "kernels/preference_loss.py", "test_preference_backends.py",
        (
            "pairs: the rejected sequence's share is added",
            "tl.where(as_chosen, slope, 0.0) - tl.where(as_rejected, slope, 0.0)",
            "tl.where(as_chosen, slope, 0.0) + tl.where(as_rejected, slope, 0.0)",
            "triton and against_itself",
        ),
    ),
    *mutants_of(
        "kernels/preference_loss.py", "test_traffic.py",
        (
            "packed: the gradient of other sequences is overwritten",
            "gradient, mask=token < stop)", "gradient, mask=token < tokens)",
            "packed_preferences",
        ),
    ),
    *mutants_of(
        "kernels/divergence.py", "test_divergence*.py",
        (
            "divergence: a side beyond the vocabulary",
            "z = tl.where(inside, z, -float(\"inf\"))", "z = tl.where(inside, z, 0.0)",
            "match_the_oracle and triton",
        ),
        (
            "divergence: the sum of one side loses its base",
            "return new_peak, rest * tl.exp2((peak - base) * rate) + tl.sum(weight, axis=1)",
            "return new_peak, rest + tl.sum(weight, axis=1)",
            "match_the_oracle and triton or offset and triton",
        ),
        (
            "divergence: one tile less in the second sweep",
            "for done in tl.range(0, tiles,", "for done in tl.range(1, tiles,",
            "match_the_oracle and triton",
        ),
        (
            "divergence: the mean is not taken off",
            "return tl.where(own == 0, 0.0, own * (w - mean))",
            "return tl.where(own == 0, 0.0, own * w)",
            "match_the_oracle and triton",
        ),
        (
            "divergence: the other side of a mixture",
            "tl.where(own == 0, 0.0, share * own * (-to_mixture - mean))",
            "tl.where(own == 0, 0.0, share_other * own * (-to_mixture - mean))",
            "match_the_oracle and triton",
        ),
    ),
    *mutants_of(
        "kernels/divergence.py", "test_divergence_accuracy.py",
        (
            "divergence: sides far apart are not taken from their bases",
            "far = tl.abs(base - base_other) > 1.0", "far = tl.abs(base - base_other) > 1e30",
            "offset_of_one_side and triton",
        ),
        (
            "divergence: differences of logits are rounded first",
            "far = tl.abs(base - base_other) > 1.0", "far = tl.abs(base - base_other) > -1.0",
            "keep_the_relative_accuracy and triton or keep_the_accuracy and triton",
        ),
        (
            "divergence: first-order terms, which cancel",
            "tl.where(tl.abs(w) < 0.5, p * expm1_minus_near_0(-w), q - p + _mean(p, w))",
            "q - p + _mean(p, w)",
            "nearly_equal and triton",
        ),
        (
            "divergence: the rounding of the normalisers stays",
            "tl.where(terms.value <= rounding, 0.0, terms.value - rounding)",
            "tl.maximum(terms.value, 0.0)",
            "nearly_equal and triton",
        ),
    ),
    *mutants_of(
        "kernels/divergence.py", "test_divergence_hostile.py",
        (
            "divergence: what has no probability takes part",
            "return tl.where(p == 0, 0.0, p * w)", "return p * w",
            "masked_vocabulary and triton or only_one_side and triton",
        ),
        (
            "divergence: no distance from a side of nothing",
            "if_q_is_empty = float(\"inf\")", "if_q_is_empty = 0.0",
            "nothing_but_minus_infinity",
        ),
    ),
    *mutants_of(
        "kernels/divergence.py", "test_divergence_backends.py",
        (
            "divergence: rows without an upstream gradient are read",
            "if (tl.load(mask + row) == 0) | (g == 0.0) | nothing:",
            "if (tl.load(mask + row) == 0) | nothing:",
            "without_an_upstream_gradient",
        ),
    ),
    Mutant(
        "divergence: the excess of the mixture where the sides are near alone",
        "kernels/divergence.py",
        "moderate = (excess >= -0.5) & (excess <= 1.0)", "moderate = tl.abs(gap) < 0.5",
        "test_divergence_accuracy.py", "nearly_one_side and triton",
    ),
    *mutants_of(
        "kernels/divergence.py", "test_vocabulary_over_ranks.py",
        (
            "shared: the norm of q is that of p in the sums",
            "_normalised_side(norms + row + 3 * plane,",
            "_normalised_side(norms + row,",
            "of_the_whole and kl_divergence and triton",
        ),
    ),
    *mutants_of(
        "kernels/fisher.py", "test_fisher.py",
        (
            "fisher: a tangent without probability",
            "tl.sum(tl.where(weight == 0, 0.0, weight * u), axis=1)",
            "tl.sum(weight * u, axis=1)",
            "without_probability and triton",
        ),
        (
            "fisher: one temperature for two",
            "inverse_t2 = 1.0 / (row_t * row_t)", "inverse_t2 = 1.0 / row_t",
            "dense_matrix and triton and number and 33",
        ),
        (
            "fisher: rows of nothing are read",
            "inside = columns < read", "inside = columns < vocab",
            "masked_rows and triton",
        ),
        (
            "fisher: lanes merged without their bases",
            "tl.sum(moment * fade, axis=0) / row_total",
            "tl.sum(moment, axis=0) / row_total",
            "dense_matrix and triton",
        ),
        (
            "fisher: a second moment that is not centred",
            "squares += tl.sum(tl.where(weight == 0, 0.0, value * centred), axis=1)",
            "squares += tl.sum(tl.where(weight == 0, 0.0, value * u), axis=1)",
            "rounding and triton or variance_of and triton",
        ),
    ),
    *mutants_of(
        "kernels/policy_loss.py", "test_logits_policy_loss_hostile.py",
        (
            "policy kernel: a forbidden token's ratio to itself has a slope",
            'return log_ratio, ended | (logprob == -float("inf"))', "return log_ratio, ended",
            "policy_forbids",
        ),
        (
            "policy kernel: so has that of DPPO",
            'ended = (ended & (dual == float("inf"))) | (logprob == -float("inf"))',
            'ended = ended & (dual == float("inf"))', "policy_forbids and dppo",
        ),
        (
            "policy kernel: a forbidden token's penalty has a slope",
            "slope = tl.where(forbidden, 0.0, slope)", "slope = slope", "policy_forbids and k1",
        ),
        (
            "policy kernel: a ratio in fp64 ends at that of fp32",
            "tl.constexpr = 700.0 if", "tl.constexpr = 80.0 if",
            "beyond_that_of_fp32",
        ),
        (
            "policy kernel: a ratio on its lower bound is clipped",
            "too_low = bad & (ratio < bounds.low)", "too_low = bad & (ratio <= bounds.low)",
            "on_its_bound",
        ),
        (
            "policy kernel: a ratio on its upper bound is clipped",
            "tl.where(bad, ratio > bounds.dual, ratio > bounds.high)",
            "tl.where(bad, ratio > bounds.dual, ratio >= bounds.high)",
            "on_its_bound",
        ),
        (
            "policy kernel: no dual clip",
            "tl.where(bad, ratio > bounds.dual, ratio > bounds.high)",
            "(bad == 0) & (ratio > bounds.high)",
            "far_away and clip and triton",
        ),
        (
            "policy kernel: weight 0 of a forbidden token",
            "return tl.where(weight == 0, 0.0, -weight * logprob), -weight",
            "return -weight * logprob, -weight",
            "has_an_entropy and triton",
        ),
        (
            "policy kernel: the slope of k3 beyond its end",
            "return expm1_minus(x), tl.where(ended, 0.0, -expm1(x))",
            "return expm1_minus(x), -expm1(x)",
            "beyond_its_end and triton",
        ),
    ),
    *mutants_of(
        "kernels/policy_loss.py", "test_logits_policy_loss*.py",
        (
            "policy kernel: the slope of |x| at 0",
            "tl.where(x < 0, 1.0, x * 0.0)", "tl.where(x <= 0, 1.0, x * 0.0)",
            "reference_itself and triton",
        ),
        (
            "policy kernel: a slope of 0 takes the entropy's gradient along",
            "((g == 0) & (h == 0))", "(g == 0)",
            "clipped_token and triton",
        ),
        (
            "policy kernel: either slope of 0 ends the row",
            "((g == 0) & (h == 0))", "((g == 0) | (h == 0))",
            "match_the_oracles and clip and triton",
        ),
        (
            "policy kernel: the ratio of cispo without its bound",
            "bounded = tl.where(ratio > bounds.high, bounds.high, bounded)",
            "bounded = bounded * 1.0",
            "match_the_oracles and cispo and triton",
        ),
        (
            "policy kernel: the ratio of cispo without its floor",
            "bounded = tl.where(ratio < bounds.low, bounds.low, ratio)",
            "bounded = ratio * 1.0",
            "match_the_oracles and cispo and triton",
        ),
        (
            "policy kernel: DPPO leaves out what comes back",
            "gone = tl.where(advantage > 0, too_high, too_low)",
            "gone = tl.where(advantage > 0, too_low, too_high)",
            "leaves_tokens_out and triton",
        ),
        (
            "policy kernel: DPPO's bound of the ratio ends the gradient",
            "loss = -tl.where(ratio > dual, dual, ratio) * advantage",
            "ended = ended | (ratio > dual)\n"
            "    loss = -tl.where(ratio > dual, dual, ratio) * advantage",
            "leaves_tokens_out and triton",
        ),
        (
            "policy kernel: DPPO's probabilities swapped",
            "larger = exp(tl.where(grown, logprob, logprob - log_ratio))",
            "larger = exp(tl.where(grown, logprob - log_ratio, logprob))",
            "match_the_oracles and dppo_tv and triton and 64",
        ),
        (
            "policy kernel: DPPO's divergence without the other words",
            "divergence = of_token - expm1(old) * (_log_of_others(old) - _log_of_others(logprob))",
            "divergence = of_token",
            "dppo and triton",
        ),
        (
            "policy kernel: the corrected penalty's gradient without that of the ratio",
            "return ratio * kl, ratio * tl.where(ended, slope, kl + slope)",
            "return ratio * kl, ratio * slope",
            "times_the_ratio and triton and token",
        ),
        (
            "policy kernel: the corrected k3's gradient is that of k3",
            "tl.where(near, -expm1(x), 1.0), -x)", "tl.where(near, -expm1(x), 1.0), -expm1(x))",
            "times_the_ratio and triton and token",
        ),
        (
            "policy kernel: penalties have one weight",
            "factor *= tl.load(kl_weights + row)", "factor *= 1.0",
            "that_are_weighed and triton",
        ),
        (
            "policy kernel: infinity times the weight 0 of a penalty",
            "kl, kl_slope = tl.where(factor == 0, 0.0, kl), tl.where(factor == 0, 0.0, kl_slope)",
            "kl, kl_slope = kl + 0.0, kl_slope + 0.0",
            "that_are_weighed and triton",
        ),
        (
            "policy kernel: an entropy that is punished backward",
            "h = -weight * tl.full((), entropy_coef, acc)",
            "h = weight * tl.full((), entropy_coef, acc)",
            "match_the_oracles and clip and triton",
        ),
        (
            "policy kernel: the loss of an ignored row",
            "tl.store(losses + row, tl.where(live, loss, 0.0))", "tl.store(losses + row, loss)",
            "match_the_oracles and clip and triton",
        ),
        (
            "policy kernel: the reference on the wrong side",
            "PENALTY(KL, tl.load(ref_logprobs + row) - logprob, log_ratio)",
            "PENALTY(KL, logprob - tl.load(ref_logprobs + row), log_ratio)",
            "match_the_oracles and clip and triton",
        ),
    ),
]  # fmt: skip
