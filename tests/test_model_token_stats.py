"""Statistics of Hugging Face models' tokens against the models' own logits."""

import copy
import warnings

import pytest
import torch
from support.sharded_head import compare_with_whole_model
from support.tiny_models import ARCHITECTURES, SMALL, VOCAB, batch, make, with_lora
from torch import nn

import fastrlhf

transformers = pytest.importorskip("transformers", reason="needs transformers")
peft = pytest.importorskip("peft", reason="needs peft")


def expected(model: nn.Module, inputs: dict[str, torch.Tensor], temperature: float = 1.0):
    """Log-prob and entropy from the model's own logits, in fp64."""
    ids, mask = inputs["input_ids"], inputs["mask"]
    logits = model(ids, attention_mask=inputs["attention_mask"], use_cache=False).logits
    log_p = (logits[:, :-1].double() / temperature).log_softmax(-1)
    logprob = log_p.gather(-1, ids[:, 1:, None])[..., 0]
    return logprob * mask[:, 1:], -(log_p.exp() * log_p).sum(-1) * mask[:, 1:]


def assert_same(model: nn.Module, tolerance: float = 1e-4, **options) -> None:
    """Compare values, and the gradients of all parameters."""
    inputs = batch()
    stats = fastrlhf.model_token_stats(model, **inputs, entropy=True, temperature=0.7, **options)
    logprob, entropy = expected(model, inputs, 0.7)
    assert stats.logprob.shape == (3, 8)
    bounds = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(stats.logprob.double(), logprob, **bounds)
    torch.testing.assert_close(stats.entropy.double(), entropy, **bounds)
    assert logprob.std() > 0.1
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    weights = torch.randn(3, 8)
    found, wanted = (
        torch.autograd.grad(
            ((a + 0.5 * b) * weights).sum(), list(trained.values()), allow_unused=True
        )
        for a, b in ((stats.logprob, stats.entropy), (logprob, entropy))
    )
    scale = max(float(g.norm()) for g in wanted if g is not None)
    for name, a, b in zip(trained, found, wanted, strict=True):
        if b is None or a is None:
            assert a is b is None, name
        else:
            # Of its own size, so that a gradient that is missing fails; rounding has a floor.
            bound = 10 * tolerance * max(float(b.norm()), 1e-3 * scale)
            assert float((a - b).norm()) <= bound, name
            assert float(b.norm()) > bound or float(b.norm()) < 1e-5 * scale, name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_gives_what_its_logits_give(name) -> None:
    assert_same(make(name))


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


@pytest.mark.parametrize("entropy_grad", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Cohere", "a frozen head", "DoRA"])
def test_further_statistics_are_those_of_the_logits(kind, entropy_grad) -> None:
    model = {
        "a frozen head": lambda: with_lora(make("Llama"), "q_proj"),
        "DoRA": lambda: with_lora(make("Llama"), "q_proj", "lm_head", use_dora=True),
    }.get(kind, lambda: make(kind))()
    inputs, names = batch(), fastrlhf.reference.FURTHER_STATS
    asked = {"entropy": True, "temperature": 0.7}
    stats = fastrlhf.model_token_stats(
        model, **inputs, entropy_grad=entropy_grad, with_stats=iter(names), chunk_size=4, **asked
    )
    ids, mask = inputs["input_ids"], inputs["mask"]
    logits = model(ids, attention_mask=inputs["attention_mask"], use_cache=False).logits[:, :-1]
    targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    wanted = fastrlhf.token_stats(logits, targets, with_stats=names, **asked)
    for name, value in stats._asdict().items():
        torch.testing.assert_close(value, getattr(wanted, name), rtol=1e-4, atol=1e-4, msg=name)
        has_gradient = name == "logprob" or (name == "entropy" and entropy_grad)
        assert value.requires_grad == has_gradient, name
    trained = [p for p in model.parameters() if p.requires_grad]
    found, expected = (
        torch.autograd.grad(x.logprob.sum(), trained, allow_unused=True) for x in (stats, wanted)
    )
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    alone = fastrlhf.model_token_stats(model, **inputs, with_stats=("is_top1",), temperature=0.7)
    assert torch.equal(alone.is_top1, stats.is_top1) and alone.entropy is alone.mean_logit is None


def test_what_is_not_known_of_a_model_is_refused_before_it_runs(monkeypatch) -> None:
    model, inputs = make("Llama"), batch()
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ValueError, match=r"^with_stats: .*'is_top1'.*got 'top1'"):
        fastrlhf.model_token_stats(model, **inputs, with_stats=("top1",))
    with pytest.raises(TypeError, match=r"^with_stats: .*got 'is_top1'"):
        fastrlhf.model_token_stats(model, **inputs, with_stats="is_top1")
    with pytest.raises(TypeError, match=r"^entropy_grad: .*bool"):
        fastrlhf.model_token_stats(model, **inputs, entropy_grad=None)


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


@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "prefix"])
def test_virtual_tokens_are_not_scored(kind) -> None:
    configs = {
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "p-tuning": lambda: peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
        ),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs = peft.get_peft_model(make("Llama"), configs[kind]()).eval(), batch()
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        stats = fastrlhf.model_token_stats(model, **inputs)
        hidden, head = fastrlhf.head_inputs(model, inputs["input_ids"], inputs["attention_mask"])
    logp = logits[:, -9:-1].double().log_softmax(-1)
    want = logp.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0] * inputs["mask"][:, 1:]
    targets = fastrlhf.shift_targets(inputs["input_ids"], inputs["mask"])
    found = fastrlhf.linear_token_logprobs(hidden, head.weight, targets, **head.options())
    for values in (stats.logprob, found[:, :-1]):
        torch.testing.assert_close(values.double(), want, rtol=1e-4, atol=1e-4)


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


def test_default_mask_scores_what_follows_a_real_token() -> None:
    model, inputs = make("Llama"), batch()
    inputs["attention_mask"][0, :3] = 0
    with torch.no_grad():
        stats = fastrlhf.model_token_stats(model, inputs["input_ids"], inputs["attention_mask"])
        every = fastrlhf.model_token_stats(model, inputs["input_ids"])
    scored = stats.logprob != 0
    assert scored[0].tolist() == [False] * 3 + [True] * 5
    assert scored[1].tolist() == [True] * 6 + [False] * 2
    assert (every.logprob != 0).all()


def test_the_logits_are_never_built() -> None:
    model, inputs = make("Llama", vocab_size=5000), batch()
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
    fastrlhf.model_token_stats(model, **inputs)
    fastrlhf.model_token_stats(model, **inputs)
    hook.remove()
    # Three rows of numbers that tell what becomes of logits.
    assert shapes == [(1, 3, 5000)] * 2


def test_the_backbone_runs_once_and_its_hooks_fire() -> None:
    model = make("Llama")
    calls = []
    for module in (model, model.model, model.lm_head):
        module.register_forward_hook(lambda m, *_: calls.append(type(m).__name__))
    fastrlhf.model_token_stats(model, **batch())
    assert calls == ["LlamaModel", "Linear", "LlamaForCausalLM"]
    assert "forward" not in vars(model.lm_head)


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


def test_bad_inputs_are_named() -> None:
    model, inputs = make("Llama"), batch()
    ids = inputs["input_ids"]
    with pytest.raises(ValueError, match=r"^labels: "):
        fastrlhf.model_token_stats(model, ids, labels=ids)
    with pytest.raises(ValueError, match=r"^mask: "):
        fastrlhf.model_token_stats(model, ids, mask=torch.ones(3, 8))
    with pytest.raises(ValueError, match=r"^input_ids: .*leaves out positions"):
        fastrlhf.model_token_stats(model, ids, logits_to_keep=2)
    with pytest.raises(TypeError, match=r"^model: expected a causal language model"):
        fastrlhf.model_token_stats(nn.Linear(2, 2), ids)
    assert "forward" not in vars(model.lm_head)


def test_bf16_and_autocast() -> None:
    model, inputs = make("Llama"), batch()
    exact = expected(model, inputs)[0].detach()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            autocast = fastrlhf.model_token_stats(model, **inputs).logprob
        low = fastrlhf.model_token_stats(copy.deepcopy(model).bfloat16(), **inputs).logprob
    for found in (autocast, low):
        assert found.dtype == torch.float32
        assert 1e-5 < float((found - exact).norm() / exact.norm()) < 2e-2


def test_temperature_for_each_token_and_gradient_checkpointing() -> None:
    model, inputs = make("Llama"), batch()
    temperature = torch.full((3, 8), 0.5)
    stats = fastrlhf.model_token_stats(model, **inputs, temperature=temperature)
    torch.testing.assert_close(
        stats.logprob.double(), expected(model, inputs, 0.5)[0], rtol=1e-4, atol=1e-4
    )
    stats.logprob.sum().backward()
    before = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    model.train()
    model.activation_checkpointing_enable()
    fastrlhf.model_token_stats(model, **inputs, temperature=0.5).logprob.sum().backward()
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, before)


def test_temperatures_belong_to_the_tokens_that_they_are_given_for() -> None:
    model, inputs = make("Llama"), batch()
    temperature = torch.linspace(0.3, 3.0, 24).view(3, 8)
    stats = fastrlhf.model_token_stats(model, **inputs, temperature=temperature)
    torch.testing.assert_close(
        stats.logprob.double(), expected(model, inputs, temperature[..., None])[0],
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def logprob_gradients(model: nn.Module, wrapped: nn.Module) -> list[torch.Tensor]:
    """Gradients of all parameters, accumulated over two passes of a wrapped model."""
    for _ in range(2):
        fastrlhf.model_token_stats(wrapped, **batch()).logprob.sum().backward()
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in
            model.parameters()]  # fmt: skip


@pytest.mark.parametrize("name", ["Llama", "Llama, tied"])
@pytest.mark.parametrize("wrapper", ["ddp", "ddp, unused", "fsdp2", "compile"])
@pytest.mark.filterwarnings("ignore")  # of the wrappers themselves
def test_wrapped_models(name, wrapper, process_group) -> None:
    plain, model = make(name), make(name)
    wanted = logprob_gradients(plain, plain)
    if wrapper == "fsdp2":
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
        wrapped = torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        with pytest.raises(RuntimeError, match=r"^model: the weight of its head is sharded"):
            fastrlhf.lm_head(wrapped)
    elif wrapper == "compile":
        wrapped = torch.compile(model, backend="eager")
        wrapped(batch()["input_ids"])  # compiled with its own head first
    else:
        wrapped = nn.parallel.DistributedDataParallel(
            model, find_unused_parameters="unused" in wrapper
        )
    for found, want in zip(logprob_gradients(model, wrapped), wanted, strict=True):
        torch.testing.assert_close(found, want)


def test_the_states_that_enter_a_head_and_the_head() -> None:
    inputs = batch()
    targets = fastrlhf.shift_targets(inputs["input_ids"], inputs["mask"])
    for name in ("Gemma2", "Cohere", "Granite", "Phi"):
        model = make(name)
        hidden, head = fastrlhf.head_inputs(model, inputs["input_ids"], inputs["attention_mask"])
        found = fastrlhf.linear_token_logprobs(hidden, head.weight, targets, **head.options())
        torch.testing.assert_close(
            found[:, :-1].double(), expected(model, inputs)[0], rtol=1e-4, atol=1e-4
        )
        assert hidden.requires_grad
    assert fastrlhf.lm_head(make("Gemma2")).softcap == 0.5
    assert fastrlhf.lm_head(make("Cohere")).scale == 3.0


BERT = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


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


def test_models_that_predict_no_next_token_are_refused_by_name() -> None:
    inputs = batch()
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**BERT)).eval()
    undecided = transformers.BertLMHeadModel(transformers.BertConfig(**BERT)).eval()
    for model in (bert, undecided):
        with pytest.raises(TypeError, match=r"^model: Bert\w+ is an encoder"):
            fastrlhf.model_token_stats(model, **inputs)
    small = {"vocab_size": VOCAB, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1}
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**small, num_heads=4, decoder_start_token_id=0)
    )
    with pytest.raises(TypeError, match=r"^model: T5\w+ is an encoder-decoder"):
        fastrlhf.model_token_stats(t5, **inputs, decoder_input_ids=inputs["input_ids"])
    with torch.device("meta"):
        meta = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    with pytest.raises(TypeError, match=r"^model: .*meta device"):
        fastrlhf.model_token_stats(meta, **inputs)
    with pytest.raises(TypeError, match=r"^model: .*meta device"):
        fastrlhf.lm_head(meta)


def hidden_signature(model: nn.Module) -> nn.Module:
    """The model with a forward of which nothing can be told."""

    class Hidden(type(model)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model.__class__ = Hidden
    return model


def test_keywords_that_the_forward_does_not_name_are_refused() -> None:
    model, inputs = make("Llama"), batch()
    mask = inputs.pop("mask")
    with pytest.raises(TypeError, match=r"^completion_mask: .*`mask`"):
        fastrlhf.model_token_stats(model, **inputs, completion_mask=mask)
    with pytest.raises(TypeError, match=r"^postion_ids: "):
        fastrlhf.model_token_stats(model, **inputs, postion_ids=None)
    assert_same(hidden_signature(make("Llama")))
    with pytest.raises(TypeError, match=r"^completion_mask: "):
        fastrlhf.model_token_stats(hidden_signature(model), **inputs, completion_mask=mask)
    with pytest.raises(ValueError, match=r"^attention_mask: .*-inf"):
        fastrlhf.model_token_stats(
            model, inputs["input_ids"], torch.zeros(3, 9).masked_fill(~mask, -torch.inf)
        )


@pytest.mark.parametrize("name", ["GPT2", "Llama", "OPT", "Bloom"])
def test_a_sequence_has_the_same_log_probs_however_it_is_padded(name) -> None:
    model = make(name)
    if name == "GPT2":
        nn.init.normal_(model.transformer.wpe.weight)
    ids = torch.randint(1, VOCAB, (1, 6))
    wanted = fastrlhf.model_token_stats(model, ids).logprob
    padding = torch.zeros(1, 3, dtype=torch.long)
    for order, columns in (((padding, ids), slice(3, None)), ((ids, padding), slice(0, 5))):
        attention = torch.cat([(x is ids) * torch.ones_like(x) for x in order], dim=1)
        found = fastrlhf.model_token_stats(model, torch.cat(order, dim=1), attention).logprob
        torch.testing.assert_close(found[:, columns], wanted, rtol=1e-4, atol=1e-4)


def test_positions_that_start_again_start_a_document() -> None:
    model, ids = make("Llama"), batch()["input_ids"][:1]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    scored = fastrlhf.model_token_stats(model, ids, position_ids=positions).logprob != 0
    assert scored.tolist() == [[True, True, True, False, True, True, False, True]]


def test_the_outputs_of_a_model_come_without_its_logits() -> None:
    model, inputs = make("Mixtral"), batch()
    stats, outputs = fastrlhf.model_token_stats(
        model, **inputs, return_outputs=True, output_router_logits=True, output_hidden_states=True
    )
    assert outputs.logits is None
    assert outputs.hidden_states[-1].shape == (3, 9, 32)
    want = model(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], output_router_logits=True
    ).aux_loss
    torch.testing.assert_close(outputs.aux_loss, want)
    torch.testing.assert_close(
        stats.logprob.double(), expected(model, inputs)[0], rtol=1e-4, atol=1e-4
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
