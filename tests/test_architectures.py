"""Whatever model: the log-probs of its own logits, or a refusal that names it."""

from pathlib import Path

import pytest
import torch
from torch import nn

import fastrlhf

pytest.importorskip("transformers", reason="needs transformers")

from support.architectures import CAUSAL, WRAPPERS, encoder_decoder, shrunken, wrapper

# Models that no log-prob of the next token can be had from.
REFUSED = {
    "xlnet": "is an encoder",  # unless it is given masks of permutations
}
# A layer of their own between backbone and head.
LAYER_BETWEEN = {
    "bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "modernbert-decoder", "rembert", "roberta", "roberta-prelayernorm", "roc_bert",
    "roformer", "xlm-roberta", "xlm-roberta-xl",
}  # fmt: skip


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 90, (2, 8))
    return ids, torch.ones_like(ids)


def own_logprobs(model: nn.Module, ids: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    return logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def assert_right(model: nn.Module, gradients: bool = False) -> None:
    ids, attention = batch()
    wanted = own_logprobs(model, ids, attention)
    found = fastrlhf.model_token_stats(model, ids, attention).logprob
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    assert float(wanted.std()) > 0.05
    hidden, head = fastrlhf.head_inputs(model, ids, attention)
    again = fastrlhf.linear_token_logprobs(
        hidden[:, :-1], head.weight, ids[:, 1:], **head.options()
    )
    torch.testing.assert_close(again.double(), wanted, rtol=1e-4, atol=1e-4)
    if gradients:
        weight = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        of = [torch.autograd.grad(x.sum(), weight) for x in (found, again, wanted)]
        for a, b, want in zip(*of, strict=True):
            for got in (a, b):
                assert (got - want).norm() < 1e-3 * want.norm()


@pytest.mark.filterwarnings("ignore")  # of the models themselves
@pytest.mark.parametrize("key", CAUSAL)
def test_a_causal_architecture(key) -> None:
    model = shrunken(key)
    if key in REFUSED:
        with pytest.raises((TypeError, ValueError), match=REFUSED[key]):
            fastrlhf.model_token_stats(model, *batch())
    else:
        assert_right(model, gradients=CAUSAL.index(key) % 8 == 0)
    if key in LAYER_BETWEEN:
        with pytest.raises((TypeError, RuntimeError), match=r"^model: "):
            fastrlhf.lm_head(model)
    elif key not in REFUSED:
        fastrlhf.lm_head(model)


def test_the_manual_counts_them() -> None:
    readme = " ".join((Path(__file__).parent.parent / "README.md").read_text().split())
    right = len(CAUSAL) - len(REFUSED)
    assert f"Of the {len(CAUSAL)} causal architectures" in readme
    assert f"makes, {right} give the log-probs" in readme
    assert f"{len(WRAPPERS)} wrappers of images, speech and text" in readme


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_of_images_and_text(name) -> None:
    assert_right(wrapper(name), gradients=name in ("LlavaNext", "Chameleon"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["T5", "MT5", "Bart", "MBart", "Pegasus", "Marian"])
def test_an_encoder_decoder_is_refused_and_its_decoder_states_are_right(name) -> None:
    model, (ids, attention) = encoder_decoder(name), batch()
    answers = torch.randint(5, 90, (2, 6))
    with pytest.raises(TypeError, match="encoder-decoder"):
        fastrlhf.model_token_stats(model, ids, attention, decoder_input_ids=answers)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    logits = model(ids, attention_mask=attention, decoder_input_ids=answers).logits[:, :-1]
    wanted = fastrlhf.token_logprobs(logits, answers[:, 1:])
    hidden, head = fastrlhf.head_inputs(model, ids, attention, decoder_input_ids=answers)
    found = fastrlhf.linear_token_logprobs(
        hidden[:, :-1], head.weight, answers[:, 1:], **head.options()
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
