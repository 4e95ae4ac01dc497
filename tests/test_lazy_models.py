"""Lazy logits of all kinds of models, and of whatever is done with a model while it has them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.lazy_wrappers import (
    lazy,
    make_batch,
    warnings_of_builds,
)
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs transformers")

from support.architectures import CAUSAL, encoder_decoder, shrunken, wrapper  # noqa: E402

EPS = torch.finfo(torch.float32).eps
X = make_batch(0)


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def outcome(model: nn.Module, loss_of: Any) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    loss = loss_of(model)
    return loss.detach(), gradients_of(model, loss)


def assert_equal(
    make: Callable[[], nn.Module], loss_of: Any, *, builds: int = 0, exact: bool = True
) -> None:
    """Compare a loss of a model, and its gradients, with those of plain logits.

    builds: how often logits are built; exact: whether the model can be run in fp64, of which both
    are an approximation.
    """
    model = make()
    plain, of_plain = outcome(model, loss_of)
    value, wanted = outcome(make().double(), loss_of) if exact else (plain, of_plain)
    with warnings_of_builds() as said, lazy(model):
        found, of_lazy = outcome(model, loss_of)
    assert len(said) == builds, said
    slack = 4 * EPS if exact else 64 * EPS
    assert (found - value).abs() <= 3 * (plain - value).abs() + slack * value.abs()
    assert of_lazy.keys() == of_plain.keys() == wanted.keys()
    largest = max(x.norm() for x in wanted.values())
    for name, want in wanted.items():
        error, of_rounding = ((x[name] - want).norm() for x in (of_lazy, of_plain))
        # Gradients that are zero but for rounding have errors of what they are made of.
        assert error <= 3 * of_rounding + slack * want.norm() + EPS * largest, name


def of_labels(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    """The loss that the model computes by itself."""
    labels = ids.clone()
    labels[0, :3] = -100
    if not model.config.is_encoder_decoder:
        inputs = {"attention_mask": torch.ones_like(ids), **inputs}
    return model(input_ids=ids, labels=labels, use_cache=False, **inputs).loss


SINGLE = {"xglm"}  # that cannot be run in fp64
IDS = torch.randint(5, 90, (2, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore")  # of the models themselves
@pytest.mark.parametrize("key", CAUSAL)
def test_a_causal_architecture(key) -> None:
    def make() -> nn.Module:
        model = shrunken(key)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        return model

    assert_equal(make, lambda model: of_labels(model, IDS), exact=key not in SINGLE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Llava", "LlavaNext", "Cohere2Vision", "Gemma3", "Qwen2_5_VL"])
def test_a_wrapper_of_images_and_text(name) -> None:
    assert_equal(lambda: wrapper(name), lambda model: of_labels(model, IDS))


def test_words_that_a_model_rules_out() -> None:
    """Chameleon writes into its logits, and makes no words of images."""
    assert_equal(lambda: wrapper("Chameleon"), lambda model: of_labels(model, IDS), builds=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["T5", "MT5"])
def test_an_encoder_decoder(name) -> None:
    assert_equal(lambda: encoder_decoder(name), lambda model: of_labels(model, IDS))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Bart", "MBart", "Pegasus", "Marian"])
def test_an_offset_of_each_word(name) -> None:
    def make() -> nn.Module:
        model = encoder_decoder(name)
        model.final_logits_bias.normal_()
        return model

    assert_equal(make, lambda model: of_labels(model, IDS))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_words_that_are_masked(name) -> None:
    config = transformers.CONFIG_MAPPING[name](
        vocab_size=120, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, dim=32, n_layers=1, n_heads=4,
        hidden_dim=48, embedding_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2,
    )  # fmt: skip

    def make() -> nn.Module:
        torch.manual_seed(0)
        return transformers.AutoModelForMaskedLM.from_config(config).eval()

    assert_equal(make, lambda model: of_labels(model, IDS))
