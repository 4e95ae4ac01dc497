"""Tiny random models of every architecture that transformers can make from a shrunken config."""

import inspect

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 120
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": VOCAB}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# What configs call their sizes. Each takes those that it knows.
SIZES = {
    **WIDTH, **TOKENS, "is_decoder": True, "n_embd": 32, "d_model": 32, "embedding_size": 32,
    "word_embed_proj_dim": 16, "lru_width": 32, "max_position_embeddings": 64, "n_positions": 64,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2, "decoder_layers": 2,
    "encoder_layers": 1, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2,
    "d_ff": 64, "ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64, "ffn_hidden_size": 64,
    "head_dim": 8, "v_head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "rotary_dim": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "attention_window_size": 8, "num_local_experts": 4,
    "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "expert_capacity": 64, "state_size": 8, "time_step_rank": 4, "chunk_size": 4,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
    "mamba_chunk_size": 4, "num_mem_blocks": 1,
}  # fmt: skip
# Those whose own rules a config of all of these sizes breaks.
WITHOUT = ((), ("head_dim",), ("num_key_value_heads",), ("head_dim", "num_key_value_heads"))
LARGEST = 3e7  # parameters

# Configs that nest others, or whose sizes depend on each other, and cannot be shrunk like this.
NOT_SHRUNK = {
    "blt", "cohere_compass_text", "dbrx", "dots3_note", "dots3_note_text", "emu3", "falcon_h1",
    "fuyu", "gemma3", "gemma3n", "gemma3n_text", "gemma4", "gemma4_assistant", "gemma4_text",
    "gemma4_unified", "gemma4_unified_assistant", "git", "got_ocr2", "gpt_neo", "lfm2_moe",
    "llama4", "mamba2", "mllama", "moss_transcribe_diarize", "musicgen", "musicgen_melody",
    "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "reformer", "xmod", "zamba",
    "zamba2", "zaya",
}  # fmt: skip
CAUSAL = [key for key in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if key not in NOT_SHRUNK]


def with_large_logits(model: nn.Module) -> nn.Module:
    """Logits on which a scale or a cap shows."""
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.4)
    return model.eval()


def shrunken(key: str) -> nn.Module:
    """A causal model of an architecture, by its name in transformers."""
    config_class = transformers.CONFIG_MAPPING[key]
    known: set[str] = set()
    for cls in config_class.__mro__:
        known.update(getattr(cls, "__annotations__", {}), getattr(cls, "attribute_map", {}))
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[key])
    failed = None
    for left_out in WITHOUT:
        try:
            sizes = {k: v for k, v in SIZES.items() if k in known and k not in left_out}
            config = config_class(**sizes)
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(config).parameters())
            assert size < LARGEST
            torch.manual_seed(0)
            model = with_large_logits(model_class(config))
            model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)
            return model
        except Exception as error:
            failed = error
    raise AssertionError(f"{key} cannot be shrunk") from failed


def _text(**changes) -> dict:
    return {
        **WIDTH, **TOKENS, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, **changes,
    }  # fmt: skip


def _vision(**changes) -> dict:
    return {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 64, "image_size": 16, "patch_size": 8, **changes,
    }  # fmt: skip


def wrapper(name: str) -> nn.Module:
    """A model of images and text."""
    t = transformers
    clip, siglip = (
        t.CLIPVisionConfig(**_vision(projection_dim=32)),
        t.SiglipVisionConfig(**_vision()),
    )
    llama = t.LlamaConfig(**_text())
    cohere = t.Cohere2Config(**_text(logit_scale=0.0625))
    gemma = t.GemmaConfig(**_text(head_dim=8))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    sight = {
        "depth": 1, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 32,
        "num_heads": 4, "patch_size": 8,
    }  # fmt: skip
    qwen = {
        "image_token_id": 119, "video_token_id": 118, "vision_start_token_id": 117,
        "vision_end_token_id": 116,
    }  # fmt: skip
    configs = {
        "Llava": lambda: t.LlavaConfig(
            vision_config=clip, text_config=llama, image_token_index=119),
        "LlavaNext": lambda: t.LlavaNextConfig(
            vision_config=clip, text_config=t.GraniteConfig(**_text(logits_scaling=8.0)),
            image_token_index=119,
        ),
        "Cohere2Vision": lambda: t.Cohere2VisionConfig(vision_config=siglip, text_config=cohere),
        "AyaVision": lambda: t.AyaVisionConfig(
            vision_config=siglip, text_config=cohere, image_token_index=119
        ),
        "PaliGemma": lambda: t.PaliGemmaConfig(
            vision_config=siglip, text_config=gemma, image_token_index=119, projection_dim=32
        ),
        "Gemma3": lambda: t.Gemma3Config(
            text_config=t.Gemma3TextConfig(**_text(head_dim=8, final_logit_softcapping=2.0)),
            vision_config=siglip, image_token_index=119, mm_tokens_per_image=1,
        ),
        "Idefics3": lambda: t.Idefics3Config(
            vision_config=_vision(), text_config=llama, image_token_id=119, scale_factor=2
        ),
        "Chameleon": lambda: t.ChameleonConfig(
            **_text(), vq_config={"base_channels": 32, "num_res_blocks": 1, "embed_dim": 16,
                                  "num_embeddings": 8, "resolution": 16, "channel_multiplier": [1]},
            vocabulary_map={**{f"IMGIMG{c}Z": 100 + i for i, c in enumerate("ABCDEFGH")},
                            "<image>": 119},
        ),
        "Qwen2VL": lambda: t.Qwen2VLConfig(
            text_config=_text(rope_parameters=rope), **qwen,
            vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4,
                           "patch_size": 8},
        ),
        "Qwen2_5_VL": lambda: t.Qwen2_5_VLConfig(
            text_config=_text(rope_parameters=rope), vision_config=sight, **qwen
        ),
        "Qwen3VL": lambda: t.Qwen3VLConfig(
            text_config=_text(head_dim=8, rope_parameters=rope), **qwen,
            vision_config={**sight, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        ),
        "Mllama": lambda: t.MllamaConfig(
            text_config=_text(cross_attention_layers=[1]),
            vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1,
                           "attention_heads": 4, "intermediate_size": 64, "image_size": 16,
                           "patch_size": 8, "vision_output_dim": 64, "max_num_tiles": 1,
                           "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]},
        ),
        "GraniteSpeech": lambda: t.GraniteSpeechConfig(
            text_config=t.GraniteConfig(**_text(logits_scaling=8.0)), audio_token_index=119,
            encoder_config={"hidden_dim": 32, "num_layers": 1, "num_heads": 4, "dim_head": 8,
                            "input_dim": 16, "output_dim": 16, "context_size": 8},
            projector_config={"model_type": "blip_2_qformer", "hidden_size": 32,
                              "num_hidden_layers": 1, "num_attention_heads": 4,
                              "intermediate_size": 32, "encoder_hidden_size": 32},
            has_lora_adapter=False,
        ),
        "Idefics2": lambda: t.Idefics2Config(
            vision_config=_vision(), text_config=t.MistralConfig(**_text()), image_token_id=119,
            perceiver_config={"resampler_n_latents": 2, "resampler_depth": 1,
                              "resampler_n_heads": 2, "resampler_head_dim": 8,
                              "num_key_value_heads": 1, "hidden_size": 32},
        ),
        "Gemma4": lambda: t.Gemma4Config(
            text_config=t.Gemma4TextConfig(
                **_text(head_dim=8, final_logit_softcapping=2.0), global_head_dim=8,
                vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=0,
                num_kv_shared_layers=0,
            ),
            vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                           "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 64,
                           "patch_size": 8},
            audio_config=None, image_token_id=119, boi_token_id=118, eoi_token_id=117,
            video_token_id=116, audio_token_id=115,
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    return with_large_logits(getattr(t, f"{name}ForConditionalGeneration")(configs[name]()))


WRAPPERS = (
    "Llava", "LlavaNext", "Cohere2Vision", "AyaVision", "PaliGemma", "Gemma3", "Idefics3",
    "Chameleon", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Mllama", "GraniteSpeech",
    "Idefics2", "Gemma4",
)  # fmt: skip


def encoder_decoder(name: str) -> nn.Module:
    """A model of one sequence given another."""
    cls = getattr(transformers, f"{name}ForConditionalGeneration", None)
    cls = cls or getattr(transformers, f"{name}MTModel")
    config_class = inspect.signature(cls.__init__).parameters["config"].annotation
    if not inspect.isclass(config_class):
        config_class = getattr(transformers, f"{name}Config")
    sizes = {
        "vocab_size": VOCAB, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64, "num_layers": 1,
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "pad_token_id": 1, "decoder_start_token_id": 2, "eos_token_id": 2,
        "forced_eos_token_id": None, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    return with_large_logits(cls(config_class(**sizes)))
