"""The benchmarks of whole steps: of a model, of TRL's trainers, and of loops with lazy logits."""

import contextlib
import itertools
import sys
import warnings

import pytest
import torch
from support.benchmark_records import (
    CPU,
    TINY,
    bench_lazy_logits,
    bench_model_step,
    bench_trainer,
    lazy_loops,
    lazy_overhead,
    measure,
    model_step,
    providers,
    trainer_step,
)

import fastrlhf


def made_step(sequences: int = 4, tokens: int = 16, *, trained: bool = True):
    model = model_step.make_model(CPU, trained=trained, tiny=True)
    return model_step.make_step(model, sequences, tokens)


def test_half_of_the_step_is_padding_half_of_the_rest_a_prompt_and_packing_keeps_the_rest() -> None:
    step = made_step(8, 64)
    assert step.ids.shape == (8, 64) and int(step.attention.sum(-1).max()) == 64
    live = int(step.attention.sum())
    assert abs(live - 8 * 64 / 2) <= 4 and abs(int(step.mask.sum()) - live / 2) <= 4
    assert not (step.mask & (step.attention == 0)).any() and not step.mask[:, 0].any()
    packed, borders = step.packed(step.ids), step.cu_seqlens
    for i, (start, end) in enumerate(itertools.pairwise(borders)):
        assert torch.equal(packed[0, start:end], step.ids[i, : end - start])
        assert step.positions[0, start:end].tolist() == list(range(end - start))
    old = step.packed_old
    assert torch.equal(old[step.packed(step.mask)[:, 1:]], step.old[step.mask[:, 1:]])


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("loss", model_step.LOSSES)
def test_every_provider_of_a_step_is_right_or_says_why_it_does_not_run(loss, trained) -> None:
    step = made_step(trained=trained)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = bench_model_step.contest(loss, step, CPU, 2, compiling=False)
    statuses = {record["provider"]: record["status"] for record in records}
    assert list(statuses) == list(model_step.LOSSES[loss].providers)
    for name in [name for name in statuses if name.startswith("Liger")]:
        assert statuses.pop(name) in (
            "needs a GPU", "compiles", "takes the reference's hidden states, not its log-probs",
        )  # fmt: skip
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):  # in PyTorch 2.11
        missing = "has no F.linear_cross_entropy"
        assert statuses.pop("F.linear_cross_entropy", missing).endswith(missing)
    assert set(statuses.values()) == {"ok"}, statuses
    for record in [record for record in records if record["status"] == "ok"]:
        assert record["rounds"] == 2 and record["peak_mib"] > 0 and record["processor_ms"] > 0
    assert all(gradient is None for gradient in step.gradients().values())
    assert "forward" not in vars(step.base)  # a peer's is gone again


@pytest.mark.parametrize("wrong", ["loss", "gradient", "no gradient"])
def test_no_times_of_steps_are_printed_where_one_is_wrong(wrong, monkeypatch, capsys) -> None:
    plain, found = model_step.LOSSES["SFT"]

    def mutant(step):
        loss = plain(step)
        if wrong == "loss":
            return loss + 1e-3 * loss.detach()
        if wrong == "gradient":
            return loss + 1e-3 * (loss - loss.detach())
        detached = step.base.model.norm.weight.detach()
        hidden = step.base.model(step.ids, step.attention, use_cache=False).last_hidden_state
        logits = step.base.lm_head(hidden.detach() + 0 * detached)
        return model_step.causal_lm_loss(logits, step.labels)

    mutants = {**found, "mutant": providers.Provider(lambda: mutant)}
    monkeypatch.setitem(model_step.LOSSES, "SFT", model_step.Loss(plain, mutants))
    command = ["bench_model_step.py", "--tiny", "--losses", "SFT", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(measure, "matmul_rate", lambda device, dtype: 1e9)
    assert bench_model_step.main() == 1
    printed = capsys.readouterr().out
    assert "mutant: Wrong: " in printed and "|" not in printed


# In matmuls with the head: where all is trained, and with LoRA. DPO's have the reference's too. The
# batch is one block of tokens, of which nothing is made twice.
HEAD_MATMULS = {
    "SFT": {"TRL, prompts skipped": (4, 3), "patched": (3, 2)},
    "DPO": {"TRL, prompts skipped": (5, 4), "patched": (4, 3), "subclass": (4, 3)},
    "GRPO": {"TRL, prompts skipped": (4, 3), "patched": (3, 2)},
}


def test_with_prompts_on_the_left_the_tokens_are_the_same() -> None:
    step = trainer_step.make_trainer_step(made_step(8, 64))
    moved = trainer_step.with_prompts_on_the_left(step)
    for kept, left in ((step.attention != 0, moved.attention != 0), (step.mask, moved.mask)):
        for i in range(8):
            assert torch.equal(step.ids[i, kept[i]], moved.ids[i, left[i]])
    inputs = trainer_step.KINDS["GRPO"].inputs(moved)
    assert inputs["prompt_mask"][:, -1].all() and inputs["completion_mask"][:, 0].all()
    assert int(inputs["completion_mask"].sum()) == int(step.mask.sum())


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", trainer_step.KINDS)
def test_every_contestant_of_a_trainer_is_right_in_so_many_matmuls(name, trained) -> None:
    model = model_step.make_model(CPU, trained=trained, tiny=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = bench_trainer.contest(name, model, 4, 16, CPU, 2)
    found = {record["provider"]: record for record in records}
    assert {record["status"] for record in records} == {"ok"}, records
    assert list(found) == ["TRL", *HEAD_MATMULS[name]]
    for contestant, matmuls in HEAD_MATMULS[name].items():
        assert found[contestant]["head_matmuls"] == pytest.approx(matmuls[not trained])
    assert found["TRL"]["head_matmuls"] > 10  # of prompts and padding
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_no_times_of_trainers_are_printed_where_one_is_wrong(wrong, monkeypatch, capsys) -> None:
    def load() -> type:
        class Mutant(trainer_step.trainer_class("SFT")):
            def compute_loss(self, *args, **kwargs):
                loss = super().compute_loss(*args, **kwargs)
                return loss + 1e-3 * (loss.detach() if wrong == "loss" else loss - loss.detach())

        return Mutant

    mutant = trainer_step.Contestant(load, contextlib.nullcontext)
    monkeypatch.setattr(bench_trainer, "contestants", lambda name, device: {"mutant": mutant})
    monkeypatch.setattr(sys, "argv", [*TINY["trainer"][1], "--rounds", "2"])
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(measure, "matmul_rate", lambda device, dtype: 1e9)
    assert bench_trainer.main() == 1
    printed = capsys.readouterr().out
    assert "mutant: Wrong: " in printed and "|" not in printed


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", lazy_loops.LOOPS)
def test_every_loop_is_right_and_builds_only_where_it_says_so(name, trained, caplog) -> None:
    model = model_step.make_model(CPU, trained=trained, tiny=True)
    step = lazy_loops.with_teacher(model_step.make_step(model, 4, 16, whole=True))
    assert step.mask[:, 1:].all() and step.attention.all()
    records = bench_lazy_logits.contest(name, step, CPU, 2)
    assert [record["status"] for record in records] == ["ok", "ok"], records
    plain, lazy = records
    assert not plain["fused"] and not plain["built"]
    builds = "builds" in name
    assert [what for what, *_ in lazy["built"]] == (["sigmoid"] if builds else [])
    assert bool(lazy["fused"]) == (not builds)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_overhead_of_lazy_logits_is_measured_of_lazy_and_of_plain_ones(monkeypatch) -> None:
    monkeypatch.setattr(lazy_overhead, "ROUNDS", 10)
    fastrlhf.lazy_report(clear=True)
    for call in lazy_overhead.CALLS.values():
        taken = lazy_overhead.measured(call)
        assert set(taken) == {"plain", "lazy"} and min(taken.values()) > 0
    report = fastrlhf.lazy_report(clear=True)
    assert [(use.what, use.calls) for use in report.fused] == [("cross_entropy", 10)] * 2
    assert {use.what: use.calls for use in report.built} == {"sigmoid": 1}  # once, before the turns
