"""Runs of a recipe: interrupted, resumed, repeated, in two processes, and what each leaves."""

import dataclasses
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for name in ("transformers", "peft", "accelerate", "vaderSentiment", "matplotlib", "tensorboard"):
    pytest.importorskip(name)

from accelerate import Accelerator  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from support.compare import budget  # noqa: E402
from support.recipe_models import PEFT_READS_AN_OLD_NAME, write_tiny_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from fastrlhf.recipes import dpo  # noqa: E402
from fastrlhf.recipes.devices import kind_of_device  # noqa: E402
from fastrlhf.recipes.finished import begin_anew, finished_or_run  # noqa: E402
from fastrlhf.recipes.metrics import read_metrics, write_metrics  # noqa: E402
from fastrlhf.recipes.report import Report  # noqa: E402
from fastrlhf.recipes.run import (  # noqa: E402
    Run,
    check_same_options,
    last_checkpoint,
    run_command,
)
from fastrlhf.recipes.settings import AdapterOptions, RunOptions  # noqa: E402

pytestmark = pytest.mark.filterwarnings(PEFT_READS_AN_OLD_NAME)

STEPS = 4


@pytest.fixture(autouse=True, scope="module")
def _as_on_a_cpu() -> Iterator[None]:
    """One thread, as these tensors are too small to share, and no interpreted kernels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
        yield
    torch.set_num_threads(threads)


class Interrupted(Exception):
    """What ends a run in the middle."""


# DPO, of the smallest sizes that have something to learn.


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def options_of(model_folder: Path, output: Path, **changes) -> dpo.DPOOptions:
    small = {"eval_prompts": 2, "eval_completions": 1, "draw_pairs": 8, "new_tokens": 6}
    given = {"model": str(model_folder), "output": str(output), "device": "cpu", **small}
    return dpo.DPOOptions(**{**given, "steps": STEPS, "save_every": 2, **changes})


def train(model_folder: Path, output: Path, **changes) -> SimpleNamespace:
    """Run the recipe; what it returns, and the adapters that it leaves."""
    metrics = dpo.train(options_of(model_folder, output, **changes))
    weights = load_file(output / "adapter" / "adapter_model.safetensors")
    return SimpleNamespace(metrics=metrics, weights=weights, output=output)


def assert_same(found: SimpleNamespace, expected: SimpleNamespace) -> None:
    for key in ("training", "sentiment", "kl", "ended", "completions", "comparison", "pairs"):
        assert found.metrics[key] == expected.metrics[key], key
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name], weight), name


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run that nothing has interrupted."""
    return train(model_folder, tmp_path_factory.mktemp("finished"))


def stop_before_update(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the update of this number, from 0, not happen."""
    update = Run.update
    taken: list[int] = []

    def stop(run: Run, loss: Tensor) -> None:
        if len(taken) == number:
            raise Interrupted
        taken.append(1)
        update(run, loss)

    monkeypatch.setattr(Run, "update", stop)


def interrupt(model_folder: Path, output: Path, number: int, **changes) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_before_update(patch, number)
        train(model_folder, output, **changes)
    assert not (output / "metrics.json").exists()


def test_the_run_learns(finished) -> None:
    training = finished.metrics["training"]
    assert len(training) == STEPS
    assert training[-1]["loss"] < training[0]["loss"] - 0.1
    assert (
        finished.metrics["completions"][0]["before"] != finished.metrics["completions"][0]["after"]
    )


def test_the_same_run_twice(finished, model_folder, tmp_path) -> None:
    torch.manual_seed(99)  # what was drawn before is nothing to a run
    torch.rand(3)
    assert_same(train(model_folder, tmp_path), finished)


def test_another_seed_is_another_run(finished, model_folder, tmp_path) -> None:
    found = train(model_folder, tmp_path, seed=1, steps=1)
    assert found.metrics["completions"] != finished.metrics["completions"]


@pytest.mark.parametrize("number", [2, 3])
def test_an_interrupted_run_goes_on_as_it_was(finished, model_folder, tmp_path, number) -> None:
    interrupt(model_folder, tmp_path, number)
    torch.manual_seed(99)
    taken: list[int] = []
    update = Run.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "update", lambda run, loss: (taken.append(run.done), update(run, loss)))
        assert_same(train(model_folder, tmp_path, resume=True), finished)
    assert taken == [2, 3]  # those before the checkpoint are not taken again


def test_evaluations_on_the_way_change_nothing(finished, model_folder, tmp_path) -> None:
    found = train(model_folder, tmp_path / "whole", eval_every=1)
    assert_same(found, finished)
    evaluations = found.metrics["evaluations"]
    assert [one["step"] for one in evaluations] == [1, 2, 3, STEPS]
    assert evaluations[0]["kl"] < evaluations[-1]["kl"] == finished.metrics["kl"]["mean"]
    assert finished.metrics["evaluations"] == evaluations[-1:]
    interrupt(model_folder, tmp_path / "part", 3, eval_every=1)
    rest = train(model_folder, tmp_path / "part", resume=True, eval_every=1)
    assert_same(rest, finished)
    assert rest.metrics["evaluations"] == evaluations


def test_a_run_goes_on_elsewhere(finished, model_folder, tmp_path) -> None:
    """What changes no figure may be another: the folder, and how often checkpoints are written."""
    interrupt(model_folder, tmp_path / "there", 2)
    (tmp_path / "there").rename(tmp_path / "here")
    found = train(model_folder, tmp_path / "here", resume=True, save_every=1)
    assert_same(found, finished)


def test_a_finished_run_is_not_trained_further(finished, model_folder, tmp_path) -> None:
    shutil.copytree(finished.output, tmp_path / "copy")
    with pytest.MonkeyPatch.context() as patch:
        stop_before_update(patch, 0)
        assert_same(train(model_folder, tmp_path / "copy", resume=True), finished)


@pytest.mark.parametrize(
    "name, value",
    [
        ("beta", 0.2),
        ("seed", 1),
        ("steps", 5),
        ("learning_rate", 1e-4),
        ("lora_rank", 2),
        ("lora_targets", "all-linear"),
        ("loss_type", "hinge"),
    ],
)
def test_another_option_is_refused_by_name(finished, model_folder, tmp_path, name, value) -> None:
    """Before anything is loaded: no wait, and no weights that do not fit."""
    shutil.copytree(checkpoint_of(finished.output), tmp_path / f"checkpoint-{STEPS}")
    had = finished.metrics["options"][name]
    with pytest.raises(
        ValueError, match=rf"--resume: .* has {name}={had}, this one {name}={value};"
    ):
        Run("dpo", options_of(model_folder, tmp_path, resume=True, **{name: value}))
    same = {"save_every": 9, "device": "cpu:0"}  # of which no figure depends
    Run("dpo", options_of(model_folder, tmp_path, resume=True, **same)).finish()


def test_another_kind_of_device_is_refused(finished, model_folder, tmp_path) -> None:
    folder = tmp_path / f"checkpoint-{STEPS}"
    shutil.copytree(checkpoint_of(finished.output), folder)
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps({**facts, "device": "cuda"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"--resume: .* was on cuda, this one is on cpu"):
        Run("dpo", options_of(model_folder, tmp_path, resume=True))


def test_the_kind_of_a_device_is_that_of_this_machine(monkeypatch) -> None:
    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
    pretend(0)
    assert kind_of_device("auto") == kind_of_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="argument --device: there is no cuda here"):
        kind_of_device("cuda")
    pretend(2)
    assert kind_of_device("auto") == kind_of_device("cuda:1") == "cuda"
    assert kind_of_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="argument --device: there is no cuda:2 here"):
        kind_of_device("cuda:2")
    with pytest.raises(ValueError, match=r"argument --device: expected auto, cpu, cuda, .*'mps'"):
        kind_of_device("mps")
    # accelerate may have been told otherwise.
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    assert kind_of_device("auto") == "cpu"
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert kind_of_device("auto") == "cpu"


def test_another_number_of_processes_is_refused(
    finished, model_folder, tmp_path, monkeypatch
) -> None:
    shutil.copytree(checkpoint_of(finished.output), tmp_path / f"checkpoint-{STEPS}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"--resume: .* has 1 processes, this one 2"):
        Run("dpo", options_of(model_folder, tmp_path, resume=True))


def test_nothing_to_resume_is_refused(model_folder, tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"--resume: there is no checkpoint in .*empty"):
        train(model_folder, tmp_path / "empty", resume=True)
    with pytest.raises(SystemExit, match="--resume: there is no checkpoint in"):
        interrupt(model_folder, tmp_path / "without", 3, save_every=0)
        train(model_folder, tmp_path / "without", resume=True, save_every=0)


def checkpoint_of(output: Path) -> Path:
    """The one that is there; its name says after which step it was written."""
    (folder,) = output.glob("checkpoint*")
    assert last_checkpoint(output) == folder
    return folder


def test_a_checkpoint_says_of_which_run_it_is(finished) -> None:
    folder = checkpoint_of(finished.output)
    assert folder.name == f"checkpoint-{STEPS}"
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert facts == {"processes": 1, "device": "cpu", "options": finished.metrics["options"]}


def test_a_checkpoint_holds_what_is_trained_alone(finished, model_folder) -> None:
    folder = checkpoint_of(finished.output)
    files = {file.name: file for file in folder.rglob("*") if file.is_file()}
    saved = torch.load(files["trained_0.pt"], weights_only=True)
    assert len(saved) == len(finished.weights)
    for name, weight in finished.weights.items():
        place = name.replace(".weight", ".default.weight")
        assert torch.equal(saved[place], weight)
    of_adapters = 4 * sum(weight.numel() for weight in finished.weights.values())
    # The weights and AdamW's two moments, the random numbers (5 KB each), and names.
    size = sum(file.stat().st_size for file in files.values())
    assert 3 * of_adapters < size < 3 * of_adapters + 40_000
    assert size < (model_folder / "model.safetensors").stat().st_size / 2


def test_the_latest_checkpoint_that_is_complete(tmp_path) -> None:
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "none") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint.unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").touch()
    (tmp_path / "checkpoint-11").mkdir()  # what is no checkpoint of a run, or half of one
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_fresh_run_forgets_the_checkpoints_of_a_former_one(
    finished, model_folder, tmp_path
) -> None:
    """Or one that is interrupted would go on from them, after steps that it never took."""
    shutil.copytree(finished.output, tmp_path / "again")
    last = tmp_path / "again" / f"checkpoint-{STEPS}"
    shutil.copytree(last, last.with_name("checkpoint-100"))
    (tmp_path / "again" / "metrics.json").unlink()
    interrupt(model_folder, tmp_path / "again", 1, beta=0.2)
    assert last_checkpoint(tmp_path / "again") is None
    with pytest.raises(SystemExit, match="--resume: there is no checkpoint in"):
        train(model_folder, tmp_path / "again", resume=True, beta=0.2)
    assert_same(train(model_folder, tmp_path / "again"), finished)
    assert checkpoint_of(tmp_path / "again").name == f"checkpoint-{STEPS}"


def test_checkpoints_of_others_stay(tmp_path) -> None:
    """Those of transformers' Trainer have names of the same form."""
    other = tmp_path / "checkpoint-500"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"weights")
    small_recipe(tmp_path)
    assert (other / "model.safetensors").exists()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_one_checkpoint_is_left(tmp_path) -> None:
    small_recipe(tmp_path)
    last = tmp_path / "checkpoint-5"
    for step in (2, 4):  # a kill came after the new one had its name
        shutil.copytree(last, tmp_path / f"checkpoint-{step}")
    last.rename(tmp_path / "elsewhere")
    state = torch.load(tmp_path / "checkpoint-4" / "custom_checkpoint_0.pkl", weights_only=True)
    state |= {"done": 4, "history": state["history"][:4]}
    torch.save(state, tmp_path / "checkpoint-4" / "custom_checkpoint_0.pkl")
    small_recipe(tmp_path, resume=True)
    assert checkpoint_of(tmp_path) == last


def fail_while_saving(folder: str) -> None:
    Path(folder, "trained_0.pt").write_bytes(b"half of")
    raise OSError("no space left on device")


@pytest.mark.parametrize("where", ["weights", "states"])
def test_a_failed_checkpoint_leaves_the_former_one(
    finished, model_folder, tmp_path, monkeypatch, where
) -> None:
    save_state, save = Accelerator.save_state, torch.save
    saved: list[str] = []

    def second_fails(accelerator: Accelerator, folder: str, **options) -> None:
        saved.append(folder)
        if len(saved) == 2 and where == "states":
            Path(folder).mkdir()
            fail_while_saving(folder)
        save_state(accelerator, folder, **options)

    def half(state: object, file: object, *rest, **options) -> None:
        if len(saved) == 2 and where == "weights":
            fail_while_saving(saved[-1])
        save(state, file, *rest, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(Accelerator, "save_state", second_fails)
        patch.setattr(torch, "save", half)
        train(model_folder, tmp_path, save_every=1)
    assert len(saved) == 2
    assert_same(train(model_folder, tmp_path, resume=True, save_every=1), finished)


@pytest.mark.parametrize("where", ["before the name", "after the name"])
def test_a_run_killed_between_two_checkpoints_can_go_on(
    finished, model_folder, tmp_path, monkeypatch, where
) -> None:
    rename = Path.rename
    renamed: list[Path] = []

    def second_is_the_last(source: Path, target: Path) -> Path:
        renamed.append(source)
        if len(renamed) == 2 and where == "before the name":
            raise Interrupted
        target = rename(source, target)
        if len(renamed) == 2:
            raise Interrupted
        return target

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Path, "rename", second_is_the_last)
        train(model_folder, tmp_path, save_every=1)
    assert (tmp_path / "checkpoint-1").exists()  # the former one goes last
    expected = "checkpoint-1" if where == "before the name" else "checkpoint-2"
    assert last_checkpoint(tmp_path) == tmp_path / expected
    assert_same(train(model_folder, tmp_path, resume=True, save_every=1), finished)
    assert last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{STEPS}"


def test_metrics_are_written(finished, model_folder) -> None:
    stored = json.loads((finished.output / "metrics.json").read_text(encoding="utf-8"))
    metrics = finished.metrics
    for key in ("training", "sentiment", "kl", "ended", "completions", "logprob_memory"):
        assert stored[key] == json.loads(json.dumps(metrics[key])), key
    assert stored["recipe"] == "dpo"
    assert stored["options"]["model"] == str(model_folder)
    assert stored["options"]["steps"] == STEPS
    assert {"torch", "fastrlhf", "peft"} <= stored["versions"].keys()
    assert all(seconds >= 0 for seconds in stored["seconds"].values())
    assert stored["peak_memory_bytes"] > 2**20
    assert len(stored["completions"]) == 2
    gain = stored["sentiment"]["after"]["mean"] - stored["sentiment"]["before"]["mean"]
    assert stored["sentiment"]["difference"]["mean"] == pytest.approx(gain)
    assert stored["kl"]["mean"] > 0
    assert stored["logprob_memory"]["fused_bytes"] < stored["logprob_memory"]["plain_bytes"]


def test_a_picture_is_drawn(finished) -> None:
    assert (finished.output / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:google.protobuf|tensorboard")
def test_tensorboard_has_the_curves(finished) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = finished.output.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    training = finished.metrics["training"]
    assert set(events.Tags()["scalars"]) == training[0].keys() == {"loss", "accuracy", "margin"}
    for name in training[0]:
        points = events.Scalars(name)
        assert [point.step for point in points] == [1, 2, 3, 4]
        assert [point.value for point in points] == pytest.approx([one[name] for one in training])


def test_the_adapters_can_be_loaded(finished, model_folder) -> None:
    ids = torch.arange(2, 8)[None]
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        before = base(ids).logits
        model = PeftModel.from_pretrained(base, finished.output / "adapter")
        assert not torch.allclose(model(ids).logits, before, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, before)
    assert (finished.output / "adapter" / "tokenizer.json").exists()


# A recipe of a few lines, whose steps take random numbers and whose model is not all trained.


@dataclasses.dataclass
class SmallOptions(AdapterOptions):
    """What it can be told."""

    steps: int = 5


class Part(nn.Module):
    """A linear layer behind one that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.trained = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.trained(self.frozen(x).relu())


def small_recipe(output: Path, stop_at: int | None = None, **changes) -> SimpleNamespace:
    """Train two models on random inputs, and note the learning rate of each step."""
    options = SmallOptions(output=str(output), device="cpu", save_every=2, **changes)
    run = Run("small", options)
    models = [Part(), Part()]
    kept = [model.frozen.weight.clone() for model in models]
    first, second = run.train(*models, learning_rate=0.1, total=options.steps)
    rates = []
    for step in run.steps(options.steps):
        if step == stop_at:
            raise Interrupted
        rates.append(run.optimizer.param_groups[0]["lr"])
        loss = (first(torch.randn(8, 3)) + second(torch.randn(8, 3)) - 1).square().mean()
        run.update(loss)
        run.log({"loss": loss, "step": float(step)})
    for model, weight in zip(models, kept, strict=True):
        assert torch.equal(model.frozen.weight, weight)
    state = [p.detach().clone() for model in models for p in model.trained.parameters()]
    return SimpleNamespace(run=run, rates=rates, state=state, metrics=run.finish(extra=3))


@pytest.mark.parametrize("stop_at", [2, 3, 4])
def test_random_numbers_go_on_where_they_were(tmp_path, stop_at) -> None:
    whole = small_recipe(tmp_path / "whole")
    assert whole.rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.05])
    with pytest.raises(Interrupted):
        small_recipe(tmp_path / "part", stop_at=stop_at)
    torch.manual_seed(99)
    rest = small_recipe(tmp_path / "part", resume=True)
    done = stop_at // 2 * 2
    assert rest.rates == whole.rates[done:]
    assert rest.metrics["training"] == whole.metrics["training"]
    assert [point["step"] for point in rest.metrics["training"]] == [0, 1, 2, 3, 4]
    assert all(torch.equal(*pair) for pair in zip(rest.state, whole.state, strict=True))


@pytest.mark.parametrize(
    ("warmup", "total", "expected"),
    [
        (0, 4, [1, 3 / 4, 2 / 4, 1 / 4]),
        (2, 5, [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
        (3, 2, [1 / 2, 1]),  # a run that is over before the rate is up
        (3, 1, [1]),
    ],
)
def test_the_learning_rate_rises_and_falls(tmp_path, warmup, total, expected) -> None:
    found = small_recipe(tmp_path, warmup_steps=warmup, steps=total)
    assert found.rates == pytest.approx([0.1 * share for share in expected])


def test_a_long_gradient_is_cut(tmp_path) -> None:
    options = SmallOptions(output=str(tmp_path), device="cpu", max_grad_norm=0.5)
    run = Run("small", options)
    (model,) = run.train(Part(), learning_rate=0.1, total=1)
    for _ in run.steps(1):
        run.update(100 * model(torch.ones(8, 3)).square().mean())
        gradients = [p.grad for p in model.trained.parameters()]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        assert norm == pytest.approx(0.5, rel=1e-4)
        run.log({"loss": 0.0})


def test_the_gradient_of_one_model_does_not_shorten_another_s(tmp_path) -> None:
    run = Run("small", SmallOptions(output=str(tmp_path), device="cpu", max_grad_norm=0.5))
    far, near = run.train(Part(), Part(), learning_rate=0.1, total=1)
    for _ in run.steps(1):
        losses = [model(torch.ones(8, 3)).sum() for model in (far, near)]
        loss = 100 * losses[0] + losses[1] / 100
        (wanted,) = torch.autograd.grad(loss, near.trained.bias, retain_graph=True)
        run.update(loss)
        assert torch.equal(near.trained.bias.grad, wanted)
        assert far.trained.bias.grad.norm() < 0.5
        run.log({"loss": 0.0})


def test_the_seconds_of_all_phases_are_those_of_the_run(monkeypatch) -> None:
    monkeypatch.setattr("fastrlhf.recipes.report.time", SimpleNamespace(perf_counter=Clock()))
    report = Report(quiet=True)
    with report.phase("outer"):  # begins at 1
        for name in ("first", "second"):
            with report.phase(name):  # at 2 and 4, a second each
                pass
    assert report.seconds == {"first": 1, "second": 1, "outer": 5 - 2}
    with pytest.raises(Interrupted), report.phase("broken"):
        raise Interrupted
    with report.phase("after"):
        pass
    assert report.seconds["after"] == 1


class Clock:
    """Every look at it takes a second."""

    def __init__(self) -> None:
        self.seconds = 0

    def __call__(self) -> int:
        self.seconds += 1
        return self.seconds


def test_a_run_without_checkpoints_writes_none(tmp_path) -> None:
    options = SmallOptions(output=str(tmp_path), device="cpu", save_every=0)
    run = Run("small", options)
    for step in run.steps(2):  # of a recipe that takes its steps itself: there is no optimizer
        run.log({"loss": float(step)})
    assert not list(tmp_path.glob("checkpoint*"))


def test_the_last_step_is_always_saved(tmp_path) -> None:
    small_recipe(tmp_path)
    folder = checkpoint_of(tmp_path)
    assert folder.name == "checkpoint-5"
    state = torch.load(folder / "custom_checkpoint_0.pkl", weights_only=True)
    assert state["done"] == 5 and len(state["history"]) == 5
    trained = [torch.load(folder / f"trained_{i}.pt") for i in range(2)]
    assert [set(one) for one in trained] == [{"trained.weight", "trained.bias"}] * 2


@pytest.mark.parametrize("former", [None, "cpu:0"])
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_device_is_of_its_run_alone(tmp_path, monkeypatch, former, device) -> None:
    if former:
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", former)
    run = Run("small", RunOptions(output=str(tmp_path), device=device))
    assert os.environ.get("ACCELERATE_TORCH_DEVICE") == former
    assert run.device.type in ("cpu", "cuda")
    run.finish()
    assert os.environ.get("ACCELERATE_TORCH_DEVICE") == former


def test_figures_that_are_not_finite_are_null(tmp_path) -> None:
    """NaN is no JSON, and a run that diverged is one whose figures are looked at."""
    run = Run("small", SmallOptions(output=str(tmp_path), device="cpu"))
    for step in run.steps(2):
        run.log({"loss": math.nan if step else 0.5, "kl": -math.inf})
    run.finish(deep={"pair": (1.0, math.inf), "list": [{"x": math.nan}], "text": "NaN"})
    text = (tmp_path / "metrics.json").read_text(encoding="utf-8")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    stored = json.loads(text, parse_constant=refuse)
    assert stored == read_metrics(tmp_path)
    assert stored["training"] == [{"loss": 0.5, "kl": None}, {"loss": None, "kl": None}]
    assert stored["deep"] == {"pair": [1.0, None], "list": [{"x": None}], "text": "NaN"}


def test_the_comparison_is_at_the_temperature_of_training(model_folder, tmp_path) -> None:
    """Of what has not moved the loss is ln 2, whatever the temperature."""
    found = train(model_folder, tmp_path, steps=1, learning_rate=1e-30, temperature=0.3)
    for name in ("fused_loss", "plain_loss"):
        # Log-probs of up to 200 nats at that temperature, once for the reference too.
        rounding = budget(0.0, torch.float32, size=2 * 0.1 * 200)
        assert found.metrics["comparison"][name] == pytest.approx(math.log(2), abs=rounding)


# Runs that consist of runs.


def test_a_run_of_a_run_is_read_or_goes_on(tmp_path) -> None:
    given: list[SmallOptions] = []

    def whole(options: SmallOptions) -> dict:
        given.append(options)
        return small_recipe(
            Path(options.output), resume=options.resume, steps=options.steps
        ).metrics

    def half(options: SmallOptions) -> dict:
        return small_recipe(Path(options.output), stop_at=3, steps=options.steps).metrics

    options = SmallOptions(output=str(tmp_path), device="cpu", save_every=2)
    # There is nothing: it starts, whatever was said. Then there are metrics.
    first = finished_or_run(whole, options, resume=True)
    assert [one.resume for one in given] == [False]
    again = finished_or_run(whole, options, resume=True)
    assert len(given) == 1 and again["training"] == first["training"]
    # Without --resume it starts anew, and is not to be taken for the former one meanwhile.
    with pytest.raises(Interrupted):
        finished_or_run(half, options, resume=False)
    assert read_metrics(tmp_path) is None
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    rest = finished_or_run(whole, options, resume=True)
    assert [one.resume for one in given] == [False, True]
    assert rest["training"] == first["training"]
    finished_or_run(whole, options, resume=False)
    assert [one.resume for one in given] == [False, True, False]


def test_a_run_of_other_options_is_not_taken_for_this_one(tmp_path) -> None:
    def fail(options: SmallOptions) -> dict:
        raise AssertionError("it was run")

    small_recipe(tmp_path)
    options = SmallOptions(output=str(tmp_path), device="cpu", save_every=2, steps=6)
    with pytest.raises(ValueError, match=r"^--resume: .* has steps=5, this one steps=6"):
        finished_or_run(fail, options, resume=True)
    metrics = read_metrics(tmp_path)
    assert metrics is not None  # what is not of this run is not removed either
    write_metrics(tmp_path, {**metrics, "device": "cuda"})
    same = dataclasses.replace(options, steps=5)
    with pytest.raises(ValueError, match="was on cuda, this one is on cpu"):
        finished_or_run(fail, same, resume=True)


def test_a_run_begun_anew_forgets_its_parts_and_no_others(tmp_path) -> None:
    for name in ("part", "other"):
        write_metrics(tmp_path / name, {})
        (tmp_path / name / "checkpoint-2").mkdir()
        (tmp_path / name / "checkpoint-2" / "run.json").write_text("{}", encoding="utf-8")
    begin_anew([tmp_path / "part", str(tmp_path / "not yet")])
    assert [read_metrics(tmp_path / name) for name in ("part", "other")] == [None, {}]
    assert last_checkpoint(tmp_path / "part") is None
    assert last_checkpoint(tmp_path / "other") is not None


@pytest.mark.parametrize("name", ["output", "device", "save_every", "resume"])
def test_what_may_differ(name) -> None:
    stored = dataclasses.asdict(SmallOptions())
    check_same_options({**stored, name: "another"}, SmallOptions(), Path("here"))


@pytest.mark.parametrize("name", ["model", "seed", "steps", "lora_rank", "learning_rate"])
def test_what_may_not_differ(name) -> None:
    stored = dataclasses.asdict(SmallOptions())
    with pytest.raises(ValueError, match=f"^--resume: the run in here has {name}=another, "):
        check_same_options({**stored, name: "another"}, SmallOptions(), Path("here"))
    with pytest.raises(ValueError, match=r"^--resume: the run in here has former=1, "):
        check_same_options({**stored, "former": 1}, SmallOptions(), Path("here"))


# Commands.


def test_a_command_that_cannot_go_on_leaves_without_a_traceback(monkeypatch, capsys) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_command(interrupted)
    assert stopped.value.code == 130
    called: list[int] = []
    run_command(lambda: called.append(1))
    assert called == [1]
    with pytest.raises(SystemExit) as refused:
        run_command(lambda: kind_of_device("nowhere"))
    assert refused.value.code == 2
    assert "error: argument --device: expected auto, cpu" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


COMMAND = """
import os, sys

print("read", os.environ.get("OMP_WAIT_POLICY"), sys.argv[1:], flush=True)
from fastrlhf.recipes.run import run_command

run_command(lambda: print("ran", os.environ["OMP_WAIT_POLICY"]))
"""


@pytest.mark.skipif(os.name != "posix", reason="a process cannot become another there")
@pytest.mark.parametrize("given", [None, "active"])
def test_a_command_waits_asleep_unless_told_otherwise(tmp_path, given) -> None:
    script = tmp_path / "script.py"
    script.write_text(COMMAND, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    done = subprocess.run(
        [sys.executable, str(script), "a word", "--x=1"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    arguments = "['a word', '--x=1']"
    if given:
        assert done.stdout.splitlines() == [f"read active {arguments}", "ran active"]
    else:
        assert done.stdout.splitlines() == [
            f"read None {arguments}", f"read passive {arguments}", "ran passive",
        ]  # fmt: skip


# Two processes.

TWO_PROCESSES = """
import json, sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from fastrlhf.recipes import dpo
from fastrlhf.recipes.run import Run, run_command
from fastrlhf.recipes.settings import AdapterOptions

model, folder = Path(sys.argv[1]), Path(sys.argv[2])
device = "cpu" if torch.cuda.is_available() else "auto"
linear_options = AdapterOptions(
    output=str(folder / "linear"), device=device, save_every=1, max_grad_norm=100.0
)
run = Run("linear", linear_options)
assert run.processes == 2
assert run.share([0, 1, 2, 3]) == [[0, 1], [2, 3]][run.rank]
assert run.mean(run.rank) == 0.5
layer = torch.nn.Linear(2, 1, bias=False)
torch.nn.init.ones_(layer.weight)
(wrapped,) = run.train(layer, learning_rate=0.1, total=2)
drawn = []
for step in run.steps(2):
    drawn.append(torch.rand(1).item())
    loss = (wrapped(torch.full((1, 2), 1.0 + 2 * run.rank)) * (1 + step)).sum()
    run.update(loss)
    run.log({"loss": loss, "gradient": layer.weight.grad[0, 0]})
linear = {"drawn": drawn, "weight": layer.weight.tolist(), "history": run.history}

options = dpo.DPOOptions(
    model=str(model), output=str(folder / "dpo"), device=device, steps=2, save_every=1,
    eval_prompts=3, eval_completions=1, draw_pairs=8, new_tokens=6, batch_size=4,
)
trained = {}
train = Run.train
def remember(run, *models, **rest):
    trained["policy"] = models[0]
    return train(run, *models, **rest)
Run.train = remember
metrics = dpo.train(options)
assert torch.distributed.is_initialized()  # a run of several runs goes on with it
assert run.mean(run.rank) == 0.5
weights = {
    name: value.tolist()
    for name, value in trained["policy"].state_dict().items() if "lora" in name
}
found = {"linear": linear, "weights": weights, "metrics": metrics}
(folder / f"rank{run.rank}.json").write_text(json.dumps(found, default=str))
run_command(lambda: None)
assert not torch.distributed.is_initialized()
"""


def run_in_two_processes(script: Path, *arguments: str) -> list[str]:
    """Run a script as torchrun would, and return what each process showed.

    Not by torchrun, whose processes look each other up by the name of the machine, which need not
    be one that is found; and nothing here waits for longer than it says.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_WAIT_POLICY": "passive",  # with which the script is not executed once more
    }  # fmt: skip
    with ExitStack() as stack:
        shown, processes = [], []
        for rank in ("0", "1"):
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                [sys.executable, str(script), *arguments], stdout=output, stderr=subprocess.STDOUT,
                env=environment | {"RANK": rank, "LOCAL_RANK": rank}, cwd=script.parent,
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)  # which comes first
            shown.append(output)
            processes.append(process)
        end = time.monotonic() + 600
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, end - time.monotonic()))
        texts = []
        for output in shown:
            output.seek(0)
            texts.append(output.read())
        codes = [process.poll() for process in processes]
    assert codes == [0, 0], "\n".join(text[-4000:] for text in texts)
    return texts


def test_two_processes_train_one_policy(model_folder, tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    # On a CPU, `accelerate launch` starts one process alone, however many it is asked for.
    shown = run_in_two_processes(script, str(model_folder), str(tmp_path))
    first, second = (
        json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)
    )

    # Gradients 1 and 3 at the first step, twice that at the second, and their mean in either.
    gradients = [point["gradient"] for point in first["linear"]["history"]]
    assert gradients == pytest.approx([2.0, 4.0])
    # Losses w·1 and w·3 with w = (1, 1), and no bias.
    assert first["linear"]["history"][0]["loss"] == pytest.approx(4.0)
    assert first["linear"]["weight"] == second["linear"]["weight"]
    assert first["linear"]["history"] == second["linear"]["history"]
    assert not set(first["linear"]["drawn"]) & set(second["linear"]["drawn"])

    assert first["weights"] == second["weights"]
    assert any(any(map(any, value)) for key, value in first["weights"].items() if "lora_B" in key)
    for key in ("training", "completions", "sentiment", "kl", "ended"):
        assert first["metrics"][key] == second["metrics"][key], key
    assert len(first["metrics"]["training"]) == 2
    assert len({one["prompt"] for one in first["metrics"]["completions"]}) == 3
    output = tmp_path / "dpo"
    stored = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    assert stored["training"] == first["metrics"]["training"]
    for name, value in load_file(output / "adapter" / "adapter_model.safetensors").items():
        assert value.tolist() == first["weights"][name.replace(".weight", ".default.weight")]
    folder = checkpoint_of(output)
    files = {file.name for file in folder.iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl", "trained_0.pt"} <= files
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["processes"] == 2
    with pytest.raises(ValueError, match=r"--resume: .* has 2 processes, this one 1"):
        again = {"steps": 2, "eval_prompts": 3, "batch_size": 4}
        Run("dpo", options_of(model_folder, output, resume=True, **again))
    assert "".join(shown).count("Curves and figures in") == 1  # one process speaks
