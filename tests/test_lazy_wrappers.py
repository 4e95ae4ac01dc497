"""Lazy logits of models that something wraps, patches, compiles or calls in ways of its own."""

import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import lazy_wrappers
from support.lazy_wrappers import (
    GOES,
    LOOPS,
    Batch,
    Wrapped,
    differences,
    lazy,
    make_batch,
    off,
    run,
    small_model,
    warnings_of_builds,
)
from support.rank_pool import RankPool
from support.tiny_models import make, with_lora
from support.wrapped_losses import checkpointed
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs transformers")
peft = pytest.importorskip("peft", reason="needs peft")
accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

BF16 = torch.finfo(torch.bfloat16).eps


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as two:
        yield two


@pytest.mark.xdist_group("lazy wrappers")
@pytest.mark.parametrize("name", lazy_wrappers.CASES)
def test_two_processes(name, pool) -> None:
    troubles = [text for found in pool.run(lazy_wrappers.compare, name, ranks=2) for text in found]
    assert not troubles, "\n".join(troubles)


def with_adapters(config: Any, model: nn.Module | None = None) -> nn.Module:
    """A model with an adapter of peft, which does something from the start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of renamed properties
        model = peft.get_peft_model(model or small_model(), config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "ia3" in name):
            nn.init.normal_(parameter, std=0.3)
    return model.train()


def lora(*targets: str, **options: Any) -> nn.Module:
    return with_adapters(peft.LoraConfig(r=4, target_modules=list(targets), **options))


def two_adapters() -> nn.Module:
    model = lora("q_proj", "lm_head")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    nn.init.normal_(model.base_model.model.lm_head.lora_B["other"].weight, std=0.3)
    model.base_model.set_adapter(["default", "other"])
    return model


def merged() -> nn.Module:
    """An adapter of the head that is merged into it, beside one that is trained."""
    model = lora("q_proj", "lm_head")
    model.base_model.model.lm_head.merge()
    model.base_model.model.lm_head.requires_grad_(False)
    return model


def switched_off() -> nn.Module:
    model = lora("lm_head")
    model.base_model.disable_adapter_layers()
    return model.requires_grad_(True)


ADAPTED = {
    "lora": lambda: lora("q_proj", "v_proj"),
    "lora on the head": lambda: lora("q_proj", "lm_head"),
    "two adapters": two_adapters,
    "merged": merged,
    "saved head": lambda: lora("q_proj", modules_to_save=["lm_head"]),
    "dora": lambda: lora("q_proj", "lm_head", use_dora=True),
    "ia3": lambda: with_adapters(
        peft.IA3Config(target_modules=["lm_head", "k_proj"], feedforward_modules=[])
    ),
    "prompts": lambda: with_adapters(
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_of_peft(kind) -> None:
    loops = LOOPS if kind != "prompts" else {"labels": LOOPS["labels"]}
    assert not differences(ADAPTED[kind], loops)


def test_a_head_whose_adapters_are_switched_off() -> None:
    def values(model: nn.Module) -> list[Tensor]:
        return [loss(model, teacher, make_batch(0)).detach() for loss in LOOPS.values()]

    model, teacher = switched_off(), small_model("teacher")
    plain = values(model)
    with lazy(model, teacher):
        torch.testing.assert_close(values(model), plain)


def against_itself(model: nn.Module, teacher: nn.Module, x: Batch) -> Tensor:
    """The KL to the model without its adapters, asked for when they are back."""
    with torch.no_grad(), model.disable_adapter():
        reference = model(input_ids=x.ids, attention_mask=x.attention).logits
    log_p = model(input_ids=x.ids, attention_mask=x.attention).logits.log_softmax(-1)
    return (log_p.exp() * (log_p - reference.log_softmax(-1))).sum(-1).mean()


def built_against_itself(model: nn.Module, teacher: nn.Module, x: Batch) -> Tensor:
    """The same with what is not fused."""
    with torch.no_grad(), model.disable_adapter():
        reference = model(input_ids=x.ids, attention_mask=x.attention).logits
    return (model(input_ids=x.ids, attention_mask=x.attention).logits - reference).square().mean()


@pytest.mark.parametrize("kind", ["lora", "lora on the head", "two adapters", "dora", "saved head"])
def test_logits_are_those_of_the_adapters_that_were_active(kind) -> None:
    assert not differences(ADAPTED[kind], {"kl": against_itself})
    assert len(differences(ADAPTED[kind], {"built": built_against_itself})) == 1  # and told


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", ["lora", "rank-stabilized"])
def test_the_dropout_of_an_adapter_of_the_head_is_drawn_once(kind, loop) -> None:
    model = lora("lm_head", lora_dropout=0.4, use_rslora=kind == "rank-stabilized")
    model.base_model.model.model.requires_grad_(True)
    wrapped, teacher, x = Wrapped(model), small_model("teacher"), make_batch(0)
    value, gradients = run(wrapped, LOOPS[loop], teacher, x)
    with lazy(model, teacher):
        found = off(run(wrapped, LOOPS[loop], teacher, x), value, gradients)
    assert max(found.values()) < 64 * torch.finfo(torch.float32).eps, found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["plain", "tied", "lora head"])
def test_gradient_checkpointing(kind, reentrant) -> None:
    assert not differences(lambda: checkpointed(small_model(kind), reentrant))


def in_bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("kind", ["plain", "tied", "scaled", "lora head", "dora head"])
def test_autocast(kind) -> None:
    assert not differences(partial(small_model, kind), around=in_bf16, eps=BF16)


@pytest.mark.parametrize("kind", ["plain", "lora head"])
def test_models_in_bf16(kind) -> None:
    assert not differences(partial(small_model, kind, torch.bfloat16), eps=BF16)


IDS = make_batch(0).ids
ENDINGS = {
    "log-softmax": lambda z: z.log_softmax(-1).gather(-1, IDS[..., None]),
    "softmax": lambda z: z.softmax(-1).gather(-1, IDS[..., None]),
    "gather": lambda z: z.gather(-1, IDS[..., None]),
    "log-sum-exp": lambda z: z.logsumexp(-1),
    "cross-entropy": lambda z: F.cross_entropy(z.flatten(0, 1), IDS.flatten()),
    "cross-entropies": lambda z: F.cross_entropy(z.mT, IDS, reduction="none"),
    "entropy": lambda z: (z.softmax(-1) * z.log_softmax(-1)).sum(-1),
    "scaled": lambda z: (z / 0.7).log_softmax(-1).gather(-1, IDS[..., None]),
    "exp": lambda z: z.log_softmax(-1).exp().gather(-1, IDS[..., None]),
    "maximum": lambda z: z.max(-1).values,
    "argmax": lambda z: z.argmax(-1),
    "top": lambda z: z.topk(3).values,
    "float": lambda z: z.float().log_softmax(-1).gather(-1, IDS[..., None]),
    "mean": lambda z: z.mean(-1),
    "sum": lambda z: z.sum(-1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ending", ENDINGS)
def test_dtypes_are_those_of_plain_logits(ending, dtype) -> None:
    model = small_model(dtype=dtype)
    for inside, outside in ((in_bf16, nullcontext), (nullcontext, in_bf16), (in_bf16, in_bf16)):
        found = []
        for each in (nullcontext(), lazy(model)):
            with each:
                with inside():
                    logits = model(input_ids=IDS).logits
                with outside():
                    result = ENDINGS[ending](logits)
                found.append((logits.dtype, result.dtype, result.shape, result.requires_grad))
        assert found[0] == found[1]


def on_hooks(model: nn.Module) -> nn.Module:
    """Spread over devices, of which a CPU has but one."""
    devices = {"model": "cpu", "lm_head": "cpu"}
    return accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)


def with_a_hook(model: nn.Module) -> nn.Module:
    return accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())


def with_a_hook_on_the_head(model: nn.Module) -> nn.Module:
    accelerate.hooks.add_hook_to_module(model.lm_head, accelerate.hooks.ModelHook())
    return model


def head_off_device(model: nn.Module) -> nn.Module:
    accelerate.cpu_offload(model.lm_head, torch.device("cpu"))
    return model


def all_off_device(model: nn.Module) -> nn.Module:
    return accelerate.cpu_offload(model, torch.device("cpu"))


def head_on_disk(model: nn.Module, folder: str) -> nn.Module:
    accelerate.disk_offload(model.lm_head, folder, torch.device("cpu"))
    return model


OFFLOADED = {"head": head_off_device, "all": all_off_device, "disk": head_on_disk}


@pytest.mark.parametrize("wrap", [on_hooks, with_a_hook, with_a_hook_on_the_head])
def test_models_with_hooks_of_accelerate(wrap) -> None:
    assert not differences(lambda: wrap(small_model()))


@pytest.mark.parametrize("way", OFFLOADED)
def test_an_offloaded_head_makes_logits(way, tmp_path) -> None:
    model = OFFLOADED[way](small_model(), *([str(tmp_path)] if way == "disk" else []))
    teacher, x = small_model("teacher"), make_batch(0)
    with warnings_of_builds() as said:
        for loss in LOOPS.values():
            plain = loss(model, teacher, x)
            with lazy(model):
                found = loss(model, teacher, x)
            torch.testing.assert_close(found, plain, rtol=0, atol=0)
    assert len(said) == len(LOOPS)  # once for each time that they were enabled
    assert all(GOES in text for text in said)


def quantized(bits: int, adapted: bool) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = make("Llama", hidden_size=64, head_dim=16, vocab_size=128)
    weight = model.lm_head.weight.data
    if bits == 4:
        head = bnb.nn.Linear4bit(64, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        head.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        head = bnb.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=False)
        head.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    model.lm_head = head.to("cpu")
    return with_lora(model, "lm_head") if adapted else model


@pytest.mark.filterwarnings("ignore")  # of what bitsandbytes casts
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_head(bits, adapted) -> None:
    model, x = quantized(bits, adapted), make_batch(0)
    model.get_input_embeddings().weight.requires_grad_()
    loops = {name: LOOPS[name] for name in ("labels", "linear", "policy")}
    for loss in loops.values():
        plain = run(Wrapped(model), loss, model, x)
        with warnings_of_builds() as said, lazy(model):
            found = off(run(Wrapped(model), loss, model, x), *plain)
        assert not said
        # The module of an 8-bit head rounds its hidden states too.
        assert max(found.values()) < (1e-4 if bits == 4 else 2e-2), found
