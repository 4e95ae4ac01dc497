"""Changes of what processes that share a vocabulary or a batch compute together."""

from mutant import mutants_of

MUTANTS = [
    *mutants_of(
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
    *mutants_of(
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
    ),
    *mutants_of(
        "fastrlhf/ops/ranks.py", "test_vocabulary_over_ranks_errors.py",
        (
            "shared: a second derivative is taken of a part",
            'if torch.is_grad_enabled():\n        raise RuntimeError(\n            '
            'f"{function}: where ranks',
            'if False:\n        raise RuntimeError(\n            f"{function}: where ranks',
            "second_derivatives",
        ),
    ),
    *mutants_of(
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
            "shared: blocks are as large as this rank's columns allow",
            "sum(sizes), max(sizes))",
            "sum(sizes), size)",
            "same_blocks and linear_token_stats",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/vocabulary_part.py", "test_vocabulary_over_ranks_errors.py",
        (
            "shared: ranks need not agree",
            "        if not alike[i]:",
            "        if False:",
            "do_not_agree",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/stats_over_ranks.py", "test_vocabulary_over_ranks.py",
        (
            "shared: the mean of the kernels is that of this rank's columns",
            "_replace(mean_logit=stats.mean_logit / part.vocab)",
            "_replace(mean_logit=stats.mean_logit / max(part.size, 1))",
            "options_mean and token_stats and triton and mean_logit",
        ),
        (
            "shared: the mean is that of this rank's columns",
            "statistics_of_parts(merged, part.vocab, row_temperature)",
            "statistics_of_parts(merged, max(part.size, 1), row_temperature)",
            "options_mean and token_stats and eager and mean_logit",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/stats_over_ranks.py", "test_vocabulary_over_ranks_accuracy.py",
        (
            "shared: no columns have a peak",
            "_OF_NO_COLUMNS = (-torch.inf, 0.0,",
            "_OF_NO_COLUMNS = (0.0, 0.0,",
            "hostile_logits and token_stats and rows_of_nothing and eager",
        ),
    ),
    *mutants_of(
        "fastrlhf/ops/stats_over_ranks.py", "test_vocabulary_over_ranks.py",
        (
            "over ranks: a slope of the mean logit that counts all columns on each",
            "d_mean = d_mean * (options.part.size / options.part.vocab)", "pass",
            "options_mean and cross_entropy and eager",
        ),
    ),
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/ops/sharded.py", "test_vocabulary_over_ranks_dtensors.py",
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
            "if is_dtensor(weight) and not _same(own_part.part, part):",
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
]  # fmt: skip
