"""What `check` says of batches and models."""

import re

import pytest
import torch

import fastrlhf

transformers = pytest.importorskip("transformers", reason="needs transformers")


def model(**changes):
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
        **{"final_logit_softcapping": None, **changes},
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config).eval()


def batch() -> dict[str, torch.Tensor]:
    mask = torch.zeros(2, 6, dtype=torch.long)
    mask[:, 3:] = 1
    return {
        "input_ids": torch.randint(1, 61, (2, 6)),
        "attention_mask": torch.ones(2, 6, dtype=torch.long),
        "completion_mask": mask,
    }


def test_nothing_is_said_of_what_is_usual() -> None:
    assert fastrlhf.check(model(), batch()) == []


def without_a_mask(b):
    del b["completion_mask"]


def misaligned(b):
    b["completion_mask"] = b["completion_mask"][:, 1:]


def first_token(b):
    b["completion_mask"][:] = 1


def no_end(b):
    b["completion_mask"][:, -1] = 0


def empty(b):
    b["completion_mask"][0] = 0


def padded_on_the_left(b):
    b["attention_mask"][0, :2] = 0


def padding_scored(b):
    b["attention_mask"][0, 5] = 0


def misspelt(b):
    b["postion_ids"] = None


def additive(b):
    b["attention_mask"] = torch.zeros(2, 6)
    b["attention_mask"][0, 0] = -torch.inf


def without_attention(b):
    del b["attention_mask"]
    b["input_ids"][0, 5] = 0


FINDINGS = {
    without_a_mask: r"^mask: none is given, so the tokens of prompts",
    misaligned: r"^completion_mask: is not aligned",
    first_token: r"^completion_mask: scores the first token .*prompt",
    no_end: r"^completion_mask: leaves out the last token of 2 of 2 .*end of sequence",
    empty: r"^completion_mask: scores no token of 1 of 2",
    padded_on_the_left: r"^attention_mask: sequences are padded on the left",
    padding_scored: r"^completion_mask: scores tokens of padding",
    misspelt: r"^postion_ids: ",
    additive: r"^attention_mask: is not of 0 and 1",
    without_attention: r"^attention_mask: none is given",
}


@pytest.mark.parametrize("change", FINDINGS)
def test_what_is_unusual_about_a_batch(change) -> None:
    inputs = batch()
    change(inputs)
    (found,) = fastrlhf.check(model(), inputs)
    assert re.search(FINDINGS[change], found)


def test_what_is_unusual_about_a_model() -> None:
    (found,) = fastrlhf.check(model(final_logit_softcapping=5.0), batch())
    assert found == "model: Gemma2ForCausalLM caps its logits at 5"
    capped = model()
    capped.register_forward_hook(lambda m, a, out: (out.logits.clamp(max=1),))
    (found,) = fastrlhf.check(capped, batch())
    assert found.startswith("lm_head is not for this model: ")


def test_what_is_unusual_about_packed_sequences() -> None:
    usual = {**batch(), "attention_mask": None}
    usual = {name: x if x is None else x[:1] for name, x in usual.items()}
    packed = {**usual, "cu_seqlens": torch.tensor([0, 2, 6])}
    assert fastrlhf.check(model(), packed) == []
    (said,) = fastrlhf.check(model(), {**packed, "cu_seqlens": torch.tensor([0, 2, 5])})
    assert said.startswith("cu_seqlens: expected to end at 6")
    (said,) = fastrlhf.check(model(), {**packed, "attention_mask": torch.ones(1, 6)})
    assert said.startswith("attention_mask: expected None with cu_seqlens")
