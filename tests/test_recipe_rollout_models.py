"""What a rollout does with the model that it is given: dropout and adapters are off and come back,
wrappers and generation configs stay as they are, and wrong arguments are named.
"""

import copy
import math
from pathlib import Path

import pytest
import torch

for name in ("transformers", "peft", "tokenizers"):
    pytest.importorskip(name)

from support.recipe_models import (  # noqa: E402, F401  the fixtures are of every test
    PEFT_READS_AN_OLD_NAME,
    dropping,
    one_thread,
    randomize_adapters,
    write_tiny_model,
)
from support.rollout_models import CPU, PROMPTS, assert_logprobs, hostile  # noqa: E402
from torch import nn  # noqa: E402

from fastrlhf.recipes.models import add_adapters, load_model  # noqa: E402
from fastrlhf.recipes.rollout import (  # noqa: E402
    adapters_off,
    evaluating,
    rollout,
)

pytestmark = pytest.mark.filterwarnings(PEFT_READS_AN_OLD_NAME)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), fillers=100)


@pytest.fixture
def loaded(model_folder: Path):
    return load_model(str(model_folder), CPU)


@pytest.fixture
def adapted(loaded):
    base, tokenizer = loaded
    policy = add_adapters(base, rank=2)
    randomize_adapters(policy)
    return policy, tokenizer


def test_dropout_is_off_and_each_module_is_put_back(loaded) -> None:
    model, tokenizer = loaded
    dropped = dropping(model)
    model.train()
    model.model.norm.eval()  # a module that its owner holds in another mode
    before = [module.training for module in model.modules()]
    own = model.generation_config = hostile()
    batch = rollout(model, tokenizer, PROMPTS, new_tokens=4)
    assert not dropped
    assert [module.training for module in model.modules()] == before
    assert model.generation_config is own
    model.eval()
    assert_logprobs(batch["logprobs"], model, batch, 1.0)


def test_dropout_of_a_given_reference_is_off_too(loaded) -> None:
    model, tokenizer = loaded
    other = copy.deepcopy(model)
    dropped = dropping(other)
    before = [module.training for module in other.train().modules()]
    batch = rollout(model, tokenizer, PROMPTS, new_tokens=4, ref_model=other)
    assert [module.training for module in other.modules()] == before
    assert not dropped
    other.eval()
    assert_logprobs(batch["ref_logprobs"], other, batch, 1.0)


@pytest.mark.parametrize("kind", ["plain", "peft"])
@pytest.mark.parametrize("call", [1, 6])  # while sampling; while scoring
def test_an_exception_leaves_the_model_as_it_was(loaded, kind, call) -> None:
    model, tokenizer = loaded
    policy = model if kind == "plain" else add_adapters(model, rank=2)
    policy.train()
    own = model.generation_config = hostile()
    before = [module.training for module in policy.modules()]
    calls: list[int] = []

    def fail(module: nn.Module, arguments: object) -> None:
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("out of memory")

    # Of 5 tokens the last is not read again while sampling: the fifth forward scores them.
    with (
        model.model.norm.register_forward_pre_hook(fail),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        rollout(policy, tokenizer, ["the"] * 9, new_tokens=5)
    assert len(calls) == call
    assert [module.training for module in policy.modules()] == before
    assert model.generation_config is own and policy.generation_config is own
    if kind == "peft":
        assert all(not layer.disable_adapters for layer in lora_layers(policy))


def lora_layers(policy: nn.Module) -> list[nn.Module]:
    layers = [module for module in policy.modules() if hasattr(module, "lora_A")]
    assert layers
    return layers


def test_adapters_come_back_after_an_exception(adapted) -> None:
    policy, _ = adapted
    with pytest.raises(RuntimeError, match="stop"), adapters_off(policy):
        assert all(layer.disable_adapters for layer in lora_layers(policy))
        raise RuntimeError("stop")
    assert all(not layer.disable_adapters for layer in lora_layers(policy))


def test_a_wrapped_model_is_sampled_as_itself(loaded) -> None:
    model, tokenizer = loaded

    class Wrapper(nn.Module):
        """What DistributedDataParallel is to a rollout: it calls its module."""

        def __init__(self, module: nn.Module):
            super().__init__()
            self.module = module

        def forward(self, *arguments: object, **options: object) -> object:
            return self.module(*arguments, **options)

    wrapped = Wrapper(model)
    torch.manual_seed(5)
    expected = rollout(model, tokenizer, PROMPTS[:4], new_tokens=4)
    torch.manual_seed(5)
    found = rollout(wrapped, tokenizer, PROMPTS[:4], new_tokens=4)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["logprobs"], expected["logprobs"])


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, math.nan, math.inf])
def test_a_temperature_must_be_positive(loaded, temperature) -> None:
    model, tokenizer = loaded
    own = model.generation_config
    with pytest.raises(ValueError, match="temperature: expected a positive number, got"):
        rollout(model, tokenizer, ["the"], temperature=temperature)
    assert model.generation_config is own


def test_a_temperature_may_be_an_int(loaded) -> None:
    model, tokenizer = loaded
    batch = rollout(model, tokenizer, PROMPTS[:4], new_tokens=4, temperature=2)
    assert_logprobs(batch["logprobs"], model, batch, 2.0)


@pytest.mark.parametrize("kind", ["plain", "peft"])
def test_a_rollout_leaves_the_owner_of_a_generation_config(loaded, kind) -> None:
    """A config on peft's wrapper would hide what is later set on the model inside."""
    model, tokenizer = loaded
    policy = model if kind == "plain" else add_adapters(model, rank=2)
    own = model.generation_config
    assert ("generation_config" in vars(policy)) == (kind == "plain")
    rollout(policy, tokenizer, PROMPTS[:2], new_tokens=2)
    assert ("generation_config" in vars(policy)) == (kind == "plain")
    assert model.generation_config is policy.generation_config is own


def test_evaluating_gives_each_module_its_mode_back(loaded) -> None:
    model, _ = loaded
    model.train()
    model.model.norm.eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == before
    assert True in before and False in before


def test_a_single_text_is_no_list_of_prompts(loaded) -> None:
    model, tokenizer = loaded
    with pytest.raises(TypeError, match=r"^prompts: expected a list of texts, got a single one$"):
        rollout(model, tokenizer, "the film")
    batch = rollout(model, tokenizer, ("the film",), new_tokens=1)
    assert batch["prompts"] == ["the film"] and len(batch["input_ids"]) == 1


@pytest.mark.parametrize("prompts, words", [([], "at least one"), (["the", ""], "an empty one")])
def test_prompts_must_have_tokens(loaded, prompts, words) -> None:
    model, tokenizer = loaded
    with pytest.raises(ValueError, match=f"^prompts: expected .*{words}"):
        rollout(model, tokenizer, prompts)
