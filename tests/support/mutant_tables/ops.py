"""Changes of the operations from logits."""

from mutant import Mutant, mutants_of

MUTANTS = [
    *mutants_of(
        "fastrlhf/ops/preference_loss.py", "test_preference_layouts.py",
        (
            "pairs: an expanded gradient",
            "d_losses.contiguous(),", "d_losses,",
            "expanded_gradient",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/preference_loss.py", "test_packed*.py",
        (
            "packed: the second derivative of rows",
            "return ROWS if cu_seqlens is None else Runs(cu_seqlens, policy)", "return ROWS",
            "second_derivatives or every_type",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/layout.py", "test_packed_sums.py",
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
    ),
    *mutants_of(
        "fastrlhf/ops/layout.py", "test_packed.py",
        (
            "layout: the last token of the mask is the last of all",
            "return (mask != 0) & is_last.view(mask.shape)", "return is_last.view(mask.shape)",
            "score_goes",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/layout.py", "test_packed*.py",
        (
            "layout: borders of any end",
            "    if last != end:\n", "    if last > end:\n",
            "wrong_borders",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/layout.py", "test_packed_transforms.py",
        (
            "layout: borders that a graph does not look at",
            "(lengths >= 0).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == end)",
            "(lengths >= 0).all() & (cu_seqlens[0] == 0)",
            "in_a_graph_too",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/targets.py", "test_packed.py",
        (
            "packed: targets cross borders",
            "following = torch.where(ids[..., 1:] == ids[..., :-1], following, ignore_index)",
            "following = torch.where(ids[..., 1:] >= ids[..., :-1], following, ignore_index)",
            "crosses_a_border",
        ),
    ),
    *mutants_of(
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
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/ops/transform.py", "test_reports.py",
        (
            "transform: temperatures of sequences are those of positions",
            "        temperature = temperature.unsqueeze(1)\n", "        pass\n",
            "temperatures_of_sequences",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/rows.py", "test_token_stats_backends.py",
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
    ),
    *mutants_of(
        "fastrlhf/ops/eager_token_stats.py", "test_token_stats*.py",
        (
            "eager: rows of nothing have a gradient",
            "active &= peak != -torch.inf", "active &= True",
            "masked_vocabulary and eager",
        ),
        (
            "eager: in place, rows without a gradient keep their logits",
            "        put_rows(d_rows, (~active).nonzero().squeeze(1), 0.0)", "        pass",
            "exactly_zero and eager",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/eager_token_stats.py", "test_token_stats_lse.py",
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
    ),
    *mutants_of(
        "fastrlhf/ops/eager_rows.py", "test_token_stats.py",
        (
            "eager: no row is a chunk too small",
            "size = max(1, (logits_at_once or _CHUNK_LOGITS) // rows.shape[2])",
            "size = (logits_at_once or _CHUNK_LOGITS) // rows.shape[2]",
            "eager_chunks",
        ),
    ),
    Mutant(
        "statistics: a copied DTensor is overwritten",
        "fastrlhf/ops/token_stats.py",
        "inplace = inplace_backward and not own.of_dtensor", "inplace = inplace_backward",
        "test_vocabulary_over_ranks_dtensors.py", "copied_dtensor",
    ),
    *mutants_of(
        "fastrlhf/ops/token_stats.py", "test_with_stats.py",
        (
            "statistics: an entropy without gradient has one",
            "        stats = stats._replace(entropy=stats.entropy.detach())\n", "        pass\n",
            "requires_one or without_the_entropy",
        ),
        (
            "statistics: zeros are the gradient of what has none",
            "ctx.set_materialize_grads(False)", "pass",
            "that_without_the_entropy",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/token_stats.py", "test_cross_entropy.py",
        (
            "statistics: a slope of the lse that is dropped",
            "given.scale, given.impl, d.lse, d_mean,", "given.scale, given.impl, None, d_mean,",
            "of_the_formula and eager",
        ),
        (
            "statistics: a second derivative without the lse",
            "_gradient_by_autograd(given, (d_logprob, d_entropy, d.lse, d_mean))",
            "_gradient_by_autograd(given, (d_logprob, d_entropy, None, d_mean))",
            "second_derivatives",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/compiled_rows.py", "test_compiled*.py",
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
            "        number(softcap, of_rows),\n", "        softcap,\n",
            "compiled_anew",
        ),
        (
            "compiled: spans of the first rows",
            "done += len(some)", "done += 0",
            "spans_of_rows",
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
            "compiled: a gradient that is written into a copy",
            "    there = _view_by_number(d_rows, index)\n",
            "    there = by_number(d_rows, index)\n",
            "columns_at_any_distance",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/compiled_fisher.py", "test_compiled.py",
        (
            "compiled: squares that are too large to add up",
            " & (quadratic != torch.inf)", "",
            "all_columns",
        ),
        (
            "compiled: a variance from moments that cancel",
            "sure = (quadratic > mean.square())", "sure = (quadratic == quadratic)",
            "all_columns",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/compiled_divergence.py", "test_compiled.py",
        (
            "compiled: ln V, in fp32, beside a small divergence",
            "peak_q, a + d, b + e, c + f)", "peak_q, *compiled_rows.added((a, b, c, d, e, f)))",
            "small_divergences",
        ),
    ),
    Mutant(
        "compiled: fp32 sums of whole runs",
        "fastrlhf/ops/compiled_rows.py",
        "*(x.sum(-1).sum(-1, dtype=torch.float64) for x in first),",
        "*(x.flatten(-2).sum(-1) for x in first),",
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
        "fastrlhf/ops/compiled_divergence.py",
        "_LARGE_DIVERGENCE = 0.5", "_LARGE_DIVERGENCE = -1.0",
        "test_divergence_accuracy.py", "nearly_equal and compiled and reverse",
    ),
    *mutants_of(
        "fastrlhf/ops/compiled_gae.py", "test_returns.py",
        (
            "gae, compiled: the last value follows nothing",
            "[after if last_values is None else last_values.to(dtype), *following]",
            "[after, *following]", "each_sequence and compiled and fp64",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/compiled.py", "test_compiled_fallback.py",
        (
            "compiled: for the threads that there were when it was compiled",
            '"cpp.dynamic_threads": True', '"cpp.dynamic_threads": False',
            "as_many_threads",
        ),
        (
            "compiled: a compiler that is turned off is taken for one that failed",
            "            if _is_off():\n                self._refuse(_OFF)\n", "",
            "was_turned_off_meanwhile",
        ),
        (
            "compiled: what was compiled runs whatever is to run instead",
            "        elif _runs_otherwise():\n            self._refuse(_OFF)\n", "",
            "asked_again",
        ),
        (
            "compiled: while the compiler is off",
            "        if _is_off():\n            self._refuse(_OFF)\n", "",
            "asked_again",
        ),
        (
            "compiled: under fx tracing",
            "or torch.jit.is_tracing() or is_fx_symbolic_tracing()", "or torch.jit.is_tracing()",
            "traced_call",
        ),
        (
            "compiled: warming up without the compiler's failures",
            'if _required.get():\n                raise RuntimeError(f"{name} cannot be',
            'if False:\n                raise RuntimeError(f"{name} cannot be',
            "warming_up_fails",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/compiled.py", "test_compiled.py",
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
            "compiled: on disk with what is made for other vectors",
            'f"{of_compiler.cache_key_tag} {torch.backends.cpu.get_cpu_capability()}"',
            "of_compiler.cache_key_tag",
            "kept_apart",
        ),
    ),
    Mutant(
        "compiled: sizes that are equal by chance",
        "fastrlhf/ops/compiled.py",
        "of_sizes.patch(use_duck_shape=False)", "of_sizes.patch(use_duck_shape=True)",
        "test_compiled*.py", "compiled_anew or survives",
        equivalent="no sizes of the example are equal: it is for what compiles after a reset",
    ),
    Mutant(
        "compiled: a lone row as it is",
        "fastrlhf/ops/compiled.py",
        "len(x) != 1:\n        return x", "True:\n        return x",
        "test_compiled*.py", "compiled_anew",
        equivalent="without guards a 1 is a size as any other; the row comes twice for safety",
    ),
    Mutant(
        "tracing: what another thread compiles",
        "fastrlhf/ops/tracing.py",
        "return TracingContext.try_get() is not None", "return True",
        "test_compiled_fallback.py", "another_thread",
    ),
    *mutants_of(
        "fastrlhf/ops/fisher.py", "test_fisher_linear.py",
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
        "test_logits_policy_loss_backends.py", "strides and triton",
        "what the losses pass comes out of torch.where or token_weights, whose (B, T) either is "
        "contiguous or has to be copied to become (N,)",
    ),
    *mutants_of(
        "fastrlhf/ops/gae.py", "test_returns.py",
        (
            "gae: returns of the advantages' lambda",
            "(advantages, _), (_, returns) = of_lams[0], of_lams[-1]",
            "(advantages, _), (_, returns) = of_lams[0], of_lams[0]",
            "lambda_of_their_own and eager",
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
    *mutants_of(
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
    *mutants_of(
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
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/ops/kept_logits.py", "test_linear_kept_ids.py",
        (
            "kept ids: the first column block alone",
            "        first += weight.shape[1]\n", "",
            "column_blocks",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/compiled_kept.py", "test_linear_kept_ids.py",
        (
            "kept ids, compiled: products without the runs",
            "return added(_DOTS(_rows(matrix), numbers, _rows(other), others))[0]",
            "return _DOTS(_rows(matrix), numbers, _rows(other), others)[-1]",
            "wide_hidden",
        ),
    ),
    *mutants_of(
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
    *mutants_of(
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
    *mutants_of(
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
]  # fmt: skip
