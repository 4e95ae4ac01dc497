"""Losses of models that read packed sequences, against those of the same sequences in rows."""

import pytest
import torch
import torch.nn.functional as F
from support import model_loss_problems
from support.model_loss_problems import (
    LOSSES,
    PAIRS,
    TOKENS,
    Plain,
    assert_same,
    gradients,
    packed,
    packed_sides,
    restarting,
)
from support.tiny_models import ARCHITECTURES, batch, make
from torch import Tensor

import fastrlhf

transformers = pytest.importorskip("transformers", reason="needs transformers")
APART = [name for name in ARCHITECTURES if name not in ("Bloom", "FalconH1", "OPT")]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", APART)
def test_packed_sequences_have_the_loss_of_padded_ones(name, loss, monkeypatch) -> None:
    model = make(name).double() if name != "Mixtral" else make(name)
    rows, there = packed(batch())
    plain, ours = LOSSES[loss]
    whole = plain(Plain(model, batch()))
    of_rows = packed_sides(there)
    monkeypatch.setattr(model_loss_problems, "sides", lambda: of_rows)
    # Attention is normalised in fp32, in another order.
    assert_same(
        ours(model, rows, chunk_size=4)[0], whole, model, 1e-5 if name != "Mixtral" else 1e-3
    )


@pytest.mark.parametrize("loss", [*LOSSES, "divergence"])
def test_empty_and_single_sequences_among_packed_ones(loss, monkeypatch) -> None:
    """Sequences without tokens at the ends and in the middle, and of one token, change nothing."""
    model = make("Llama").double()
    rows, there = packed(batch())
    borders = rows["cu_seqlens"].tolist()
    ids, mask = rows["input_ids"][0], rows["mask"][0]
    one = ids.new_tensor([3]), mask.new_tensor([True])
    first, second, third, end = borders
    assert first == 0
    with_more = {
        "input_ids": torch.cat((ids[:second], one[0], ids[second:]))[None],
        "mask": torch.cat((mask[:second], one[1], mask[second:]))[None],
        "attention_mask": None,
        "cu_seqlens": torch.tensor(
            [0, 0, second, second + 1, second + 1, third + 1, end + 1, end + 1]
        ),
    }
    place = [1, 4, 5]  # of the sequences that there were
    of_rows = packed_sides(there)
    more = dict(of_rows)
    for name, x in of_rows.items():
        if x.ndim == 2:  # of tokens
            garbage = x.new_full((1, 1), torch.nan)
            more[name] = torch.cat((x[:, : second - 1], garbage, x[:, second - 1 :]), dim=1)
        else:
            more[name] = x.new_zeros(7).index_copy(0, torch.tensor(place), x)
    teacher = make("GPT2").double()

    def run(
        inputs: dict[str, Tensor], found: dict[str, Tensor], pairs: dict[str, Tensor]
    ) -> Tensor:
        monkeypatch.setattr(model_loss_problems, "sides", lambda: found)
        monkeypatch.setattr(model_loss_problems, "PAIRS", pairs)
        if loss == "divergence":
            return fastrlhf.model_kl_divergence(model, teacher, **inputs).sum()
        return LOSSES[loss][1](model, inputs)[0]

    moved = {name: torch.tensor(place)[x] for name, x in PAIRS.items()}
    whole = run(rows, of_rows, dict(PAIRS))
    found = run(with_more, more, moved)
    if loss == "gspo":  # a mean over all sequences
        found = found * 7 / 3
    assert_same(found, whole, model, 1e-5)


def test_a_temperature_of_each_sequence_packed_or_padded() -> None:
    model, inputs = make("Llama").double(), batch()
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    rows, there = packed(inputs)
    wide, narrow = (
        fastrlhf.model_token_stats(model, **given, temperature=temperature).logprob
        for given in (inputs, rows)
    )
    expected = torch.cat((wide, wide.new_zeros(3, 1)), dim=1)[there][:-1]
    torch.testing.assert_close(narrow[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in APART])
def test_models_that_let_packed_sequences_see_each_other_are_refused(name) -> None:
    rows, _ = packed(batch())
    with pytest.raises(TypeError, match=r"^model: .*packed sequences"):
        fastrlhf.model_token_stats(make(name), **rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_a_new_model_lets_sequences_see_is_found_in_any_precision(dtype) -> None:
    """Its weights are as small as at the start of a training."""
    config = transformers.OPTConfig(**ARCHITECTURES["OPT"])
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    rows, _ = packed(batch())
    with pytest.raises(TypeError, match=r"^model: OPT.*packed sequences apart"):
        fastrlhf.model_token_stats(model, **rows)


def test_positions_that_start_again_pack_as_borders_do() -> None:
    model, ids = make("Llama").double(), batch()["input_ids"][:1]
    cu_seqlens = torch.tensor([0, 4, 7, 9])
    by_borders = fastrlhf.sft_loss(model, ids, cu_seqlens=cu_seqlens)[0]
    for given in (
        {"position_ids": restarting()},
        {"position_ids": restarting(), "cu_seqlens": cu_seqlens},
        {"position_ids": None, "cu_seqlens": cu_seqlens, "use_cache": None, "labels": None},
        {"cu_seqlens": cu_seqlens, "use_cache": False, "logits_to_keep": 0},
    ):
        found = fastrlhf.sft_loss(model, ids, **given)[0]
        torch.testing.assert_close(found, by_borders, rtol=1e-12, atol=0)
    with pytest.raises(TypeError, match=r"^model: OPT.*packed sequences apart"):
        fastrlhf.sft_loss(make("OPT"), ids, position_ids=restarting())
    fastrlhf.sft_loss(make("OPT"), ids, position_ids=torch.arange(TOKENS)[None])


def test_packed_inference_then_training() -> None:
    """The trial of a model needs a gradient, whatever surrounds the first call."""
    model, rows = make("Llama"), packed(batch())[0]
    with torch.inference_mode():
        first = fastrlhf.sft_loss(model, **rows)[0]
    found = fastrlhf.sft_loss(model, **rows)[0]
    torch.testing.assert_close(found.detach(), first)
    assert gradients(model, found).keys() == dict(model.named_parameters()).keys()


def test_packed_log_probs_of_a_model_go_into_packed_losses() -> None:
    model, rows = make("Llama").double(), packed(batch())[0]
    ids, mask, cu_seqlens = rows["input_ids"], rows["mask"], rows["cu_seqlens"]
    logprobs = fastrlhf.model_token_stats(model, **rows).logprob
    kept = fastrlhf.shift_targets(ids, mask, cu_seqlens=cu_seqlens) != -100
    sums = fastrlhf.sequence_logprobs(F.pad(logprobs, (0, 1)), kept, cu_seqlens=cu_seqlens)
    wide = fastrlhf.model_token_stats(model, **batch()).logprob
    expected = fastrlhf.sequence_logprobs(wide, batch()["mask"][:, 1:])
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"^cu_seqlens: .*F\.pad\(x, \(0, 1\)\)"):
        fastrlhf.sequence_logprobs(logprobs, cu_seqlens=cu_seqlens)


def test_packed_sequences_with_a_mask_of_their_own() -> None:
    """What a 4-d attention mask says is taken at its word."""
    model = make("OPT").double()
    rows, there = packed(batch())
    ids = torch.repeat_interleave(torch.arange(3), rows["cu_seqlens"].diff())
    place = torch.arange(len(ids))
    seen = (ids[:, None] == ids) & (place[:, None] >= place)
    attention = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    found = fastrlhf.model_token_stats(
        model, **{**rows, "attention_mask": attention[None, None]}
    ).logprob
    wide = fastrlhf.model_token_stats(model, **batch()).logprob
    expected = torch.cat((wide, wide.new_zeros(3, 1)), dim=1)[there][:-1]
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
