"""The changes that `mutants.py` makes, and the tests that should notice each.

A row says where, by a text that stands in the file exactly once, and names the narrowest selection
of tests that is enough.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One change: `old` becomes `new` in a file."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # a file in tests/
    select: str = ""  # what pytest takes as -k
    equivalent: str = ""  # why no test can tell it from the original, if none can


def _mutants(
    file: str, tests: str, *rows: tuple[str, str, str] | tuple[str, str, str, str]
) -> list[Mutant]:
    """Make the mutants of one file that one test file should notice: name, old, new, selection."""
    return [Mutant(row[0], file, row[1], row[2], tests, *row[3:]) for row in rows]


MUTANTS = [
    *_mutants(
        "kernels/token_stats.py", "test_token_stats.py",
        (
            "K1: columns past the end are logits of 0",
            'stride_vocab, mask=inside, other=-float("inf")\n        ).to(acc)\n        if WORDS',
            "stride_vocab, mask=inside, other=0.0\n        ).to(acc)\n        if WORDS",
            "match_the_oracle and triton and 5003",
        ),
        (
            "K1: the smallest peak of the splits",
            "row_peak = tl.max(peak, axis=1)", "row_peak = tl.min(peak, axis=1)",
            "several_splits and triton",
        ),
        (
            "K1: ignored rows are live",
            "live = inside & (target != ignore_index)\n    row_t = row_temperature("
            "token_temperature, temperature, row, live, acc, PER_TOKEN_TEMPERATURE)\n"
            "    tl.device_assert",
            "live = inside\n    row_t = row_temperature(token_temperature, "
            "temperature, row, live, acc, PER_TOKEN_TEMPERATURE)\n    tl.device_assert",
            "exactly_zero and triton",
        ),
        (
            "K1: splits that are not there are read",
            "present = live[:, None] & (split < splits)\n    plane = stride_plane",
            "present = live[:, None] & (split >= 0)\n    plane = stride_plane",
            "masked_vocabulary and triton",
        ),
        (
            "K1: the lse without the temperature",
            "tl.where(live, base / row_t + log_norm, 0.0)", "tl.where(live, base + log_norm, 0.0)",
            "match_the_oracle and triton and scaled and 1000",
        ),
        (
            "K1: a row of nothing has a peak",
            'tl.where(live & (empty == 0), base, -float("inf"))',
            'tl.where(live, base, -float("inf"))',
            "masked_vocabulary and triton",
        ),
        (
            "K2: a slope of 0 alone ends the row",
            "without_gradient &= h == 0.0", "without_gradient |= h == 0.0",
            "either_statistic and triton",
        ),
        (
            "K2: a zero slope of the log-prob alone ends the row",
            "without_gradient &= h == 0.0", "without_gradient = g == 0.0",
            "either_statistic and triton",
        ),
        (
            "K2: a zero slope of the lse alone ends the row",
            "without_gradient &= l == 0.0", "without_gradient |= l == 0.0",
            "any_slope and triton",
        ),
        (
            "K2: a row with a slope of the lse alone is zeros",
            "without_gradient &= l == 0.0", "without_gradient &= True",
            "any_slope and triton",
        ),
        (
            "K2: the slope of the lse is that of the log-prob",
            "d_logprob if d_lse is None else d_lse", "d_logprob",
            "any_slope and triton",
        ),
        (
            "K2: the other inner dimension",
            "    destination += columns.to(tl.int64) * d_stride_vocab\n\n    base",
            "    destination += columns.to(tl.int64)\n\n    base",
            "layouts and True",
        ),
    ),
    *_mutants(
        "kernels/rows.py", "test_token_stats.py",
        (
            "rows: no finite base",
            'return tl.where(peak == -float("inf"), 0.0, peak)', "return peak",
            "masked_vocabulary and triton",
        ),
        (
            "rows: an empty sum meets inf * 0",
            "(moment + rest * tl.where(fade > 0, shift, 0.0)) * fade",
            "(moment + rest * shift) * fade",
            "masked_vocabulary and triton",
        ),
        (
            "rows: capped columns past the end",
            'capped = tl.where(inside, capped, -float("inf"))\n    new_peak',
            "capped = capped * 1.0\n    new_peak",
            "match_the_oracle and triton and capped and 1000",
        ),
        (
            "rows: the target counts twice",
            "weight = tl.where(columns == target, 0.0, tl.exp2(bits))", "weight = tl.exp2(bits)",
            "match_the_oracle and triton and plain and 33",
        ),
        (
            "rows: 0 * -inf in the moment",
            "tl.sum(tl.where(weight > 0, weight * bits, 0.0), axis=1)",
            "tl.sum(weight * bits, axis=1)",
            "masked_vocabulary and triton",
        ),
        (
            "rows: a log-prob that cancels",
            "logprob = log_sigmoid(target_shift - tl.log(rest))",
            "logprob = target_shift - log_norm",
            "nearly_one and triton",
        ),
        (
            "rows: a row of nothing but -inf",
            'logprob = tl.where(empty, -float("inf"), logprob)', "logprob = logprob * 1.0",
            "masked_vocabulary and triton",
        ),
        (
            "rows: the lse has no slope at the target",
            "l * p - g * expm1(logprob), (l - g) * p", "0.0 - g * expm1(logprob), (l - g) * p",
            "gradient_of_the_lse and triton and 33",
        ),
        (
            "rows: the lse has no slope beside the target",
            "l * p - g * expm1(logprob), (l - g) * p", "l * p - g * expm1(logprob), (0.0 - g) * p",
            "gradient_of_the_lse and triton and 33",
        ),
        (
            "rows: 1 - p by subtraction beside the lse",
            "l * p - g * expm1(logprob), (l - g) * p", "g + (l - g) * p, (l - g) * p",
            "both_tails and triton",
        ),
        (
            "rows: slopes of log-prob and lse that do not cancel",
            "l * p - g * expm1(logprob), (l - g) * p",
            "l * p - g * expm1(logprob), l * (p * (1.0 + 1e-6)) - g * p",
            "slopes_that_cancel and triton",
        ),
        (
            "rows: 1 - p by subtraction",
            "-g * expm1(logprob)", "g - g * p",
            "nearly_one and triton",
        ),
        (
            "rows: 0 * -inf in the gradient",
            "dz -= tl.where(p > 0, h * p * (bits * LN2 + entropy), 0.0)",
            "dz -= h * p * (bits * LN2 + entropy)",
            "masked_vocabulary and triton",
        ),
        (
            "rows: the gradient in bits",
            "h * p * (bits * LN2 + entropy)", "h * p * (bits + entropy)",
            "match_the_oracle and triton and plain and 33",
        ),
        (
            "rows: the gradient without the temperature",
            "return dz * (slope * (1.0 / row_t))", "return dz * slope",
            "match_the_oracle and triton and scaled and 33",
        ),
        (
            "rows: the entropy without what the target adds",
            "tl.where(target_weight > 0, target_weight * target_bits, 0.0)",
            "tl.where(target_weight > 0, 0.0, 0.0)",
            "match_the_oracle and triton and plain and 33",
        ),
    ),
    *_mutants(
        "kernels/tiles.py", "test_token_stats.py",
        (
            "tiles: log1p takes the logarithm too early",
            "tl.where(u <= 1.0, log1p_near_0(u)", "tl.where(u <= 0.01, log1p_near_0(u)",
            "nine_tenths and triton",
        ),
        (
            "tiles: expm1 subtracts too early",
            "tl.where(tl.abs(x) < 0.5, x * _exp_series(x, 1), exp(x) - 1.0)",
            "tl.where(tl.abs(x) < 0.001, x * _exp_series(x, 1), exp(x) - 1.0)",
            "nine_tenths and triton",
        ),
        (
            "tiles: the slope of tanh cancels",
            ", complement * (2.0 - complement)", ", 1.0 - magnitude * magnitude",
            "beyond_the_cap and triton",
        ),
        (
            "tiles: rows and blocks change places",
            "return (row // inner) * stride_outer + (row % inner) * stride_inner",
            "return (row % inner) * stride_outer + (row // inner) * stride_inner",
            "layouts and triton",
        ),
    ),
    *_mutants(
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
    *_mutants(
        "kernels/preference_loss.py", "test_preference.py",
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
            "pairs: the gradient of a sum for that of a mean",
            "d_sum *= tl.load(weights + sequence)", "d_sum *= 1.0",
            "triton and (ipo or summed_over)",
        ),
        (
            "pairs: a reference per token of the first sequence",
            "place = reference + row * reference_stride + token",
            "place = reference + token + 0 * row * reference_stride",
            "triton and summed_over",
        ),
        (
            "pairs: the rejected sequence's share is added",
            "tl.where(as_chosen, slope, 0.0) - tl.where(as_rejected, slope, 0.0)",
            "tl.where(as_chosen, slope, 0.0) + tl.where(as_rejected, slope, 0.0)",
            "triton and against_itself",
        ),
        (
            "pairs: results in the dtype of the policy",
            "acc = torch.promote_types(torch.promote_types(policy.dtype, reference.dtype), "
            "torch.float32)",
            "acc = torch.promote_types(policy.dtype, torch.float32)",
            "promote_mixed or precision_of_the_reference",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/preference_loss.py", "test_preference.py",
        (
            "pairs: an expanded gradient",
            "d_losses.contiguous(),", "d_losses,",
            "expanded_gradient",
        ),
    ),
    *_mutants(
        "kernels/tiles.py", "test_packed.py",
        (
            "packed: a kernel begins each sequence at the first token",
            "start = tl.load(cu_seqlens + sequence)\n", "start = tl.load(cu_seqlens)\n",
            "bits_are_those_of_rows",
        ),
        (
            "packed: a kernel runs over the end of a sequence",
            "stop = tl.load(cu_seqlens + sequence + 1)", "stop = tokens + start * 0",
            "bits_are_those_of_rows",
        ),
    ),
    *_mutants(
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
    *_mutants(
        "kernels/preference_loss.py", "test_traffic.py",
        (
            "packed: the gradient of other sequences is overwritten",
            "gradient, mask=token < stop)", "gradient, mask=token < tokens)",
            "packed_preferences",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/layout.py", "test_packed.py",
        (
            "layout: a border belongs to the sequence before it",
            "place, right=True)", "place, right=False)",
            "counts_are_exact",
        ),
        (
            "layout: the tokens after the last whole group are lost",
            "torch.where(across, end * _NEIGHBOURS, stop), stop)",
            "torch.where(across, stop, stop), stop)",
            "sums_of_sequences",
        ),
        (
            "layout: a sequence within a group runs to its end",
            "torch.where(across, first * _NEIGHBOURS, stop))", "first * _NEIGHBOURS)",
            "sums_of_sequences",
        ),
        (
            "layout: a sequence within a group has whole groups too",
            "start, stop = first, torch.maximum(first, end)", "start, stop = first, first + 1",
            "sums_of_sequences",
        ),
        (
            "layout: what is not there is multiplied by 0",
            "return torch.where(inside, values[cell.clamp(max=values.shape[0] - 1)], 0.0).sum(1)",
            "return (values[cell.clamp(max=values.shape[0] - 1)] * inside).sum(1)",
            "nothing_infinite",
        ),
        (
            "layout: the gradient of a spread value is that of one token",
            "return _sums(d_tokens, *ctx.saved_tensors), None, None",
            "return _sums(d_tokens, *ctx.saved_tensors) * 0.5, None, None",
            "each_others_transpose",
        ),
        (
            "layout: the last token of the mask is the last of all",
            "return (mask != 0) & is_last.view(mask.shape)", "return is_last.view(mask.shape)",
            "score_goes",
        ),
        (
            "layout: borders of any end",
            "    if last != end:\n", "    if last > end:\n",
            "wrong_borders",
        ),
        (
            "layout: borders that a graph does not look at",
            "(lengths >= 0).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == end)",
            "(lengths >= 0).all() & (cu_seqlens[0] == 0)",
            "in_a_graph_too",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/preference_loss.py", "test_packed.py",
        (
            "packed: the second derivative of rows",
            "return ROWS if cu_seqlens is None else Runs(cu_seqlens, policy)", "return ROWS",
            "second_derivatives or every_type",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/targets.py", "test_packed.py",
        (
            "packed: targets cross borders",
            "following = torch.where(ids[..., 1:] == ids[..., :-1], following, ignore_index)",
            "following = torch.where(ids[..., 1:] >= ids[..., :-1], following, ignore_index)",
            "crosses_a_border",
        ),
    ),
    *_mutants(
        "fastrlhf/reference.py", "test_packed.py",
        (
            "packed: an eager scan steps over borders",
            "same = ids[step:] == ids[:-step]", "same = ids[step:] >= ids[:-step]",
            "stop_at_the_borders and eager",
        ),
        (
            "packed: an eager scan takes the next sequence's value",
            "torch.where(follows & found.roll(-1), nearest.roll(-1), after",
            "torch.where(found.roll(-1), nearest.roll(-1), after",
            "stop_at_the_borders and eager",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/policy_arguments.py", "test_packed.py",
        (
            "packed: of tokens or of sequences, as it happens",
            "of_tokens = layout is not ROWS and tuple(x.shape) == shape", "of_tokens = False",
            "tokens_shape_is_of_tokens",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/reduce.py", "test_packed.py",
        (
            "packed: a mean over as many sequences as there are tokens",
            "max(layout.sequences(mask), 1)", "max(mask.shape[0], 1)",
            "every_reduction",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/preference.py", "test_packed.py",
        (
            "packed: a reference of tokens is taken for one of sequences",
            "given.ndim == 2 or given.shape == pi_logps.shape", "given.ndim == 2",
            "every_type or tokens_shape",
        ),
    ),
    *_mutants(
        "kernels/divergence.py", "test_divergence.py",
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
            "divergence: one tile less in the second sweep",
            "for done in tl.range(0, tiles,", "for done in tl.range(1, tiles,",
            "match_the_oracle and triton",
        ),
        (
            "divergence: first-order terms, which cancel",
            "tl.where(tl.abs(w) < 0.5, p * expm1_minus_near_0(-w), q - p + _mean(p, w))",
            "q - p + _mean(p, w)",
            "nearly_equal and triton",
        ),
        (
            "divergence: what has no probability takes part",
            "return tl.where(p == 0, 0.0, p * w)", "return p * w",
            "masked_vocabulary and triton or only_one_side and triton",
        ),
        (
            "divergence: the rounding of the normalisers stays",
            "value = tl.where(value <= rounding, 0.0, value - rounding)",
            "value = tl.maximum(value, 0.0)",
            "nearly_equal and triton",
        ),
        (
            "divergence: no distance from a side of nothing",
            "if_q_is_empty = float(\"inf\")", "if_q_is_empty = 0.0",
            "nothing_but_minus_infinity",
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
        (
            "divergence: rows without an upstream gradient are read",
            "if (tl.load(mask + row) == 0) | (g == 0.0) | nothing:",
            "if (tl.load(mask + row) == 0) | nothing:",
            "without_an_upstream_gradient",
        ),
    ),
    *_mutants(
        "fastrlhf/reference.py", "test_reports.py",
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
        (
            "reference: sums in the dtype of the policy",
            "dtype = accumulation_dtype(torch.promote_types(policy.dtype, reference.dtype))",
            "dtype = accumulation_dtype(policy.dtype)",
            "token_sums",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/checks.py", "test_reports.py",
        (
            "checks: integers stay as narrow as they are",
            "    return index.long()\n", "    return index\n",
            "low_bits",
        ),
        (
            "checks: every mask passes",
            "        other = (tensor != 0) & (tensor != 1)\n",
            "        other = (tensor != 0) & (tensor == 0)\n",
            "no_mask",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/transform.py", "test_reports.py",
        (
            "transform: temperatures of sequences are those of positions",
            "        temperature = temperature.unsqueeze(1)\n", "        pass\n",
            "temperatures_of_sequences",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/preference.py", "test_preference.py",
        (
            "preference: rewards that are not scaled",
            "    return losses, (beta * scores).detach()\n", "    return losses, scores.detach()\n",
            "values_rewards",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/pair_losses.py", "test_preference.py",
        (
            "preference: aot sorts one side",
            "margin = policy.sort(0).values - ref.sort(0).values",
            "margin = policy.sort(0).values - ref",
            "values_rewards and aot",
        ),
    ),
    *_mutants(
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
    *_mutants(
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
    *_mutants(
        "fastrlhf/losses/f_divergence.py", "test_preference_options.py",
        (
            "f-divergence: a mixture of unlike shares",
            "-log_to_mixture(-s, 0.5, 0.5)", "-log_to_mixture(-s, 0.4, 0.6)",
            "papers and JS",
        ),
    ),
    *_mutants(
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
    *_mutants(
        "fastrlhf/losses/fused_sequences.py", "test_linear_preference_options.py",
        (
            "fused sequences: the tokens of a group are all there are",
            "losses, _ = loss.of_tokens(SequenceTokens(here, mask, **back))",
            "losses, _ = loss.of_tokens(SequenceTokens(here, here, **back))",
            "from_hidden_states and MPO and True",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/triple.py", "test_reference_free_options.py",
        (
            "tpo: the preferred sequence is the gold one",
            "-sums[gold_idxs.long()]", "-sums[yw_idxs.long()]",
            "types_of_tpo",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/rankings.py", "test_rankings.py",
        (
            "rankings: pairs across rankings",
            "(groups[:, None] == groups) & (ranks[:, None] < ranks)", "ranks[:, None] < ranks",
            "all_its_pairs",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/moving_reference.py", "test_moving_reference.py",
        (
            "moving reference: the shares change places",
            "torch.lerp(before, policy, alpha)", "torch.lerp(policy, before, alpha)",
            "is_the_mixture",
        ),
    ),
    *_mutants(
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
    *_mutants(
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
    *_mutants(
        "fastrlhf/losses/unpaired.py", "test_unpaired.py",
        (
            "kto: a baseline below 0",
            "return kl.detach().to(scores).clamp(min=0)", "return kl.detach().to(scores)",
        ),
        (
            "kto: weights change places",
            "desirable_weight * sigmoid(-gain),\n        undesirable_weight",
            "undesirable_weight * sigmoid(-gain),\n        desirable_weight",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/reward.py", "test_reward.py",
        ("reward: the margin helps", "else difference - margin)", "else difference + margin)"),
    ),
    *_mutants(
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
            "mean = tl.sum(moment * fade, axis=0) / row_total",
            "mean = tl.sum(moment, axis=0) / row_total",
            "dense_matrix and triton",
        ),
        (
            "fisher: a second moment that is not centred",
            "squares += tl.sum(tl.where(weight == 0, 0.0, value * centred), axis=1)",
            "squares += tl.sum(tl.where(weight == 0, 0.0, value * u), axis=1)",
            "rounding and triton or variance_of and triton",
        ),
    ),
    *_mutants(
        "kernels/policy_loss.py", "test_logits_policy_loss.py",
        (
            "K3: a ratio in fp64 ends at that of fp32",
            "tl.constexpr = 700.0 if", "tl.constexpr = 80.0 if",
            "beyond_that_of_fp32",
        ),
        (
            "K3: a ratio on its lower bound is clipped",
            "too_low = bad & (ratio < low)", "too_low = bad & (ratio <= low)",
            "on_its_bound",
        ),
        (
            "K3: a ratio on its upper bound is clipped",
            "tl.where(bad, ratio > dual, ratio > high)",
            "tl.where(bad, ratio > dual, ratio >= high)",
            "on_its_bound",
        ),
        (
            "K3: no dual clip",
            "tl.where(bad, ratio > dual, ratio > high)", "(bad == 0) & (ratio > high)",
            "far_away and clip and triton",
        ),
        (
            "K3: the slope of |x| at 0",
            "tl.where(x < 0, 1.0, x * 0.0)", "tl.where(x <= 0, 1.0, x * 0.0)",
            "reference_itself and triton",
        ),
        (
            "K3: a slope of 0 takes the entropy's gradient along",
            "((g == 0) & (h == 0))", "(g == 0)",
            "clipped_token and triton",
        ),
        (
            "K3: either slope of 0 ends the row",
            "((g == 0) & (h == 0))", "((g == 0) | (h == 0))",
            "match_the_oracles and clip and triton",
        ),
        (
            "K3: the ratio of cispo without its bound",
            "bounded = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))",
            "bounded = tl.where(ratio < low, low, ratio)",
            "match_the_oracles and cispo and triton",
        ),
        (
            "K3: the ratio of cispo without its floor",
            "bounded = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))",
            "bounded = tl.where(ratio > high, high, ratio)",
            "match_the_oracles and cispo and triton",
        ),
        (
            "K3: DPPO leaves out what comes back",
            "gone = tl.where(advantage > 0, too_high, too_low)",
            "gone = tl.where(advantage > 0, too_low, too_high)",
            "leaves_tokens_out and triton",
        ),
        (
            "K3: DPPO's bound of the ratio ends the gradient",
            "loss = -tl.where(ratio > dual, dual, ratio) * advantage",
            "ended = ended | (ratio > dual)\n"
            "    loss = -tl.where(ratio > dual, dual, ratio) * advantage",
            "leaves_tokens_out and triton",
        ),
        (
            "K3: DPPO's probabilities swapped",
            "larger = exp(tl.where(grown, logprob, logprob - log_ratio))",
            "larger = exp(tl.where(grown, logprob - log_ratio, logprob))",
            "match_the_oracles and dppo_tv and triton and 64",
        ),
        (
            "K3: DPPO's divergence without the other words",
            "divergence = of_token - expm1(old) * (_log_of_others(old) - _log_of_others(logprob))",
            "divergence = of_token",
            "dppo and triton",
        ),
        (
            "K3: the corrected penalty's gradient without that of the ratio",
            "return ratio * kl, ratio * tl.where(ended, slope, kl + slope)",
            "return ratio * kl, ratio * slope",
            "times_the_ratio and triton and token",
        ),
        (
            "K3: the corrected k3's gradient is that of k3",
            "tl.where(near, -expm1(x), 1.0), -x)", "tl.where(near, -expm1(x), 1.0), -expm1(x))",
            "times_the_ratio and triton and token",
        ),
        (
            "K3: penalties have one weight",
            "factor *= tl.load(kl_weights + row)", "factor *= 1.0",
            "that_are_weighed and triton",
        ),
        (
            "K3: infinity times the weight 0 of a penalty",
            "kl, kl_slope = tl.where(factor == 0, 0.0, kl), tl.where(factor == 0, 0.0, kl_slope)",
            "kl, kl_slope = kl + 0.0, kl_slope + 0.0",
            "that_are_weighed and triton",
        ),
        (
            "K3: weight 0 of a forbidden token",
            "return tl.where(weight == 0, 0.0, -weight * logprob), -weight",
            "return -weight * logprob, -weight",
            "has_an_entropy and triton",
        ),
        (
            "K3: the slope of k3 beyond its end",
            "return expm1_minus(x), tl.where(ended, 0.0, -expm1(x))",
            "return expm1_minus(x), -expm1(x)",
            "beyond_its_end and triton",
        ),
        (
            "K3: an entropy that is punished backward",
            "h = -weight * tl.full((), entropy_coef, acc)",
            "h = weight * tl.full((), entropy_coef, acc)",
            "match_the_oracles and clip and triton",
        ),
        (
            "K3: the loss of an ignored row",
            "tl.store(losses + row, tl.where(live, loss, 0.0))", "tl.store(losses + row, loss)",
            "match_the_oracles and clip and triton",
        ),
        (
            "K3: the reference on the wrong side",
            "PENALTY(KL, tl.load(ref_logprobs + row) - logprob, log_ratio)",
            "PENALTY(KL, logprob - tl.load(ref_logprobs + row), log_ratio)",
            "match_the_oracles and clip and triton",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/token_stats.py", "test_token_stats.py",
        (
            "in place: overlapping windows",
            "if size > 1 and stride < span:", "if size > 1 and stride < 1:",
            "windows",
        ),
        (
            "in place: what lies side by side",
            "if size > 1 and stride < span:", "if size > 1 and stride <= span:",
            "windows or same_bits_in_the_memory",
        ),
        (
            "eager: rows of nothing have a gradient",
            "active &= peak != -torch.inf", "active &= True",
            "masked_vocabulary and eager",
        ),
        (
            "eager: a row with a slope of the lse alone is zeros",
            "    for slope in others:\n", "    for slope in others[:1]:\n",
            "any_slope and eager",
        ),
        (
            "eager: the slope of the lse of another row",
            "*(None if slope is None else slope[index] for slope in others)",
            "*(None if slope is None else slope[: len(d_logprob[index])] for slope in others)",
            "any_slope and eager",
        ),
        (
            "eager: in place, rows without a gradient keep their logits",
            "    _put_rows(d_rows, (~active).nonzero().squeeze(1), 0.0)", "    pass",
            "exactly_zero and eager",
        ),
        (
            "eager: no row is a chunk too small",
            "size = max(1, _EAGER_CHUNK_LOGITS // rows.shape[2])",
            "size = _EAGER_CHUNK_LOGITS // rows.shape[2]",
            "eager_chunks",
        ),
    ),
    *_mutants(
        "fastrlhf/reference.py", "test_token_stats.py",
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
    *_mutants(
        "fastrlhf/ops/compiled_rows.py", "test_compiled.py",
        (
            "compiled: rows are found by their place among those that count",
            "return rows[0], index", "return rows[0], torch.arange(len(index))",
            "not_asked_for",
        ),
        (
            "compiled: room for all gradients at once",
            "_pieces(index, vocab, _ROOM_LOGITS, mixed=mixed)", "(index,)",
            "cannot_be_done_twice",
        ),
        (
            "compiled: a softcap is compiled in",
            "        _number(softcap, of_rows),\n", "        softcap,\n",
            "compiled_anew",
        ),
        (
            "compiled: spans of the first rows",
            "done += len(some)", "done += 0",
            "spans_of_rows",
        ),
        (
            "compiled: squares that are too large to add up",
            " & (found != torch.inf)", "",
            "all_columns",
        ),
        (
            "compiled: sums of whole runs alone",
            "*(x.sum(-1) for x in rest),", "*(0 * x.sum(-1) for x in rest),",
            "all_columns",
        ),
        (
            "compiled: sums of what is no whole run",
            "*(x.sum(-1).sum(-1, dtype=torch.float64) for x in first),",
            "*(0 * x.sum(-1).sum(-1) for x in first),",
            "all_columns",
        ),
        (
            "compiled: ln V, in fp32, beside a small divergence",
            "peak_q, a + d, b + e, c + f)", "peak_q, *added((a, b, c, d, e, f)))",
            "small_divergences",
        ),
        (
            "compiled: a gradient that is written into a copy",
            "    there = _view_by_number(d_rows, index)\n",
            "    there = _found_by_number(d_rows, index)\n",
            "columns_at_any_distance",
        ),
        (
            "compiled: a variance from moments that cancel",
            "sure = (found > mean.square())", "sure = (found == found)",
            "all_columns",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/compiled.py", "test_compiled.py",
        (
            "compiled: for the threads that there were when it was compiled",
            '"cpp.dynamic_threads": True', '"cpp.dynamic_threads": False',
            "as_many_threads",
        ),
        (
            "compiled: a compiler that is turned off is taken for one that failed",
            "            if _is_off():  # meanwhile\n                self._refuse(_OFF)\n", "",
            "was_turned_off_meanwhile",
        ),
        (
            "compiled: what was compiled runs whatever is to run instead",
            "        elif _runs_otherwise():\n            self._refuse(_OFF)\n", "",
            "asked_again",
        ),
        (
            "compiled: while the compiler is off",
            "        if _is_off():  # for a while\n            self._refuse(_OFF)\n", "",
            "asked_again",
        ),
        (
            "compiled: a lone row, which comes twice, in place",
            "not (variant.in_place and len(numbers) > 1)", "not variant.in_place",
            "takes_the_place",
        ),
        (
            "compiled: what it has written is read",
            "not (variant.in_place and len(numbers) > 1)", "len(numbers) == 1",
            "reads_what_it_has_written",
        ),
        (
            "compiled: under fx tracing",
            "or torch.jit.is_tracing() or is_fx_symbolic_tracing()", "or torch.jit.is_tracing()",
            "traced_call",
        ),
        (
            "compiled: on disk with what is made for other vectors",
            'f"{of_compiler.cache_key_tag} {torch.backends.cpu.get_cpu_capability()}"',
            "of_compiler.cache_key_tag",
            "kept_apart",
        ),
        (
            "compiled: warming up without the compiler's failures",
            'if _required.get():\n                raise RuntimeError(f"{name} cannot be',
            'if False:\n                raise RuntimeError(f"{name} cannot be',
            "warming_up_fails",
        ),
    ),
    Mutant(
        "tracing: what another thread compiles",
        "fastrlhf/ops/tracing.py",
        "return TracingContext.try_get() is not None", "return True",
        "test_compiled.py", "another_thread",
    ),
    Mutant(
        "compiled: sizes that are equal by chance",
        "fastrlhf/ops/compiled.py",
        "of_sizes.patch(use_duck_shape=False)", "of_sizes.patch(use_duck_shape=True)",
        "test_compiled.py", "compiled_anew or survives",
        equivalent="no sizes of the example are equal: it is for what compiles after a reset",
    ),
    Mutant(
        "compiled: a lone row as it is",
        "fastrlhf/ops/compiled.py",
        "len(x) != 1:\n        return x", "True:\n        return x",
        "test_compiled.py", "compiled_anew",
        equivalent="without guards a 1 is a size as any other; the row comes twice for safety",
    ),
    Mutant(
        "compiled: fp32 sums of whole runs",
        "fastrlhf/ops/compiled_rows.py",
        "*(x.sum(-1).sum(-1, dtype=torch.float64) for x in first),",
        "*(x.flatten(-2).sum(-1) for x in first),",
        "test_compiled.py", "equal_numbers",
    ),
    Mutant(
        "compiled: fp32 sums",
        "fastrlhf/reference.py",
        "return x.sum(-1, keepdim=True, dtype=torch.float64).to(x.dtype)",
        "return x.sum(-1, keepdim=True)",
        "test_compiled.py", "equal_numbers",
    ),
    Mutant(
        "compiled: rows of a mixture fill no registers",
        "fastrlhf/ops/compiled_rows.py",
        "_WHOLE_VECTORS = 32", "_WHOLE_VECTORS = 1",
        "test_batch_invariance.py", "compiled and jsd and 5-",
        equivalent="today's compiler makes no such loop of sums, and that of gradients has the "
        "same bits at its end: it is for one that does otherwise",
    ),
    Mutant(
        "compiled: a KL of small numbers from one pass",
        "fastrlhf/ops/compiled_rows.py",
        "_LARGE_DIVERGENCE = 0.5", "_LARGE_DIVERGENCE = -1.0",
        "test_divergence.py", "nearly_equal and compiled and reverse",
    ),
    *_mutants(
        "fastrlhf/ops/linear_head.py", "test_linear_token_stats.py",
        (
            "head: the low nibble first",
            "torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=-1)",
            "torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=-1)",
            "quantized",
        ),
        (
            "head: scales from the first row on",
            "for bound in (rows.start, rows.stop)",
            "for bound in (0, rows.stop - rows.start)",
            "quantized",
        ),
        (
            "head: slices overwrite each other backward",
            "values[:, rows], weight, fresh=rows.start == 0", "values[:, rows], weight, fresh=True",
            "in_slices",
        ),
        (
            "head: a run that a slice begins in the middle of",
            "sizes[0] -= first % self.run", "sizes[-1] -= first % self.run",
            "quantized",
        ),
        (
            "head: the weight of the last block",
            "_add_product(total, a, b, fresh)", "_add_product(total, a, b, True)",
            "values_and_gradients and eager",
        ),
    ),
    Mutant(
        "head: a weight that is rounded first as it is",
        "fastrlhf/ops/linear_head.py",
        "dtype == self.operands and all(", "all(",
        "test_linear_token_stats.py", "rounded_first",
    ),
    Mutant(
        "head: small slices on a GPU too",
        "fastrlhf/ops/linear_head.py",
        "_SLICE_ELEMENTS if on_cpu else _GPU_SLICE_ELEMENTS", "_SLICE_ELEMENTS",
        "test_head_gradients.py", "large_slices",
    ),
    Mutant(
        "head gradients: the bias of the last block",
        "fastrlhf/ops/head_gradients.py",
        "self.bias = part if self.bias is None else self.bias.add_(part)", "self.bias = part",
        "test_linear_token_stats.py", "values_and_gradients and eager",
    ),
    *_mutants(
        "fastrlhf/ops/head_gradients.py", "test_head_gradients.py",
        (
            "head gradients: rows start anywhere",
            "width = -(-vocab // alignment) * alignment", "width = vocab",
            "bounded",
        ),
        (
            "head gradients: fp16 without units",
            "if operands != torch.float16:", "if True:",
            "small_loss",
        ),
        (
            "head gradients: rows of zeros decide the unit",
            "exponent = torch.where(plain, exponent, _SMALLEST_EXPONENT)", "pass",
            "small_loss",
        ),
        (
            "head gradients: what was added keeps its old unit",
            "total.mul_(self.unit / unit)", "pass",
            "very_different",
        ),
        (
            "head gradients: hidden states do not carry the units",
            "(rows * (units / unit)).to(rows.dtype), unit", "rows, unit",
            "cost_their_rounding and P2",
        ),
        (
            "head gradients: sums end in their unit",
            "total.mul_(self.unit)\n", "pass\n",
            "small_loss",
        ),
        (
            "head gradients: hidden states have any size",
            "_unit((_largest(rows.float()) * units).amax())", "units.amax()",
            "keep_their_places",
        ),
        (
            "head gradients: gaps while a graph is compiled",
            "if being_traced():", "if False:",
            "one_graph",
        ),
        (
            "head gradients: the bias without the units",
            "if units is None:", "if True:",
            "cost_their_rounding and P2",
        ),
        (
            "head gradients: nothing waits",
            "min(self.rows, waiting_rows // rows * rows)", "rows",
            "wait_for_each_other",
        ),
        (
            "head gradients: room for more rows than come",
            "min(self.rows, waiting_rows // rows * rows)", "waiting_rows // rows * rows",
            "bounded",
        ),
        (
            "head gradients: what waits is lost at the end",
            "self._add_waiting()\n        self._room = None", "self._room = None",
            "wait_for_each_other",
        ),
        (
            "head gradients: room that is taken is given away",
            "return self._room[waiting : waiting + rows]", "return self._room[:rows]",
            "wait_for_each_other",
        ),
    ),
    Mutant(
        "head: blocks of columns overwrite each other",
        "fastrlhf/ops/linear_head.py",
        "weight.T, fresh=block.start == 0", "weight.T, fresh=True",
        "test_model_token_stats.py", "with_a_lora_adapter",
    ),
    *_mutants(
        "fastrlhf/ops/linear_rows.py", "test_linear_token_stats.py",
        (
            "compiled: what ignored rows hold",
            "torch.where((targets != self.ignore_index).unsqueeze(1), hidden, 0.0)", "hidden * 1.0",
            "compiled",
        ),
        (
            "blocks: the last one ends too early",
            "(first, min(first + size, rows)) for first in range(0, rows, size)",
            "(first, min(first + size, rows - 1)) for first in range(0, rows, size)",
            "values_and_gradients and eager",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_rows.py", "test_head_gradients.py",
        (
            "blocks: as many rows as fit",
            "rows // _WHOLE_ROWS * _WHOLE_ROWS or rows", "rows",
            "whole_tiles",
        ),
        (
            "blocks: of one size, whole tiles or not",
            "min(chunk, -(-size // _WHOLE_ROWS) * _WHOLE_ROWS)", "size",
            "whole_tiles",
        ),
    ),
    *_mutants(
        "kernels/launch.py", "test_launch.py",
        (
            "launch: on the current device",
            "device_index(None if on_host else device.index)", "device_index(None)",
            "device_of_its_tensors",
        ),
        (
            "launch: stages are not handed on",
            "max(1, tile // warp_tokens), shape.stages)", "max(1, tile // warp_tokens), 1)",
            "cut_by",
        ),
    ),
    Mutant(
        "launch: a launcher without its device",
        "kernels/scan.py",
        "@on_their_device\ndef gae(", "def gae(",
        "test_launch.py", "device_of_its_tensors",
    ),
    Mutant(
        "divergence: the excess of the mixture where the sides are near alone",
        "kernels/divergence.py",
        "moderate = (excess >= -0.5) & (excess <= 1.0)", "moderate = tl.abs(gap) < 0.5",
        "test_divergence.py", "nearly_one_side and triton",
    ),
    Mutant(
        "reference: the excess of the mixture where the sides are near alone",
        "fastrlhf/reference.py",
        "small = gap < 40\n", "small = gap.abs() < 0.5\n",
        "test_divergence.py", "nearly_one_side and eager",
    ),
    *_mutants(
        "benchmarks/first_light/row_order.py", "test_row_order.py",
        (
            "row order: the numbers of a row before its last split",
            "== splits - 1:", "== 0:",
            "40000",
        ),
        (
            "row order: the gradient of another row",
            "place = earlier * vocab + columns", "place = (earlier + 1) % rows * vocab + columns",
        ),
        (
            "row order: all splits but the last",
            "there = split < splits", "there = split < splits - 1",
        ),
    ),
    Mutant(
        "tiles: tanh near 0 from where it cancels",
        "kernels/tiles.py",
        "tl.where(tl.abs(x) < 0.6, _tanh_near_0(tl.abs(x)), 1.0 - complement)", "1.0 - complement",
        "test_token_stats.py", "twice_those_of and triton",
    ),
    *_mutants(
        "fastrlhf/ops/linear_rows.py", "test_linear_loss.py",
        (
            "groups: places for tokens",
            "return order[by_group], sizes.tolist()", "return by_group, sizes.tolist()",
            "groups_reach",
        ),
        (
            "groups: more than a chunk at once",
            "if held and held + rows > chunk:", "if held and held > chunk:",
            "groups_reach or larger_than",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_plans.py", "test_linear_loss.py",
        (
            "plans: slopes of another block of the group",
            "slopes.at(slice(*span)), gradients)",
            "slopes.at(slice(span[1] - span[0])), gradients)",
            "groups_reach",
        ),
        (
            "plans: the slope of the lse is lost",
            "self.impl, slopes.lse, slopes.mean_logit,", "self.impl, None, slopes.mean_logit,",
            "lse_is_differentiable and eager",
        ),
        (
            "plans: slopes of entropy and lse of another block of the group",
            "slope[place] for slope in self[1:]",
            "slope[: len(slope[place])] for slope in self[1:]",
            "lse_is_differentiable and eager and groups",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_plans.py", "test_linear_token_stats.py",
        (
            "plans: small slopes in fp16",
            "keeps_its_own = alone and hidden.dtype != torch.float16", "keeps_its_own = alone",
            "slopes_that_cancel or one_slope_alone or fp32_logits",
        ),
        (
            "plans: slopes that cancel in bf16",
            "keeps_its_own = alone and hidden.dtype != torch.float16",
            "keeps_its_own = hidden.dtype != torch.float16",
            "slopes_that_cancel or one_slope_alone or fp32_logits",
        ),
        (
            "plans: the trained head is forgotten",
            "return Plan.P4 if needs.head else Plan.P1", "return Plan.P1",
            "values_and_gradients and eager",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_loss.py", "test_linear_loss.py",
        (
            "linear loss: the upstream gradient",
            "(known * d_loss).to(dtype)", "known.to(dtype)",
            "groups_reach or accumulate or by_themselves",
        ),
        (
            "linear loss: the slope of the lse is dropped",
            "return Slopes(zeros if g is None else g, *others)",
            "return Slopes(zeros if g is None else g, others[0])",
            "lse_is_differentiable and eager",
        ),
        (
            "linear loss: a slope of an lse that is not used",
            "None if x is None else next(found) for x in leaves)",
            "None if x is None else (y := next(found), zeros)[y is None] for x in leaves)",
            "only_a_loss",
        ),
        (
            "linear loss: a mean for a sum in aux",
            "torch.stack(values).sum(0)", "torch.stack(values).mean(0)",
            "groups_reach or by_themselves",
        ),
        (
            "linear loss: aux keeps its graph",
            "{name: value.detach() for name, value in aux.items()}", "dict(aux.items())",
            "",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_token_stats.py", "test_linear_token_stats.py",
        (
            "linear stats: an upstream gradient of ignored tokens",
            "part = slope * torch.where(live, upstream, 0.0).unsqueeze(1)",
            "part = slope * upstream.unsqueeze(1)",
            "does_no_harm",
        ),
        (
            "linear stats: the entropy's slope overwrites",
            "part if d_hidden is None else d_hidden.add_(part)", "part",
            "values_and_gradients and eager",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_divergence.py", "test_linear_divergence.py",
        (
            "linear divergence: an upstream gradient of masked tokens",
            "upstream = torch.where(mask.reshape(-1), d_values, 0.0)", "upstream = d_values",
            "does_no_harm",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/fisher.py", "test_fisher.py",
        (
            "linear fisher: no slope of the cap backward",
            "as_operands(d_logits.mul_(slope), head.operands, room)",
            "as_operands(d_logits, head.operands, room)",
            "linear_form",
        ),
    ),
    Mutant(
        "fused policy: strided vectors",
        "fastrlhf/ops/policy_loss.py",
        "return x.reshape(-1).to(acc).contiguous()", "return x.reshape(-1).to(acc)",
        "test_logits_policy_loss.py", "strides and triton",
        "what the losses pass comes out of torch.where or token_weights, whose (B, T) either is "
        "contiguous or has to be copied to become (N,)",
    ),
    *_mutants(
        "fastrlhf/losses/policy.py", "test_logits_policy_loss.py",
        (
            "policy: a forbidden token without old log-probs",
            "logprobs = torch.where(logprobs == -torch.inf, 0.0, logprobs)",
            "logprobs = logprobs * 1.0",
            "forbidden_tokens_and",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/reduce.py", "test_policy_loss.py",
        (
            "reduction: a metric of no tokens",
            "/ layout.total(mask).clamp(min=1)", "/ layout.total(mask)",
            "without_tokens",
        ),
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
        "test_policy_loss.py", "without_tokens",
        "1/0 is taken only where the mask has no token, and then the where gives every token 0",
    ),
    *_mutants(
        "fastrlhf/losses/ratios.py", "test_policy_loss.py",
        (
            "ratios: the gradient of NaN is 0",
            "return torch.where(x > bound, bound, x)", "return x.clamp(max=bound)",
            "its_token_alone",
        ),
    ),
    *_mutants(
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
    *_mutants(
        "fastrlhf/losses/segments.py", "test_reward.py",
        (
            "segments: the gradient of what is dropped",
            "torch.where(same, x, 0.0) for x in (head, ahead)", "x for x in (head, ahead)",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/policy.py", "test_policy_loss.py",
        (
            "policy: the sum for the mean of a sequence's log-ratios",
            "mean = total / sums(torch.ones_like(log_ratio)).clamp(min=1)", "mean = total",
            "those_of_the_papers",
        ),
        (
            "policy: GSPO-token has the gradient of the whole sequence",
            "return mean.detach() + own - own.detach()", "return mean",
            "those_of_the_papers and sequence-token",
        ),
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
            "policy: infinity times the weight 0 of a penalty",
            "counts = tokens.kl_weights != 0", "counts = tokens.kl_weights == tokens.kl_weights",
            "weight_zero_can_be_infinite",
        ),
        (
            "policy: a constant leaves its rounding in the corrected gradient",
            "            log_product = log_product.detach()", "            pass",
            "corrected_k3_keeps",
        ),
        (
            "policy: clipped sequences counted by tokens",
            "counts(clipped).to(dtype) / lengths.clamp(min=1)",
            "counts(clipped).to(dtype) / clipped.shape[-1]",
            "sequences_that_are_clipped",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/fused_policy.py", "test_linear_policy_loss.py",
        (
            "policy: the sums of a sequence are off by a trifle",
            "return segment_sums(x, stats.groups)", "return segment_sums(x, stats.groups) * 1.0001",
            "it_is_the_loss and float32 and product",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/surrogates.py", "test_policy_loss.py",
        (
            "policy: a ratio on its bound counts as clipped",
            "return ratio < bounds.low,", "return ratio <= bounds.low,",
            "on_its_bound",
        ),
        (
            "policy: DPPO leaves out what comes back",
            "gone = torch.where(advantage > 0, too_high, too_low)",
            "gone = torch.where(advantage > 0, too_low, too_high)",
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
            "held = saturated(log_ratio).detach()", "held = saturated(log_ratio)",
            "those_of_the_papers and vespo",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/penalties.py", "test_policy_loss.py",
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
        (
            "penalties: the corrected k3 loses its digits",
            "return torch.where(near, close, far)", "return far",
            "corrected_k3_keeps or those_of_the_papers",
        ),
    ),
    Mutant(
        "policy: the ratio of a sequence without tokens",
        "fastrlhf/losses/policy.py",
        "mean = total / sums(torch.ones_like(log_ratio)).clamp(min=1)",
        "mean = total / sums(torch.ones_like(log_ratio))",
        "test_policy_loss.py", "those_of_the_papers or without_tokens",
        "0/0 is the log-ratio of tokens outside of the mask alone, whose advantage is 0, which "
        "replaces it by 0; a where drops its gradient, and the metrics look at no such token",
    ),
    *_mutants(
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
    *_mutants(
        "fastrlhf/losses/advantages.py", "test_advantages.py",
        (
            "whiten: the variance of a single entry",
            "group) / divisor.clamp(min=1)", "group) / divisor",
            "fewer_than_two",
        ),
        (
            "whiten: equal large entries",
            "mean = mean + shared_by_ranks(rest, group)", "mean = mean * 1.0",
            "no_deviation",
        ),
    ),
    *_mutants(
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
    *_mutants(
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
    *_mutants(
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
            "torch.where(strange, torch.nan, found)", "found * 1.0", "zeros_and_ones",
        ),
        (
            "grpo_passk: several best ones",
            "torch.where(is_best & alone, samples", "torch.where(is_best, samples", "exactly_zero",
        ),
    ),
    *_mutants(
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
            "torch.where(scores.isfinite().all(), found, torch.nan)", "found.nan_to_num()",
            "not_hidden",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/value.py", "test_value_reductions.py",
        (
            "value: tokens whatever the reduction",
            "token_weights(inside, reduction,", "token_weights(inside, \"token-mean\",",
            "of_the_formula",
        ),
    ),
    *_mutants(
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
    *_mutants(
        "fastrlhf/ops/gae.py", "test_returns.py",
        (
            "gae: returns of the advantages' lambda",
            "(advantages, _), (_, returns) = found[0], found[-1]",
            "(advantages, _), (_, returns) = found[0], found[0]", "lambda_of_their_own and eager",
        ),
        (
            "gae: a lambda of a sequence outside of its bounds",
            "fits = (lam >= 0) & (lam <= 1)", "fits = lam == lam", "errors",
        ),
        (
            "gae: strided numbers of sequences",
            "return x.detach().contiguous()", "return x.detach()", "dtypes_and_strides and triton",
        ),
    ),
    *_mutants(
        "fastrlhf/reference.py", "test_returns.py",
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
    *_mutants(
        "fastrlhf/ops/compiled_rows.py", "test_returns.py",
        (
            "gae, compiled: the last value follows nothing",
            "[after if last_values is None else last_values.to(dtype), *following]",
            "[after, *following]", "each_sequence and compiled and fp64",
        ),
    ),
    *_mutants(
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
    *_mutants(
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
    *_mutants(
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
    *_mutants(
        "fastrlhf/reference.py", "test_advantages.py",
        (
            "rewards: the score on every token",
            "(counts.flip(-1).cumsum(-1).flip(-1) == 1)",
            "(counts.flip(-1).cumsum(-1).flip(-1) >= 1)",
            "at_the_last",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/linear_preference.py", "test_linear_dpo_loss.py",
        (
            "linear dpo: a pair with an empty sequence is dropped",
            "present[yw_idxs.long()] | present[yl_idxs.long()]",
            "present[yw_idxs.long()] & present[yl_idxs.long()]",
            "one_sequence_has_no",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/summed_gradient.py", "test_linear_cross_entropy.py",
        (
            "summed gradient: one upstream gradient for all",
            "if bool((weights == weights[0]).all()):", "if True:",
            "reductions and by and none",
        ),
        (
            "summed gradient: that of losses that do not count",
            "d_losses.reshape(-1) if counted is None else d_losses[counted]",
            "d_losses.reshape(-1)",
            "without_any_target or as_many_matmuls or (reductions and counts)",
        ),
        (
            "summed gradient: recomputed outside of autocast",
            "    with autocast():\n        return weighted_sum(",
            "    if True:\n        return weighted_sum(",
            "autocast",
        ),
    ),
    *_mutants(
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
    *_mutants(
        "fastrlhf/reference.py", "test_linear_cross_entropy.py",
        (
            "eager K1: a mean logit without temperature",
            "mean_logit = total / vocab / temperature", "mean_logit = total / vocab",
            "loss_is_that and smoothed and warm",
        ),
        (
            "eager K1: a mean of logits that are neither scaled nor capped",
            "yield capped\n", "yield logits.to(capped)\n",
            "loss_is_that and smoothed and (scaled or capped)",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_plans.py", "test_with_stats.py",
        (
            "plans: an entropy's slope that nobody asked for",
            "    if bench.entropy_grad:\n        slopes", "    if bench.entropy:\n        slopes",
            "without_the_entropy or those_of_the_logits",
        ),
        (
            "plans: a slope that is alone in the dtype of two",
            "alone = not bench.entropy_grad and", "alone = not bench.entropy and",
            "one_slope_alone",
        ),
        (
            "plans: what is further asked for stays as it was made",
            "= stats[: len(found)]\n    for whole, part in zip(found, values, strict=True)",
            "= stats[:3]\n    for whole, part in zip(found, values, strict=False)",
            "those_of_the_logits",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_token_stats.py", "test_with_stats.py",
        (
            "linear stats: an entropy without gradient that claims one",
            "1 if not options.entropy_grad else 2", "2",
            "those_of_the_logits",
        ),
        (
            "linear stats: further statistics that claim a gradient",
            "*found[1 if not options.entropy_grad else 2 :]", "found[2]",
            "those_of_the_logits",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/token_stats.py", "test_with_stats.py",
        (
            "statistics: an entropy without gradient has one",
            "        row_entropy = row_entropy.detach()\n", "        pass\n",
            "requires_one or without_the_entropy",
        ),
        (
            "statistics: zeros are the gradient of what has none",
            "ctx.set_materialize_grads(False)", "pass",
            "that_without_the_entropy",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/checks.py", "test_with_stats.py",
        (
            "checks: the letters of a name",
            "if isinstance(given, str) or not", "if not",
            "bad_options",
        ),
        (
            "checks: an unknown name is left out",
            "        if wrong not in known:\n", "        if wrong in known[:0]:\n",
            "bad_options",
        ),
    ),
    *_mutants(
        "kernels/rows.py", "test_with_stats.py",
        (
            "further: the mean counts columns past the end",
            "total += tl.sum(tl.where(inside, capped, 0.0), axis=1)",
            "total += tl.sum(capped, axis=1)",
            "match_the_oracle and triton and capped and 33",
        ),
        (
            "further: columns past the end have a square",
            '    if HAS_SOFTCAP:\n        capped = tl.where(inside, capped, -float("inf"))\n'
            "    if WITH_TOP1",
            "    if WITH_TOP1",
            "as_low_as_the_cap and triton",
        ),
        (
            "further: the target is its own rival",
            "tl.where(columns < target, capped", "tl.where(columns <= target, capped",
            "match_the_oracle and triton and plain and 33",
        ),
        (
            "further: any tie counts",
            "tl.where(columns < target, capped", "tl.where(columns < 0, capped",
            "first_is_on_top and triton",
        ),
        (
            "further: a later rival is an earlier one",
            "tl.where(columns < target, capped", "tl.where(columns != target, capped",
            "first_is_on_top and triton",
        ),
        (
            "further: the target has a square among the others",
            "weight = tl.where(columns == target, 0.0, tl.exp2((capped - base[:, None]) * rate))",
            "weight = tl.exp2((capped - base[:, None]) * rate)",
            "match_the_oracle and triton and plain and 33",
        ),
        (
            "further: weights for their squares",
            "squares += tl.sum(weight * weight, axis=1)", "squares += tl.sum(weight, axis=1)",
            "match_the_oracle and triton and plain and 33",
        ),
        (
            "further: squares fade as weights do",
            "return squares * (fade * fade)", "return squares * fade",
            "several_splits and triton",
        ),
        (
            "further: squares stay when the peak moves",
            "squares = move_squares(old_peak, squares, base, rate)", "squares = squares * 1.0",
            "several_splits and triton",
        ),
        (
            "further: the square of a likely target cancels",
            "heavy = square > 0.25", "heavy = square > 4.0",
            "nearly_all_probability and triton",
        ),
        (
            "further: the square of an unlikely target is nothing",
            "heavy = square > 0.25", "heavy = square > -1.0",
            "unlikely_target and triton",
        ),
        (
            "further: the target's square is left out",
            "tl.log(squares + square) - 2.0 * log_norm", "tl.log(squares) - 2.0 * log_norm",
            "unlikely_target and triton",
        ),
        (
            "further: one norm for the two of a square",
            "tl.log(squares + square) - 2.0 * log_norm", "tl.log(squares + square) - log_norm",
            "match_the_oracle and triton and plain and 33",
        ),
        (
            "further: squares of a row of nothing",
            "return tl.where(empty, 0.0, tl.where(heavy",
            "return tl.where(empty, -1.0, tl.where(heavy",
            "masked_vocabulary and triton",
        ),
        (
            "further: the target's weight without the temperature",
            "weight = tl.exp2((target_capped - base) / row_t * LOG2E)",
            "weight = tl.exp2((target_capped - base) * LOG2E)",
            "match_the_oracle and triton and scaled and 33",
        ),
    ),
    *_mutants(
        "kernels/token_stats.py", "test_with_stats.py",
        (
            "K1: squares of lanes relative to their own peaks",
            "squares = move_squares(peak, squares, finite_base(row_peak), rate)",
            "squares = squares * 1.0",
            "match_the_oracle and triton and plain and 5003",
        ),
        (
            "K1: squares of splits relative to their own peaks",
            "tl.sum(move_squares(peak, squares, base[:, None], split_rate), axis=1)",
            "tl.sum(squares, axis=1)",
            "several_splits and triton",
        ),
        (
            "K1: a rival in another split is not seen",
            "is_top1 = (own > before) & (own == row_peak)", "is_top1 = (own > before)",
            "several_splits and triton",
        ),
        (
            "K1: the first of equal logits is not asked for",
            "is_top1 = (own > before) & (own == row_peak)", "is_top1 = (own == row_peak)",
            "first_is_on_top and triton",
        ),
        (
            "K1: a top token beside NaN",
            " & (log_norm == log_norm)", "",
            "without_a_distribution and triton",
        ),
        (
            "K1: a mean logit without temperature",
            "total / vocab / row_t", "total / vocab",
            "match_the_oracle and triton and scaled and 33",
        ),
        (
            "K1: squares in the place of the mean",
            "tl.where(live, total / vocab / row_t, 0.0), mask=inside)\n        place += plane",
            "tl.where(live, total / vocab / row_t, 0.0), mask=inside)",
            "match_the_oracle and triton and plain and 33",
        ),
    ),
    *_mutants(
        "fastrlhf/reference.py", "test_with_stats.py",
        (
            "eager K1: a top token beside NaN",
            "& ~log_norm.isnan() & ~empty", "& ~empty",
            "without_a_distribution and eager",
        ),
        (
            "eager K1: the top of a row of nothing",
            "& ~log_norm.isnan() & ~empty", "& ~log_norm.isnan()",
            "masked_vocabulary and eager",
        ),
        (
            "eager K1: weights for their squares",
            "yield weight.square()", "yield weight",
            "match_the_oracle and eager and plain and 33",
        ),
        (
            "eager K1: the square of a likely target cancels",
            "heavy = square > 0.25", "heavy = square > 4.0",
            "nearly_all_probability and eager",
        ),
        (
            "eager K1: the target's square is left out",
            "(squares + square).log() - 2 * log_norm", "squares.log() - 2 * log_norm",
            "unlikely_target and eager",
        ),
        (
            "eager K1: squares of a row of nothing",
            "log_squares = torch.where(empty, 0.0, log_squares)", "log_squares = log_squares * 1.0",
            "masked_vocabulary and eager",
        ),
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
    *_mutants(
        "fastrlhf/hf/model_token_stats.py", "test_model_token_stats.py",
        (
            "model: further statistics of the next token",
            "name: x[:, :-1] for name, x in done.aside.items()",
            "name: x[:, 1:] for name, x in done.aside.items()",
            "further_statistics and Llama",
        ),
        (
            "model: an entropy without gradient is tied to the output",
            'if entropy and entropy_grad else ("logprob",)', 'if entropy else ("logprob",)',
            "further_statistics and Llama",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/own_module.py", "test_linear_loss.py",
        (
            "model: an own module's mean logit without a slope",
            "found = found._replace(mean_logit=(logits / temperature).mean(-1))", "pass",
            "further_statistics",
        ),
    ),
    Mutant(
        "K2: no slope of the mean logit",
        "kernels/rows.py",
        "        dz += m\n", "        dz += 0 * m\n",
        "test_linear_cross_entropy.py", "as_accurate and triton and dtype0 and smoothed",
    ),
    Mutant(
        "eager K2: no slope of the mean logit",
        "fastrlhf/reference.py",
        "dz.add_(slopes.mean.unsqueeze(-1))", "pass",
        "test_linear_cross_entropy.py", "loss_is_that and smoothed and all",
    ),
    *_mutants(
        "fastrlhf/hf/head_scorer.py", "test_model_token_stats.py",
        (
            "model: an adapter without its scaling",
            "adapter.down(adapter.dropout(hidden.to(dtype))) * adapter.scaling",
            "adapter.down(adapter.dropout(hidden.to(dtype)))",
            "with_a_lora_adapter",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/at_head.py", "test_model_token_stats.py",
        (
            "model: a temperature for the token before",
            "torch.cat((expanded, last.expand(len(expanded), 1)), dim=1)",
            "torch.cat((last.expand(len(expanded), 1), expanded), dim=1)",
            "belong_to_the_tokens",
        ),
        (
            "model: a head's forward is not compared",
            "check_weight(self.module,", "(lambda *_: None)(self.module,",
            "not_understood and patched",
        ),
    ),
    Mutant(
        "model: statistics of the next token",
        "fastrlhf/hf/model_token_stats.py",
        "done.result[:, :-1].unbind(-1)", "done.result[:, 1:].unbind(-1)",
        "test_model_token_stats.py", "gives_what_its_logits_give and Llama",
    ),
    *_mutants(
        "fastrlhf/hf/own_module.py", "test_model_losses.py",
        (
            "model: an own module without what follows it",
            "return self.map(logits.to(accumulation_dtype(logits.dtype)))",
            "return logits.to(accumulation_dtype(logits.dtype))",
            "rules_words_out and dpo",
        ),
        (
            "model: an own module's groups in the order of memory",
            "order, _ = order_by_group(order, groups.reshape(-1))", "pass",
            "own_module_sees_groups",
        ),
        (
            "model: an own module's lse without a slope",
            "lse=(logits / temperature).logsumexp(-1)",
            "lse=(logits / temperature).logsumexp(-1).detach()",
            "heads_of_other_kinds and smoothed and DoRA",
        ),
        (
            "model: an own module that is not run where nothing is scored",
            "return found.logprob.sum(), {}", "return self.hidden.new_zeros(()), {}",
            "nothing_is_scored_by_an_own_module",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/model_losses.py", "test_model_losses.py",
        (
            "model loss: a normalizer that is not used",
            "mean_of(total, targets != IGNORED, normalizer)",
            "mean_of(total, targets != IGNORED, None)",
            "metrics_are_those",
        ),
        (
            "model loss: weights that are not looked at",
            "targets, options, here, ignore_index=IGNORED",
            "targets, options, None, ignore_index=IGNORED",
            "tokens_weigh",
        ),
        (
            "model loss: the metrics of the smoothed loss",
            'for name in ("nll", "z_loss")', 'for name in ("losses", "z_loss")',
            "metrics_are_those",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/packing.py", "test_model_losses.py",
        (
            "packing: a model that lets sequences see each other",
            "not _gradient_crosses(model, base, device)", "True",
            "see_each_other_are_refused",
        ),
        (
            "packing: positions that go on",
            "places = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0) - first",
            "places = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)",
            "packed_sequences_have and Llama and dpo",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_divergence.py", "test_model_losses.py",
        (
            "divergence: a known gradient for any weights",
            "if options.sum_expected and _are_alike(upstream[order]):",
            "if options.sum_expected:",
            "divergence_is_that and by and reverse and wider",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/lm_head.py", "test_model_token_stats.py",
        (
            "head: hooks of an adapter's module count twice",
            "forward(unit)", "module(unit)",
            "hook_on_an_adapted_head",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/model_inputs.py", "test_model_token_stats.py",
        (
            "model: what follows padding is scored",
            "scored[:, 1:] &= attended[:, :-1]", "scored[:, 1:] &= attended[:, 1:]",
            "default_mask",
        ),
        (
            "model: documents run into each other",
            "position_ids[:, 1:] > position_ids[:, :-1]", "position_ids[:, 1:] >= 0",
            "start_again",
        ),
        (
            "model: padding on the left moves a sequence",
            "not bool((attention_mask[:, 0] == 0).any())", "True",
            "however_it_is_padded and GPT2",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/stand_in.py", "test_model_token_stats.py",
        (
            "model: a forward that was there is not put back",
            "attributes.update(before)", "attributes.update({})",
            "put_back",
        ),
        (
            "model: parameters after the head are lost",
            "rows, trained = self.rows, _is_trained(made)", "rows, trained = self.rows, False",
            "not_understood and trained",
        ),
        (
            "model: a change of logits goes unseen",
            "if not trained and expected.agrees(rows, made):", "if not trained:",
            "done_to_logits and scale and True",
        ),
        (
            "model: results that no output of a wrapper leads to",
            "return _Tied.apply(value, other)", "return value",
            "sharded_by_itself",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/logit_map.py", "test_model_token_stats.py",
        (
            "head: an offset before the scale",
            "offset = self.offset / self.scale", "offset = self.offset",
            "offset_of_scaled_logits",
        ),
        (
            "head: only the fitted numbers are looked at",
            "return bool((error <= _PRECISION * size).all())", "return True",
            "not_understood and bend",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/head_parts.py", "test_model_token_stats.py",
        (
            "model: virtual tokens are scored",
            "return hidden[:, virtual:] if", "return hidden[:, :tokens] if",
            "virtual_tokens",
        ),
        (
            "model: dropout in the check",
            "    module.eval()\n    try:", "    try:",
            "dropout",
        ),
        (
            "model: modules stay in evaluation mode",
            "part.training = mode", "part.training = False",
            "dropout",
        ),
        (
            "lm_head: a merged adapter that is switched off",
            "module.unmerge()  # as its own forward would", "pass",
            "switched_off",
        ),
        (
            "lm_head: 8-bit codes of 128 steps",
            "scales.float() / 127", "scales.float() / 128",
            "8_bit",
        ),
        (
            "lm_head: nested scales without their offset",
            "dequantize_blockwise(state.absmax, state.state2) + state.offset",
            "dequantize_blockwise(state.absmax, state.state2)",
            "quantized_head",
        ),
        (
            "lm_head: an adapter that is switched off is kept",
            "if not (module.merged or module.disable_adapters):", "if not module.merged:",
            "with_a_lora_adapter",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/stand_in.py", "test_wrapped_losses.py",
        (
            "wrapped: a backward that no wrapper is told of",
            "return tied(self.made, this_ranks(logits))", "return self.made",
            "sharded_models and everything",
        ),
        (
            "wrapped: weights that accelerate brings are not waited for",
            '"_old_forward" if hasattr(self.module, "_hf_hook") else "forward"', '"forward"',
            "offloaded_head",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/head_check.py", "test_model_token_stats.py",
        (
            "model: a 4-bit head is packed by the look at it",
            "hidden.requires_grad_()", "pass",
            "4_bit_head_leaves",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/head_check.py", "test_wrapped_losses.py",
        (
            "wrapped: the look at a head leaves something for backward",
            "@torch.no_grad()\ndef weight_is_used(", "def weight_is_used(",
            "checkpoint_around",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/at_head.py", "test_wrapped_losses.py",
        (
            "wrapped: a part of the head that is sharded by itself",
            "parts_within_call(self.module)", "head_parts(self.module)",
            "sharded_models and each",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/head_parts.py", "test_wrapped_losses.py",
        (
            "wrapped: a factor of an adapter that is sharded by itself",
            "_whole(up.weight)", "pass",
            "sharded_models and peft",
        ),
        (
            "wrapped: the wrapper of FSDP1 is taken for the head",
            "module = module.module  # whose", "break  # whose",
            "sharded_models and FSDP1",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/logit_map.py", "test_wrapped_losses.py",
        (
            "wrapped: numbers that 16 bits do not hold",
            "return rows.bfloat16().to(", "return rows.to(",
            "sharded_models and output",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_divergence.py", "test_wrapped_losses.py",
        (
            "linear divergence: a mean is taken for a sum",
            "by = upstream[order][:1].sum()", "by = 1.0",
            "checkpoint_around",
        ),
        (
            "linear divergence: a known gradient of the head alone",
            "return side.wants.hidden and (options.sum_expected or not side.trained)",
            "return side.wants.hidden and not side.trained",
            "checkpoint_around",
        ),
        (
            "linear divergence: a weight that is gone is read",
            "        _check_weights_are_there(tensors)\n", "",
            "cannot_be_computed",
        ),
    ),
    *_mutants(
        "fastrlhf/trpo.py", "test_trpo.py",
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
            "trpo: steps add up",
            "p.copy_(_wide(old) + part.view(p.shape))", "p.copy_(_wide(p) + part.view(p.shape))",
            "is_shortened",
        ),
        (
            "trpo: no token counts",
            "return self.summed(own.float()).clamp(min=1)", "return self.summed(own.float())",
            "without_tokens",
        ),
        (
            "trpo: an operator that is not definite",
            "going = (square > floor) & (curvature > 0)", "going = square > floor",
            "not_definite",
        ),
        (
            "trpo: the old policy moves along",
            "return output.clone() if shared else output", "return output",
            "parameters_themselves",
        ),
        (
            "trpo: steepest descent",
            "torch.where(going, residual + share * direction, direction)",
            "torch.where(going, residual, direction)",
            "as_many_steps",
        ),
        (
            "trpo: the solution of a target of size one",
            "return (x * (size / first_gain)).to(", "return (x * (1 / first_gain)).to(",
            "scales_with or solved_at_once",
        ),
        (
            "trpo: the temperature is forgotten",
            'return head | {"temperature": self.temperature}', 'return head | {"temperature": 1.0}',
            "natural_gradient",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/own_loss.py", "test_transformers_trainer.py",
        (
            "own loss: shift_labels are forgotten",
            "targets = shift_targets(labels, labels != IGNORED) if shift_labels is None else "
            "shift_labels",
            "targets = shift_targets(labels, labels != IGNORED)",
            "shift_labels",
        ),
        (
            "own loss: each batch by its own tokens",
            "divisor = scored if by is None else torch.as_tensor(by, device=total.device)",
            "divisor = scored",
            "accumulated",
        ),
        (
            "own loss: gradients of 0 / 0",
            "safe = torch.where(scored > 0, divisor, 1)", "safe = divisor",
            "any_count_of_items",
        ),
        (
            "own loss: more of the loss is made of what stands for logits",
            "spend(logits)", "pass",
            "read_after_the_loss",
        ),
    ),
    *_mutants(
        "fastrlhf/integrations/transformers.py", "test_transformers_trainer.py",
        (
            "trainer: a patch that does nothing",
            "if not _has_fusible_loss(self, model, inputs, return_outputs):", "if True:",
            "Qwen2",
        ),
        (
            "trainer: no logits for metrics",
            "_loss_only.set(bool(prediction_loss_only) and plain)", "_loss_only.set(plain)",
            "asked_for",
        ),
        (
            "trainer: no logits for a loss around its own",
            "_loss_only.set(bool(prediction_loss_only) and plain)",
            "_loss_only.set(bool(prediction_loss_only))",
            "calls_the_loss_of_its_base_class",
        ),
        (
            "trainer: what cannot be served is tried each time",
            "_left_alone.add(_innermost(model))", "pass",
            "left_alone",
        ),
    ),
    *_mutants(
        "fastrlhf/integrations/replacements.py", "test_transformers_trainer.py",
        (
            "patch: the first to leave takes it off",
            "if self._wanted or self._inside:", "if self._wanted:",
            "on_and_off",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/foreseen_stats.py", "test_foreseen_stats.py",
        (
            "foreseen: any slopes are taken for those that were foreseen",
            "missed = came - factor * guess", "missed = torch.zeros_like(came)",
            "right_whatever_is_guessed and head",
        ),
        (
            "foreseen: slopes that are not finite are taken for foreseen ones",
            "due = ~(alike & came.isfinite())", "due = ~alike",
            "not_finite_are_seen",
        ),
        (
            "foreseen: what was foreseen of a hidden state need only be made up for",
            "own[rows] = of_rest[rows] * ratio", "own[rows] += of_rest[rows]",
            "lose_no_accuracy",
        ),
        (
            "foreseen: the factor is that of the first token",
            "torch.where(guess != 0, came / guess, torch.nan).nanmedian()",
            "(came / guess)[0]",
            "as_many_matmuls",
        ),
        (
            "foreseen: an entropy's gradient is forgotten",
            "if slopes.entropy is not None:\n        needs", "if False:\n        needs",
            "right_whatever_is_guessed and hidden",
        ),
        (
            "foreseen: an entropy's gradient is forgotten where slopes are foreseen",
            "due |= slopes.entropy[order] != 0", "pass",
            "right_whatever_is_guessed and head and equal",
        ),
        (
            "foreseen: what is left serves twice",
            "left, ctx.left = ctx.left, None", "left = ctx.left",
            "backward_twice or second_derivatives",
        ),
        (
            "foreseen: logits that are left stand for other tokens",
            "order[: last_block.span[0]] if last_block",
            "order[last_block.span[0] :] if last_block",
            "right_whatever_is_guessed and head and none",
        ),
        (
            "foreseen: a guess without bounds",
            "torch.where(guess.abs() < _LARGEST_GUESS, guess, 0.0)", "guess",
            "too_large_is_none or nan",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_divergence.py", "test_trl.py",
        (
            "divergence: the teacher's entropy",
            "ours = self.pair[1 if self.swapped else 0]", "ours = self.pair[1]",
            "changes_no_result and distillation",
        ),
    ),
    *_mutants(
        "fastrlhf/integrations/trl.py", "test_trl_patch.py",
        (
            "trl: an adapter is left out once the patch is gone",
            "if not _replacements.in_place:", "if False:",
            "once_the_patch_is_gone",
        ),
        (
            "trl: a head that is cast may be adapted",
            "return _adapters_refused.get() and has_adapter(instance)", "return False",
            "may_be_saved_but_not_adapted",
        ),
    ),
    *_mutants(
        "fastrlhf/integrations/trl.py", "test_trl.py",
        (
            "trl: prompts are scored on a CPU",
            'found.append(Replacement(module, "_use_triton", _always))', "pass",
            "cost_of_a_head",
        ),
    ),
    *_mutants(
        "fastrlhf/integrations/trl_head.py", "test_trl_patch.py",
        (
            "trl: a sharded adapter is left out",
            "if any(map(has_adapter, heads)):", "if False:",
            "weight_that_was_gathered",
        ),
    ),
    *_mutants(
        "fastrlhf/integrations/trl_head.py", "test_trl.py",
        (
            "trl: a temperature a little off, in bf16",
            "LogitMap(scale, softcap), temperature=temperature",
            "LogitMap(scale, softcap), temperature=1.05 * temperature",
            "changes_no_result and bf16 and sft and not lora",
        ),
        (
            "trl: a temperature a little off, in AdamW",
            "LogitMap(scale, softcap), temperature=temperature",
            "LogitMap(scale, softcap), temperature=1.05 * temperature",
            "changes_no_result and adamw",
        ),
        (
            "trl: a temperature a little off, in forward KL",
            "LogitMap(scale, softcap), temperature=temperature",
            "LogitMap(scale, softcap), temperature=1.05 * temperature",
            "changes_no_result and dpo and forward",
        ),
        (
            "trl: forward and reverse divergence are mixed up",
            '{0.0: "forward", 1.0: "reverse"}', '{0.0: "reverse", 1.0: "forward"}',
            "changes_no_result and distillation",
        ),
        (
            "trl: an adapter of the head is left out",
            "return module, head_parts(module)",
            "return None, parts_of_weight(weight, bias)",
            "adapter_of_the_head",
        ),
    ),
    *_mutants(
        "fastrlhf/integrations/trl_foresight.py", "test_trl.py",
        (
            "trl: nothing is foreseen for SFT",
            '{"nll": _equal, "dft": _probability}', "{}",
            "many_blocks and sft",
        ),
        (
            "trl: nothing is foreseen for GRPO",
            'inputs.get("old_per_token_logps") is None', "False",
            "many_blocks and grpo",
        ),
        (
            "trl: the trainer logs what was only foreseen",
            'other._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}', "",
            "changes_no_result and grpo",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/rollout.py", "test_recipe_rollout.py",
        (
            "rollout: the model's own options of sampling stay",
            "owner.generation_config = config", "pass",
            "tempered_softmax",
        ),
        (
            "rollout: the 50 likeliest tokens alone",
            "top_k=0,", "top_k=50,",
            "tempered_softmax and plain",
        ),
        (
            "rollout: log-probs without the temperature",
            "temperature=temperature,\n        return_outputs=True", "return_outputs=True",
            "each_sequence_alone",
        ),
        (
            "rollout: the end is no part of a completion",
            "ended.cumsum(1) - ended == 0", "ended.cumsum(1) == 0",
            "keeps_all_up_to",
        ),
        (
            "rollout: dropout while scoring",
            'with evaluating(policy):\n        batch["logprobs"]',
            'if True:\n        batch["logprobs"]',
            "dropout_is_off",
        ),
        (
            "rollout: sequences are padded on the left",
            "(~valid).long().argsort(dim=1, stable=True)[:, :longest]",
            "valid.long().argsort(dim=1, stable=True)[:, -longest:]",
            "laid_out",
        ),
        (
            "rollout: a reference drops out",
            'with evaluating(ref_model):\n            batch["ref_logprobs"]',
            'if True:\n            batch["ref_logprobs"]',
            "given_reference_is_off_too",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/settings.py", "test_recipe_settings.py",
        (
            "settings: what is not a number is within bounds",
            "above and value <= self.most and value < math.inf",
            "not value <= self.least and not value > self.most",
            "beyond_a_bound and nan",
        ),
        (
            "settings: a bound beside None is not looked at",
            "return None if value is None else check_option(name, hint, value)", "return None",
            "beyond_a_bound and perhaps",
        ),
        (
            "settings: what is unknown is dropped",
            "    if rest:\n", "    if False:\n",
            "unknown",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/run.py", "test_recipe_run.py",
        (
            "run: the weights of a checkpoint are not taken back",
            "parameter.copy_(saved[name])", "pass",
            "interrupted",
        ),
        (
            "run: the learning rate starts again",
            "self.accelerator.register_for_checkpointing(self.schedule)", "pass",
            "random_numbers_go_on",
        ),
        (
            "run: the first step is as long as any",
            "(step + 1) / (warmup + 1)", "1.0",
            "rises_and_falls",
        ),
        (
            "run: the gradients of all models are cut together",
            "for parameters in self.trained:", "for parameters in [list(chain(*self.trained))]:",
            "does_not_shorten",
        ),
        (
            "run: a warm-up longer than the run",
            "min(self.options.warmup_steps, total - 1)", "self.options.warmup_steps",
            "rises_and_falls",
        ),
        (
            "run: a checkpoint holds the frozen model",
            "weights.clear()", "pass",
            "what_is_trained_alone",
        ),
        (
            "run: a former run's checkpoints are taken for this one's",
            "            self._forget_checkpoints()\n", "",
            "forgets_the_checkpoints",
        ),
        (
            "run: the last checkpoint is the first by its name",
            'int(path.name.removeprefix("checkpoint-"))', "path.name",
            "latest_checkpoint",
        ),
        (
            "run: all processes have the samples of the first",
            "set_seed(self.options.seed, device_specific=True)", "set_seed(self.options.seed)",
            "two_processes",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/evaluation.py", "test_recipe_evaluation.py",
        (
            "evaluation: the KL of the reference to the policy",
            "hidden[:, :-1],\n        head.weight,\n"
            "        ref_hidden[:, :-1],\n        ref_head.weight",
            "ref_hidden[:, :-1],\n        ref_head.weight,\n"
            "        hidden[:, :-1],\n        head.weight",
            "sum_over_the_vocabulary",
        ),
        (
            "evaluation: what got better is called worse",
            "[new - old for old, new in", "[old - new for old, new in",
            "paired_means",
        ),
        (
            "evaluation: the KL with dropout",
            "    with evaluating(policy):\n        hidden", "    if True:\n        hidden",
            "dropout_is_off",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/devices.py", "test_recipe_evaluation.py",
        (
            "devices: training has other random numbers after an evaluation",
            'torch.random.fork_rng([device] if device.type == "cuda" else [])',
            "torch.random.fork_rng([], enabled=False)",
            "whenever",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/devices.py", "test_recipe_run.py",
        (
            "devices: accelerate is not asked what it was told",
            "os.environ.get(_DEVICE) or", "",
            "kind_of_a_device",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/preference.py", "test_recipe_evaluation.py",
        (
            "preference: references of other sequences",
            "self.reference[indices].T.reshape(-1)", "self.reference[indices].reshape(-1)",
            "stay_with_their_pairs",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/draws.py", "test_recipe_evaluation.py",
        (
            "draws: the passes of neighbouring seeds are the same",
            "seed * 1_000_003 + passes", "seed + passes",
            "nothing_else",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/adaptive_kl.py", "test_recipes.py",
        (
            "adaptive KL: a step of any length",
            "min(0.2, max(-0.2, kl / self.target - 1))", "(kl / self.target - 1)",
            "penalty_follows",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/ppo.py", "test_recipes.py",
        (
            "ppo: the passes go on however far the policy is",
            'options.kl_stop is not None and run.mean(metrics["approx_kl"]) > options.kl_stop',
            "False",
            "goes_on_to_the_next_step",
        ),
        (
            "ppo: the penalty is paid, not charged",
            "keep, kl_coef=kl_coef", "keep, kl_coef=-kl_coef",
            "ppo_targets",
        ),
        (
            "ppo: a cut completion is as good as any",
            "options.truncation_penalty * batch", "0 * batch",
            "costs_the_penalty",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/ppo.py", "test_recipe_losses.py",
        (
            "ppo: the critic's error counts as it is",
            "loss + options.value_coef * error", "loss + error",
            "loss_of_ppo",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/grpo.py", "test_recipe_losses.py",
        (
            "grpo: Dr. GRPO divides by sequences",
            "float(len(advantages) * options.new_tokens)", "float(len(advantages))",
            "divide_by and dr_grpo",
        ),
        (
            "grpo: each process divides by its own tokens",
            'run.mean(batch["completion_mask"].sum())', 'batch["completion_mask"].sum()',
            "divide_by and dapo",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/sft.py", "test_recipes.py",
        (
            "sft: the model is that without its adapters",
            "copy.deepcopy(policy).merge_and_unload()", "copy.deepcopy(policy).unload()",
            "of_its_adapters",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/rankings.py", "test_recipe_evaluation.py",
        (
            "rankings: the gap to the best alone",
            "scores[kept[-1]] - scores[index]", "scores[kept[0]] - scores[index]",
            "next_better",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/reward.py", "test_recipes.py",
        (
            "reward: rankings are not centred",
            "losses + options.center_coef * (2 * means).square()", "losses",
            "that_of_the_paper and 3",
        ),
        (
            "reward: no margin",
            "margin=options.margin * gaps", "margin=0 * gaps",
            "that_of_the_paper and 2",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/models.py", "test_recipes.py",
        (
            "models: a reward model scores the padding",
            "model.config.pad_token_id = load_tokenizer(source).pad_token_id",
            "model.config.pad_token_id = -1",
            "read_back and False",
        ),
        (
            "models: bitsandbytes packs the reward model for inference",
            "module.support_avx512bf16_for_cpu = False", "pass",
            "keep_their_backward",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/best_of_n.py", "test_recipes.py",
        (
            "best of n: the best of n + 1",
            "math.comb(rank, n - 1) / total", "math.comb(rank, n) / total",
            "all_choices",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/distill.py", "test_recipes.py",
        (
            "distill: a student's cache has the places of the teacher's",
            "layer.self_attn.layer_idx = number", "pass",
            "pruned_student",
        ),
    ),
    *_mutants(
        "fastrlhf/recipes/finished.py", "test_recipe_run.py",
        (
            "finished: checkpoints of a former run stay",
            "shutil.rmtree(checkpoint)", "pass",
            "forgets_its_parts",
        ),
        (
            "finished: figures of another kind of device are taken",
            'check_same_device(found["device"], options, folder)', "pass",
            "of_other_options",
        ),
        (
            "finished: figures of a former run stay",
            '(folder / "metrics.json").unlink(missing_ok=True)', "pass",
            "is_read_or_goes_on",
        ),
    ),
    *_mutants(
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
    *_mutants(
        "fastrlhf/ops/ranks.py", "test_losses_over_ranks.py",
        (
            "ranks: the gradient of a sum is added up over ranks too",
            "return shared_by_ranks(d_sum, ctx.group), None",
            "return sum_over_ranks(d_sum, ctx.group), None",
            "of_the_whole and other_calls and 2-False",
        ),
        (
            "ranks: the second derivative of a sum is that of this rank",
            "return shared_by_ranks(d_sum, ctx.group), None", "return d_sum, None",
            "second_derivatives",
        ),
        (
            "ranks: what is shared has the gradient of this rank",
            "return sum_over_ranks(d_shared, ctx.group), None", "return d_shared, None",
            "of_the_whole and policy_calls and 2-False",
        ),
        (
            "ranks: parts are as long as the longest",
            "torch.cat([part[:n] for", "torch.cat([part for",
            "several_ranks and 3",
        ),
        (
            "ranks: own entries are found as if all ranks had as many",
            "start = sum(lengths[:rank])", "start = rank * length",
            "several_ranks and 3",
        ),
    ),
    *_mutants(
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
            "mean = mean + shared_by_ranks(rest, group)", "mean = mean + rest",
            "whitened and 3",
        ),
        (
            "whiten: the gradient of the variance is that of this rank",
            "variance = shared_by_ranks(over_batch(centred.square(), count - 1), group)",
            "variance = over_batch(centred.square(), count - 1)",
            "whitened and 3",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/groups.py", "test_losses_over_ranks.py",
        (
            "advantages: groups are what this rank has of them",
            "own = of_all_ranks(parts, group)", "own = parts, slice(None)",
            "several_ranks and 2",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/gdpo.py", "test_losses_over_ranks.py",
        (
            "gdpo: groups are what this rank has of them",
            "own = of_all_ranks(parts, group)", "own = parts, slice(None)",
            "comparisons and 2",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/policy.py", "test_losses_over_ranks.py",
        (
            "ranks: the distance from the sampler is that of this rank's tokens",
            "masked_mean(own_log_ratio.square() / 2, scored, layout)",
            "masked_mean(own_log_ratio.square() / 2, scored)",
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
            "masked_mean(of.to(dtype), mask, layout)",
            "masked_mean(of.to(dtype), mask)",
            "of_the_whole and policy_calls and 2-False",
        ),
    ),
    *_mutants(
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
    *_mutants(
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
    *_mutants(
        "fastrlhf/losses/preference.py", "test_losses_over_ranks.py",
        (
            "ranks: pairs are averaged over this rank's tokens",
            "lengths = logps.layout.counts(logps.mask)",
            "lengths = logps.layout.here.counts(logps.mask)",
            "of_the_whole and preference_calls and 2-False",
        ),
        (
            "ranks: sums are taken for tokens of ranks",
            "if check_group(group) is not None and mask is None and cu_seqlens is None:",
            "if False:",
            "named",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/arguments.py", "test_losses_over_ranks.py",
        (
            "ranks: packed tokens may be taken for sequences",
            "if logps.ndim == 1:  # on one rank", "if False:  # on one rank",
            "named",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/cross_entropy_options.py", "test_losses_over_ranks.py",
        (
            "cross-entropy: the normalizer is not looked at",
            "by = live.sum().clamp(min=1) if normalizer is None else normalizer",
            "by = live.sum().clamp(min=1)",
            "one_large_batch and cross and 2",
        ),
    ),
    *_mutants(
        "fastrlhf/trpo.py", "test_losses_over_ranks.py",
        (
            "trpo: ranks of a group go their own ways",
            "dist.all_reduce(x, group=self.group)", "pass",
            "trust_region and 2",
        ),
    ),
    *_mutants(
        "fastrlhf/trpo.py", "test_trpo.py",
        (
            "trpo: without a group every process is alone",
            "return dist.group.WORLD", "return None",
            "two_processes",
        ),
    ),
    *_mutants(
        "kernels/token_stats.py", "test_vocabulary_over_ranks.py",
        (
            "shared: K1 reads the target before the columns of a part",
            "here = live & (target >= 0) & (target < vocab)",
            "here = live & (target < vocab)",
            "of_the_whole and token_stats and triton and uneven",
        ),
        (
            "shared: a target that no rank holds counts",
            'capped = tl.where(tl.max(held.to(tl.int32), axis=1) > 0, capped, -float("inf"))',
            'capped = tl.where(tl.max(held.to(tl.int32), axis=1) >= 0, capped, -float("inf"))',
            "hostile_logits and token_stats and scattered and triton",
        ),
        (
            "shared: ranks without the target add to it",
            "capped = tl.sum(tl.where(held, of_ranks, 0.0), axis=1)",
            "capped = tl.sum(tl.where(held, of_ranks, 1.0), axis=1)",
            "of_the_whole and token_stats and triton and uneven",
        ),
        (
            "shared: the squares of a message are relative to another peak",
            "squares = move_squares(peak, squares, finite_base(row_peak)[:, None], rate)\n      "
            "  tl.store(out",
            "squares = move_squares(peak, squares, 0.0 * row_peak[:, None], rate)\n        "
            "tl.store(out",
            "options_mean and token_stats and triton and sum_sq",
        ),
    ),
    *_mutants(
        "kernels/divergence.py", "test_vocabulary_over_ranks.py",
        (
            "shared: the norm of q is that of p in the sums",
            "base_q, tl.load(place + 4 * plane),",
            "base_q, tl.load(place + plane),",
            "of_the_whole and kl_divergence and triton",
        ),
    ),
    *_mutants(
        "fastrlhf/reference.py", "test_vocabulary_over_ranks.py",
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
    *_mutants(
        "fastrlhf/ops/ranks.py", "test_vocabulary_over_ranks.py",
        (
            "shared: each rank adds in an order of its own",
            "return gathered(x, group).sum(0",
            "return gathered(x, group).roll(rank_in(group), 0).sum(0",
            "of_the_whole and kl_divergence and 3",
        ),
        (
            "shared: the rank is that among all processes",
            "return dist.get_rank(group)",
            "return dist.get_rank()",
            "two_groups",
        ),
        (
            "shared: what was on its way is overwritten",
            "self.receive()\n        if part.numel():",
            "if part.numel():",
            "options_mean and linear_cross_entropy and eager",
        ),
        (
            "shared: a second derivative is taken of a part",
            'if torch.is_grad_enabled():\n        raise RuntimeError(\n            '
            'f"{function}: where ranks',
            'if False:\n        raise RuntimeError(\n            f"{function}: where ranks',
            "second_derivatives",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/vocabulary_part.py", "test_vocabulary_over_ranks.py",
        (
            "shared: parts start one column late",
            "return VocabularyPart(group, sum(sizes[: rank_in(group)]), size,",
            "return VocabularyPart(group, sum(sizes[: rank_in(group)]) + (rank_in(group) > 0), "
            "size,",
            "of_the_whole and token_stats and eager and uneven",
        ),
        (
            "shared: an earlier target is taken for an ignored one",
            "own = (targets - self.start).clamp(NOT_HERE, self.size)",
            "own = (targets - self.start).clamp(max=self.size)",
            "at_the_borders and eager",
        ),
        (
            "shared: targets are checked against this rank's columns",
            "(targets < self.vocab)) | ~live",
            "(targets < self.size)) | ~live",
            "of_the_whole and token_stats and eager and uneven",
        ),
        (
            "shared: ranks need not agree",
            "        if not alike[i]:",
            "        if False:",
            "do_not_agree",
        ),
        (
            "shared: blocks are as large as this rank's columns allow",
            "sum(sizes), max(sizes))",
            "sum(sizes), size)",
            "same_blocks and linear_token_stats",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/stats_over_ranks.py", "test_vocabulary_over_ranks.py",
        (
            "shared: the mean of the kernels is that of this rank's columns",
            "mean_logit = mean_logit / part.vocab",
            "mean_logit = mean_logit / max(part.size, 1)",
            "options_mean and token_stats and triton and mean_logit",
        ),
        (
            "shared: the mean is that of this rank's columns",
            "statistics_of_parts(merged, part.vocab, row_temperature)",
            "statistics_of_parts(merged, max(part.size, 1), row_temperature)",
            "options_mean and token_stats and eager and mean_logit",
        ),
        (
            "shared: no columns have a peak",
            "_OF_NO_COLUMNS = (-torch.inf, 0.0,",
            "_OF_NO_COLUMNS = (0.0, 0.0,",
            "hostile_logits and token_stats and rows_of_nothing and eager",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/divergence_over_ranks.py", "test_vocabulary_over_ranks.py",
        (
            "shared: the norm of p is that of this rank",
            "_norm(of_ranks[:, i : i + 2], temperature) for i",
            "_norm(of_ranks[:, i : i + 2] if i else peaks_and_rests[None, :2], temperature) for i",
            "of_the_whole and kl_divergence and eager and uneven",
        ),
        (
            "shared: the norm of q is that of p",
            "for i in (0, 2)])",
            "for i in (0, 0)])",
            "of_the_whole and kl_divergence and eager and uneven",
        ),
        (
            "shared: the mean of q is that of p in a mixture",
            "summed(own if share is not None else own[:3], part.group)",
            "summed(own[:3], part.group)",
            "options_mean and kl_divergence and jsd and eager",
        ),
        (
            "shared: the excess is another sum",
            "of_sums_of_terms(sums[0], sums[1], p_is",
            "of_sums_of_terms(sums[0], sums[2], p_is",
            "of_the_whole and kl_divergence and eager and uneven",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_token_stats.py", "test_vocabulary_over_ranks.py",
        (
            "shared: P1 has the gradient of this rank's columns",
            "d_hidden = all_reduced_rows(d_hidden, order, problem.options.part.group)",
            "pass",
            "frozen and linear_token_stats and hidden and eager",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_divergence.py", "test_vocabulary_over_ranks.py",
        (
            "shared: a divergence has the gradient of this rank's columns",
            "d_hidden = all_reduced_rows(d_hidden, order, options.part.group)",
            "pass",
            "frozen and linear_kl and hidden and eager",
        ),
        (
            "shared: slopes of a divergence are rounded before they are added",
            "alone=side.group is None)",
            "alone=True)",
            "that_cancel and kl",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_plans.py", "test_vocabulary_over_ranks.py",
        (
            "shared: slopes are rounded before they are added",
            "alone = not bench.entropy_grad and bench.part is None",
            "alone = not bench.entropy_grad",
            "that_cancel and linear_token",
        ),
        (
            "shared: the mean's gradient is that of this rank's columns",
            "mean_logit=slopes.mean_logit * share)",
            "mean_logit=slopes.mean_logit)",
            "options_mean and linear_cross_entropy and eager",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/head_gradients.py", "test_vocabulary_over_ranks.py",
        (
            "shared: P2 to P4 have the gradient of this rank's columns",
            "self.over_ranks = None if group is None or hidden is None else",
            "self.over_ranks = None if group is None or hidden is not None else",
            "of_the_whole and linear_loss and eager and uneven",
        ),
        (
            "shared: the last block never comes",
            "            self.over_ranks.receive()\n",
            "            pass\n",
            "of_the_whole and linear_loss and eager and uneven",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/sharded.py", "test_vocabulary_over_ranks.py",
        (
            "shared: a DTensor starts where its rank among all does",
            "start = min(mesh.get_local_rank(mesh_dim) * largest, vocab)",
            "start = min(mesh.get_rank() * largest, vocab)",
            "may_have_copies and token_stats",
        ),
        (
            "shared: a bias may be cut in another way",
            "        or x.placements != weight.placements\n",
            "",
            "not_served_are_named and linear_token_stats",
        ),
        (
            "shared: a reference may be cut in another way",
            "if is_dtensor(weight) and not _same(found.part, part):",
            "if False:",
            "not_served_are_named and linear_kl",
        ),
        (
            "shared: two dimensions of a mesh cut the vocabulary",
            "if len(cutting) > 1 or not",
            "if not",
            "grid_that",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/head_scorer.py", "test_tensor_parallel.py",
        (
            "tensor parallel: an adapter has the gradient of this rank's rows",
            "up = rows_of_rank(up, parts.part)",
            "up = up[parts.part.columns]",
            "whole_model and head",
        ),
        (
            "tensor parallel: the offset of other words",
            "found.of_columns(parts.part).folded_bias(parts.bias)",
            "found.folded_bias(parts.bias)",
            "whole_model and offset",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/head_parts.py", "test_more_wrappers.py",
        (
            "tensor parallel: what FSDP2 shards is taken for a shared vocabulary",
            "return is_dtensor(module.weight) and _is_cut(module)",
            "return is_dtensor(module.weight)",
            "fsdp2",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/scored_divergence.py", "test_tensor_parallel.py",
        (
            "tensor parallel: a teacher has the columns of the first rank",
            "rows = ours.part.columns", "rows = slice(0, ours.part.size)",
            "whole_model and torch and gathered",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/tensor_parallel.py", "test_tensor_parallel.py",
        (
            "tensor parallel: a head is compared by the columns of the first rank",
            "return logits[..., part.columns]", "return logits[..., : part.size]",
            "whole_model and gathered",
        ),
        (
            "tensor parallel: hidden states of a part of the positions",
            "whole = hidden.redistribute(placements=everywhere).to_local(",
            "whole = hidden.to_local(",
            "whole_model and sequence",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_plans.py", "test_zero_coefficients.py",
        (
            "no gradient: that of the entropy does not count",
            "nonzero = [slope != 0 for slope in self if slope is not None]",
            "nonzero = [self.logprob != 0]",
            "any_statistic",
        ),
        (
            "no gradient: all rows are multiplied",
            "return index if left_out >= max(_FEWEST, wanted.shape[0] / _ONE_IN) else None",
            "return None",
            "ones_own and few",
        ),
        (
            "no gradient: rows are moved where there is nothing to gain",
            "max(_FEWEST, wanted.shape[0] / _ONE_IN)", "1",
            "not_worth",
        ),
        (
            "no gradient: hidden states of other rows",
            "at(place, some), block.hidden[some], dz.leading(some)",
            "at(place, some), block.hidden[: len(some)], dz.leading(some)",
            "ones_own and few",
        ),
        (
            "no gradient: all logits are made again",
            "some = None if order is None else self.few_enough(slopes.at(order).counting())",
            "some = None",
            "comes_later and few",
        ),
        (
            "no gradient: slopes in the order of all tokens of a group",
            "order, slopes = order[some], slopes.at(some)", "order = order[some]",
            "ones_own and True-16",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/head_gradients.py", "test_zero_coefficients.py",
        (
            "no gradient: rows that are moved overwrite each other",
            "self.values[first : first + len(rows)] = self.values[rows]",
            "self.values[: len(rows)] = self.values[rows]",
            "in_parts",
        ),
        (
            "no gradient: units of the first rows",
            "None if self.unit is None else self.unit[some])",
            "None if self.unit is None else self.unit[:count])",
            "in_parts",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_rows.py", "test_shared_rows.py",
        (
            "shared rows: tokens of one state in two blocks",
            "        of_states = self.shared.state[self.order]",
            "        return even_spans(self.size, chunk)\n"
            "        of_states = self.shared.state[self.order]",
            "what_the_states_cost",
        ),
        (
            "shared rows: one temperature of a hidden state",
            "    if temperature is None:\n        return SharedRows",
            "    if True:\n        return SharedRows",
            "its_own and all",
        ),
        (
            "shared rows: groups by their tokens",
            "sizes if states is None else states, strict=True", "sizes, strict=True",
            "what_the_states_cost",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/shared_targets.py", "test_shared_rows.py",
        (
            "shared rows: the smallest logit leads",
            'largest = lowest.scatter_reduce(0, of_token, own, "amax")',
            'largest = (-lowest).scatter_reduce(0, of_token, own, "amin")',
            "nearly_one",
        ),
        (
            "shared rows: of equal logits the last leads",
            'beyond).scatter_reduce(0, of_token, candidates, "amin")',
            '-1).scatter_reduce(0, of_token, torch.where(ahead, targets, -1), "amax")',
            "leader_of_equal",
        ),
        (
            "shared rows: the leader keeps what is of others",
            "values = torch.cat((d_logprob * own, -d_logprob * of_leader))",
            "values = torch.cat((d_logprob * own, 0 * of_leader))",
            "its_own and eager and plain",
        ),
        (
            "shared rows: targets without their gradient",
            "values = torch.cat((d_logprob * own, -d_logprob * of_leader))",
            "values = torch.cat((0 * own, -d_logprob * of_leader))",
            "its_own and eager and plain",
        ),
        (
            "shared rows: the slope of the cap is 1",
            "slope *= cap_slope(logits, transform.softcap, transform.scale)", "pass",
            "its_own and eager and capped",
        ),
        (
            "shared rows: targets of a row without a distribution",
            "follows = ~self.leads & (self.peak != -torch.inf)[self.of_token]",
            "follows = ~self.leads",
            "without_a_distribution",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/shared_slopes.py", "test_shared_rows.py",
        (
            "shared rows: all targets are the leader's",
            "g = torch.cat((g * own_factor, -g * leader_factor))",
            "g = torch.cat((g * own_factor, g * leader_factor)) * 0",
            "its_own and eager and plain and False",
        ),
        (
            "shared rows: u of states by the numbers of hidden states",
            "add_at(u_logprob.new_zeros(hidden.shape), shared.row_of_state, d_states)",
            "d_states[: len(hidden)]",
            "its_own and eager and all and False",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/kept_ids.py", "test_kept_ids.py",
        (
            "kept ids: ids of ignored tokens are looked at",
            "ids = torch.where(live, ids, 0)", "ids = ids",
            "all_ignored or oracle",
        ),
        (
            "kept ids: an id twice counts twice",
            "    if twice.any():", "    if False:",
            "is_named and twice",
        ),
        (
            "kept ids: sums in fp32",
            'values.double(), "sum"', 'values.float(), "sum"',
            "oracle and eager and dtype0",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/kept_stats.py", "test_kept_ids.py",
        (
            "kept ids: a lone id by its logit",
            "torch.where(alone, value, x) if value is not None and len(x) else x", "x",
            "lone",
        ),
        (
            "kept ids: the gradient of a lone id",
            "no_choice = nowhere | kept.alone", "no_choice = nowhere",
            "lone",
        ),
        (
            "kept ids: the mean over the vocabulary",
            "reference.statistics_of_parts(parts, kept.counts, temperature)",
            "reference.statistics_of_parts(parts, 40, temperature)",
            "further and eager",
        ),
        (
            "kept ids: of equal logits the first in memory is on top",
            "torch.where(kept.ids < targets, capped, -torch.inf)",
            "torch.where(torch.arange(len(capped)) < kept.own[kept.token], capped, -torch.inf)",
            "equal_logits",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/taken_logits.py", "test_kept_ids.py",
        (
            "kept ids: a gradient where nothing is kept",
            "d_logits = torch.zeros_like(logits, memory_format=torch.contiguous_format)",
            "d_logits = torch.ones_like(logits, memory_format=torch.contiguous_format)",
            "oracle and eager and dtype0",
        ),
        (
            "kept ids: the logits stay in the gradient's place",
            "d_logits = logits.zero_()", "d_logits = logits.mul_(1)",
            "place_of_the_logits",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/kept_logits.py", "test_linear_kept_ids.py",
        (
            "kept ids: the first column block alone",
            "        first += weight.shape[1]\n", "",
            "column_blocks",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/weighted_rows.py", "test_linear_kept_ids.py",
        (
            "kept ids: rows whose factor is 0 are read",
            "order = sums.order[factors[sums.order] != 0]", "order = sums.order",
            "lone and eager",
        ),
        (
            "kept ids: sums of a gathered part alone",
            "place[first : first + at_a_time], products", "place[: len(products)], products",
            "quantized",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_head.py", "test_linear_kept_ids.py",
        (
            "kept ids: quantized rows by the scales of the first ones",
            "run = (index.unsqueeze(1) * values.shape[1] + column) // self.run",
            "run = (0 * index.unsqueeze(1) + column) // self.run",
            "quantized",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/compiled_kept.py", "test_linear_kept_ids.py",
        (
            "kept ids, compiled: products without the runs",
            "return added(_DOTS(_rows(matrix), numbers, _rows(other), others))[0]",
            "return _DOTS(_rows(matrix), numbers, _rows(other), others)[-1]",
            "wide_hidden",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_loss.py", "test_linear_kept_ids.py",
        (
            "kept ids: a loss of all tokens in one chunk",
            "index = order[slice(*whole(spans))]", "index = order",
            "ones_own and eager and 4",
        ),
    ),
    *_mutants(
        "kernels/kept_ids.py", "test_linear_kept_ids.py",
        (
            "kept ids, kernel: the last columns are missing",
            "for first in range(0, width, COLUMNS):",
            "for first in range(0, width - COLUMNS, COLUMNS):",
            "wide_hidden and triton",
        ),
        (
            "kept ids, kernel: rows whose factor is 0 are read",
            "inside &= factor != 0.0", "pass",
            "lone and triton",
        ),
        (
            "kept ids, kernel: the first summands alone",
            "range(start, stop, BLOCK):\n        place = first + tl.arange(0, BLOCK)\n",
            "range(start, start + 1, BLOCK):\n        place = first + tl.arange(0, BLOCK)\n",
            "all_ids and triton",
        ),
    ),
    *_mutants(
        "kernels/kept_ids.py", "test_kept_ids.py",
        (
            "kept ids, kernel: the first block of a token's ids alone",
            "range(start, stop, BLOCK):\n        place = first + tl.arange(0, BLOCK)[:, None]",
            "range(start, start + 1, BLOCK):\n        place = first + tl.arange(0, BLOCK)[:, None]",
            "long_rows and triton",
        ),
        (
            "kept ids, kernel: the mean over a block",
            "tl.sum(total, axis=0) / (stop - start) / row_t",
            "tl.sum(total, axis=0) / BLOCK / row_t",
            "further and triton",
        ),
        (
            "kept ids, kernel: ids that are not there have a logit of 0",
            'x = tl.load(logits + place, mask=inside, other=-float("inf"))',
            "x = tl.load(logits + place, mask=inside, other=0.0)",
            "oracle and triton and plain and dtype1",
        ),
    ),
    *_mutants(
        "kernels/kept_ids.py", "test_traffic.py",
        (
            "kept ids, kernel: ids that nobody looks at are read",
            "inside &= tl.load(wanted + pair, mask=inside, other=0) != 0", "pass",
            "kept_ids",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/model_inputs.py", "test_model_kept_ids.py",
        (
            "kept ids: of positions, not of the tokens that they predict",
            "first = torch.arange(sequences, device=offsets.device).unsqueeze(1) * (tokens - 1)",
            "first = torch.arange(sequences, device=offsets.device).unsqueeze(1) * 0",
            "scale_or_cap and Llama",
        ),
        (
            "shared rows: parents in the first row of ids",
            "flat = first + of_scored.clamp(0, tokens - 1)",
            "flat = of_scored.clamp(0, tokens - 1)",
            "several_trees",
        ),
    ),
    *_mutants(
        "fastrlhf/hf/at_head.py", "test_model_kept_ids.py",
        (
            "shared rows: a tree's branches are documents",
            'positions = batch.inputs.get("position_ids") if batch.rows is None else None',
            'positions = batch.inputs.get("position_ids")',
            "its_sequences",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/kept_ids.py", "test_vocabulary_over_ranks.py",
        (
            "kept ids: over ranks, by their numbers in the whole vocabulary",
            "return torch.where(own, kept.ids - part.start, 0), own",
            "return torch.where(own, kept.ids.clamp(max=part.size - 1), 0), own",
            "kept_ids and eager and linear_token_stats",
        ),
        (
            "kept ids: ranks that keep others do not say so",
            "return scored + fingerprint(ids, None) + 3 * fingerprint(offsets, None)",
            "return scored",
            "other_ids",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_kept.py", "test_vocabulary_over_ranks.py",
        (
            "kept ids: each rank's part of a gradient is rounded",
            "hidden = shared_by_ranks(hidden.to(accumulation_dtype(hidden.dtype)), group)",
            "hidden = shared_by_ranks(hidden, group)",
            "cancel and True",
        ),
        (
            "kept ids: the gradient of a rank's own part alone",
            "hidden = shared_by_ranks(hidden.to(accumulation_dtype(hidden.dtype)), group)",
            "hidden = hidden.to(accumulation_dtype(hidden.dtype))",
            "kept_ids and eager and linear_token_stats",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_plans.py", "test_zero_coefficients.py",
        (
            "no gradient: 0 times what is infinite",
            "hidden = torch.where(counting.unsqueeze(1), block.hidden, 0.0)",
            "hidden = block.hidden",
            "few_tokens_too",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_plans.py", "test_head_gradients.py",
        (
            "no gradient: blocks of no rows are multiplied",
            "        elif len(some) == 0:\n            return\n", "",
            "without_any_gradient",
        ),
    ),
    *_mutants(
        "fastrlhf/losses/rollout_tokens.py", "test_rollout_correction.py",
        (
            "rollouts: what both sides rule out is NaN",
            "torch.where(own == engine, 0.0, own - engine)", "own - engine",
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
    *_mutants(
        "fastrlhf/losses/rollout_tokens.py", "test_losses_over_ranks.py",
        (
            "rollouts: the largest of this rank alone",
            "largest = gathered(largest, self.tokens.group).amax()", "pass",
            "rollout_weights",
        ),
    ),
    *_mutants(
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
    *_mutants(
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
    *_mutants(
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
    *_mutants(
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
    *_mutants(
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
    *_mutants(
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
    *_mutants(
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
            "torch.where(counts, x, 0.0) for x in found", "x for x in found",
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
    *_mutants(
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
    *_mutants(
        "fastrlhf/ops/token_stats.py", "test_cross_entropy.py",
        (
            "statistics: a slope of the lse that is dropped",
            "arguments += (temperature, softcap, scale, impl, d_lse, d_mean)",
            "arguments += (temperature, softcap, scale, impl, None, d_mean)",
            "of_the_formula and eager",
        ),
        (
            "statistics: a second derivative without the lse",
            "upstream = (d_logprob, d_entropy, d_lse, d_mean)",
            "upstream = (d_logprob, d_entropy, None, d_mean)", "second_derivatives",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/stats_over_ranks.py", "test_vocabulary_over_ranks.py",
        (
            "over ranks: a slope of the mean logit that counts all columns on each",
            "d_mean = d_mean * (options.part.size / options.part.vocab)", "pass",
            "options_mean and cross_entropy and eager",
        ),
    ),
    *_mutants(
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
            "found = torch.where(counts > 0, found, -torch.inf)", "pass", "without_steps",
        ),
        (
            "process reward: the least of all tokens",
            "values = torch.where(inside, x, without).reshape(-1)", "values = x.reshape(-1)",
            "no_step and min",
        ),
    ),
    *_mutants(
        "kernels/rows.py", "test_topk_divergence.py",
        (
            "words: the first of a tile stays in",
            "for place in range(first, last):\n        inside &=",
            "for place in range(first + 1, last):\n        inside &=",
            "match_the_oracle",
        ),
    ),
    *_mutants(
        "kernels/token_stats.py", "test_topk_divergence.py",
        (
            "words: under a softcap those left out weigh as one at the cap",
            "inside = left_in(inside, columns, numbers, out_of_row, start, start + LANES * VEC)\n"
            '            x = tl.where(inside, x, -float("inf"))',
            "kept_in = left_in(inside, columns, numbers, out_of_row, start, start + LANES * VEC)\n"
            '            x = tl.where(kept_in, x, -float("inf"))',
            "match_the_oracle",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/bucket_logits.py", "test_topk_divergence.py",
        (
            "buckets: words count among the others",
            "others = padded.scatter(-1, ids, -torch.inf)", "others = padded",
            "match_the_oracle",
        ),
        (
            "buckets: relative to nothing",
            "base = _finite(torch.maximum(words.detach().amax(-1, keepdim=True), peak))",
            "base = torch.zeros_like(peak)",
            "large_logits",
        ),
        (
            "buckets: words that are not there get the gradient of their own",
            "values = torch.where(there, d_words, d_words[:, :1])", "values = d_words",
            "match_the_oracle",
        ),
        (
            "buckets: the gradient of words without the slope of the softcap",
            "slopes = slopes * cap_slope(x, transform.softcap, transform.scale)", "pass",
            "match_the_oracle",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/bucket_divergence.py", "test_topk_divergence.py",
        (
            "buckets: the likeliest has a gradient of its own",
            "student = relative_to_largest(student)", "pass",
            "nearly_certain",
        ),
        (
            "buckets: terms without m - own, which may be negative",
            "close = own * expm1_minus(torch.where(near, to_mixture, 0.0))",
            "close = -own * to_mixture",
            "nearly_equal",
        ),
        (
            "buckets: the mixture of the other side",
            "of_teacher = kl_to_mixture(log_t, log_s, beta, complete=complete)",
            "of_teacher = kl_to_mixture(log_t, log_s, 1 - beta, complete=complete)",
            "match_the_oracle",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/teacher_words.py", "test_topk_divergence.py",
        (
            "teacher: a log-prob of -inf is a word",
            "there = keep & (ids != -1) & (logprobs != -torch.inf)", "there = keep & (ids != -1)",
            "match_the_oracle",
        ),
        (
            "teacher: a rest of rounding is none",
            "rest = torch.where(unsure, least, left).log()",
            "rest = torch.where(unsure, 0.0, left).log()",
            "no_more_than_rounding",
        ),
        (
            "teacher: a rest of rounding where there are no other words",
            "return torch.where(all_words, -torch.inf, rest), unsure",
            "return rest, unsure & False",
            "whole_vocabulary",
        ),
    ),
    *_mutants(
        "fastrlhf/ops/linear_topk_divergence.py", "test_linear_topk_divergence.py",
        (
            "words from hidden states: all values weigh as the first",
            "if bool((of_rows == of_rows[0]).all()):", "if True:",
            "every_gradient",
        ),
        (
            "words from hidden states: masked tokens pass on what they get",
            "upstream = torch.where(keep, d_values, 0.0)", "upstream = d_values",
            "does_no_harm",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/source.py", "test_lazy_logits.py",
        (
            "lazy: logits of another weight",
            "if any(_version(x) != version for x, version in self._seen):", "if False:",
            "before_the_weight_changes",
        ),
        (
            "lazy: all logits at a time",
            "max(fewest, self.tokens // (_PARTS * held))", "self.tokens",
            "an_eighth",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/source.py", "test_lazy_wrappers.py",
        (
            "lazy: a dropout is drawn again",
            "self.own_is_there = not (holds_weight or drops)",
            "self.own_is_there = not holds_weight",
            "dropout",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/gradient.py", "test_lazy_chains.py",
        (
            "lazy: a graph is never let go",
            "                self.inner = None\n", "                pass\n",
            "kept or leak or twice or second",
        ),
        (
            "lazy: a gradient that is read lacks what is plain",
            "    total = gradient.rest\n", "    total = None\n",
            "hook or gradient",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/graph.py", "test_lazy_loops.py",
        (
            "lazy: a term reaches its head twice",
            "terms = [x._replace(heads=x.heads - parent.heads) for x in terms]", "pass",
            "KL or entropy or PPO",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/graph.py", "test_lazy_chains.py",
        (
            "lazy: a term goes by the first of two that are watched",
            "            gradient = dense(gradient)  # else it would all go by the first\n",
            "            pass\n",
            "different_ways",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/scores.py", "test_lazy_chains.py",
        (
            "lazy: ignored tokens are remembered with zeros",
            "return -taken(scorer.stats(laid_out, ignore_index=IGNORED, lse=False).logprob)",
            "return -logprobs(of, targets)",
            "as_plain",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/views.py", "test_lazy_chains.py",
        (
            "lazy: an index of words is one of tokens",
            "parts[-1] != slice(None)", "False",
            "program",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/endings.py", "test_lazy_chains.py",
        (
            "lazy: an index smaller than the logits is of all tokens",
            "    if lead != x.shape[:-1]:\n", "    if False:\n",
            "program",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/scores.py", "test_lazy_logits.py",
        (
            "lazy: what was computed is not remembered",
            "    source.known.append(known)\n", "",
            "the_plan",
        ),
        (
            "lazy: the lse has the gradient of a log-prob",
            "self.with_gradient = self.stats.lse + (slope - slope.detach())",
            "self.with_gradient = self.stats.lse - (slope - slope.detach())",
            "gradients_of_what",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/losses.py", "test_lazy_chains.py",
        (
            "lazy: ignored labels are words",
            "    live = target != ignore_index\n", "    live = target == target\n",
            "program or ignored",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/recipe.py", "test_lazy_chains.py",
        (
            "lazy: what was written into logits is forgotten",
            "                    step.on_plain()\n", "                    pass\n",
            "program",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/building.py", "test_lazy_chains.py",
        (
            "lazy: a write is not in the graph",
            "            Replaced.apply(lazy, lazy._plain)\n", "",
            "program or function or written",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/head.py", "test_lazy_logits.py",
        (
            "lazy: one position waits too",
            "hidden.shape[-2] < 2", "hidden.shape[-2] < 1",
            "one_position",
        ),
        (
            "lazy: a head is left enabled",
            "        _take_away(module)\n", "        pass\n",
            "on_and_off",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/report.py", "test_lazy_logits.py",
        (
            "lazy: a site is warned of at every call",
            "    if len(_built) > known:\n", "    if True:\n",
            "the_report",
        ),
        (
            "lazy: the tokens of a call are not counted",
            "    use.calls += 1\n    use.tokens += tokens\n\n", "    use.calls += 1\n\n",
            "the_report",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/meaning.py", "test_lazy_logits.py",
        (
            "lazy: a scale after a cap is one before it",
            "            return self._changed(factor=self.factor * by)\n", "            pass\n",
            "factors",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/endings.py", "test_lazy_logits.py",
        (
            "lazy: the factor of a sum is left out",
            "lambda: found() * factor", "lambda: found()",
            "factors",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/source.py", "test_lazy_logits.py",
        (
            "lazy: computed outside of autocast",
            "with torch.set_grad_enabled(differentiable and self.requires_grad), self.autocast():",
            "with torch.set_grad_enabled(differentiable and self.requires_grad):",
            "autocast_that",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/maps.py", "test_lazy_logits.py",
        (
            "lazy: a product of two distributions is an entropy",
            "if other.kind in kinds and p.same_as(other.first):", "if other.kind in kinds:",
            "looks_like",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/maps.py", "test_lazy_logits.py",
        (
            "lazy: logits times a negative number keep their order",
            "words.kind is Kind.LOGITS and not factor > 0", "False",
            "looks_like",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/meaning.py", "test_lazy_logits.py",
        (
            "lazy: a detached factor has a gradient",
            "            and self.constant == other.constant\n", "",
            "one_distribution",
        ),
    ),
    *_mutants(
        "fastrlhf/lazy/meaning.py", "test_lazy_logits.py",
        (
            "lazy: rows of one path are those of another",
            "return on_host and torch.equal(self.numbers, other.numbers)", "return True",
            "one_distribution",
        ),
    ),
]  # fmt: skip
