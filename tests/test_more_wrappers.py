"""Losses inside a model's forward, with models that FSDP2, DeepSpeed and accelerate prepare."""

from importlib.util import find_spec

import pytest
import torch
from support import more_wrappers
from support.more_wrappers import ALL_LOSSES, CASES, refusals
from support.rank_pool import RankPool
from support.wrapped_losses import TOLERANCE, errors, make_batch, outcome, small_model
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("peft", reason="needs peft")
accelerate = pytest.importorskip("accelerate", reason="needs accelerate")


@pytest.fixture(scope="module")
def pools():
    """Processes by their number: a library may take all of them for its own."""
    with RankPool(2) as two, RankPool(4) as four:
        yield {2: two, 4: four}


def assert_right(pools: dict[int, RankPool], family: str, name: str) -> None:
    ranks = CASES[family][name].ranks
    found = pools[ranks].run(more_wrappers.compare, family, name, ranks=ranks)
    rows = [row for of_rank in found for row in of_rank]
    assert len(rows) >= ranks * len(CASES[family][name].losses)
    failing = [str(row) for row in rows if row.fails]
    assert not failing, "\n".join(failing)


@pytest.mark.xdist_group("more wrappers")
@pytest.mark.parametrize("name", CASES["fsdp2"])
def test_fsdp2(name, pools) -> None:
    assert_right(pools, "fsdp2", name)


@pytest.mark.xdist_group("more wrappers")
@pytest.mark.parametrize("name", CASES["fake ZeRO-3"])
def test_hooks_as_of_zero_3(name, pools) -> None:
    assert_right(pools, "fake ZeRO-3", name)


@pytest.mark.xdist_group("more wrappers")
@pytest.mark.parametrize("name", CASES["accelerate"])
def test_accelerate(name, pools) -> None:
    assert_right(pools, "accelerate", name)


@pytest.mark.xdist_group("more wrappers")
@pytest.mark.parametrize("name", CASES["hsdp"])
def test_four_processes(name, pools) -> None:
    assert_right(pools, "hsdp", name)


@pytest.mark.xdist_group("more wrappers")
def test_a_head_that_a_forward_takes_away(pools) -> None:
    found = pools[2].run(more_wrappers.refusals_of_gathered_heads, ranks=2)
    failing = [str(row) for rows in found for row in rows if row.fails]
    assert not failing, "\n".join(failing)


@pytest.mark.xdist_group("more wrappers")
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("name", CASES["deepspeed"])
def test_deepspeed(name, pools) -> None:
    assert_right(pools, "deepspeed", name)


def on_cpu(model: nn.Module, folder: str) -> nn.Module:
    return accelerate.cpu_offload(model, torch.device("cpu"))


def on_disk(model: nn.Module, folder: str) -> nn.Module:
    return accelerate.disk_offload(model, folder, torch.device("cpu"))


def head_on_disk(model: nn.Module, folder: str) -> nn.Module:
    accelerate.disk_offload(model.lm_head, folder, torch.device("cpu"))
    return model


def by_device_map(model: nn.Module, folder: str) -> nn.Module:
    devices = {"model": "cpu", "model.layers.1": "disk", "lm_head": "disk"}
    return accelerate.dispatch_model(
        model, devices, main_device="cpu", offload_dir=folder, force_hooks=True
    )


def loaded(model: nn.Module, folder: str) -> nn.Module:
    model.save_pretrained(f"{folder}/model")
    return transformers.AutoModelForCausalLM.from_pretrained(
        f"{folder}/model", device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=folder
    ).train()


OFFLOADED = {
    "plain": (on_cpu, on_disk, head_on_disk, by_device_map, loaded),
    # A map of devices keeps weights tied for a single forward.
    "tied": (on_cpu, on_disk, head_on_disk),
    "lora head": (on_cpu, on_disk, head_on_disk),
}


@pytest.mark.parametrize(
    ("kind", "offload"), [(kind, way) for kind, ways in OFFLOADED.items() for way in ways]
)
def test_offloaded_models(kind, offload, tmp_path) -> None:
    model, x = offload(small_model(kind), str(tmp_path)), [make_batch(0)]
    for loss in more_wrappers.EVERY:
        of_model, of_logits = ALL_LOSSES[loss]
        want, _ = outcome(small_model(kind), of_logits, x)
        _, wanted = outcome(model, of_logits, x)
        values, found = outcome(model, of_model, x)
        assert values == pytest.approx(want, rel=TOLERANCE, abs=TOLERANCE)
        # What is offloaded is another tensor in each call, so its gradient is nowhere.
        nowhere = {name for name, gradient in wanted.items() if gradient is None}
        assert nowhere == {name for name, gradient in found.items() if gradient is None}
        for name in nowhere:
            del wanted[name], found[name]
        for name, error in errors(found, wanted).items():
            assert error <= TOLERANCE, f"{loss}: {name} is off by {error:.1e}"
    failing = [str(row) for row in refusals("offloaded", model) if row.fails]
    assert not failing, "\n".join(failing)
