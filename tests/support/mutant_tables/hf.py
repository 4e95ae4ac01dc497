"""Changes of what knows the models of transformers and peft."""

from mutant import Mutant, mutants_of

MUTANTS = [
    *mutants_of(
        "fastrlhf/hf/moving_reference.py", "test_moving_reference.py",
        (
            "moving reference: the shares change places",
            "torch.lerp(before, policy, alpha)", "torch.lerp(policy, before, alpha)",
            "is_the_mixture",
        ),
    ),
    *mutants_of(
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
    Mutant(
        "model: statistics of the next token",
        "fastrlhf/hf/model_token_stats.py",
        "done.result[:, :-1].unbind(-1)", "done.result[:, 1:].unbind(-1)",
        "test_model_token_stats.py", "gives_what_its_logits_give and Llama",
    ),
    *mutants_of(
        "fastrlhf/hf/own_module.py", "test_linear_loss.py",
        (
            "model: an own module's mean logit without a slope",
            "chunk = chunk._replace(mean_logit=(logits / temperature).mean(-1))", "pass",
            "further_statistics",
        ),
    ),
    *mutants_of(
        "fastrlhf/hf/own_module.py", "test_model_losses_heads.py",
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
            "return scored.logprob.sum(), {}", "return self.hidden.new_zeros(()), {}",
            "nothing_is_scored_by_an_own_module",
        ),
    ),
    *mutants_of(
        "fastrlhf/hf/head_scorer.py", "test_model_token_stats_heads.py",
        (
            "model: an adapter without its scaling",
            "adapter.down(adapter.dropout(hidden.to(dtype))) * adapter.scaling",
            "adapter.down(adapter.dropout(hidden.to(dtype)))",
            "with_a_lora_adapter",
        ),
    ),
    *mutants_of(
        "fastrlhf/hf/head_scorer.py", "test_tensor_parallel.py",
        (
            "tensor parallel: an adapter has the gradient of this rank's rows",
            "up = rows_of_rank(up, parts.part)",
            "up = up[parts.part.columns]",
            "whole_model and head",
        ),
        (
            "tensor parallel: the offset of other words",
            "logit_map.of_columns(parts.part).folded_bias(parts.bias)",
            "logit_map.folded_bias(parts.bias)",
            "whole_model and offset",
        ),
    ),
    *mutants_of(
        "fastrlhf/hf/at_head.py", "test_model_token_stats.py",
        (
            "model: a temperature for the token before",
            "torch.cat((expanded, last.expand(len(expanded), 1)), dim=1)",
            "torch.cat((last.expand(len(expanded), 1), expanded), dim=1)",
            "belong_to_the_tokens",
        ),
    ),
    *mutants_of(
        "fastrlhf/hf/at_head.py", "test_model_token_stats_heads.py",
        (
            "model: a head's forward is not compared",
            "check_weight(self.module,", "(lambda *_: None)(self.module,",
            "not_understood and patched",
        ),
    ),
    *mutants_of(
        "fastrlhf/hf/at_head.py", "test_wrapped_losses.py",
        (
            "wrapped: a part of the head that is sharded by itself",
            "parts_within_call(self.module)", "head_parts(self.module)",
            "sharded_models and each",
        ),
    ),
    *mutants_of(
        "fastrlhf/hf/at_head.py", "test_model_kept_ids.py",
        (
            "shared rows: a tree's branches are documents",
            'positions = batch.inputs.get("position_ids") if batch.rows is None else None',
            'positions = batch.inputs.get("position_ids")',
            "its_sequences",
        ),
    ),
    *mutants_of(
        "fastrlhf/hf/model_losses.py", "test_model_losses.py",
        (
            "model loss: a normalizer that is not used",
            "mean_of(total, scored, normalizer)",
            "mean_of(total, scored, None)",
            "metrics_are_those",
        ),
        (
            "model loss: weights that are not looked at",
            "targets, options, weights_there, ignore_index=IGNORED",
            "targets, options, None, ignore_index=IGNORED",
            "tokens_weigh",
        ),
        (
            "model loss: the metrics of the smoothed loss",
            'for name in ("nll", "z_loss")', 'for name in ("losses", "z_loss")',
            "metrics_are_those",
        ),
    ),
    *mutants_of(
        "fastrlhf/hf/packing.py", "test_model_losses_packed.py",
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
    *mutants_of(
        "fastrlhf/hf/lm_head.py", "test_model_token_stats_heads.py",
        (
            "head: hooks of an adapter's module count twice",
            "forward(unit)", "module(unit)",
            "hook_on_an_adapted_head",
        ),
    ),
    *mutants_of(
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
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/hf/stand_in.py", "test_model_token_stats_heads.py",
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
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/hf/logit_map.py", "test_model_token_stats_heads.py",
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
    *mutants_of(
        "fastrlhf/hf/logit_map.py", "test_wrapped_losses.py",
        (
            "wrapped: numbers that 16 bits do not hold",
            "return rows.bfloat16().to(", "return rows.to(",
            "sharded_models and output",
        ),
    ),
    *mutants_of(
        "fastrlhf/hf/head_parts.py", "test_model_token_stats.py",
        (
            "model: virtual tokens are scored",
            "return hidden[:, virtual:] if", "return hidden[:, :tokens] if",
            "virtual_tokens",
        ),
    ),
    *mutants_of(
        "fastrlhf/hf/head_parts.py", "test_model_token_stats_heads.py",
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
            "module.unmerge()  # as the forward of the module would", "pass",
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
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/hf/head_parts.py", "test_more_wrappers.py",
        (
            "tensor parallel: what FSDP2 shards is taken for a shared vocabulary",
            "return is_dtensor(module.weight) and _is_cut(module)",
            "return is_dtensor(module.weight)",
            "fsdp2",
        ),
    ),
    *mutants_of(
        "fastrlhf/hf/head_check.py", "test_model_token_stats_heads.py",
        (
            "model: a 4-bit head is packed by the look at it",
            "hidden.requires_grad_()", "pass",
            "4_bit_head_leaves",
        ),
    ),
    *mutants_of(
        "fastrlhf/hf/head_check.py", "test_wrapped_losses.py",
        (
            "wrapped: the look at a head leaves something for backward",
            "@torch.no_grad()\ndef weight_is_used(", "def weight_is_used(",
            "checkpoint_around",
        ),
    ),
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/hf/scored_divergence.py", "test_tensor_parallel.py",
        (
            "tensor parallel: a teacher has the columns of the first rank",
            "rows = ours.part.columns", "rows = slice(0, ours.part.size)",
            "whole_model and torch and gathered",
        ),
    ),
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/hf/model_inputs.py", "test_model_cache_names.py",
        (
            "inputs: the old name of the cache is unknown",
            "known.update(CACHES[:1])", "known.update(CACHES[:0])",
            "either_name",
        ),
        (
            "inputs: a cache by its new name is not seen",
            "any(inputs.get(name) is not None for name in CACHES)",
            "any(inputs.get(name) is not None for name in CACHES[:1])",
            "positions_are_left",
        ),
    ),
    *mutants_of(
        "fastrlhf/hf/packing.py", "test_model_cache_names.py",
        (
            "packing: a cache by its new name is not refused",
            'for name in ("use_cache", *CACHES):', 'for name in ("use_cache", *CACHES[:1]):',
            "go_with_no_cache",
        ),
    ),
    *mutants_of(
        "fastrlhf/hf/head_check.py", "test_model_token_stats_heads.py",
        (
            "head: logits of fewer columns are compared",
            "alike = logits.shape == expected.shape", "alike = True",
            "fewer_columns",
        ),
    ),
]  # fmt: skip
