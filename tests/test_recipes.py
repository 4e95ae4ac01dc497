"""Each recipe for a few steps of a tiny model: what it computes, leaves behind, and resumes."""

import itertools
import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

for name in ("transformers", "peft", "accelerate", "vaderSentiment", "matplotlib", "tensorboard"):
    pytest.importorskip(name)

from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from support.compare import assert_as_accurate  # noqa: E402
from support.recipe_models import (  # noqa: E402, F401  the fixtures are of every test
    PEFT_READS_AN_OLD_NAME,
    as_on_a_cpu,
    one_thread,
    write_tiny_model,
)
from transformers import AutoModelForCausalLM  # noqa: E402

from fastrlhf.recipes import distill, dpo, frontier, grpo, pipeline, ppo, reward, sft, trpo  # noqa: E402
from fastrlhf.recipes.best_of_n import best_of_n, kl_of_best_of_n  # noqa: E402
from fastrlhf.recipes.finished import finished_or_run  # noqa: E402
from fastrlhf.recipes.models import (  # noqa: E402
    add_adapters,
    load_model,
    load_reward_model,
    source_of,
)
from fastrlhf.recipes.reviews import REVIEWS  # noqa: E402
from fastrlhf.recipes.rewards import RewardModel  # noqa: E402
from fastrlhf.recipes.rollout import rollout  # noqa: E402
from fastrlhf.recipes.run import Run  # noqa: E402
from fastrlhf.recipes.sampling import Sample, samples_of  # noqa: E402
from fastrlhf.recipes.sentiment import vader  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(PEFT_READS_AN_OLD_NAME),
    pytest.mark.xdist_group("recipes"),  # the tiny models are made once
]
CPU = torch.device("cpu")
EVALUATION = {"eval_prompts": 2, "eval_completions": 1}
TINY = {"device": "cpu", "new_tokens": 6, "batch_size": 8, "save_every": 2}
RECIPES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sft": (sft.train, sft.SFTOptions, {"texts_per_step": 4, **EVALUATION}),
    "dpo": (dpo.train, dpo.DPOOptions, {"pairs_per_step": 2, "draw_pairs": 8, **EVALUATION}),
    "ppo": (
        ppo.train,
        ppo.PPOOptions,
        {"completions_per_step": 4, "kl_target": 1e-4, "eval_every": 2, **EVALUATION},
    ),
    "grpo": (grpo.train, grpo.GRPOOptions, {"prompts_per_step": 2, "group_size": 3, **EVALUATION}),
    "trpo": (
        trpo.train,
        trpo.TRPOOptions,
        {"prompts_per_step": 2, "group_size": 3, "max_kl": 1e-3, "eval_every": 2, **EVALUATION},
    ),
    "reward": (
        reward.train,
        reward.RewardOptions,
        {"rankings_per_step": 2, "draw_rankings": 8, "eval_rankings": 8, "quantize": False},
    ),
    "distill": (
        distill.train,
        distill.DistillOptions,
        {"completions_per_step": 4, "drop_layers": 1, **EVALUATION},
    ),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, one of which can be taken out."""
    return write_tiny_model(tmp_path_factory.mktemp("model"), fillers=50, num_hidden_layers=3)


def run_recipe(name: str, model: Path, output: Path, **changes: Any) -> dict[str, Any]:
    train, kind, options = RECIPES[name]
    choice = {"model": str(model), "output": str(output), "steps": 4, **TINY, **options, **changes}
    metrics: dict[str, Any] = train(kind(**choice))
    return metrics


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a run left, whichever of the two places its recipe puts them."""
    adapter = folder / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model" / "model.safetensors")


class Interrupted(Exception):
    """What ends a run in the middle."""


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_leaves_its_figures_and_resumes_where_it_was(
    name: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_recipe(name, model_folder, tmp_path / "whole")
    assert len(whole["training"]) == 4
    assert all(math.isfinite(value) for point in whole["training"] for value in point.values())
    stored = json.loads((tmp_path / "whole" / "metrics.json").read_text(encoding="utf-8"))
    assert stored["training"] == whole["training"] and stored["peak_memory_bytes"] > 0
    assert (tmp_path / "whole" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "whole" / name).glob("events*")), "no logs for TensorBoard"

    log = Run.log

    def log_and_stop(run: Run, figures: Any) -> None:
        if run.done == 2:
            raise Interrupted
        log(run, figures)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_stop)
        with pytest.raises(Interrupted):
            run_recipe(name, model_folder, tmp_path / "part")
    part = run_recipe(name, model_folder, tmp_path / "part", resume=True)
    assert part["training"] == whole["training"]
    assert part["evaluations"] == whole["evaluations"]
    first, second = trained(tmp_path / "whole"), trained(tmp_path / "part")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", RECIPES)
def test_bad_options_are_refused_as_argparse_does(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = {
        "sft": sft, "dpo": dpo, "ppo": ppo, "grpo": grpo, "trpo": trpo, "reward": reward,
        "distill": distill,
    }[name]  # fmt: skip
    for wrong, message in (
        (["--steps", "0"], "argument --steps: expected a positive number, got 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--temperature", "nan"], "argument --temperature: expected more than 0, got nan"),
        (["--unheard-of"], "unrecognized arguments: --unheard-of"),
    ):
        with pytest.raises(SystemExit) as left:
            module.main(wrong)
        assert left.value.code == 2
        assert f"fastrlhf.recipes.{name}: error: {message}" in capsys.readouterr().err


# SFT


def test_sft_scores_endings_and_the_token_that_ends_them(model_folder: Path) -> None:
    _, tokenizer = load_model(str(model_folder), CPU)
    training, held_out = sft.texts(tokenizer, CPU)
    assert len(training) + len(held_out) == 3 * len(REVIEWS)
    assert not {one.prompt for one in training} & {one.prompt for one in held_out}
    for one in training + held_out:
        opening = tokenizer(one.prompt).input_ids
        assert one.prompt_ids.tolist() == opening
        assert one.completion_ids[-1] == tokenizer.eos_token_id
        assert one.completion_ids[:-1].tolist() == tokenizer(one.completion).input_ids


def test_the_reviews_lean_to_neither_side() -> None:
    kind, unkind, neutral = (vader(column) for column in zip(*REVIEWS.values(), strict=True))
    assert min(kind) > 0.3 and max(unkind) < -0.3 and max(map(abs, neutral)) < 0.25
    assert abs(sum(kind) + sum(unkind)) / len(kind) < 0.1


@pytest.mark.parametrize("name", ["/nowhere", "./model", "model.gguf"])
def test_a_model_that_is_not_there_is_named(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"argument --model: there is no {name}"):
        source_of(name)
    assert source_of("someone/model") == "someone/model"  # of a hub


def test_the_model_of_sft_is_that_of_its_adapters(model_folder: Path, tmp_path: Path) -> None:
    run_recipe("sft", model_folder, tmp_path, learning_rate=0.05)
    ids = torch.tensor([[2, 3, 4, 5, 6]])
    base, _ = load_model(str(model_folder), CPU)
    before = base(ids).logits.detach()
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(ids).logits
    plain = adapted(ids).logits
    assert_as_accurate(merged, plain, adapted.double()(ids).logits)
    assert not torch.allclose(merged, before, atol=1e-2)


# DPO


@pytest.mark.parametrize("loss_type", get_args(dpo.LossType))
def test_every_loss_of_dpo_trains(loss_type: Any, model_folder: Path, tmp_path: Path) -> None:
    smoothing = 1e-3 if loss_type == "exo_pair" else 0.0
    few = {"steps": 1, "save_every": 0, "label_smoothing": smoothing}
    run_recipe("dpo", model_folder, tmp_path, loss_type=loss_type, **few)
    began_at_0 = [weight for name, weight in trained(tmp_path).items() if "lora_B" in name]
    assert began_at_0 and all(weight.abs().sum() > 0 for weight in began_at_0)


def test_smoothing_is_refused_where_a_loss_has_none() -> None:
    with pytest.raises(ValueError, match="argument --label_smoothing: is of sigmoid, robust"):
        dpo.DPOOptions(loss_type="hinge", label_smoothing=0.1)
    with pytest.raises(ValueError, match="argument --label_smoothing: expected more than 0 for"):
        dpo.DPOOptions(loss_type="exo_pair")


# The reward model


def sample(text: str, prompt: str = "the film") -> Sample:
    return Sample(prompt, text, torch.tensor([2, 3]), torch.tensor([5, 0]))


def test_rankings_are_in_order_and_without_ties() -> None:
    texts = ["bad", "great", "good", "fine table", "awful", "awful", "awful", "awful"]
    samples = [sample(text) for text in texts]
    (ranking,) = reward.ranked(samples, size=4, minimal_gap=0.3)
    scores = ranking.sentiment
    assert scores == sorted(scores, reverse=True)
    assert all(a - b >= 0.3 for a, b in itertools.pairwise(scores))
    assert ranking.samples[0].completion == "great"
    assert reward.pairs_in_order(torch.tensor([3.0, 1.0, 2.0, 2.0])) == pytest.approx(3.5 / 6)


@pytest.mark.parametrize("center", [0.0, 0.3])
@pytest.mark.parametrize("completions", [2, 3])
def test_the_reward_loss_is_that_of_the_paper(completions: int, center: float) -> None:
    options = reward.RewardOptions(
        completions=completions, center_coef=center, margin=0.5 if completions == 2 else 0.0
    )
    given = {1: 0.3, 2: -0.2, 3: 0.9, 4: 0.1, 5: -1.0, 6: 0.4}
    batch = [
        reward.Ranking(
            [sample(str(k)) for k in range(s, s + completions)], list(range(9, 9 - completions, -1))
        )
        for s in (1, 1 + completions)
    ]

    class Scored(RewardModel):
        def raw(self, samples: list[Sample]) -> torch.Tensor:
            return torch.tensor([given[int(one.completion)] for one in samples])

    loss, figures = reward.loss_of(Scored(None, 0, 0.0, 1.0), batch, options)  # type: ignore[arg-type]
    expected, right = 0.0, 0.0
    for ranking in batch:
        s = [given[int(one.completion)] for one in ranking.samples]
        pairs = list(itertools.combinations(s, 2))
        right += sum(a > b for a, b in pairs) / len(pairs) / 2
        expected += center * (2 * sum(s) / len(s)) ** 2 / 2
        if completions == 2:
            expected += math.log1p(math.exp(-(s[0] - s[1] - 0.5))) / 2
        else:
            for k in range(len(s)):
                expected += (math.log(sum(map(math.exp, s[k:]))) - s[k]) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert figures["accuracy"].item() == pytest.approx(right)


@pytest.mark.parametrize("quantize", [False, True])
def test_a_reward_model_is_read_back(quantize: bool, tmp_path: Path) -> None:
    if quantize:
        pytest.importorskip("bitsandbytes")
    # bitsandbytes quantizes blocks of 64.
    folder = write_tiny_model(tmp_path / "model", 50, hidden_size=64, intermediate_size=128)
    out = tmp_path / "reward"
    # Its head is peaked: a high temperature, so that texts differ.
    few = {"steps": 2, "completions": 3, "temperature": 8.0, "draw_rankings": 16}
    metrics = run_recipe("reward", folder, out, quantize=quantize, **few)
    assert 0 <= metrics["held_out"]["after"]["accuracy"] <= 1
    model = RewardModel.load(str(out), CPU)
    policy, tokenizer = load_model(str(folder), CPU)
    torch.manual_seed(0)
    prompts = ["the film was", "the film", "the"] * 2
    samples = samples_of(rollout(policy, tokenizer, prompts, new_tokens=5))
    assert len({len(one.prompt_ids) + len(one.completion_ids) for one in samples}) > 1
    scores = model.scores(samples, batch_size=4)
    assert scores.shape == (6,) and len(set(scores.tolist())) > 1
    again = RewardModel.load(str(out), CPU).scores(samples, batch_size=4)
    assert torch.equal(scores, again)
    # Padding changes nothing: each alone.
    alone = torch.cat([model.scores([one], 1) for one in samples])
    model.model = model.model.dequantize().double() if quantize else model.model.double()
    exact = torch.cat([model.scores([one], 1) for one in samples])
    assert_as_accurate(scores, alone, exact)

    tuned = run_recipe("ppo", folder, tmp_path / "ppo", reward=str(out), steps=1)
    assert math.isfinite(tuned["training"][0]["reward"])


def test_weights_in_4_bits_keep_their_backward(tmp_path: Path, monkeypatch: Any) -> None:
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    # As on a processor with bf16 instructions, for which evaluation packs weights anew.
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    folder = write_tiny_model(tmp_path, 50, hidden_size=64, intermediate_size=128)
    model = add_adapters(load_reward_model(str(folder), CPU, True), 2, task="SEQ_CLS")
    ids = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad():
        before = model(ids).logits
    model(ids).logits.sum().backward()
    assert torch.equal(model(ids).logits, before)
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert gradients and all(gradient.abs().sum() > 0 for gradient in gradients)


def test_a_folder_without_a_reward_model_is_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reward: expected vader or .* has no reward\.json"):
        run_recipe("ppo", model_folder, tmp_path, reward=str(tmp_path))
    with pytest.raises(ValueError, match="argument --margin"):
        reward.RewardOptions(completions=3, margin=1.0)
    with pytest.raises(ValueError, match="argument --completions"):
        reward.RewardOptions(completions=1)


# PPO


def test_ppo_targets_are_those_of_the_papers() -> None:
    torch.manual_seed(0)
    options = ppo.PPOOptions(gamma=0.9, lam=0.8)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]).bool()
    old, ref, values = (torch.randn(2, 5) for _ in range(3))
    scores = torch.tensor([0.7, -0.4])
    batch: Any = {
        "input_ids": torch.zeros(2, 6, dtype=torch.long),
        "completion_mask": mask,
        "logprobs": old,
        "ref_logprobs": ref,
        "hidden_states": torch.zeros(2, 6, 3),
        "prompts": ["a", "b"],
    }
    found = ppo.ppo_targets(batch, scores, lambda hidden, batch: values, 0.3, options)
    advantages, returns, kept = {}, {}, []
    for row in range(2):
        places = [t for t in range(5) if mask[row, t + 1]]
        rewards = {t: -0.3 * (old[row, t] - ref[row, t]).item() for t in places}
        rewards[places[-1]] += scores[row].item()
        following, next_value = 0.0, 0.0
        for t in reversed(places):
            delta = rewards[t] + 0.9 * next_value - values[row, t].item()
            following = delta + 0.9 * 0.8 * following
            next_value = values[row, t].item()
            advantages[row, t] = following
            returns[row, t] = following + next_value
            kept.append(following)
    mean = sum(kept) / len(kept)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in kept) / (len(kept) - 1) + 1e-8)
    for place, value in advantages.items():
        whitened = (value - mean) / deviation
        assert found["advantages"][place].item() == pytest.approx(whitened, rel=1e-4, abs=1e-5)
        assert found["returns"][place].item() == pytest.approx(returns[place], rel=1e-4, abs=1e-5)
    assert "hidden_states" not in found and "prompts" not in found


def test_the_penalty_follows_the_kl_to_its_target() -> None:
    for kl, factor in ((8.0, 1.02), (4.4, 1.01), (4.0, 1.0), (1.0, 0.98)):
        penalty = ppo.AdaptiveKL(0.5, target=4.0, gain=0.1)
        penalty.update(kl)
        assert penalty.coefficient == pytest.approx(0.5 * factor)
    fixed = ppo.AdaptiveKL(0.5, target=None, gain=0.1)
    fixed.update(100.0)
    assert fixed.coefficient == 0.5


def test_minibatches_are_all_the_samples_once() -> None:
    data = {"input_ids": torch.arange(7)[:, None], "other": torch.arange(7) * 10}
    parts = list(ppo.minibatches(data, 3))
    assert sorted(torch.cat([part["input_ids"][:, 0] for part in parts]).tolist()) == list(range(7))
    assert all(torch.equal(part["input_ids"][:, 0] * 10, part["other"]) for part in parts)


def test_ppo_goes_on_to_the_next_step_where_the_kl_says_so(
    model_folder: Path, tmp_path: Path
) -> None:
    wild = {"learning_rate": 0.1, "epochs": 5, "minibatches": 1, "steps": 1}
    stopped = run_recipe("ppo", model_folder, tmp_path / "a", kl_stop=1e-6, **wild)
    free = run_recipe("ppo", model_folder, tmp_path / "b", kl_stop=None, **wild)
    assert stopped["training"][0]["updates"] == 1  # before it, the policy has not moved
    assert free["training"][0]["updates"] == 5


@pytest.mark.parametrize("separate", [False, True])
def test_the_critic_of_ppo_is_trained(separate: bool, model_folder: Path, tmp_path: Path) -> None:
    run_recipe("ppo", model_folder, tmp_path, separate_critic=separate, steps=2)
    critic = torch.load(tmp_path / "checkpoint-2" / "trained_1.pt", weights_only=True)
    began_at_0 = [w for name, w in critic.items() if "lora_A" not in name]
    assert began_at_0 and all(weight.abs().sum() > 0 for weight in began_at_0)


def test_a_cut_completion_costs_the_penalty(model_folder: Path, tmp_path: Path) -> None:
    # With two tokens next to no completion comes to an end.
    plain, fined = (
        run_recipe(
            "ppo", model_folder, tmp_path / str(p), steps=1, new_tokens=1, truncation_penalty=p
        )
        for p in (0.0, 2.0)
    )
    assert plain["training"][0]["reward"] - fined["training"][0]["reward"] == pytest.approx(
        2.0, abs=1.0
    )
    assert plain["training"][0]["reward"] > fined["training"][0]["reward"]


# GRPO and TRPO


@pytest.mark.parametrize("loss_type", ["bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"])
def test_every_member_of_the_family_trains(
    loss_type: str, model_folder: Path, tmp_path: Path
) -> None:
    metrics = run_recipe(
        "grpo", model_folder, tmp_path, loss_type=loss_type, steps=2, iterations=2, save_every=0
    )
    assert all(math.isfinite(point["loss"]) for point in metrics["training"])
    began_at_0 = [weight for name, weight in trained(tmp_path).items() if "lora_B" in name]
    assert began_at_0 and all(weight.abs().sum() > 0 for weight in began_at_0)


def test_a_group_of_one_is_refused() -> None:
    for kind in (grpo.GRPOOptions, trpo.TRPOOptions):
        with pytest.raises(ValueError, match="argument --group_size: expected 2 or more, got 1"):
            kind(group_size=1)


def test_no_step_of_trpo_is_beyond_its_bound(model_folder: Path, tmp_path: Path) -> None:
    metrics = run_recipe("trpo", model_folder, tmp_path)
    accepted = [point for point in metrics["training"] if point["accepted"]]
    assert accepted, "no step was accepted"
    for point in accepted:
        assert 0 < point["step_kl"] <= 1e-3 and point["gain"] > 0


# Distillation


def test_a_pruned_student_is_the_teacher_without_a_layer(model_folder: Path) -> None:
    teacher, _ = load_model(str(model_folder), CPU)
    student = distill.without_layers(teacher, 1)
    assert student.config.num_hidden_layers == 2 and len(teacher.model.layers) == 3
    ids = torch.tensor([[2, 3, 4, 5]])
    expected = teacher.model.layers
    teacher.model.layers = torch.nn.ModuleList([expected[0], expected[2]])
    assert torch.equal(student(ids).logits, teacher(ids, use_cache=False).logits)
    teacher.model.layers = expected
    # Its cache has a place for each layer: sampling gives the tokens of the whole forward.
    greedy = student.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for length in range(4, greedy.shape[1]):
        assert greedy[0, length] == student(greedy[:, :length]).logits[0, -1].argmax()
    with pytest.raises(ValueError, match="drop_layers: expected at most 1, got 2"):
        distill.without_layers(teacher, 2)


def test_distillation_is_judged_on_the_way(model_folder: Path, tmp_path: Path) -> None:
    metrics = run_recipe("distill", model_folder, tmp_path, eval_every=1, steps=3)
    points = metrics["evaluations"]
    assert [point["step"] for point in points] == [1, 2]
    assert all(point["kl"] > 0 and point["kl_error"] > 0 for point in points)


# Best of n, the pipeline and the frontier


def test_best_of_n_is_the_mean_over_all_choices() -> None:
    scores = [[0.3, -0.5, 0.9, 0.3], [0.0, 0.1, -0.2, 0.4]]
    for n in (1, 2, 3, 4):
        expected = [
            sum(max(chosen) for chosen in itertools.combinations(row, n)) / math.comb(4, n)
            for row in scores
        ]
        found = best_of_n(scores, n)
        assert found.mean == pytest.approx(sum(expected) / 2)
        assert found.standard_error == pytest.approx(abs(expected[0] - expected[1]) / 2)
    # The best of n uniform numbers has density n·u^(n-1): its KL to u's, by quadrature.
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for n in (2, 5):
        density = n * u ** (n - 1)
        assert kl_of_best_of_n(n) == pytest.approx(
            (density * density.log()).mean().item(), rel=1e-4
        )


def test_the_pipeline_hands_each_step_to_the_next(model_folder: Path, tmp_path: Path) -> None:
    options = pipeline.PipelineOptions(
        model=str(model_folder), output=str(tmp_path), device="cpu", quantize=False, save_every=0
    )
    sizes = pipeline.Sizes(2, 8, 2, 2, 4, 1)
    shared = {"new_tokens": 6, "eval_prompts": 2}
    metrics = pipeline.train(options, sizes, **shared)
    assert metrics["reward"]["options"]["model"] == str(tmp_path / "sft" / "model")
    assert metrics["ppo"]["options"]["reward"] == str(tmp_path / "reward")
    assert json.loads((tmp_path / "metrics.json").read_text())["ppo"] == json.loads(
        json.dumps(metrics["ppo"], default=str)
    )
    options.resume = True
    again = pipeline.train(options, sizes, **shared)
    assert again["ppo"]["seconds"] == metrics["ppo"]["seconds"], "a finished step was run again"


def test_the_frontier_goes_on_cell_by_cell(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = frontier.FrontierOptions(
        model=str(model_folder),
        output=str(tmp_path),
        **TINY,
        **EVALUATION,
        eval_every=1,
        betas=[0.1],
        ppo_kl_coefs=[0.05],
        grpo_kl_coefs=[0.0],
        max_kls=[0.001],
        best_of=4,
        sft_steps=1,
        dpo_steps=2,
        online_steps=2,
        trpo_steps=1,
        texts_per_step=8,
    )

    def stop(*_: Any) -> Any:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "train", stop)
        with pytest.raises(Interrupted):
            frontier.train(options)
    done = json.loads((tmp_path / "ppo-0.05" / "metrics.json").read_text())
    options.resume = True
    metrics = frontier.train(options)
    assert [line["method"] for line in metrics["lines"]] == [
        "best of n",
        "DPO",
        "PPO",
        "GRPO",
        "TRPO",
    ]
    by_method = {line["method"]: line for line in metrics["lines"]}
    assert [point["step"] for point in by_method["best of n"]["points"]] == [1, 2, 4]
    assert [point["step"] for point in by_method["PPO"]["points"]] == [1, 2]
    assert by_method["PPO"]["seconds"] == sum(done["seconds"].values())
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("texts", [4, 12, 32])
def test_all_methods_of_the_frontier_have_their_texts(texts: int) -> None:
    options = frontier.FrontierOptions(texts_per_step=texts)
    of = {cell.method: cell.options for cell in frontier.cells(options, Path("here"), {})}
    assert of["PPO"].completions_per_step == texts
    for method, expected in (("GRPO", texts), ("TRPO", texts // 2)):
        assert of[method].prompts_per_step * of[method].group_size == expected
    with pytest.raises(ValueError, match="argument --texts_per_step: expected a multiple of 4"):
        frontier.FrontierOptions(texts_per_step=texts + 2)


def test_a_finished_run_of_other_options_is_not_taken_for_this_one(
    model_folder: Path, tmp_path: Path
) -> None:
    run_recipe("sft", model_folder, tmp_path, steps=1)
    _, kind, options = RECIPES["sft"]
    same = {"model": str(model_folder), "output": str(tmp_path), **TINY, **options}
    with pytest.raises(ValueError, match=r"--resume: .* has steps=1, this one steps=2"):
        finished_or_run(sft.train, kind(steps=2, **same), resume=True)
