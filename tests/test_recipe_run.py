"""Runs of DPO, of the smallest sizes that have something to learn: interrupted, resumed, repeated,
in two processes, and what each leaves.
"""

import json
import math
import shutil
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
from support.recipe_runs import (  # noqa: E402, F401  of every test in this file
    Interrupted,
    checkpoint_of,
    on_the_device_of_the_run,
)
from support.two_processes import TWO_PROCESSES, run_in_two_processes  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from fastrlhf.recipes import dpo  # noqa: E402
from fastrlhf.recipes.devices import kind_of_device  # noqa: E402
from fastrlhf.recipes.run import (  # noqa: E402
    Run,
    last_checkpoint,
)

pytestmark = pytest.mark.filterwarnings(PEFT_READS_AN_OLD_NAME)
STEPS = 4

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


def test_the_comparison_is_at_the_temperature_of_training(model_folder, tmp_path) -> None:
    """Of what has not moved the loss is ln 2, whatever the temperature."""
    found = train(model_folder, tmp_path, steps=1, learning_rate=1e-30, temperature=0.3)
    for name in ("fused_loss", "plain_loss"):
        # Log-probs of up to 200 nats at that temperature, once for the reference too.
        rounding = budget(0.0, torch.float32, size=2 * 0.1 * 200)
        assert found.metrics["comparison"][name] == pytest.approx(math.log(2), abs=rounding)


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
