"""The keys and values of tokens before, by both names that forwards of transformers have for them:
`past_key_values`, and since transformers 5.24 `cache`, of models that take the old name still.
"""

import inspect

import pytest
import torch
from support.model_loss_problems import SEQUENCES, restarting
from support.tiny_models import batch, make

import fastrlhf
from fastrlhf.hf.model_inputs import with_positions

transformers = pytest.importorskip("transformers", reason="needs transformers")


@pytest.fixture(params=["its own", "new"])
def model(request, monkeypatch):
    model = make("GPT2").double()
    own = type(model).forward
    if request.param == "new" and "cache" not in inspect.signature(own).parameters:

        def forward(self, input_ids=None, cache=None, attention_mask=None, position_ids=None,
                    logits_to_keep=0, **others):  # fmt: skip
            cache = others.pop("past_key_values", cache)
            return own(
                self, input_ids=input_ids, past_key_values=cache, attention_mask=attention_mask,
                position_ids=position_ids, logits_to_keep=logits_to_keep, **others,
            )  # fmt: skip

        monkeypatch.setattr(type(model), "forward", forward)
    return model


def names_of(model) -> list[str]:
    taken = inspect.signature(type(model).forward).parameters
    return ["past_key_values", *(["cache"] if "cache" in taken else [])]


def test_either_name_may_be_none(model) -> None:
    inputs = batch()
    padded = {name: torch.cat((x.new_zeros(SEQUENCES, 3), x), 1) for name, x in inputs.items()}
    plain, _ = fastrlhf.sft_loss(model, **inputs)
    for name in names_of(model):
        found, _ = fastrlhf.sft_loss(model, **padded, **{name: None})
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)


def test_packed_sequences_go_with_no_cache(model) -> None:
    for name in names_of(model):
        with pytest.raises(ValueError, match=f"^{name}: expected none with packed sequences"):
            fastrlhf.sft_loss(
                model, batch()["input_ids"][:1], position_ids=restarting(),
                **{name: transformers.DynamicCache()},
            )  # fmt: skip


def test_after_a_cache_positions_are_left_to_the_model(model) -> None:
    mask = torch.tensor([[0, 1, 1]])
    assert "position_ids" in with_positions(model, mask, {}, model)
    for name in names_of(model):
        given = {name: transformers.DynamicCache()}
        assert with_positions(model, mask, given, model) is given


def test_another_name_is_refused(model) -> None:
    with pytest.raises(TypeError, match=r"^caches: the forward of GPT2LMHeadModel takes no arg"):
        fastrlhf.sft_loss(model, **batch(), caches=None)
