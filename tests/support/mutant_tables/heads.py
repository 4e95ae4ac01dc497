"""Changes of the operations from hidden states and the weight of a head."""

from mutant import Mutant, mutants_of

MUTANTS = [
    *mutants_of(
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
        "head: blocks of columns overwrite each other",
        "fastrlhf/ops/linear_head.py",
        "weight.T, fresh=block.start == 0", "weight.T, fresh=True",
        "test_model_token_stats_heads.py", "with_a_lora_adapter",
    ),
    *mutants_of(
        "fastrlhf/ops/linear_head.py", "test_linear_kept_ids.py",
        (
            "kept ids: quantized rows by the scales of the first ones",
            "run = (index.unsqueeze(1) * values.shape[1] + column) // self.run",
            "run = (0 * index.unsqueeze(1) + column) // self.run",
            "quantized",
        ),
    ),
    Mutant(
        "head gradients: the bias of the last block",
        "fastrlhf/ops/head_gradients.py",
        "self.bias = part if self.bias is None else self.bias.add_(part)", "self.bias = part",
        "test_linear_token_stats.py", "values_and_gradients and eager",
    ),
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/ops/head_gradients.py", "test_vocabulary_over_ranks.py",
        (
            "shared: WITH_LOSS and RECOMPUTE have the gradient of this rank's columns",
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
    *mutants_of(
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
    *mutants_of(
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
    *mutants_of(
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
    *mutants_of(
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
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/ops/linear_plans.py", "test_linear_loss.py",
        (
            "plans: the slope of the lse is lost",
            "self.impl, slopes.lse, slopes.mean_logit,", "self.impl, None, slopes.mean_logit,",
            "lse_is_differentiable and eager",
        ),
    ),
    *mutants_of(
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
            "return Plan.RECOMPUTE if needs.head else Plan.KEEP_SLOPES", "return Plan.KEEP_SLOPES",
            "values_and_gradients and eager",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_plans.py", "test_with_stats.py",
        (
            "plans: an entropy's slope that nobody asked for",
            "    if bench.question.entropy_grad:\n        slopes",
            "    if bench.question.entropy:\n        slopes",
            "without_the_entropy or those_of_the_logits",
        ),
        (
            "plans: a slope that is alone in the dtype of two",
            "alone = not bench.question.entropy_grad and", "alone = not bench.question.entropy and",
            "one_slope_alone",
        ),
        (
            "plans: what is further asked for stays as it was made",
            "= stats[: len(all_stats)]\n"
            "    for of_all, of_block in zip(all_stats, values, strict=True)",
            "= stats[:3]\n    for of_all, of_block in zip(all_stats, values, strict=False)",
            "those_of_the_logits",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_plans.py", "test_vocabulary_over_ranks_accuracy.py",
        (
            "shared: slopes are rounded before they are added",
            "alone = not bench.question.entropy_grad and bench.part is None",
            "alone = not bench.question.entropy_grad",
            "that_cancel and linear_token",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_plans.py", "test_vocabulary_over_ranks.py",
        (
            "shared: the mean's gradient is that of this rank's columns",
            "mean_logit=slopes.mean_logit * share)",
            "mean_logit=slopes.mean_logit)",
            "options_mean and linear_cross_entropy and eager",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_plans.py", "test_zero_coefficients.py",
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
            "at(place, some), block.hidden[some]\n",
            "at(place, some), block.hidden[: len(some)]\n",
            "ones_own and few",
        ),
        (
            "no gradient: all logits are made again",
            "some = None if order is None else self.few_enough(slopes.at(order).counting())",
            "some = None",
            "comes_later and few",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_plans.py", "test_zero_coefficients.py",
        (
            "no gradient: 0 times what is infinite",
            "hidden = torch.where(counting.unsqueeze(1), block.hidden, 0.0)",
            "hidden = block.hidden",
            "few_tokens_too",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_plans.py", "test_head_gradients.py",
        (
            "no gradient: blocks of no rows are multiplied",
            "        elif len(some) == 0:\n            return\n", "",
            "without_any_gradient",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_loss_plans.py", "test_linear_loss.py",
        (
            "plans: slopes of another block of the group",
            "slopes.at(slice(*span)), gradients)",
            "slopes.at(slice(span[1] - span[0])), gradients)",
            "groups_reach",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_statistics.py", "test_linear_loss.py",
        (
            "plans: slopes of entropy and lse of another block of the group",
            "slope[place] for slope in self[1:]",
            "slope[: len(slope[place])] for slope in self[1:]",
            "lse_is_differentiable and eager and groups",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_statistics.py", "test_zero_coefficients.py",
        (
            "no gradient: that of the entropy does not count",
            "nonzero = [slope != 0 for slope in self if slope is not None]",
            "nonzero = [self.logprob != 0]",
            "any_statistic",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_loss_plans.py", "test_zero_coefficients.py",
        (
            "no gradient: slopes in the order of all tokens of a group",
            "order, slopes = order[some], slopes.at(some)", "order = order[some]",
            "ones_own and True-16",
        ),
    ),
    *mutants_of(
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
            "None if x is None else next(slopes) for x in leaves)",
            "None if x is None else (y := next(slopes), zeros)[y is None] for x in leaves)",
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
    *mutants_of(
        "fastrlhf/ops/linear_loss.py", "test_linear_kept_ids_losses.py",
        (
            "kept ids: a loss of all tokens in one chunk",
            "index = order[slice(*whole(spans))]", "index = order",
            "ones_own and eager and 4",
        ),
    ),
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/ops/linear_token_stats.py", "test_with_stats.py",
        (
            "linear stats: an entropy without gradient that claims one",
            "2 if entropy_grad else 1", "2",
            "those_of_the_logits",
        ),
        (
            "linear stats: further statistics that claim a gradient",
            "*all_stats[2 if entropy_grad else 1 :]", "all_stats[2]",
            "those_of_the_logits",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_token_stats.py", "test_vocabulary_over_ranks.py",
        (
            "shared: KEEP_SLOPES has the gradient of this rank's columns",
            "d_hidden = all_reduced_rows(d_hidden, order, problem.options.part.group)",
            "pass",
            "frozen and linear_token_stats and hidden and eager",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_divergence.py", "test_linear_divergence.py",
        (
            "linear divergence: an upstream gradient of masked tokens",
            "upstream = torch.where(mask.reshape(-1), d_values, 0.0)", "upstream = d_values",
            "does_no_harm",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_divergence.py", "test_model_losses_heads.py",
        (
            "divergence: a known gradient for any weights",
            "if options.sum_expected and weigh_alike(upstream[order]):",
            "if options.sum_expected:",
            "divergence_is_that and by and reverse and wider",
        ),
    ),
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/ops/linear_divergence_sides.py", "test_trl.py",
        (
            "divergence: the teacher's entropy",
            "ours = self.pair[1 if self.swapped else 0]", "ours = self.pair[1]",
            "changes_no_result and distillation",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_divergence.py", "test_vocabulary_over_ranks.py",
        (
            "shared: a divergence has the gradient of this rank's columns",
            "d_hidden = all_reduced_rows(d_hidden, order, options.part.group)",
            "pass",
            "frozen and linear_kl and hidden and eager",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_divergence.py", "test_vocabulary_over_ranks_accuracy.py",
        (
            "shared: slopes of a divergence are rounded before they are added",
            "alone=side.group is None)",
            "alone=True)",
            "that_cancel and kl",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/summed_gradient.py", "test_linear_cross_entropy.py",
        (
            "summed gradient: one upstream gradient for all",
            "if weigh_alike(weights):", "if True:",
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
    *mutants_of(
        "fastrlhf/ops/foreseen_stats.py", "test_foreseen_stats.py",
        (
            "foreseen: any slopes are taken for those that were foreseen",
            "missed = actual - factor * foreseen", "missed = torch.zeros_like(actual)",
            "right_whatever_is_guessed and head",
        ),
        (
            "foreseen: slopes that are not finite are taken for foreseen ones",
            "recompute = ~(alike & actual.isfinite())", "recompute = ~alike",
            "not_finite_are_seen",
        ),
        (
            "foreseen: what was foreseen of a hidden state need only be made up for",
            "d_hidden[rows] = of_rest[rows] * ratio", "d_hidden[rows] += of_rest[rows]",
            "lose_no_accuracy",
        ),
        (
            "foreseen: the factor is that of the first token",
            "torch.where(foreseen != 0, actual / foreseen, torch.nan).nanmedian()",
            "(actual / foreseen)[0]",
            "as_many_matmuls",
        ),
        (
            "foreseen: an entropy's gradient is forgotten",
            "if slopes.entropy is not None:\n        needs", "if False:\n        needs",
            "right_whatever_is_guessed and hidden",
        ),
        (
            "foreseen: an entropy's gradient is forgotten where slopes are foreseen",
            "recompute |= slopes.entropy[order] != 0", "pass",
            "right_whatever_is_guessed and head and equal",
        ),
        (
            "foreseen: what is left serves twice",
            "leftover, ctx.leftover = ctx.leftover, None", "leftover = ctx.leftover",
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
    *mutants_of(
        "fastrlhf/ops/shared_targets.py", "test_shared_rows.py",
        (
            "shared rows: the smallest logit leads",
            'largest = lowest.scatter_reduce(0, of_token, target_logits, "amax")',
            'largest = (-lowest).scatter_reduce(0, of_token, target_logits, "amin")',
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
            "values = torch.cat((d_logprob * of_target, -d_logprob * of_leader))",
            "values = torch.cat((d_logprob * of_target, 0 * of_leader))",
            "its_own and eager and plain",
        ),
        (
            "shared rows: targets without their gradient",
            "values = torch.cat((d_logprob * of_target, -d_logprob * of_leader))",
            "values = torch.cat((0 * of_target, -d_logprob * of_leader))",
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
    *mutants_of(
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
    *mutants_of(
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
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/ops/linear_kept.py", "test_vocabulary_over_ranks_accuracy.py",
        (
            "kept ids: each rank's part of a gradient is rounded",
            "hidden = shared_by_ranks(hidden.to(accumulation_dtype(hidden.dtype)), group)",
            "hidden = shared_by_ranks(hidden, group)",
            "cancel and True",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_kept.py", "test_vocabulary_over_ranks.py",
        (
            "kept ids: the gradient of a rank's own part alone",
            "hidden = shared_by_ranks(hidden.to(accumulation_dtype(hidden.dtype)), group)",
            "hidden = hidden.to(accumulation_dtype(hidden.dtype))",
            "kept_ids and eager and linear_token_stats",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/linear_topk_divergence.py", "test_linear_topk_divergence.py",
        (
            "words from hidden states: all values weigh as the first",
            "if weigh_alike(of_rows):", "if True:",
            "every_gradient",
        ),
        (
            "words from hidden states: masked tokens pass on what they get",
            "upstream = torch.where(keep, d_values, 0.0)", "upstream = d_values",
            "does_no_harm",
        ),
    ),
]  # fmt: skip
