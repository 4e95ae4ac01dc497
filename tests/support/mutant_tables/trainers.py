"""Changes of integrations, recipes and benchmarks."""

from mutant import mutants_of

MUTANTS = [
    *mutants_of(
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
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/integrations/replacements.py", "test_transformers_trainer.py",
        (
            "patch: the first to leave takes it off",
            "if self._wanted or self._inside:", "if self._wanted:",
            "on_and_off",
        ),
    ),
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/integrations/trl.py", "test_trl.py",
        (
            "trl: prompts are scored on a CPU",
            'replacements.append(Replacement(module, "_use_triton", _always))', "pass",
            "cost_of_a_head",
        ),
    ),
    *mutants_of(
        "fastrlhf/integrations/trl_head.py", "test_trl_patch.py",
        (
            "trl: a sharded adapter is left out",
            "if any(map(has_adapter, heads)):", "if False:",
            "weight_that_was_gathered",
        ),
    ),
    *mutants_of(
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
    *mutants_of(
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
    *mutants_of(
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
            "rollout: sequences are padded on the left",
            "(~valid).long().argsort(dim=1, stable=True)[:, :longest]",
            "valid.long().argsort(dim=1, stable=True)[:, -longest:]",
            "laid_out",
        ),
    ),
    *mutants_of(
        "fastrlhf/recipes/rollout.py", "test_recipe_rollout_models.py",
        (
            "rollout: dropout while scoring",
            'with evaluating(policy):\n        batch["logprobs"]',
            'if True:\n        batch["logprobs"]',
            "dropout_is_off",
        ),
        (
            "rollout: a reference drops out",
            'with evaluating(ref_model):\n            batch["ref_logprobs"]',
            'if True:\n            batch["ref_logprobs"]',
            "given_reference_is_off_too",
        ),
    ),
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/recipes/run.py", "test_recipe_run.py",
        (
            "run: the weights of a checkpoint are not taken back",
            "parameter.copy_(saved[name])", "pass",
            "interrupted",
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
    *mutants_of(
        "fastrlhf/recipes/run.py", "test_recipe_run_steps.py",
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
    ),
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/recipes/devices.py", "test_recipe_evaluation.py",
        (
            "devices: training has other random numbers after an evaluation",
            'torch.random.fork_rng([device] if device.type == "cuda" else [])',
            "torch.random.fork_rng([], enabled=False)",
            "whenever",
        ),
    ),
    *mutants_of(
        "fastrlhf/recipes/devices.py", "test_recipe_run.py",
        (
            "devices: accelerate is not asked what it was told",
            "os.environ.get(_DEVICE) or", "",
            "kind_of_a_device",
        ),
    ),
    *mutants_of(
        "fastrlhf/recipes/preference.py", "test_recipe_evaluation.py",
        (
            "preference: references of other sequences",
            "self.reference[indices].T.reshape(-1)", "self.reference[indices].reshape(-1)",
            "stay_with_their_pairs",
        ),
    ),
    *mutants_of(
        "fastrlhf/recipes/draws.py", "test_recipe_evaluation.py",
        (
            "draws: the passes of neighbouring seeds are the same",
            "seed * 1_000_003 + passes", "seed + passes",
            "nothing_else",
        ),
    ),
    *mutants_of(
        "fastrlhf/recipes/adaptive_kl.py", "test_recipes.py",
        (
            "adaptive KL: a step of any length",
            "min(0.2, max(-0.2, kl / self.target - 1))", "(kl / self.target - 1)",
            "penalty_follows",
        ),
    ),
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/recipes/ppo.py", "test_recipe_losses.py",
        (
            "ppo: the critic's error counts as it is",
            "loss + options.value_coef * error", "loss + error",
            "loss_of_ppo",
        ),
    ),
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/recipes/sft.py", "test_recipes.py",
        (
            "sft: the model is that without its adapters",
            "copy.deepcopy(policy).merge_and_unload()", "copy.deepcopy(policy).unload()",
            "of_its_adapters",
        ),
    ),
    *mutants_of(
        "fastrlhf/recipes/rankings.py", "test_recipe_evaluation.py",
        (
            "rankings: the gap to the best alone",
            "scores[kept[-1]] - scores[index]", "scores[kept[0]] - scores[index]",
            "next_better",
        ),
    ),
    *mutants_of(
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
    *mutants_of(
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
    *mutants_of(
        "fastrlhf/recipes/best_of_n.py", "test_recipes.py",
        (
            "best of n: the best of n + 1",
            "math.comb(rank, n - 1) / total", "math.comb(rank, n) / total",
            "all_choices",
        ),
    ),
    *mutants_of(
        "fastrlhf/recipes/distill.py", "test_recipes.py",
        (
            "distill: a student's cache has the places of the teacher's",
            "layer.self_attn.layer_idx = number", "pass",
            "pruned_student",
        ),
    ),
    *mutants_of(
        "fastrlhf/recipes/finished.py", "test_recipe_run_steps.py",
        (
            "finished: checkpoints of a former run stay",
            "shutil.rmtree(checkpoint)", "pass",
            "forgets_its_parts",
        ),
        (
            "finished: figures of another kind of device are taken",
            'check_same_device(metrics["device"], options, folder)', "pass",
            "of_other_options",
        ),
        (
            "finished: figures of a former run stay",
            '(folder / "metrics.json").unlink(missing_ok=True)', "pass",
            "is_read_or_goes_on",
        ),
    ),
]  # fmt: skip
