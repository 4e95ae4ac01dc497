"""Statistics of Hugging Face models' tokens against the models' own logits."""

import copy
import warnings

import pytest
import torch
from support.model_stats import BERT, assert_same, expected
from support.tiny_models import ARCHITECTURES, SMALL, VOCAB, batch, make, with_lora
from support.wrapped_losses import enable_checkpointing
from torch import nn

import fastrlhf

transformers = pytest.importorskip("transformers", reason="needs transformers")
peft = pytest.importorskip("peft", reason="needs peft")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_gives_what_its_logits_give(name) -> None:
    assert_same(make(name))


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
    enable_checkpointing(model)
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
