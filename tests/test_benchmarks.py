"""The benchmarks: that the check before each timing can fail, that providers take turns, that the
limits are the right numbers, and that the tables say what was measured and what was not.
"""

import contextlib
import csv
import functools
import importlib
import itertools
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastrlhf

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CPU = torch.device("cpu")

batch, contests, gpu, gpu_tests, losses, measure, providers, report, shapes = map(
    importlib.import_module,
    ("batch", "contest", "gpu", "gpu_tests", "losses", "measure", "providers", "report", "shapes"),
)
bench_model_step, bench_trainer, model_step, trainer_step = map(
    importlib.import_module, ("bench_model_step", "bench_trainer", "model_step", "trainer_step")
)
bench_lazy_logits, lazy_loops, lazy_overhead = map(
    importlib.import_module, ("bench_lazy_logits", "lazy_loops", "lazy_overhead")
)
median_of_runs = importlib.import_module("median_of_runs").median_of_runs
FORWARD, BOTH = contests.FORWARD, contests.BOTH


def operation(name: str):
    return importlib.import_module(f"bench_{name}").OPERATION


OPERATIONS = [
    path.stem.removeprefix("bench_")
    for path in sorted(BENCHMARKS.glob("bench_*.py"))
    if path.stem.removeprefix("bench_") not in ("trpo", "model_step", "trainer", "lazy_logits")
]


# Providers.


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_provider_is_right_or_says_why_it_does_not_run(name, monkeypatch) -> None:
    # What needs a compiler is checked whenever it is timed; here it would take minutes. Those of
    # Liger's losses that compile themselves are checked as they are written.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    of = operation(name)
    center = shapes.shapes(of.source, CPU, 0)
    for shape in [shape.small() for shape in center]:
        for kind in of.kinds(shape):
            names = [n for n in of.entrants(kind) if not of.providers[n].compiles]
            for record in contests.contest(of, shape, kind, CPU, names, 0.0, (2, 2)):
                provider = of.providers[record["provider"]]
                assert record["status"] == ("needs a GPU" if provider.gpu_only else "ok"), record
                if not provider.gpu_only:
                    assert record["rounds"] == 2 and record["peak_mib"] >= 0
                    assert record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]


def test_every_operation_has_this_library_first_and_plain_pytorch() -> None:
    for name in OPERATIONS:
        names = list(operation(name).providers)
        assert names[0] == "fastrlhf" and "eager" in names
    peers = {n for name in OPERATIONS for n in operation(name).providers}
    assert {
        "torch.compile", "TRL selective_log_softmax", "TRL chunked log-probs",
        "F.linear_cross_entropy", "Liger cross-entropy", "Liger scaled cross-entropy",
        "Liger fused linear DPO", "Liger fused linear GRPO", "cut-cross-entropy",
    } <= peers  # fmt: skip


def test_a_peer_that_is_not_installed_or_fails_says_so() -> None:
    def load_missing():
        raise ImportError("No module named 'peer'")

    def load_failing():
        def fail(data):
            raise RuntimeError("first line\nsecond line")

        return fail

    of = operation("preference_loss")
    of = replace(
        of,
        providers={
            "missing": providers.Provider(load_missing),
            "failing": providers.Provider(load_failing),
            "eager": of.providers["eager"],
        },
    )
    records = contests.contest(of, batch.Shape(4, 8), BOTH, CPU, None, 0.0, (2, 2))
    statuses = {record["provider"]: record["status"] for record in records}
    assert statuses == {
        "missing": "not installed: No module named 'peer'",
        "failing": "RuntimeError: first line",
        "eager": "ok",
    }


# The check.


def with_gradient(loss, change):
    """The loss with a changed gradient of the logits."""

    def mutant(data):
        leaf = data.logits
        value = loss(data)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach() + ((leaf - leaf.detach()) * change(gradient, data)).sum()

    return mutant


def of_targets(gradient, data, others: float, targets: float):
    index = data.targets.clamp(min=0)[..., None]
    return (gradient * others).scatter(-1, index, targets * gradient.gather(-1, index))


MUTANTS = {
    "no gradient": lambda g, data: 0 * g,
    "twice the gradient": lambda g, data: 2 * g,
    "the targets' part alone": lambda g, data: of_targets(g, data, 0.0, 1.0),
    "the softmax's part alone": lambda g, data: of_targets(g, data, 1.0, 0.0),
    "a tenth too much of the softmax": lambda g, data: of_targets(g, data, 1.1, 1.0),
    "a gradient at the prompt": lambda g, data: g + (~data.mask)[..., None] * g.abs().mean(),
    "nothing beyond the first tile": lambda g, data: g * (torch.arange(g.shape[-1]) < 4096),
    "not a number": lambda g, data: g * torch.nan,
}


def eager_ppo(data):
    return losses.clipped(providers.eager_logprobs(data), data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_rejects_wrong_gradients(mutant, dtype) -> None:
    shape = batch.Shape(4, 16, 32000, dtype=dtype).small()
    of = operation("logits_policy_loss")
    right = with_gradient(eager_ppo, lambda gradient, data: gradient)
    contests.check(of.exact, right, batch.make_batch("logits", shape, CPU), BOTH)
    with pytest.raises(contests.Wrong, match=r"gradient|nan"):
        wrong = with_gradient(eager_ppo, MUTANTS[mutant])
        contests.check(of.exact, wrong, batch.make_batch("logits", shape, CPU), BOTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.9, 1.1, torch.nan])
@pytest.mark.parametrize("name", ["token_stats", "logits_policy_loss", "linear_loss"])
def test_the_check_rejects_wrong_results(name, factor, dtype) -> None:
    of = operation(name)
    shape = batch.Shape(4, 16, 1000, 64, dtype=dtype)
    for kind in (FORWARD, BOTH):
        data = batch.make_batch(of.source, shape, CPU, gradients=kind == BOTH)
        with pytest.raises(contests.Wrong, match="result off"):
            contests.check(of.exact, lambda given: factor * of.exact(given), data, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("name", ["linear_token_stats", "linear_loss", "linear_dpo_loss"])
def test_a_softmax_over_a_part_of_the_vocabulary_is_not_timed(name, share, dtype) -> None:
    """Not in forward alone either, where a loss of pairs hides it."""
    of = operation(name)
    loss = {"linear_token_stats": lambda x, data: x, "linear_loss": losses.nll}.get(
        name, losses.dpo
    )

    def partial(data):
        logits = data.hidden @ data.weight[: int(share * data.shape.vocab)].T
        lse = logits.float().logsumexp(-1)
        target = (data.hidden * data.weight[data.targets.clamp(min=0)]).sum(-1).float()
        return loss((target - lse) * data.mask, data)

    of = replace(of, providers={"partial": providers.Provider(lambda: partial)})
    shape = batch.Shape(4, 16, 32000, 64, trained=True, dtype=dtype).small()
    for kind in (FORWARD, BOTH):
        (found,) = contests.contest(of, shape, kind, CPU, None, 0.0, (2, 2))
        assert found["status"].startswith("Wrong: "), found["status"]


def test_who_overwrites_the_batch_must_say_so() -> None:
    of = operation("dpo_loss")

    def spoil(data):
        loss = of.exact(data)
        with torch.no_grad():
            data.logits.zero_()
        return loss

    data = batch.make_batch("logits", batch.Shape(4, 16, 1000), CPU, gradients=False)
    with pytest.raises(contests.Wrong, match="logits overwritten"):
        contests.check(of.exact, spoil, data, FORWARD)


def test_the_check_rejects_a_provider_that_leaves_a_gradient_out() -> None:
    of = operation("linear_loss")
    data = batch.make_batch("hidden", batch.Shape(4, 16, 1000, 64, trained=True), CPU)
    with pytest.raises(contests.Wrong, match="no gradient of weight"):
        forgetful = lambda b: of.exact(replace(b, weight=b.weight.detach()))  # noqa: E731
        contests.check(of.exact, forgetful, data, BOTH)


def test_overwritten_logits_are_restored_for_the_others() -> None:
    of = operation("token_stats")
    shape = batch.Shape(2, 8, 50, dtype=torch.bfloat16)
    seen = []

    def look(data):
        seen.append(data.logits.detach().clone())
        return providers.eager_logprobs(data)

    of = replace(
        of,
        providers={
            "in place": of.providers["fastrlhf, in place"],
            "looks": providers.Provider(lambda: look),
        },
    )
    contests.contest(of, shape, BOTH, CPU, None, 0.0, (3, 3))
    untouched = batch.make_batch("logits", shape, CPU).logits
    timed = [logits for logits in seen if logits.shape == untouched.shape]
    assert len(timed) == 2 + 1 + 3
    assert all(torch.equal(logits, untouched) for logits in timed)


# Batches.


def test_a_batch_is_what_its_shape_says() -> None:
    shape = batch.Shape(4, 10, 100, 8, prompt=0.3, trained=True, dtype=torch.bfloat16)
    data = batch.make_batch("two hidden", shape, CPU)
    assert (shape.rows, shape.live) == (40, 28) and int(data.mask.sum()) == 28
    assert not data.mask[:, :3].any() and not data.upstream[:, :3].any()
    assert set(data.leaves) == {"hidden", "weight"}
    assert data.weight.dtype == torch.bfloat16 and data.exact().weight.dtype == torch.float64
    assert not batch.make_batch("hidden", shape, CPU, gradients=False).leaves
    assert torch.equal(data.hidden, batch.make_batch("two hidden", shape, CPU).hidden)


def test_about_half_of_the_ratios_are_clipped_and_none_is_near_a_bound() -> None:
    data = batch.make_batch("logits", batch.Shape(16, 64, 500), CPU)
    ratio = (providers.eager_logprobs(data) - data.old).detach().exp()[data.mask]
    clipped = (ratio < 0.8) | (ratio > 1.2)
    assert 0.4 < clipped.float().mean() < 0.6
    assert min((ratio / 0.8).log().abs().min(), (ratio / 1.2).log().abs().min()) > 0.05


def test_the_gpu_has_all_batches_that_are_asked_for_and_the_central_ones_first() -> None:
    cuda = torch.device("cuda")
    found = shapes.shapes("hidden", cuda)
    assert len(set(found)) == len(found) == 4 * 5 * 2 * 2 * 2
    assert {s.rows for s in found} == {4096, 8192, 16384, 32768}
    assert {s.vocab for s in found} == {32000, 50257, 128256, 151936, 262144}
    assert {s.width for s in found} == {2048, 4096} and {s.prompt for s in found} == {0.0, 0.5}
    assert {s.dtype for s in found} == {torch.bfloat16}
    assert len(shapes.shapes("logits", cuda)) == 4 * 5 * 2
    planned = list(gpu.plan(cuda))
    compiled = [i for i, held in enumerate(planned) if held.compiles]
    quick = planned[: compiled[0]]
    assert {held.operation.name for held in quick} == {operation(n).name for n in OPERATIONS}
    assert {(c.shape.rows, c.shape.vocab, c.shape.width) for c in quick if c.shape.width} == {
        (8192, 128256, 4096)
    }
    assert compiled == list(range(compiled[0], compiled[-1] + 1))
    # Nobody is left out, and nobody is asked twice for the same.
    asked = [(c.operation.name, c.shape, c.kind, name) for c in planned for name in c.names]
    assert len(set(asked)) == len(asked)
    for name in OPERATIONS:
        of = operation(name)
        found = {provider for held in planned if held.operation is of for provider in held.names}
        assert found == set(of.providers)


# Measurements.


def test_work_takes_turns_and_every_round_starts_with_another() -> None:
    log = []
    turns = {
        name: measure.Turn(functools.partial(log.append, name), lambda: log.append("after"))
        for name in "abc"
    }
    times, errors = measure.take_turns(turns, CPU, 0.0, (3, 9))
    order = "".join(name for name in log if name != "after")
    assert order == "abc" + "abc" + "bca" + "cab"
    assert log[1::2] == ["after"] * 12
    assert {name: len(measured) for name, measured in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert not errors
    assert len(measure.take_turns(turns, CPU, 3600.0, (3, 9))[0]["a"]) == 9


def test_who_fails_is_out_and_the_others_go_on() -> None:
    calls = []

    def fail() -> None:
        calls.append("fail")
        if calls.count("fail") == 2:
            raise RuntimeError("out of luck")

    turns = {
        "steady": measure.Turn(lambda: None, lambda: None),
        "failing": measure.Turn(fail, lambda: calls.append("after")),
    }
    times, errors = measure.take_turns(turns, CPU, 0.0, (4, 4))
    assert list(times) == ["steady"] and len(times["steady"]) == 4
    assert str(errors["failing"]) == "out of luck"
    calls.clear()
    of = operation("preference_loss")
    eager = of.providers["eager"].load()

    def late() -> None:
        def run(data):
            calls.append(1)
            if len(calls) > 4:
                raise RuntimeError("late")
            return eager(data)

        return run

    of = replace(of, providers={"late": providers.Provider(late), "eager": of.providers["eager"]})
    records = contests.contest(of, batch.Shape(4, 8), BOTH, CPU, None, 0.0, (4, 4))
    assert [record["status"] for record in records] == ["RuntimeError: late", "ok"]


def test_percentiles() -> None:
    assert measure.percentiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))


def test_the_limits_are_bytes_and_matmuls_at_the_measured_rates(monkeypatch) -> None:
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(measure, "matmul_rate", lambda device, dtype: 1e9)
    shape = batch.Shape(2, 10, 1000, prompt=0.5, dtype=torch.bfloat16)  # 10 of 20 rows count
    row = 1000 * 2 / 1e9
    expected = {
        "token_stats": (10 * row, (2 * 10 + 20) * row),
        "dpo_loss": (10 * row, (2 * 10 + 20) * row),
        "logits_policy_loss": (10 * row, (10 + 20) * row),
        "divergence": (20 * row, (2 * 10 + 20) * row),
        "fisher": ((2 * 10 + 20) * row, None),
    }
    for name, (forward, both) in expected.items():
        of = operation(name)
        assert of.limit(shape, FORWARD, CPU) == pytest.approx(forward)
        assert both is None or of.limit(shape, BOTH, CPU) == pytest.approx(both)
    kl = operation("divergence")
    assert kl.limit(shape, BOTH, CPU, kl.providers["fastrlhf"]) == pytest.approx(
        (4 * 10 + 20) * row
    )
    by_logprobs = operation("logits_policy_loss").providers["fastrlhf, by log-probs"]
    assert operation("logits_policy_loss").limit(shape, BOTH, CPU, by_logprobs) == pytest.approx(
        (2 * 10 + 20) * row
    )
    matmul = 2 * 10 * 1000 * 8 / 1e9
    for trained, head, plan in ((False, 2, 2), (True, 3, 4)):
        linear = replace(shape, width=8, trained=trained)
        of = operation("linear_dpo_loss")
        assert of.limit(linear, BOTH, CPU) == pytest.approx(head * matmul)
        by_logprobs = of.providers["fastrlhf, by log-probs"]
        assert of.limit(linear, BOTH, CPU, by_logprobs) == pytest.approx(plan * matmul)
        assert of.limit(linear, FORWARD, CPU) == pytest.approx(matmul)


def test_rates_of_the_device_are_measured_once() -> None:
    assert measure.copy_bandwidth(CPU) == measure.copy_bandwidth(CPU) > 1e8
    assert measure.matmul_rate(CPU, torch.float32) > 1e8


# The report.

MACHINE = {
    "device": "CPU, 2 cores", "date": "2026-01-01", "python": "3.11", "torch": "2.13", "threads": 2,
    "cuda": None, "copy_bytes_per_second": 3e10, "matmul_flops_per_second": {"float32": 1e11},
}  # fmt: skip


def record(provider, vocab, median=None, fraction=0.5, kind=BOTH, **rest):
    described = {
        "operation": "PPO loss from logits", "kind": kind, "provider": provider, "device": "cpu",
        "dtype": "bfloat16", "sequences": 8, "tokens": 64, "rows": 512, "vocab": vocab, "width": 0,
        "prompt": 0.5, "central": vocab == 32000, "head": "",
    }  # fmt: skip
    if median is None:
        return described | {"status": "needs a GPU"} | rest
    times = {"median_ms": median, "p20_ms": 0.9 * median, "p80_ms": 1.1 * median, "rounds": 9}
    return described | {"status": "ok", "peak_mib": 12.34, "fraction_of_limit": fraction} | times


@pytest.fixture
def written(tmp_path) -> Path:
    timed = [
        record("fastrlhf", 32000, 10.0, 0.25), record("eager", 32000, 25.0, 0.1),
        record("quick peer", 32000, 8.0, 0.31),
        record("fastrlhf", 128256, 40.0, 0.0123), record("fastrlhf, in place", 128256, 30.0, 0.02),
        record("quick peer", 128256, 35.0, 0.017),
    ]  # fmt: skip
    result = {
        "machine_info": MACHINE,
        "benchmarks": [{"extra_info": r} for r in timed],
        "not_timed": [record("gpu | peer", 32000)],
    }
    (tmp_path / "results.json").write_text(json.dumps(result))
    report.write(tmp_path / "results.json", tmp_path / "out")
    return tmp_path / "out"


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_is_tidy(written) -> None:
    rows = read_csv(written / "results.csv")
    assert len(rows) == 7
    found = {(row["provider"], row["vocab"]): row for row in rows}
    assert found["quick peer", "32000"]["times_fastrlhf"] == "0.8"
    assert found["eager", "32000"]["median_ms"] == "25.0"
    assert found["gpu | peer", "32000"]["status"] == "needs a GPU"
    assert found["gpu | peer", "32000"]["median_ms"] == ""


def test_the_tables_say_who_is_faster_who_is_missing_and_where_the_limit_is_far(written) -> None:
    text = (written / "tables.md").read_text()
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert ["fastrlhf", "10 (9 to 11)", "1.00", "25%", "12.3"] in lines
    assert ["quick peer", "8 (7.2 to 8.8)", "**0.80**", "31%", "12.3"] in lines
    assert ["eager", "25 (22.5 to 27.5)", "2.50", "10%", "12.3"] in lines
    assert ["gpu / peer", "needs a GPU", "", "", ""] in lines
    summary = text.split("## Summary")[1].split("##")[0]
    assert "10 ms, 12.3 MiB" in summary and "2.50×, 12.3 MiB" in summary
    faster = text.split("## Where a peer is faster")[1].split("##")[0]
    assert faster.count("quick peer") == 2 and "0.80" in faster and "0.88" in faster
    furthest = text.split("## Furthest from the limit")[1].split("##")[0]
    assert "1.2%" in furthest and "128,256" in furthest
    assert "copies at 30 GB/s" in text and "0.1 TFLOP/s" in text and "torch 2.13" in text


def test_the_pictures_are_there(written) -> None:
    pictures = list(written.glob("*.png"))
    assert [path.name for path in pictures] == ["ppo-loss-from-logits.png"]
    assert pictures[0].read_bytes().startswith(b"\x89PNG")


def test_another_json_is_refused_in_a_line(tmp_path) -> None:
    (tmp_path / "other.json").write_text('{"benchmarks": [{"extra_info": {}}]}')
    for name in ("other.json", "missing.json"):
        command = [sys.executable, str(BENCHMARKS / "report.py"), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and "not the JSON of these benchmarks" in done.stderr


def test_no_peer_is_faster_where_none_is() -> None:
    alone = report.with_ratios([record("fastrlhf", 10, 1.0), record("eager", 10, 1.5)])
    assert report.faster_peers(alone) == "Nowhere in this run.\n"


RESULTS = sorted((BENCHMARKS / "results").glob("*/results.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_the_kept_tables_are_those_of_the_kept_json(path, tmp_path) -> None:
    machine, records = report.load(path)
    assert (path.parent / "tables.md").read_text() == report.tables(machine, records)
    report.write_csv(records, tmp_path / "results.csv")
    assert read_csv(path.parent / "results.csv") == read_csv(tmp_path / "results.csv")
    assert {machine["date"], machine["torch"]}.isdisjoint({None, ""}) and "node" not in machine


# A training step of a model.


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


# A step of TRL's trainers.

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


# Loops with lazy logits.


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


# The tables of steps.

TINY = {
    "lazy-logits": (
        bench_lazy_logits,
        ["bench_lazy_logits.py", "--tiny", "--loops", "SFT, labels=", "sigmoid, which builds"],
    ),
    "model-step": (bench_model_step, ["bench_model_step.py", "--tiny", "--losses", "DPO"]),
    "trainer": (bench_trainer, ["bench_trainer.py", "--tiny", "--trainers", "SFT"]),
}


@pytest.mark.parametrize("name", TINY)
def test_the_table_of_steps_is_written_beside_its_json(name, tmp_path, monkeypatch, capsys) -> None:
    bench, command = TINY[name]
    monkeypatch.setattr(sys, "argv", [*command, "--rounds", "2", "--output", str(tmp_path)])
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(measure, "matmul_rate", lambda device, dtype: 1e9)
    assert bench.main() == 0
    text = (tmp_path / f"{name}.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    kept = json.loads((tmp_path / f"{name}.json").read_text())
    assert text == bench.tables(kept["machine_info"], kept["records"])
    assert {record["trained"].split()[0] for record in kept["records"]} == {"all", "LoRA"}
    rows = [line for line in text.splitlines() if line.startswith("|")]
    in_a_row = 2 if name == "lazy-logits" else 1  # plain and lazy
    assert len(rows) == 2 + len(kept["records"]) / in_a_row


STEPS = [path for name in TINY for path in sorted((BENCHMARKS / "results").glob(f"*/{name}.json"))]


@pytest.mark.parametrize("path", STEPS, ids=lambda path: f"{path.parent.name}, {path.stem}")
def test_the_kept_table_of_steps_is_that_of_the_kept_json(path) -> None:
    kept = json.loads(path.read_text())
    text = TINY[path.stem][0].tables(kept["machine_info"], kept["records"])
    assert path.with_suffix(".md").read_text() == text


# The commands.


def test_from_pytest_to_the_report(tmp_path) -> None:
    results = tmp_path / "results.json"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
        str(BENCHMARKS / "bench_preference_loss.py"), str(BENCHMARKS / "bench_token_stats.py"),
        "-k", "(64x512 or 8x64x32000-prompt50-bfloat16) and forward+backward and not compile",
        f"--benchmark-json={results}",
    ]  # fmt: skip
    # A worker of the suite that runs this is not one of the benchmarks', which have none; and
    # nobody times interpreted kernels.
    foreign = ("PYTEST_XDIST", "TRITON_INTERPRET")
    alone = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    done = subprocess.run(command, cwd=BENCHMARKS.parent, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "peak memory beyond the batch" in done.stdout
    command = [sys.executable, str(BENCHMARKS / "report.py"), str(results)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "results.csv")
    assert {row["provider"] for row in rows} == {
        "fastrlhf", "fastrlhf, in place", "eager", "TRL selective_log_softmax",
        "Liger cross-entropy",
    }  # fmt: skip
    statuses = {row["provider"]: row["status"] for row in rows}
    assert statuses.pop("Liger cross-entropy") == "needs a GPU"
    assert set(statuses.values()) == {"ok"}
    # pytest-benchmark's own figures are those of the contest.
    for benchmark in json.loads(results.read_text())["benchmarks"]:
        assert benchmark["stats"]["median"] * 1e3 == pytest.approx(
            benchmark["extra_info"]["median_ms"]
        )
    assert "node" not in json.loads(results.read_text())["machine_info"]
    assert (tmp_path / "tables.md").exists() and list(tmp_path.glob("*.png"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_of_several_processes_each_contest_is_kept_whole() -> None:
    def run(*contests: tuple[float, float]) -> dict:
        timed = [
            {"group": str(i), "extra_info": {"provider": provider, "group": i, "median_ms": x}}
            for i, times in enumerate(contests)
            for provider, x in zip(("fastrlhf", "eager"), times, strict=True)
        ]
        skipped = [{"provider": "cut-cross-entropy", "status": "needs a GPU"}]
        return {"machine_info": {"device": "cpu"}, "benchmarks": timed, "not_timed": skipped}

    # Ratios of 3, 0.5 and 1; then of 1, 2 and 4.
    runs = [run((3.0, 1.0), (1.0, 1.0)), run((1.0, 2.0), (2.0, 1.0)), run((9.0, 9.0), (4.0, 1.0))]
    found = median_of_runs(runs)
    assert [b["extra_info"]["median_ms"] for b in found["benchmarks"]] == [9.0, 9.0, 2.0, 1.0]
    assert found["not_timed"] == runs[0]["not_timed"]
    assert found["machine_info"] == {"device": "cpu", "processes": 3}


def test_the_gpu_command_says_when_there_is_none() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "no GPU here: nothing measured\n"


def test_the_gpu_command_runs_the_tests_that_a_gpu_matters_to(tmp_path, monkeypatch) -> None:
    files = [Path(name) for name in gpu_tests.test_files()]
    assert len(set(files)) == len(files) and all(path.is_file() for path in files)
    assert files[0].name == "test_real_sizes.py"
    everything = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    left_out = {f"test_{name}" for name in gpu_tests._WITHOUT_GPU}
    assert everything - {path.stem for path in files} == left_out
    (tmp_path / "test_a.py").write_text("def test_right():\n    pass\n")
    monkeypatch.setattr(gpu_tests, "test_files", lambda: [str(tmp_path / "test_a.py")])
    outcome = gpu_tests.run_tests(tmp_path, 60.0)
    assert outcome.startswith("passed (1 passed in ")
    (tmp_path / "test_a.py").write_text("def test_wrong():\n    assert 0\n")
    assert gpu_tests.run_tests(tmp_path, 60.0).startswith("failed (1 failed in ")


@pytest.mark.parametrize("tests", [False, True])
def test_the_gpu_command_spends_its_minutes_on_contests_unless_asked(
    tests, tmp_path, monkeypatch
) -> None:
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Card")
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: 100.0))
    monkeypatch.setattr(gpu, "write_report", lambda output: calls.append("report"))
    monkeypatch.setattr(gpu_tests, "run_tests", lambda output, left: f"failed after {left}")

    def measure_until(output, device, deadline) -> None:
        calls.append(deadline)
        (output / "results.json").write_text('{"machine_info": {}}')

    monkeypatch.setattr(gpu, "measure", measure_until)
    arguments = SimpleNamespace(minutes=10.0, output=tmp_path, tests=tests)
    assert gpu.run_contests(arguments) == tests
    assert calls == [100.0 + (300.0 if tests else 580.0), "report"]
    machine = json.loads((tmp_path / "results.json").read_text())["machine_info"]
    assert machine == ({"tests": "failed after 580.0"} if tests else {})


def test_the_gpu_command_keeps_what_it_has_when_time_is_over(tmp_path, monkeypatch) -> None:
    """Its contests, on the CPU and with small batches."""
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(measure, "matmul_rate", lambda device, dtype: 1e9)
    of = operation("preference_loss")
    lost = replace(of, name="lost", source="unheard of")
    names = ["fastrlhf", "eager"]
    plan = [
        gpu.Contest(of, batch.Shape(4, 8), BOTH, names, compiles=False),
        gpu.Contest(of, batch.Shape(4, 8), BOTH, ["torch.compile"], compiles=True),
        gpu.Contest(lost, batch.Shape(4, 8), BOTH, names, compiles=False),
        gpu.Contest(of, batch.Shape(8, 8), BOTH, names, compiles=False),
    ]
    monkeypatch.setattr(gpu, "plan", lambda device: iter(plan))
    clock = iter([0.0, 0.0, 0.0, 51.0])
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    gpu.measure(tmp_path, CPU, deadline=50.0)
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["machine_info"]["contests"] == "2 of 4"
    timed = {b["extra_info"]["provider"] for b in result["benchmarks"]}
    assert timed == {"fastrlhf", "eager"}
    assert {r["operation"] for r in result["not_timed"]} == {"lost"}
    gpu.write_report(tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "Tests: not run. Contests: 2 of 4." in text


def test_no_provider_of_this_library_differs_from_its_public_functions() -> None:
    data = batch.make_batch("logits", batch.Shape(2, 8, 50), CPU, gradients=False)
    found = providers.FUSED_LOGPROBS["fastrlhf"].load()(data)
    assert torch.equal(found, fastrlhf.token_logprobs(data.logits, data.targets))
