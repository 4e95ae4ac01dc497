"""TRL's trainers under the patch, against TRL's trainers themselves: all that they log, and the
weights that come of training.
"""

import tempfile
from functools import cache, partial
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, make
from support.trl_trainers import (
    DEPRECATIONS,
    KINDS,
    ROUNDING,
    Record,
    assert_same,
    differences,
    distillation_trainer,
    head_cost,
    in_another_order,
    plain_heads,
    train,
    transformers,
    utils,
)

from fastrlhf.integrations import trl as patching
from fastrlhf.ops import linear_rows

pytestmark = DEPRECATIONS

ALL_LINEAR = {"target_modules": ["q_proj", "v_proj", "up_proj"]}
HEAD = {"target_modules": ["q_proj", "lm_head"]}
SAVED_HEAD = {**ALL_LINEAR, "modules_to_save": ["lm_head"]}
# A cap that bends logits, but leaves the largest one the largest.
CAPPED = {"model": "Gemma2", "changes": {"final_logit_softcapping": 3.0}}
MOE = {"model": "Mixtral", "changes": {"router_aux_loss_coef": 0.5}}


def counting_words(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss of one's own, from logits."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return 0.5 * total / num_items_in_batch


CASES: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft"},
    "sft, lora": {"kind": "sft", "lora": ALL_LINEAR},
    "sft, adamw": {"kind": "sft", "optim": "adamw_torch", "learning_rate": 1e-3},
    "sft, dft": {"kind": "sft", "loss_type": "dft"},
    "sft, of all tokens": {"kind": "sft", "data": "text"},
    "sft, of the prompt too": {"kind": "sft", "completion_only_loss": False},
    "sft, of the assistant": {"kind": "sft", "data": "chat", "assistant_only_loss": True},
    "sft, padding-free": {"kind": "sft", "padding_free": True, "max_length": None},
    "sft, packed": {"kind": "sft", "data": "text", "packing": True, "max_length": 24},
    "sft, accumulated": {"kind": "sft", "gradient_accumulation_steps": 2},
    "sft, evaluated": {"kind": "sft", "evaluate": True},
    "sft, smoothed": {"kind": "sft", "label_smoothing_factor": 0.1},
    "sft, own loss": {"kind": "sft", "arguments": {"compute_loss_func": counting_words}},
    "sft, checkpointed": {"kind": "sft", "gradient_checkpointing": True},
    "sft, checkpointed, lora": {"kind": "sft", "gradient_checkpointing": True, "lora": ALL_LINEAR},
    "sft, saved head": {"kind": "sft", "lora": SAVED_HEAD},
    "sft, tied": {"kind": "sft", "model": "Llama, tied"},
    "sft, cap": {"kind": "sft", **CAPPED},
    "sft, scale": {"kind": "sft", "model": "Cohere"},
    "sft, division": {"kind": "sft", "model": "Granite", "learning_rate": 3e-3},
    "sft, bias": {"kind": "sft", "model": "Phi"},
    "sft, experts": {"kind": "sft", **MOE},
    "sft, experts, accumulated": {"kind": "sft", **MOE, "gradient_accumulation_steps": 2},
    "sft, bf16": {"kind": "sft", "bf16": True},
    "sft, bf16, lora": {"kind": "sft", "bf16": True, "lora": ALL_LINEAR},
    "dpo": {"kind": "dpo"},
    "dpo, bf16": {"kind": "dpo", "bf16": True},
    # One step: after it the weights differ by bf16's rounding, and so may the words that are drawn.
    "grpo, bf16": {"kind": "grpo", "bf16": True, "max_steps": 1},
    "grpo, bf16, head in fp32": {
        "kind": "grpo", "bf16": True, "cast_lm_head_to_fp32": True, "max_steps": 1,
    },
    "distillation, bf16": {"kind": "distillation", "bf16": True, "beta": 0.5, "max_steps": 1},
    "dpo, lora": {"kind": "dpo", "lora": ALL_LINEAR},
    "dpo, saved head": {"kind": "dpo", "lora": SAVED_HEAD},
    "dpo, ipo": {"kind": "dpo", "loss_type": "ipo", "learning_rate": 3e-3},
    "dpo, hinge": {"kind": "dpo", "loss_type": "hinge"},
    "dpo, mpo": {
        "kind": "dpo", "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0],
    },
    "dpo, wpo": {"kind": "dpo", "use_weighting": True, "learning_rate": 1.0},
    "dpo, wpo, lora, cap": {
        "kind": "dpo", "use_weighting": True, "lora": ALL_LINEAR, **CAPPED,
    },
    "dpo, desensitised to length": {"kind": "dpo", "ld_alpha": 0.5},
    "dpo, known reference": {"kind": "dpo", "precompute_ref_log_probs": True},
    "dpo, known reference, lora": {
        "kind": "dpo", "precompute_ref_log_probs": True, "lora": ALL_LINEAR,
    },
    "dpo, forward kl": {"kind": "dpo", "f_divergence_type": "forward_kl", "learning_rate": 3e-4},
    "dpo, alpha divergence": {
        "kind": "dpo", "f_divergence_type": "alpha_divergence", "learning_rate": 1e-3,
    },
    "dpo, aot": {"kind": "dpo", "loss_type": "aot"},
    "dpo, evaluated": {"kind": "dpo", "evaluate": True},
    "dpo, accumulated": {"kind": "dpo", "gradient_accumulation_steps": 2},
    "dpo, checkpointed, lora": {"kind": "dpo", "gradient_checkpointing": True, "lora": ALL_LINEAR},
    "dpo, tied": {"kind": "dpo", "model": "Llama, tied"},
    "dpo, scale": {"kind": "dpo", "model": "Cohere"},
    "dpo, experts": {"kind": "dpo", **MOE},
    "kto": {"kind": "kto"},
    "kto, lora": {"kind": "kto", "lora": ALL_LINEAR},
    "kto, apo": {"kind": "kto", "loss_type": "apo_zero_unpaired"},
    "kto, evaluated": {"kind": "kto", "evaluate": True},
    "grpo": {"kind": "grpo"},
    "grpo, lora": {"kind": "grpo", "lora": ALL_LINEAR, "beta": 0.04},
    "grpo, penalty": {"kind": "grpo", "beta": 0.04},
    "grpo, top entropies": {"kind": "grpo", "top_entropy_quantile": 0.5},
    "grpo, entropy bonus": {"kind": "grpo", "entropy_coef": 0.01},
    "grpo, entropy bonus, lora": {"kind": "grpo", "entropy_coef": 0.01, "lora": ALL_LINEAR},
    "grpo, twice": {"kind": "grpo", "num_iterations": 2},
    "grpo, bnpo": {"kind": "grpo", "loss_type": "bnpo"},
    "grpo, dr_grpo": {"kind": "grpo", "loss_type": "dr_grpo"},
    "grpo, dapo": {"kind": "grpo", "loss_type": "dapo"},
    "grpo, cispo": {"kind": "grpo", "loss_type": "cispo", "epsilon_high": 5.0},
    "grpo, by sequence": {
        "kind": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2,
    },
    "grpo, cool": {"kind": "grpo", "temperature": 0.7},
    "grpo, evaluated": {"kind": "grpo", "evaluate": True, "num_generations_eval": 4},
    "grpo, accumulated, experts": {"kind": "grpo", "gradient_accumulation_steps": 2, **MOE},
    "grpo, cap": {"kind": "grpo", **CAPPED, "temperature": 0.7, "entropy_coef": 0.01},
    "grpo, head in fp32": {"kind": "grpo", "cast_lm_head_to_fp32": True},
    "rloo": {"kind": "rloo"},
    "rloo, lora, cool": {"kind": "rloo", "lora": ALL_LINEAR, "temperature": 0.7},
    "rloo, no penalty": {"kind": "rloo", "beta": 0.0, "num_iterations": 2},
    "distillation": {"kind": "distillation"},
    "distillation, forward": {"kind": "distillation", "beta": 0.0},
    "distillation, middle": {"kind": "distillation", "beta": 0.5},
    "distillation, reverse": {"kind": "distillation", "beta": 1.0},
    "distillation, warm": {"kind": "distillation", "temperature": 2.0},
    "distillation, lora": {"kind": "distillation", "lora": ALL_LINEAR, "beta": 0.5},
    "distillation, cap": {"kind": "distillation", **CAPPED, "beta": 0.5},
    "distillation, scale": {
        "kind": "distillation", "model": "Cohere", "changes": {"logit_scale": 0.5},
    },
    "distillation, evaluated": {"kind": "distillation", "evaluate": True},
    "distillation, accumulated": {"kind": "distillation", "gradient_accumulation_steps": 2},
}  # fmt: skip


# As ROUNDING, of metrics and of weights: see test_tolerances_are_of_the_size_of_rounding.
# In bf16, TRL differs by at most 4e-3 and 2e-2 from fp64 statistics of logits made in bf16.
ROUNDING_OF_BF16 = 1e-2, 4e-2
# Exponentials of sums of log-probs of about -40, each known to 4e-6; TRL: 8e-6, 2e-5.
ROUNDING_OF_EXPONENTIALS = 3e-5, 1e-4
# AdamW divides by the size of gradients, and what is left of small ones is rounding: 2e-6, 3e-4.
ROUNDING_OF_ADAMW = 1e-5, 1e-3


def tolerance(name: str) -> tuple[float, float]:
    if "bf16" in name:
        return ROUNDING_OF_BF16
    if "forward kl" in name:
        return ROUNDING_OF_EXPONENTIALS
    return ROUNDING_OF_ADAMW if "adamw" in name else ROUNDING


@cache
def by_trl(name: str) -> Record:
    return train(**CASES[name])


@cache
def by_the_patch(name: str) -> Record:
    with patching.patched():
        return train(**CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_the_patch_changes_no_result(name) -> None:
    wanted, found = by_trl(name), by_the_patch(name)
    assert wanted.calls.by_trl == wanted.calls.asked > 0
    assert (found.calls.by_trl, found.calls.asked) == (0, wanted.calls.asked)

    assert_same(found, wanted, tolerance(name), partial(in_another_order, **CASES[name]))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
def test_tolerances_are_of_the_size_of_rounding(name) -> None:
    """TRL is as far from itself in another order of sums, and from the logits, as is allowed."""
    assert_same(in_another_order(**CASES[name]), by_trl(name), tolerance(name))
    with plain_heads():
        assert_same(train(**CASES[name]), by_trl(name), tolerance(name))


def test_rounding_is_seen() -> None:
    """Another order of sums is not without effect, or it would tell nothing of rounding."""
    again = in_another_order(**CASES["sft, experts, accumulated"])
    assert differences(again, by_trl("sft, experts, accumulated"))[1] > ROUNDING[1] / 100


REFUSED = "Applying a PEFT adapter to `lm_head` is not supported"


def trained_as_logits_say(**options: Any) -> Record:
    """Train under the patch, and compare with the statistics of the model's own logits in fp64, and
    these with themselves in fp32.
    """

    def in_fp32() -> Record:
        with plain_heads(torch.float32):
            return train(**options)

    with plain_heads():
        wanted = train(**options)
    with patching.patched():
        found = train(**options)
    assert found.calls.by_trl == 0 < found.calls.asked
    assert_same(found, wanted, ROUNDING, in_fp32)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_the_head_is_trained(kind) -> None:
    """TRL refuses it, so that the plain logits of the model, adapter and all, are what is right."""
    options = {"kind": kind, "lora": HEAD, **({} if kind == "sft" else {"beta": 0.05})}
    with pytest.raises(ValueError, match=REFUSED):
        train(**options)
    found = trained_as_logits_say(**options)
    of_head = [name for name in found.weights if "lm_head" in name]
    assert len(of_head) == 2
    for name in of_head:
        assert not torch.equal(found.weights[name], found.start[name])


# Widths of whole blocks of codes; and what dequantizes shorter rows on a CPU is wrong.
OF_64 = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}


def quantized_to_4_bits() -> torch.nn.Module:
    """A tiny model whose linear layers, the head too, are of 4 bits."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    with tempfile.TemporaryDirectory() as folder:
        make("Llama", **OF_64).save_pretrained(folder)
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, llm_int8_skip_modules=[], bnb_4bit_compute_dtype=torch.float32
        )
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32
        )


@pytest.mark.parametrize("targets", [ALL_LINEAR, HEAD], ids=["body", "head"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "grpo", "rloo"])
def test_a_quantized_head_is_what_its_codes_stand_for(kind, targets) -> None:
    trained_as_logits_say(kind=kind, model=quantized_to_4_bits, lora=targets)


# Matmuls of the tokens with the head in a step of training: with the head trained, with adapters of
# other layers, and with one of the head, whose own factors of rank 4 and width 32 count as eighths.
# All tokens are one block, whose logits a trained head keeps for backward.
MATMULS = {
    "sft": (3, 2, 2.375),
    "dpo": (4, 3, 3.375),
    "kto": (6, 5, 5.5),
    "grpo": (3, 2, 2.375),
    "rloo": (5, 4, 4.5),
    "distillation": (4.5, 3.5, 3.875),  # of which the teacher, half as wide again, has 1.5
}


@pytest.mark.parametrize("trained", ["full", "lora", "lora on the head"])
@pytest.mark.parametrize("kind", MATMULS)
def test_cost_of_a_head(kind, trained) -> None:
    known = ["full", "lora", "lora on the head"].index(trained)
    with patching.patched():
        cost = head_cost(kind, lora=(None, ALL_LINEAR, HEAD)[known])
    print(f"{kind}, {trained}: {cost.matmuls:.3f} matmuls")
    assert cost.matmuls == MATMULS[kind][known]


@pytest.mark.parametrize(
    ("kind", "options", "matmuls"),
    [
        ("sft", {}, 3),
        ("sft", {"loss_type": "dft"}, 3),
        ("grpo", {}, 3),
        ("grpo", {"loss_type": "cispo", "importance_sampling_level": "sequence"}, 3),
        ("grpo", {"entropy_coef": 0.01}, 4),
        ("grpo", {"beta": 0.04}, 5),  # one of them of the reference
        ("dpo", {}, 5),
    ],
)
def test_cost_of_a_trained_head_in_many_blocks(kind, options, matmuls, monkeypatch) -> None:
    """3G where the gradient is foreseen; else 4G, less what the last block of two tokens saves."""
    monkeypatch.setitem(linear_rows._WORKSPACE_BYTES, "cpu", 2 * 4 * VOCAB)
    with patching.patched():
        cost = head_cost(kind, **options)
    saved = 0 if matmuls == 3 else 2 / cost.tokens
    assert cost.matmuls == pytest.approx(matmuls - saved)


# TRL's own, with the head trained and with adapters of other layers.
OF_TRL = {
    "sft": (4, 3),
    "dpo": (5, 4),
    "kto": (7, 6),
    "grpo": (4, 3),
    "rloo": (6, 5),
    "distillation": (7, 6),
}


@pytest.mark.parametrize("lora", [None, ALL_LINEAR], ids=["full", "lora"])
@pytest.mark.parametrize("kind", OF_TRL)
def test_cost_of_a_head_of_trl(kind, lora, monkeypatch) -> None:
    """With prompts left out on a CPU too: what the table of the manual compares with."""
    for module in (utils, distillation_trainer):
        monkeypatch.setattr(module, "_use_triton", lambda device: True)
    assert head_cost(kind, lora=lora).matmuls == OF_TRL[kind][lora is not None]


@pytest.mark.parametrize(
    ("options", "matmuls"),
    [({"entropy_coef": 0.01}, 3), ({"beta": 0.04}, 3), ({"top_entropy_quantile": 0.5}, 2)],
)
def test_cost_of_a_frozen_head_in_grpo(options, matmuls) -> None:
    """A bonus has a gradient in the entropy, G more; with beta, G are of the reference."""
    with patching.patched():
        assert head_cost("grpo", lora=ALL_LINEAR, **options).matmuls == matmuls


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_no_logits_of_a_long_batch(kind, monkeypatch) -> None:
    """Nothing is made of the size of the logits, where blocks of them are to be small."""
    monkeypatch.setitem(linear_rows._WORKSPACE_BYTES, "cpu", 2**20)
    options = {"longer": 16, "changes": {"vocab_size": 32768, "max_position_embeddings": 1024}}
    with patching.patched():
        cost = head_cost(kind, **options)
    assert cost.largest < cost.tokens * cost.vocab / 4
