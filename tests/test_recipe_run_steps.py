"""Runs of a recipe of a few lines: random numbers, learning rates, gradients, checkpoints, runs
that consist of runs, and commands.
"""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for name in ("transformers", "peft", "accelerate", "vaderSentiment", "matplotlib", "tensorboard"):
    pytest.importorskip(name)

from support.recipe_models import PEFT_READS_AN_OLD_NAME  # noqa: E402
from support.recipe_runs import (  # noqa: E402, F401  of every test in this file
    Interrupted,
    checkpoint_of,
    on_the_device_of_the_run,
)
from torch import Tensor, nn  # noqa: E402

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
from fastrlhf.recipes.run import run_command  # noqa: E402

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
