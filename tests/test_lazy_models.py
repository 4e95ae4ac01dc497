"""Lazy logits of all kinds of models, and of whatever is done with a model while it has them."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from support.lazy_wrappers import lazy, make_batch, warnings_of_builds
from support.wrapped_losses import VOCAB, small_model
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


BUILDS = {"inkling2_text": 1}  # which leaves out words that pad its vocabulary: logits[..., :n]
SINGLE = {"xglm", "inkling2_text", "prophetnet"}  # that cannot be run in fp64
IDS = torch.randint(5, 90, (2, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore")  # of the models themselves
@pytest.mark.parametrize("key", CAUSAL)
def test_a_causal_architecture(key) -> None:
    def make() -> nn.Module:
        model = shrunken(key)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        return model

    builds = BUILDS.get(key, 0)
    assert_equal(make, lambda model: of_labels(model, IDS), exact=key not in SINGLE, builds=builds)


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


OFFSET = torch.linspace(-2, 2, VOCAB)
RULED_OUT = OFFSET.masked_fill(torch.arange(VOCAB) % 7 == 5, -torch.inf)
ADDED = {
    "offset": lambda z: z + OFFSET,
    "from the left": lambda z: OFFSET[None, None] + z,
    "twice, scaled": lambda z: (0.7 * z + OFFSET).add(OFFSET) / 1.3,
    "ruled out": lambda z: (z / 0.5 + RULED_OUT).float() * 0.9,
    "temperatures": lambda z: (z + OFFSET) / torch.linspace(0.5, 1, 9)[:, None],
    "hidden from": lambda z: z + OFFSET.bfloat16(),
}


def of_added(change: Callable[[Tensor], Tensor], model: nn.Module) -> Tensor:
    ids = 6 * (X.ids // 6)  # none that is ruled out: 5 of 7
    ids = torch.where(ids % 7 == 5, ids - 1, ids)
    logits = change(model(input_ids=X.ids).logits)
    log_p = logits.log_softmax(-1)
    picked = log_p.gather(-1, ids[..., None])[..., 0]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    lse = logits.logsumexp(-1)
    return (picked.tanh() + lse).mean() + losses + picked.exp().mean()


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("kind", ["plain", "scaled", "lora head", "dora head"])
def test_offsets_of_words(added, kind) -> None:
    # The log-sum-exp of a head that is no matrix is not known.
    builds = int(kind == "dora head")
    assert_equal(partial(small_model, kind), partial(of_added, ADDED[added]), builds=builds)


def test_an_offset_in_bf16() -> None:
    found = []
    for dtype, each in ((torch.float64, None), (torch.bfloat16, None), (torch.bfloat16, lazy)):
        model = small_model(dtype=dtype)
        with warnings_of_builds() as said, each(model) if each else nullcontext():
            found.append(outcome(model, partial(of_added, lambda z: z + OFFSET.to(z.dtype))))
        assert not said
    (value, wanted), (plain, of_plain), (ours, of_lazy) = found
    assert (ours - value).abs() <= 2 * (plain - value).abs() + torch.finfo(torch.bfloat16).eps
    for name, want in wanted.items():
        error, of_rounding = ((x[name] - want).norm() for x in (of_lazy, of_plain))
        assert error <= 2 * of_rounding, name


def test_what_is_no_offset_of_words_is_built() -> None:
    model = small_model()
    trained = nn.Parameter(OFFSET.clone())
    with torch.no_grad():
        plain = model(input_ids=X.ids).logits
    for add in (
        lambda z: z + 1, lambda z: z + torch.ones(9, 1), lambda z: z + torch.randn(9, VOCAB),
        lambda z: z + trained, lambda z: z.tanh() + OFFSET, lambda z: (z + OFFSET).tanh(),
        lambda z: torch.add(z, OFFSET, alpha=0.5), lambda z: (z + OFFSET).argmax(-1).double(),
    ):  # fmt: skip
        torch.manual_seed(0)
        want = add(plain)
        torch.manual_seed(0)
        with warnings_of_builds() as said, lazy(model), torch.no_grad():
            found = add(model(input_ids=X.ids).logits) + 0
        assert said
        torch.testing.assert_close(found, want)


def test_an_offset_that_is_changed_later() -> None:
    model, offset = small_model(), OFFSET.clone()
    with torch.no_grad():
        want = (model(input_ids=X.ids).logits + offset).logsumexp(-1)
        with lazy(model):
            logits = model(input_ids=X.ids).logits + offset
            offset.fill_(3)
            torch.testing.assert_close(logits.logsumexp(-1), want)
