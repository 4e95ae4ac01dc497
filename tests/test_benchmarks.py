"""The benchmarks: that the check before each timing can fail, that providers take turns, and that
the limits are the right numbers.
"""

import functools
from dataclasses import replace

import pytest
import torch
from support.benchmark_records import (
    BENCHMARKS,
    BOTH,
    CPU,
    FORWARD,
    batch,
    contests,
    gpu,
    losses,
    measure,
    operation,
    providers,
    shapes,
)

import fastrlhf

_TORCH_HAS_IT = hasattr(torch.nn.functional, "linear_cross_entropy")  # 2.11 has not

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
                if record["provider"] == "F.linear_cross_entropy" and not _TORCH_HAS_IT:
                    assert record["status"].endswith("has no F.linear_cross_entropy"), record
                    continue
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


def test_no_provider_of_this_library_differs_from_its_public_functions() -> None:
    data = batch.make_batch("logits", batch.Shape(2, 8, 50), CPU, gradients=False)
    found = providers.FUSED_LOGPROBS["fastrlhf"].load()(data)
    assert torch.equal(found, fastrlhf.token_logprobs(data.logits, data.targets))
