"""Tiny models of transformers, with heads large enough to tell a scale or a cap, and a batch."""

import warnings

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs transformers")
peft = pytest.importorskip("peft", reason="needs peft")

VOCAB = 101
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
OLD = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
# Caps and scales that change the logits of these models by far more than rounding.
CAP = {"final_logit_softcapping": 0.5}
ARCHITECTURES = {
    "Llama": SMALL,
    "Llama, tied": {**SMALL, "tie_word_embeddings": True},
    "Qwen3": SMALL,
    "Gemma2": {**SMALL, **CAP, "tie_word_embeddings": True},
    "Gemma3Text": {**SMALL, **CAP, "tie_word_embeddings": True},
    "GPT2": {**OLD, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "OPT": {
        **OLD, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 16,
    },
    "Phi": {**SMALL, "num_key_value_heads": 4},
    "Mistral": SMALL,
    "Mixtral": {**SMALL, "num_local_experts": 2},
    "Cohere": {**SMALL, "logit_scale": 3.0, "tie_word_embeddings": True},
    "Granite": {**SMALL, "logits_scaling": 0.25},
    "FalconH1": {
        **SMALL, "lm_head_multiplier": 5.0, "mamba_d_ssm": 32, "mamba_n_heads": 4,
        "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 8,
    },
    "Bloom": {**OLD, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoX": {**SMALL, "num_key_value_heads": 4},
}  # fmt: skip


def make(name: str, **changes) -> nn.Module:
    """A tiny random model, whose logits are large enough to tell a scale or a cap."""
    config = getattr(transformers, name.split(",")[0] + "Config")(
        **{**ARCHITECTURES[name], **changes}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.normal_(0, 0.3)
        if head.bias is not None:
            head.bias.normal_()
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    attention = torch.ones(3, 9, dtype=torch.long)
    attention[1, 7:] = 0
    mask = attention.bool() & (torch.arange(9) >= 4)
    return {"input_ids": torch.randint(VOCAB, (3, 9)), "attention_mask": attention, "mask": mask}


def with_lora(model: nn.Module, *targets: str, **options) -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, and of renamed properties
        model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()
