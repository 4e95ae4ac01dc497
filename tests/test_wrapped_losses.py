"""Losses inside a model's forward, with models that are wrapped, sharded, compiled or offloaded."""

from functools import partial
from pathlib import Path

import pytest
import torch
from support import wrapped_losses as wrapped
from support.wrapped_losses import CASES, FIVE, LOSSES, TOLERANCE, Row, errors, make_batch, outcome
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("peft", reason="needs peft")
accelerate = pytest.importorskip("accelerate", reason="needs accelerate")


def in_two_processes(folder: Path, family: str) -> list[Row]:
    torch.multiprocessing.spawn(wrapped.compare, (str(folder), family), nprocs=2)
    return wrapped.rows_of(folder, family)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> list[Row]:
    return in_two_processes(tmp_path_factory.mktemp("ddp"), "ddp")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> list[Row]:
    return in_two_processes(tmp_path_factory.mktemp("fsdp2"), "fsdp2")


def assert_right(rows: list[Row], family: str, case: str) -> None:
    rows = [row for row in rows if row.case == case]
    assert len(rows) == 2 * len(CASES[family][case].losses)
    failing = [str(row) for row in rows if row.fails]
    assert not failing, "\n".join(failing)


@pytest.mark.xdist_group("wrapped losses, ddp")
@pytest.mark.parametrize("case", CASES["ddp"])
def test_distributed_data_parallel(case, ddp) -> None:
    assert_right(ddp, "ddp", case)


@pytest.mark.xdist_group("wrapped losses, fsdp2")
@pytest.mark.parametrize("case", CASES["fsdp2"])
def test_sharded_models(case, sharded) -> None:
    assert_right(sharded, "fsdp2", case)


@pytest.mark.xdist_group("wrapped losses, fsdp2")
def test_the_gradient_of_a_sharded_head_is_made_in_its_call(sharded) -> None:
    rows = {row.loss: row for row in sharded if row.case == "sharded head"}
    assert not any(row.trouble for row in rows.values()), rows
    for loss in wrapped.MADE_IN_THE_CALL:
        assert rows[loss].error == 0, f"{loss}: a matmul of the vocabulary in backward"
    for loss in wrapped.MADE_IN_BACKWARD:
        assert rows[loss].error == 1, f"{loss}: no matmul of the vocabulary was seen"


@pytest.mark.xdist_group("wrapped losses, fsdp2")
@pytest.mark.parametrize(
    ("what", "says"),
    [("gone_in_backward", "weigh all values alike"), ("tensor_parallel", "tensor parallelism")],
)
def test_what_cannot_be_computed_is_named(what, says, sharded) -> None:
    rows = [row for row in sharded if row.case == what]
    assert len(rows) == 2
    for row in rows:
        assert row.trouble.startswith("model")
        assert says in row.trouble


def test_the_comparison_tells_wrong_gradients() -> None:
    batches = [make_batch(0), make_batch(1)]
    (_, wanted), (_, of_one) = (
        outcome(wrapped.small_model(), LOSSES["dpo"][1], some, 0.5)
        for some in (batches, batches[:1])
    )
    for name, gradient in wanted.items():
        wrong = {
            "missing": None, "of one process": of_one[name], "doubled": 2 * gradient,
            "halved": gradient / 2,
        }  # fmt: skip
        for what, other in wrong.items():
            error = errors({**wanted, name: other}, wanted)[name]
            assert error > 1e3 * TOLERANCE, f"{name}, {what}: off by {error:.1e}"


def assert_like_the_logits(
    model: nn.Module, loss: str, batches: list[wrapped.Batch], kind: str = "plain"
) -> None:
    """Compare values and gradients with those of the logits of a model that nothing wraps."""
    of_model, of_logits = LOSSES[loss]
    want, wanted = outcome(wrapped.small_model(kind), of_logits, batches)
    values, found = outcome(model, of_model, batches)
    assert values == pytest.approx(want, rel=TOLERANCE, abs=TOLERANCE)
    for name, error in errors(found, wanted).items():
        assert error <= TOLERANCE, f"{loss}: {name} is off by {error:.1e}"


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant) -> None:
    for kind in ("plain", "tied", "dora head"):
        model = wrapped.checkpointed(wrapped.small_model(kind), reentrant)
        for loss in FIVE:
            assert_like_the_logits(model, loss, [make_batch(0)], kind)


def test_a_checkpoint_around_the_loss() -> None:
    def around(loss, model, teacher, x):
        return checkpoint(lambda: loss(model, teacher, x), use_reentrant=False)

    for loss, (of_model, of_logits) in LOSSES.items():
        x = [make_batch(0)]
        _, wanted = outcome(wrapped.small_model(), of_logits, x)
        # The first call of a model looks at its head, the one in backward does not.
        _, found = outcome(wrapped.small_model(), partial(around, of_model), x)
        assert max(errors(found, wanted).values()) <= TOLERANCE, loss


@pytest.mark.parametrize("kind", ["plain", "tied", "lora head", "dora head"])
def test_autocast(kind) -> None:
    def rounded(loss, model, teacher, x):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, teacher, x)

    model, x = wrapped.small_model(kind), [make_batch(0)]
    for loss, (of_model, of_logits) in LOSSES.items():
        _, exact = outcome(model, of_logits, x)
        of_plain, of = (
            errors(outcome(model, partial(rounded, function), x)[1], exact)
            for function in (of_logits, of_model)
        )
        for name, error in of.items():
            allowed = 2 * of_plain[name] + 2**-8
            assert error <= allowed < 0.5, f"{loss}: {name} is off by {error:.1e}"


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_compiled_models() -> None:
    model = torch.compile(wrapped.small_model(), backend="aot_eager")
    for loss in FIVE:
        assert_like_the_logits(model, loss, [make_batch(0), make_batch(1, tokens=7)])


def on_hooks(model: nn.Module) -> nn.Module:
    """Spread over devices, of which a CPU has but one."""
    devices = {"model": "cpu", "lm_head": "cpu"}
    return accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)


def head_off_device(model: nn.Module) -> nn.Module:
    accelerate.cpu_offload(model.lm_head, torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    return model


def all_off_device(model: nn.Module) -> nn.Module:
    model = accelerate.cpu_offload(model, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


def with_a_hook(model: nn.Module) -> nn.Module:
    return accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())


def with_a_hook_on_the_head(model: nn.Module) -> nn.Module:
    accelerate.hooks.add_hook_to_module(model.lm_head, accelerate.hooks.ModelHook())
    return model


@pytest.mark.parametrize("wrap", [on_hooks, with_a_hook, with_a_hook_on_the_head])
def test_models_with_hooks_of_accelerate(wrap) -> None:
    model = wrap(wrapped.small_model())
    for loss in FIVE:
        assert_like_the_logits(model, loss, [make_batch(0)])


def test_an_offloaded_head() -> None:
    whole, model = wrapped.small_model(), head_off_device(wrapped.small_model())
    for loss, (of_model, of_logits) in LOSSES.items():
        (want, wanted), (values, found) = (
            outcome(of, function, [make_batch(0)])
            for of, function in ((whole, of_logits), (model, of_model))
        )
        assert values == pytest.approx(want, rel=TOLERANCE, abs=TOLERANCE)
        # The offloaded weight is another tensor each time, so its gradient is nowhere.
        assert wanted.pop("lm_head.weight") is not found.pop("lm_head.weight") is None
        for name, error in errors(found, wanted).items():
            assert error <= TOLERANCE, f"{loss}: {name} is off by {error:.1e}"


@torch.no_grad()
def test_an_offloaded_model() -> None:
    whole, model = wrapped.small_model(), all_off_device(wrapped.small_model())
    x, teacher = make_batch(0), all_off_device(wrapped.small_model("teacher"))
    for of_model, of_logits in LOSSES.values():
        want = of_logits(whole, wrapped.small_model("teacher"), x)
        torch.testing.assert_close(of_model(model, teacher, x), want)


@pytest.mark.parametrize("loss", FIVE)
def test_the_backbone_runs_once(loss) -> None:
    models, calls = [wrapped.small_model(), wrapped.small_model("teacher")], []
    for name, model in zip(("model", "teacher"), models, strict=True):
        model.model.register_forward_hook(lambda *_, name=name: calls.append(name))
    for _ in range(2):
        LOSSES[loss][0](*models, make_batch(0)).backward()
    once = ["model", "teacher"] if loss == "kl" else ["model"]
    assert calls == 2 * once
