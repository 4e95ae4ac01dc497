"""Statistics of models whose heads are adapted, quantized, hooked, scaled or followed by something
else, against the models' own logits.
"""

import warnings

import pytest
import torch
from support.model_stats import BERT, assert_same, expected
from support.sharded_head import compare_with_whole_model
from support.tiny_models import VOCAB, batch, make, with_lora
from torch import nn

import fastrlhf
from fastrlhf.hf.head_check import check_weight
from fastrlhf.hf.head_parts import head_parts

transformers = pytest.importorskip("transformers", reason="needs transformers")
peft = pytest.importorskip("peft", reason="needs peft")


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere"])
def test_a_frozen_head_under_lora(name) -> None:
    assert_same(with_lora(make(name), "q_proj", "v_proj"))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_head_with_a_lora_adapter(dropout) -> None:
    model = with_lora(make("Llama"), "q_proj", "lm_head", lora_dropout=dropout)
    assert_same(model)
    with model.disable_adapter():
        inputs = batch()
        stats = fastrlhf.model_token_stats(model, **inputs)
        torch.testing.assert_close(
            stats.logprob.double(), expected(model, inputs)[0], rtol=1e-4, atol=1e-4
        )
    model.merge_adapter()
    with torch.no_grad():
        stats = fastrlhf.model_token_stats(model, **inputs)
        torch.testing.assert_close(
            stats.logprob.double(), expected(model, inputs)[0], rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
def test_a_merged_adapter_that_is_switched_off_takes_no_part() -> None:
    model, inputs = with_lora(make("Llama"), "lm_head"), batch()
    with model.disable_adapter():
        plain = expected(model, inputs)[0]
    model.merge_adapter()
    merged = expected(model, inputs)[0]
    assert not torch.allclose(merged, plain, atol=0.1)
    with model.disable_adapter():
        found = fastrlhf.model_token_stats(model, **inputs).logprob
    torch.testing.assert_close(found.double(), plain, rtol=1e-4, atol=1e-4)


def test_adapter_dropout_in_training_passes_the_check() -> None:
    model = with_lora(make("Llama"), "lm_head", lora_dropout=0.5).train()
    inputs = batch()
    logprobs = [fastrlhf.model_token_stats(model, **inputs).logprob for _ in range(2)]
    assert not torch.equal(*logprobs)
    assert all(module.training for module in model.modules())


def test_a_head_that_is_trained_whole_beside_lora() -> None:
    model = with_lora(make("Llama"), "q_proj", modules_to_save=["lm_head"])
    assert any("modules_to_save" in n and p.requires_grad for n, p in model.named_parameters())
    assert_same(model)


ADAPTERS = {
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["lm_head"], use_dora=True),
    "lora bias": lambda: peft.LoraConfig(r=4, target_modules=["lm_head"], lora_bias=True),
    "ia3": lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=["lm_head"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["lm_head"]),
    "trained tokens": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 5, 90]}
    ),
    "trained tokens, tied": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5, 90]
    ),
}


def with_adapter(kind: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = make("Llama, tied" if "tied" in kind else "Llama")
        model = peft.get_peft_model(base, ADAPTERS[kind]())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_whose_matrix_its_module_alone_knows(kind) -> None:
    model = with_adapter(kind)
    assert_same(model, chunk_size=3)
    inputs = batch()
    hidden, head = fastrlhf.head_inputs(model, inputs["input_ids"], inputs["attention_mask"])
    targets = fastrlhf.shift_targets(inputs["input_ids"], inputs["mask"])
    found = fastrlhf.linear_token_logprobs(hidden, head.weight, targets, **head.options())
    torch.testing.assert_close(
        found[:, :-1].double(), expected(model, inputs)[0], rtol=1e-4, atol=1e-4
    )
    assert head.weight.requires_grad


def test_a_hook_on_an_adapted_head_counts_once() -> None:
    model, inputs = with_adapter("dora"), batch()
    model.get_base_model().lm_head.register_forward_hook(lambda m, a, out: 1.5 * out)
    wanted = expected(model, inputs)[0]
    hidden, head = fastrlhf.head_inputs(model, inputs["input_ids"], inputs["attention_mask"])
    targets = fastrlhf.shift_targets(inputs["input_ids"], inputs["mask"])
    found = fastrlhf.linear_token_logprobs(hidden, head.weight, targets, **head.options())
    torch.testing.assert_close(found[:, :-1].double(), wanted, rtol=1e-4, atol=1e-4)
    assert_same(model)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_head(bits, double) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = make("Llama", hidden_size=64, head_dim=16, vocab_size=128)
    model.requires_grad_(False)
    weight = model.lm_head.weight.data
    if bits == 4:
        head = bnb.nn.Linear4bit(
            64, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32,
            compress_statistics=double,
        )  # fmt: skip
        head.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=double
        )
    else:
        head = bnb.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=False)
        head.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    model.lm_head = head.to("cpu")
    if double:
        model = with_lora(model, "lm_head")
    model.get_input_embeddings().weight.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what bitsandbytes casts
        # The module of an 8-bit head rounds its hidden states too.
        assert_same(model, 1e-4 if bits == 4 else 2e-2)


@torch.no_grad()
def test_the_look_at_a_4_bit_head_leaves_it_as_it_is() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model, inputs = make("Llama", hidden_size=64, head_dim=16, vocab_size=128), batch()
    weight = bnb.nn.Params4bit(model.lm_head.weight.data, quant_type="nf4")
    model.lm_head = bnb.nn.Linear4bit(64, 128, bias=False, compute_dtype=torch.float32)
    model.lm_head.weight = weight
    model.lm_head.to("cpu")
    first, second = (fastrlhf.model_token_stats(model, **inputs).logprob for _ in range(2))
    torch.testing.assert_close(second, first)
    wanted = expected(model, inputs)[0]  # whose forward packs the weight, and rounds to bf16
    torch.testing.assert_close(first.double(), wanted, rtol=2e-2, atol=2e-2)


def test_an_8_bit_head_has_the_largest_weight_of_each_row_exactly() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = make("Llama")
    dense = model.lm_head.weight.data
    head = bnb.nn.Linear8bitLt(32, VOCAB, bias=False, has_fp16_weights=False)
    head.weight = bnb.nn.Int8Params(dense, requires_grad=False, has_fp16_weights=False)
    model.lm_head = head.to("cpu")
    weight = fastrlhf.lm_head(model).weight
    assert isinstance(weight, fastrlhf.QuantizedWeight)
    largest = dense.abs().amax(1)
    torch.testing.assert_close(weight[0:VOCAB].float().abs().amax(1), largest, rtol=1e-3, atol=0)


def test_a_forward_of_the_head_that_was_put_there_is_put_back() -> None:
    model, inputs = make("Llama"), batch()
    head, calls = model.lm_head, []

    def counted(hidden):
        calls.append(hidden.shape)
        return type(head).forward(head, hidden)

    head.forward = counted
    fastrlhf.model_token_stats(model, **inputs)
    assert head.forward is counted
    assert len(calls) == 1  # the check of the first call
    with pytest.raises(ValueError, match="adds or leaves out positions"):
        fastrlhf.model_token_stats(model, **inputs, logits_to_keep=1)
    assert head.forward is counted  # after an error too


def test_the_head_of_a_model_serves_the_linear_operations() -> None:
    for name in ("Gemma2", "Cohere", "Granite", "Phi"):
        model, inputs = make(name), batch()
        head = fastrlhf.lm_head(model)
        hidden = model.base_model(inputs["input_ids"]).last_hidden_state
        targets = fastrlhf.shift_targets(inputs["input_ids"], inputs["mask"])
        found = fastrlhf.linear_token_logprobs(hidden, head.weight, targets, **head.options())
        plain = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
        torch.testing.assert_close(
            found[:, :-1].double(), expected(model, plain)[0], rtol=1e-4, atol=1e-4
        )
    model = with_lora(make("Llama"), "lm_head")
    merged = fastrlhf.lm_head(model).weight
    model.merge_adapter()
    torch.testing.assert_close(merged, fastrlhf.lm_head(model).weight)
    assert merged.requires_grad


class Twisted(nn.Module):
    """A head that is no plain linear layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).sin()


def changed(model: nn.Module, monkeypatch, change) -> None:
    """Let the model's forward change its logits."""
    own = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, *a, **k: _edited(own(self, *a, **k), change)
    )


@pytest.mark.parametrize("kind", ["bend", "class", "unused", "trained", "positions", "patched"])
def test_a_head_that_is_not_understood_fails_loudly(kind, monkeypatch) -> None:
    model = make("Llama")
    if kind == "bend":
        # Where the logits of this model are, it makes no difference: only the numbers show it.
        changed(model, monkeypatch, lambda z: z.clamp(max=50))
    elif kind == "class":
        model.lm_head = Twisted(model.lm_head)
    elif kind == "unused":
        model.get_output_embeddings = lambda: nn.Linear(32, VOCAB, bias=False)
    elif kind == "trained":
        factor = nn.Parameter(torch.ones(()))
        model.lm_head.register_forward_hook(lambda m, a, out: factor * out)
    elif kind == "positions":
        factors = torch.linspace(1, 2, 9).view(9, 1)
        changed(model, monkeypatch, lambda z: factors * z)
    elif kind == "patched":
        own = model.lm_head.forward
        model.lm_head.forward = lambda hidden: 2 * own(hidden)
    with pytest.raises((RuntimeError, TypeError), match=r"^model: .*use token_stats on"):
        fastrlhf.model_token_stats(model, **batch())
    assert "forward" not in vars(model.lm_head) or kind == "patched"


CHANGES = {
    "scale": lambda z: 1.1 * z,
    "softcap": lambda z: 6 * torch.tanh(z / 6),
    "offset": lambda z: z + torch.linspace(-3, 3, VOCAB),
    "ruled out": lambda z: z.masked_fill(torch.arange(VOCAB) >= 90, -torch.inf),
    "lowest": lambda z: z.masked_fill(torch.arange(VOCAB) >= 90, torch.finfo(z.dtype).min),
    "all": lambda z: 6 * torch.tanh(1.7 * z / 6) + torch.linspace(-3, 3, VOCAB),
}


@pytest.mark.parametrize("where", ["head", "model"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_logits_is_measured(change, late, where, monkeypatch) -> None:
    model = make("Llama")
    if late:
        fastrlhf.model_token_stats(model, **batch())
    if where == "head":
        model.lm_head.register_forward_hook(lambda m, a, out: CHANGES[change](out))
    else:
        changed(model, monkeypatch, CHANGES[change])
    inputs = batch()
    inputs["input_ids"] = inputs["input_ids"] % 90
    wanted = expected(model, inputs)[0]
    found = fastrlhf.model_token_stats(model, **inputs).logprob
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    wanted, found = (torch.autograd.grad(x.sum(), model.lm_head.weight)[0] for x in (wanted, found))
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


def _edited(output, change):
    output.logits = change(output.logits)
    return output


def test_a_layer_between_backbone_and_head() -> None:
    config = transformers.RobertaConfig(**BERT, is_decoder=True, initializer_range=0.5)
    model, inputs = transformers.RobertaForCausalLM(config).eval(), batch()
    with pytest.raises(TypeError, match="a layer stands between the backbone and the head"):
        fastrlhf.lm_head(model)
    hidden, head = fastrlhf.head_inputs(model, inputs["input_ids"], inputs["attention_mask"])
    targets = fastrlhf.shift_targets(inputs["input_ids"], inputs["mask"])
    found = fastrlhf.linear_token_logprobs(hidden, head.weight, targets, **head.options())
    stats = fastrlhf.model_token_stats(model, **inputs)
    for values in (found[:, :-1], stats.logprob):
        torch.testing.assert_close(
            values.double(), expected(model, inputs)[0], rtol=1e-4, atol=1e-4
        )


class Scaled(nn.Linear):
    """A linear layer that somebody gave a class of its own."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class Cast(nn.Module):
    def forward(self, x):
        return x.float()


def test_heads_that_only_cast() -> None:
    for wrap in (lambda h: nn.Sequential(h, Cast()), lambda h: nn.Sequential(Cast(), h)):
        model = make("Llama")
        model.lm_head = wrap(model.lm_head)
        assert_same(model)
    model = make("Llama")
    weight = model.lm_head.weight
    model.lm_head = Scaled(32, VOCAB, bias=False)
    model.lm_head.weight = weight
    assert_same(model)


def test_an_offset_of_scaled_logits() -> None:
    model, inputs = make("Granite"), batch()
    model.register_forward_hook(
        lambda m, a, out: _edited(out, lambda z: z + torch.linspace(-3, 3, VOCAB))
    )
    assert_same(model)
    hidden, head = fastrlhf.head_inputs(model, inputs["input_ids"], inputs["attention_mask"])
    targets = fastrlhf.shift_targets(inputs["input_ids"], inputs["mask"])
    found = fastrlhf.linear_token_logprobs(hidden, head.weight, targets, **head.options())
    torch.testing.assert_close(
        found[:, :-1].double(), expected(model, inputs)[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("parts", ["head", "norm"])
def test_a_head_that_is_sharded_by_itself(parts, tmp_path) -> None:
    torch.multiprocessing.spawn(compare_with_whole_model, (str(tmp_path), parts), nprocs=2)


def test_a_head_of_fewer_columns_than_its_weight_is_refused() -> None:
    """A tensor-parallel head may give a rank its own columns alone, of a weight that is whole."""
    head = make("Llama").lm_head
    own = type(head).forward
    with pytest.raises(RuntimeError, match=r"the forward of its head.*gives other logits than its"):
        check_weight(
            head, lambda x: own(head, x)[..., : VOCAB // 2], head_parts(head), torch.randn(3, 32)
        )
