"""Changes of the kernels of statistics per token, and of what all kernels share."""

from mutant import Mutant, mutants_of

MUTANTS = [
    *mutants_of(
        "kernels/token_stats.py", "test_token_stats.py",
        (
            "statistics: columns past the end are logits of 0",
            'x = load_tile(source, columns, inside, -float("inf"), acc, "")',
            'x = load_tile(source, columns, inside, 0.0, acc, "")',
            "match_the_oracle and triton and 5003",
        ),
        (
            "statistics: the smallest peak of the splits",
            "row_peak = tl.max(peak, axis=1)", "row_peak = tl.min(peak, axis=1)",
            "several_splits and triton",
        ),
        (
            "gradient: a slope of 0 alone ends the row",
            "(slopes.logprob == 0.0) & (slopes.entropy == 0.0)",
            "(slopes.logprob == 0.0) | (slopes.entropy == 0.0)",
            "either_statistic and triton",
        ),
        (
            "gradient: a zero slope of the log-prob alone ends the row",
            "(slopes.logprob == 0.0) & (slopes.entropy == 0.0)", "(slopes.logprob == 0.0)",
            "either_statistic and triton",
        ),
    ),
    *mutants_of(
        "kernels/token_stats.py", "test_token_stats_hostile.py",
        (
            "statistics: ignored rows are live",
            "live = inside & (target != ignore_index)",
            "live = inside",
            "exactly_zero and triton",
        ),
        (
            "statistics: splits that are not there are read",
            "split, live[:, None] & (split < splits)",
            "split, live[:, None] & (split >= 0)",
            "masked_vocabulary and triton",
        ),
    ),
    *mutants_of(
        "kernels/token_stats.py", "test_token_stats_lse.py",
        (
            "gradient: a zero slope of the lse alone ends the row",
            "no_slope &= (slopes.lse == 0.0)", "no_slope |= (slopes.lse == 0.0)",
            "any_slope and triton",
        ),
        (
            "gradient: a row with a slope of the lse alone is zeros",
            "no_slope &= (slopes.lse == 0.0) & (slopes.total == 0.0)",
            "no_slope &= (slopes.total == 0.0)",
            "any_slope and triton",
        ),
    ),
    *mutants_of(
        "kernels/token_stats.py", "test_token_stats_backends.py",
        (
            "gradient: the other inner dimension",
            "destination = out.first + columns.to(tl.int64) * out.stride",
            "destination = out.first + columns.to(tl.int64)",
            "layouts and True",
        ),
    ),
    *mutants_of(
        "kernels/token_stats.py", "test_with_stats.py",
        (
            "statistics: squares of splits relative to their own peaks",
            "tl.sum(move_squares(peak, squares, base, rate), axis=1)",
            "tl.sum(squares, axis=1)",
            "several_splits and triton",
        ),
        (
            "statistics: squares in the place of the mean",
            "place, mask=present, other=0.0), axis=1)\n        place += plane",
            "place, mask=present, other=0.0), axis=1)",
            "match_the_oracle and triton and plain and 33",
        ),
    ),
    *mutants_of(
        "kernels/token_stats.py", "test_vocabulary_over_ranks.py",
        (
            "shared: the statistics read the target before the columns of a part",
            "here = live & (target >= 0) & (target < vocab)",
            "here = live & (target < vocab)",
            "of_the_whole and token_stats and triton and uneven",
        ),
        (
            "shared: ranks without the target add to it",
            "capped = tl.sum(tl.where(held, of_ranks, 0.0), axis=1)",
            "capped = tl.sum(tl.where(held, of_ranks, 1.0), axis=1)",
            "of_the_whole and token_stats and triton and uneven",
        ),
        (
            "shared: the squares of a message are relative to another peak",
            "squares = tl.sum(move_squares(peak, squares, base, rate), axis=1)",
            "squares = tl.sum(move_squares(peak, squares, 0.0 * base, rate), axis=1)",
            "options_mean and token_stats and triton and sum_sq",
        ),
    ),
    *mutants_of(
        "kernels/token_stats.py", "test_vocabulary_over_ranks_accuracy.py",
        (
            "shared: a target that no rank holds counts",
            'return tl.where(tl.max(held.to(tl.int32), axis=1) > 0, capped, -float("inf"))',
            'return tl.where(tl.max(held.to(tl.int32), axis=1) >= 0, capped, -float("inf"))',
            "hostile_logits and token_stats and scattered and triton",
        ),
    ),
    *mutants_of(
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
    *mutants_of(
        "kernels/rows.py", "test_token_stats*.py",
        (
            "rows: no finite base",
            'return tl.where(peak == -float("inf"), 0.0, peak)', "return peak",
            "masked_vocabulary and triton",
        ),
        (
            "rows: an empty sum meets inf * 0",
            "(moment + sums.rest * tl.where(fade > 0, shift, 0.0)) * fade",
            "(moment + sums.rest * shift) * fade",
            "masked_vocabulary and triton",
        ),
        (
            "rows: 0 * -inf in the moment",
            "tl.sum(tl.where(weight > 0, weight * bits, 0.0), axis=1)",
            "tl.sum(weight * bits, axis=1)",
            "masked_vocabulary and triton",
        ),
        (
            "rows: a row of nothing but -inf",
            'logprob = tl.where(empty, -float("inf"), logprob)', "logprob = logprob * 1.0",
            "masked_vocabulary and triton",
        ),
        (
            "rows: 0 * -inf in the gradient",
            "dz -= tl.where(p > 0, h * p * (bits * LN2 + stats.entropy), 0.0)",
            "dz -= h * p * (bits * LN2 + stats.entropy)",
            "masked_vocabulary and triton",
        ),
    ),
    *mutants_of(
        "kernels/rows.py", "test_token_stats.py",
        (
            "rows: capped columns past the end",
            'capped = tl.where(inside, capped, -float("inf"))\n    peak',
            "capped = capped * 1.0\n    peak",
            "match_the_oracle and triton and capped and 1000",
        ),
        (
            "rows: the target counts twice",
            "weight = tl.where(columns == target, 0.0, tl.exp2(bits))", "weight = tl.exp2(bits)",
            "match_the_oracle and triton and plain and 33",
        ),
        (
            "rows: a log-prob that cancels",
            "logprob = log_sigmoid(target_shift - tl.log(sums.rest))",
            "logprob = target_shift - log_norm",
            "nearly_one and triton",
        ),
        (
            "rows: 1 - p by subtraction",
            "-g * expm1(stats.logprob)", "g - g * p",
            "nearly_one and triton",
        ),
        (
            "rows: the gradient in bits",
            "h * p * (bits * LN2 + stats.entropy)", "h * p * (bits + stats.entropy)",
            "match_the_oracle and triton and plain and 33",
        ),
        (
            "rows: the gradient without the temperature",
            "return dz * (slope * (1.0 / transform.temperature))", "return dz * slope",
            "match_the_oracle and triton and scaled and 33",
        ),
        (
            "rows: the entropy without what the target adds",
            "tl.where(target_weight > 0, target_weight * target_bits, 0.0)",
            "tl.where(target_weight > 0, 0.0, 0.0)",
            "match_the_oracle and triton and plain and 33",
        ),
    ),
    *mutants_of(
        "kernels/rows.py", "test_token_stats_lse.py",
        (
            "rows: the lse has no slope at the target",
            "l * p - g * expm1", "0.0 - g * expm1",
            "gradient_of_the_lse and triton and 33",
        ),
        (
            "rows: the lse has no slope beside the target",
            "g * expm1(stats.logprob), (l - g) * p", "g * expm1(stats.logprob), (0.0 - g) * p",
            "gradient_of_the_lse and triton and 33",
        ),
        (
            "rows: 1 - p by subtraction beside the lse",
            "l * p - g * expm1(stats.logprob), (l - g) * p", "g + (l - g) * p, (l - g) * p",
            "both_tails and triton",
        ),
        (
            "rows: slopes of log-prob and lse that do not cancel",
            "l * p - g * expm1(stats.logprob), (l - g) * p",
            "l * p - g * expm1(stats.logprob), l * (p * (1.0 + 1e-6)) - g * p",
            "slopes_that_cancel and triton",
        ),
    ),
    *mutants_of(
        "kernels/rows.py", "test_with_stats.py",
        (
            "further: the mean counts columns past the end",
            "total += tl.sum(tl.where(inside, capped, 0.0), axis=1)",
            "total += tl.sum(capped, axis=1)",
            "match_the_oracle and triton and capped and 33",
        ),
        (
            "further: columns past the end have a square",
            "    if transform.HAS_SOFTCAP:\n"
            '        capped = tl.where(inside, capped, -float("inf"))\n'
            "    if asked.top1",
            "    if asked.top1",
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
            "others = tl.where(columns == target, 0.0, tl.exp2(bits))",
            "others = tl.exp2(bits)",
            "match_the_oracle and triton and plain and 33",
        ),
        (
            "further: weights for their squares",
            "squares += tl.sum(others * others, axis=1)", "squares += tl.sum(others, axis=1)",
            "match_the_oracle and triton and plain and 33",
        ),
        (
            "further: squares fade as weights do",
            "return squares * (fade * fade)", "return squares * fade",
            "several_splits and triton",
        ),
        (
            "further: squares stay when the peak moves",
            "squares = move_squares(old_peak, squares, base, transform.rate)",
            "squares = squares * 1.0",
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
            "tl.log(squares + square) - 2.0 * stats.log_norm",
            "tl.log(squares) - 2.0 * stats.log_norm",
            "unlikely_target and triton",
        ),
        (
            "further: one norm for the two of a square",
            "tl.log(squares + square) - 2.0 * stats.log_norm",
            "tl.log(squares + square) - stats.log_norm",
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
            "weight = tl.exp2((target_capped - stats.base) / row_t * LOG2E)",
            "weight = tl.exp2((target_capped - stats.base) * LOG2E)",
            "match_the_oracle and triton and scaled and 33",
        ),
    ),
    Mutant(
        "gradient: no slope of the mean logit",
        "kernels/rows.py",
        "        dz += slopes.total\n", "        dz += 0 * slopes.total\n",
        "test_linear_cross_entropy.py", "as_accurate and triton and dtype0 and smoothed",
    ),
    *mutants_of(
        "kernels/rows.py", "test_topk_divergence.py",
        (
            "words: the first of a tile stays in",
            "for place in range(first, last):\n        inside &=",
            "for place in range(first + 1, last):\n        inside &=",
            "match_the_oracle",
        ),
    ),
    *mutants_of(
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
    ),
    *mutants_of(
        "kernels/rows.py", "test_token_stats_backends.py",
        (
            "rows: rows and blocks change places",
            "view + (row // inner) * stride_outer + (row % inner) * stride_inner",
            "view + (row % inner) * stride_outer + (row // inner) * stride_inner",
            "layouts and triton",
        ),
    ),
    *mutants_of(
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
    Mutant(
        "tiles: tanh near 0 from where it cancels",
        "kernels/tiles.py",
        "tl.where(tl.abs(x) < 0.6, _tanh_near_0(tl.abs(x)), 1.0 - complement)", "1.0 - complement",
        "test_token_stats.py", "twice_those_of and triton",
    ),
    *mutants_of(
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
    *mutants_of(
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
    *mutants_of(
        "kernels/kept_ids.py", "test_kept_ids.py",
        (
            "kept ids, kernel: the first block of a token's ids alone",
            "range(start, stop, BLOCK):\n        place = first + tl.arange(0, BLOCK)[:, None]",
            "range(start, start + 1, BLOCK):\n        place = first + tl.arange(0, BLOCK)[:, None]",
            "long_rows and triton",
        ),
        (
            "kept ids, kernel: the mean over a block",
            "sums, further, capped, stop - start,",
            "sums, further, capped, BLOCK,",
            "further and triton",
        ),
        (
            "kept ids, kernel: ids that are not there have a logit of 0",
            'x = tl.load(logits + place, mask=inside, other=-float("inf"))',
            "x = tl.load(logits + place, mask=inside, other=0.0)",
            "oracle and triton and plain and dtype1",
        ),
    ),
    *mutants_of(
        "kernels/kept_ids.py", "test_traffic.py",
        (
            "kept ids, kernel: ids that nobody looks at are read",
            "inside &= tl.load(wanted + pair, mask=inside, other=0) != 0", "pass",
            "kept_ids",
        ),
    ),
    *mutants_of(
        "kernels/rows.py", "test_token_stats.py",
        (
            "statistics: the lse without the temperature",
            "lse = quotient(stats.base, row_t) + stats.log_norm",
            "lse = stats.base + stats.log_norm",
            "match_the_oracle and triton and scaled and 1000",
        ),
    ),
    *mutants_of(
        "kernels/rows.py", "test_token_stats_hostile.py",
        (
            "statistics: a row of nothing has a peak",
            'tl.where(live & (empty == 0), stats.base, -float("inf"))',
            'tl.where(live, stats.base, -float("inf"))',
            "masked_vocabulary and triton",
        ),
    ),
    *mutants_of(
        "kernels/rows.py", "test_token_stats_lse.py",
        (
            "gradient: the slope of the lse is that of the log-prob",
            "others = (d_entropy, d_lse, d_mean)",
            "others = (d_entropy, None if d_lse is None else d_logprob, d_mean)",
            "any_slope and triton",
        ),
    ),
    *mutants_of(
        "kernels/rows.py", "test_with_stats.py",
        (
            "statistics: squares of lanes relative to their own peaks",
            "tl.sum(move_squares(sums.peak, squares, base, rate), axis=0)",
            "tl.sum(squares, axis=0)",
            "match_the_oracle and triton and plain and 5003",
        ),
        (
            "statistics: a rival in another split is not seen",
            "(further.own > further.before) & (further.own == sums.peak)",
            "(further.own > further.before)",
            "several_splits and triton",
        ),
        (
            "statistics: the first of equal logits is not asked for",
            "(further.own > further.before) & (further.own == sums.peak)",
            "(further.own == sums.peak)",
            "first_is_on_top and triton",
        ),
        (
            "statistics: a top token beside NaN",
            "is_top1 &= stats.log_norm == stats.log_norm", "is_top1 &= True",
            "without_a_distribution and triton",
        ),
        (
            "statistics: a mean logit without temperature",
            "further.total / count / row_t", "further.total / count",
            "match_the_oracle and triton and scaled and 33",
        ),
    ),
    *mutants_of(
        "kernels/tiles.py", "test_gpu_arithmetic.py",
        (
            "tiles: a quotient of a row by the quick division",
            "return tl.div_rn(x, y)", "return x / y",
            "an_offset_of_logits",
        ),
    ),
]  # fmt: skip
