"""The examples of the guides do what the guides say: they are short, and they train."""

import pytest
import torch
from support.pages import example

import fastrlhf


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
def test_the_dpo_trainer_example_trains_as_the_trainer_does_at_three_matmuls(monkeypatch) -> None:
    trainers = pytest.importorskip("support.trl_trainers", reason="needs trl")
    block = example("class FusedDPOTrainer(")
    body = block.code.split("def compute_loss(")[1].strip().splitlines()[1:]
    assert len(body) <= 10
    fused = block.run()["FusedDPOTrainer"]
    for options in ({}, {"lora": {"target_modules": ["q_proj", "lm_head"]}}):
        if not options:  # TRL refuses an adapter of the head
            wanted = trainers.train("dpo", beta=0.3)
        else:
            with trainers.plain_heads():
                wanted = trainers.train("dpo", beta=0.3, **options)
        with monkeypatch.context() as patch, _patched():
            patch.setattr(trainers.trl, "DPOTrainer", fused)
            found = trainers.train("dpo", beta=0.3, **options)
            cost = trainers.head_cost("dpo", longer=16) if not options else None
        for record in (found, wanted):  # what the example does not log
            kept = ("loss", "grad_norm")
            record.metrics = [{k: x for k, x in m.items() if k in kept} for m in record.metrics]
        trainers.assert_same(found, wanted, trainers.ROUNDING)
        if cost is not None:
            assert cost.matmuls == pytest.approx(4, rel=0.01)  # one of them of the reference


def _patched():
    from fastrlhf.integrations import trl

    return trl.patched()


def tiny_llama(transformers, kind: str, **options):
    """A random model of a few thousand parameters."""
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, **options,
    )  # fmt: skip
    return getattr(transformers, kind).from_config(config)


def tiny_batch() -> dict[str, torch.Tensor]:
    """Four sequences of twelve tokens, a prompt of five and a completion of seven."""
    ids = torch.randint(97, (4, 12))
    mask = torch.arange(12).expand(4, 12) >= 5
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("README.md", "dpo_step"),
        ("docs/guide/models.md", "dpo_step"),
        ("docs/guide/logits.md", "dpo_step_from_logits"),
    ],
)
def test_the_trainer_example_is_short_and_trains_a_hugging_face_model(page, name) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    block = example(f"def {name}(", page)
    assert len(block.code.split(f"def {name}(")[1].strip().splitlines()) <= 10
    dpo_step = block.run()[name]
    model, batch = tiny_llama(transformers, "AutoModelForCausalLM"), tiny_batch()
    ids = batch["input_ids"]
    with torch.no_grad():
        plain = model(ids).logits.log_softmax(-1)[:, 4:-1].gather(-1, ids[:, 5:, None])
    ref = plain[..., 0].sum(-1)
    loss, rewards = dpo_step(model, batch, ref)
    torch.testing.assert_close(loss, torch.tensor(2.0).log())
    torch.testing.assert_close(rewards, torch.zeros(4), atol=1e-5, rtol=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss.backward()
    optimizer.step()
    assert dpo_step(model, batch, ref)[0] < loss


def test_the_ppo_example_is_short_and_trains_policy_and_critic() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    block = example("def ppo_step(")
    assert len(block.code.split("def ppo_step(")[1].strip().splitlines()) <= 15
    ppo_step, ppo_targets = (block.run()[name] for name in ("ppo_step", "ppo_targets"))
    model = tiny_llama(transformers, "AutoModelForCausalLM")
    critic = tiny_llama(transformers, "AutoModelForTokenClassification", num_labels=1)
    batch = tiny_batch()
    ids = batch["input_ids"]
    with torch.no_grad():
        logprobs = model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        values = critic(ids).logits[:, :-1, 0]
    batch |= {"logprobs": logprobs, "ref_logprobs": logprobs, "values": values}
    batch = ppo_targets(batch | {"scores": torch.tensor([1.0, -1.0, 0.5, -0.5])})
    parameters = [*model.parameters(), *critic.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    losses = []
    for _ in range(3):
        loss, metrics = ppo_step(model, critic, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert metrics["policy/approxkl_avg"] > 0 and "val/clipfrac_avg" in metrics


def test_the_sft_example_makes_the_completions_likelier() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    block = example("def sft_step(")
    sft_step = block.run()["sft_step"]
    model, batch = tiny_llama(transformers, "AutoModelForCausalLM"), tiny_batch()
    loss, metrics = sft_step(model, batch)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert metrics["tokens"] == 28
    assert sft_step(model, batch)[0] < loss


def test_the_packed_example_makes_the_better_completions_likelier() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    block = example("def packed_grpo_step(")
    step = block.run()["packed_grpo_step"]
    model, batch = tiny_llama(transformers, "AutoModelForCausalLM"), tiny_batch()
    packed = {
        "input_ids": batch["input_ids"].view(1, -1),
        "completion_mask": batch["completion_mask"].reshape(1, -1),
        "cu_seqlens": torch.arange(0, 49, 12),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "old_logprobs": None,
    }
    loss, _ = step(model, packed)
    padded, _ = fastrlhf.model_policy_loss(
        model, batch["input_ids"], batch["attention_mask"], None, packed["advantages"],
        mask=batch["completion_mask"], **fastrlhf.grpo_options("dapo"),
    )  # fmt: skip
    torch.testing.assert_close(loss, padded)
    loss.backward()
    assert model.get_output_embeddings().weight.grad.any()


@pytest.mark.parametrize("name", ["grpo_step", "grpo_step_from_hidden_states"])
def test_the_grpo_examples_make_the_better_completions_likelier(name) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    block = example(f"def {name}(")
    grpo_step = block.run()[name]
    model, batch = tiny_llama(transformers, "AutoModelForCausalLM"), tiny_batch()
    rewards, prompts = torch.tensor([1.0, 0.0, 3.0, 2.0]), torch.tensor([0, 0, 1, 1])
    batch["advantages"] = fastrlhf.group_advantages(rewards, prompts)
    batch["old_logprobs"] = None

    def likelihood() -> torch.Tensor:
        ids = batch["input_ids"]
        with torch.no_grad():
            logprobs = model(ids).logits.log_softmax(-1)[:, 4:-1].gather(-1, ids[:, 5:, None])
        return logprobs.sum((1, 2))

    before = likelihood()
    loss, _ = grpo_step(model, batch)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert ((likelihood() - before) > 0).tolist() == [True, False, True, False]


def test_the_example_of_accumulation_has_the_gradient_of_one_large_batch() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    block = example("def accumulated_step(")
    model, batch = tiny_llama(transformers, "AutoModelForCausalLM"), tiny_batch()
    batch |= {"old_logprobs": None, "advantages": torch.tensor([1.0, -1.0, 2.0, 0.5])}
    batch["completion_mask"][0, -3:] = 0  # so that a mean of means would be another

    def gradients(*pieces: slice) -> list[torch.Tensor]:
        model.zero_grad()
        parts = [
            {name: None if x is None else x[piece] for name, x in batch.items()} for piece in pieces
        ]
        block.run()["accumulated_step"](model, parts, None)
        return [p.grad.clone() for p in model.parameters()]

    whole, apart = gradients(slice(None)), gradients(slice(0, 1), slice(1, 4))
    for found, wanted in zip(apart, whole, strict=True):
        assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm())


def test_the_distillation_example_brings_the_student_closer() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    block = example("def distillation_step(")
    body = block.code.split("def distillation_step(")[1].strip().splitlines()
    assert len(body) <= 12  # ten, and the signature with its docstring
    step = block.run()["distillation_step"]
    student, teacher = (tiny_llama(transformers, "AutoModelForCausalLM") for _ in range(2))
    batch = tiny_batch()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    losses = []
    for _ in range(3):
        loss = step(student, teacher, *batch.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
def test_the_trpo_example_is_short_and_keeps_its_bound() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    peft = pytest.importorskip("peft", reason="needs peft")
    block = example("def trust_region_step(")
    assert len(block.code.split("def trust_region_step(")[1].strip().splitlines()) <= 15
    step = block.run()["trust_region_step"]
    base = tiny_llama(transformers, "AutoModelForCausalLM")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"])).eval()
    info = step(model, tiny_batch() | {"advantages": torch.tensor([1.0, -1.0, 0.5, -0.5])})
    assert info.accepted and 0 < info.kl <= 0.01 and info.surrogate > 0


def test_the_example_of_scores_is_the_support_of_what_was_generated() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    block = example("def support_of_scores(")
    model = tiny_llama(transformers, "AutoModelForCausalLM").eval()
    prompt = torch.randint(3, 60, (2, 4))
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_p=0.7, temperature=0.8,
        max_new_tokens=5, min_new_tokens=5, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    support = block.run()["support_of_scores"](output.scores, prompt.shape[1])
    mask = torch.zeros_like(output.sequences)
    mask[:, 4:] = 1
    stats = fastrlhf.model_token_stats(
        model, output.sequences, mask=mask, support=support, temperature=0.8
    )
    sampled = torch.stack(output.scores, 1).log_softmax(-1)
    expected = sampled.gather(-1, output.sequences[:, 4:, None])[..., 0]
    torch.testing.assert_close(stats.logprob[:, 3:], expected, rtol=1e-4, atol=1e-5)


def test_the_example_of_a_tree_is_its_branches() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    block = example("def stats_of_tree(")
    model = tiny_llama(transformers, "AutoModelForCausalLM").eval()
    ids = torch.tensor([[5, 6, 11, 12, 13, 14, 15]])  # 5 6 11, and then 12 13 or 14 15
    stats = block.run()["stats_of_tree"](model, ids, [-1, 0, 1, 2, 3, 2, 5])
    branches = torch.tensor([[5, 6, 11, 12, 13], [5, 6, 11, 14, 15]])
    apart = fastrlhf.model_token_stats(model, branches, entropy=True)
    for found, expected in zip(stats[:2], apart[:2], strict=True):
        together = torch.cat((expected[0], expected[1, 2:]))
        torch.testing.assert_close(found[0], together, rtol=1e-4, atol=1e-5)
