"""Read the head of a causal language model as it is stored: a matrix, a bias, adapters.

The head is the module of the model's output embeddings. Its class must be one that is known here,
and wrappers of peft may be around it. For any other class there is an error, not a guess that is
compared with the model's logits: an adapter that starts at zero would agree with any guess at
first. What a model does to the logits of its head is not read but measured (`logit_map.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrlhf.ops.linear_head import QuantizedWeight, Weight
from fastrlhf.ops.sharded import head_part, is_dtensor, vocabulary_part
from fastrlhf.ops.vocabulary_part import VocabularyPart


class Adapter(NamedTuple):
    """A LoRA adapter of the head, which adds scaling·up(down(dropout(h)))."""

    down: nn.Linear
    up: nn.Linear
    dropout: nn.Module
    scaling: float


class HeadParts(NamedTuple):
    """A head as it is stored: a matrix, and LoRA adapters that are not merged into it."""

    weight: Weight
    bias: Tensor | None
    adapters: list[Adapter]
    part: VocabularyPart | None = None  # this rank's rows, where the rows are spread over ranks


def base_model(model: Any) -> Any:
    """Take off the wrappers of a model, down to the one that transformers made."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):  # peft
            model = model.get_base_model()
        elif not hasattr(type(model), "get_output_embeddings") and hasattr(model, "module"):
            # DDP, FSDP, DeepSpeed. FSDP and DeepSpeed pass attributes of the model on, so that they
            # could stand for it, but the `config` of DeepSpeed is its own.
            model = model.module
        else:
            break
    if not hasattr(model, "get_output_embeddings"):
        raise TypeError(
            f"model: expected a causal language model of transformers, got {type(model).__name__}"
        )
    return model


def text_config(base: Any) -> Any:
    """Return the config of that part of a model which makes text."""
    config = base.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def virtual_tokens(model: Any) -> int:
    """Return how many positions an adapter of learned prompts (peft) puts before a sequence."""
    config = getattr(model, "active_peft_config", None)
    return getattr(config, "num_virtual_tokens", None) or 0


def without_virtual_tokens(hidden: Tensor, tokens: int, virtual: int) -> Tensor:
    """Drop virtual tokens before each sequence in (B, virtual + tokens, H), if there are any."""
    return hidden[:, virtual:] if virtual and hidden.shape[1] == tokens + virtual else hidden


def check_weights(module: Any, name: str) -> None:
    """Raise TypeError for a head on the meta device, unless accelerate offloads it, which does that
    with a head as a whole, or with each part of an adapter.
    """
    weight = getattr(module, "weight", None)
    offloaded = any(hasattr(part, "_hf_hook") for part in module.modules())
    if isinstance(weight, Tensor) and weight.is_meta and not offloaded:
        raise TypeError(f"model: expected a model with weights, got {name} on the meta device")


def head_module(base: Any) -> nn.Module:
    """Find the module that makes the logits."""
    module = base.get_output_embeddings()
    if not isinstance(module, nn.Module):
        raise TypeError(f"model: {type(base).__name__} has no output embeddings")
    while is_of(module, "torch.distributed.fsdp.", "FullyShardedDataParallel"):
        module = module.module  # whose weight is whole within the call of the wrapper
    return module


def head_parts(module: Any) -> HeadParts | None:
    """Read a head of a known class. None stands for an adapter of peft whose matrix cannot be read,
    so that its own module has to make the logits (DoRA, IA3, OFT, VeRA, trained tokens, ...).

    Raises:
        TypeError, RuntimeError: as `lm_head`.
    """
    if is_of(module, "peft.", "ModulesToSaveWrapper"):
        active = not module.disable_adapters and module.active_adapters
        saved = module.modules_to_save
        chosen = saved[module.active_adapters[0]] if active else module.original_module
        if active and _is_cut(chosen):
            raise TypeError(
                "model: a copy of a head that is tensor parallel (modules_to_save), whose forward "
                "may be that of the original; use token_stats on the model's logits"
            )
        return head_parts(chosen)
    if is_of(module, "peft.tuners.lora", "Linear", "Linear4bit", "Linear8bitLt"):
        return _lora_parts(module)
    if is_of(module, "bitsandbytes.", "Linear4bit", "Linear8bitLt") and _is_cut(module):
        raise TypeError(
            "model: its head is quantized and tensor parallel, so that its rows are not known; use "
            "token_stats on the model's logits"
        )
    if is_of(module, "bitsandbytes.", "Linear4bit"):
        return HeadParts(_four_bit(module), module.bias, [])
    if is_of(module, "bitsandbytes.", "Linear8bitLt"):
        return HeadParts(_eight_bit(module), module.bias, [])
    if any(cls.__module__.startswith("peft.") for cls in type(module).__mro__):
        return None
    if isinstance(module, nn.Sequential):
        inner = [part for part in module if next(part.parameters(), None) is not None]
        if len(inner) == 1:
            return head_parts(inner[0])
    linear = isinstance(module, nn.Linear) and {"weight", "bias"}.issuperset(
        name for name, _ in module.named_parameters()
    )
    if not linear:
        raise TypeError(
            f"model: its head is a {type(module).__module__}.{type(module).__name__}, of which "
            "fastrlhf does not know what it computes; use token_stats on the model's logits"
        )
    if is_tensor_parallel(module):
        return _tensor_parallel(module)
    return HeadParts(_whole(module.weight), module.bias, [])


def parts_of_weight(weight: Any, bias: Tensor | None) -> HeadParts:
    """Read a linear head from its parameters, without its module; they may be quantized by
    bitsandbytes.

    Raises:
        TypeError, RuntimeError: as `lm_head`.
    """
    module, kind = SimpleNamespace(weight=weight), type(weight).__name__
    if kind == "Params4bit":
        return HeadParts(_four_bit(module), bias, [])
    if kind == "Int8Params":
        return HeadParts(_eight_bit(module), bias, [])
    return HeadParts(_whole(weight), bias, [])


class NotWholeError(RuntimeError):
    """Only a part of a weight is there."""


def parts_within_call(module: Any) -> HeadParts | None:
    """Read a head as `head_parts` does, during a call of it: its weight is whole then, however it
    is sharded otherwise.

    None also stands for a head whose parts are gathered one by one (see `gathers_its_parts`).
    """
    if gathers_its_parts(module):
        return None  # a part that is gathered now is released after the next call of that part
    try:
        parts = head_parts(module)
        if parts is None and any(map(_is_cut, module.modules())):
            raise RuntimeError(
                "model: an adapter around a head that is tensor parallel, of a kind that no matrix "
                "of its rows stands for; use token_stats on the model's logits"
            )
        return parts
    except NotWholeError as error:
        if isinstance(module, nn.Linear):
            raise RuntimeError(
                "model: the weight of its head is sharded or empty in the call of the head too, in "
                "another way than tensor parallelism over the vocabulary (Shard(0) on a mesh of "
                f"its own), which fastrlhf knows; use token_stats on the model's logits ({error})"
            ) from error
        return None


def gathers_its_parts(module: nn.Module) -> bool:
    """Whether the parts of a head are sharded one by one (as `fsdp_auto_wrap_policy` of peft does
    with adapters, and ZeRO-3 with all modules). Then only a call of a part makes it whole, and all
    processes have to make the same number of calls.
    """
    inner = [part for part in module.modules() if part is not module]
    wrappers = "FSDPModule", "FullyShardedDataParallel"
    return any(
        is_of(part, "torch.distributed.fsdp", *wrappers)
        or any(map(_comes_and_goes, part.parameters(recurse=False)))
        for part in inner
    )


def _comes_and_goes(parameter: Tensor) -> bool:
    """Whether a parameter is whole only during calls of its own module (ZeRO-3 of DeepSpeed)."""
    return hasattr(parameter, "ds_status") and not getattr(parameter, "ds_persist", False)


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether a head is tensor parallel: the ranks that share its rows have the same tokens, where
    under FSDP2 each has a batch of its own. The weight is a DTensor in both cases, but only the
    tensor parallelism of torch and transformers leaves marks on the module.
    """
    return is_dtensor(module.weight) and _is_cut(module)


def _is_cut(module: nn.Module) -> bool:
    marks = ("_distribute_module_applied", "_is_hooked")
    return any(getattr(module, mark, False) for mark in marks)


def _is_part(weight: Any, part: VocabularyPart | None) -> bool:
    """Whether a DTensor (V, r) is cut along the vocabulary as the head is."""
    cut = vocabulary_part("weight", weight, 0)[1]
    return cut is not None and part is not None and cut.is_that_of(part)


def _tensor_parallel(module: Any) -> HeadParts:
    """Read this rank's rows of a tensor parallel head."""
    try:
        head = head_part(torch.empty(0), [module.weight], module.bias, None)
    except ValueError as error:
        raise NotWholeError(f"model: of its head, {error}") from error
    return HeadParts(head.weights[0], head.bias, [], head.part)


def _lora_parts(module: Any) -> HeadParts | None:
    if module.merged and module.disable_adapters:
        module.unmerge()  # as the forward of the module would
    base = head_parts(module.get_base_layer())
    if base is None:
        return None
    adapters = []
    if not (module.merged or module.disable_adapters):
        for name in module.active_adapters:
            if name not in module.lora_A:
                continue
            biased = getattr(module.lora_B[name], "bias", None) is not None
            if name in module.lora_variant or biased:  # DoRA and the like
                return None
            down, up = module.lora_A[name], module.lora_B[name]
            if not (is_dtensor(up.weight) and _is_part(up.weight, base.part)):
                _whole(up.weight)
            adapters.append(Adapter(down, up, module.lora_dropout[name], module.scaling[name]))
    return base._replace(adapters=base.adapters + adapters)


def _four_bit(module: Any) -> Weight:
    state = module.weight.quant_state
    if state is None:
        return _whole(module.weight)
    if getattr(state, "packing_format_for_cpu", False) or state.blocksize % 2:
        raise TypeError("model: its 4-bit head is packed for the CPU's kernels, which is not known")
    scales = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    vocab = state.shape[0]
    codes = module.weight.detach().view(vocab, -1)
    return QuantizedWeight(codes, scales.float(), state.blocksize, state.code, state.dtype)


def _eight_bit(module: Any) -> Weight:
    state = getattr(module, "state", None)
    holder = module.weight if state is None or state.CB is None else state
    if getattr(holder, "CB", None) is None:
        return _whole(module.weight)
    codes, scales = holder.CB, holder.SCB
    return QuantizedWeight(codes, scales.float() / 127, codes.shape[1], None, torch.float32)


def _whole(weight: Tensor) -> Tensor:
    """Return a weight; raise NotWholeError unless it is whole."""
    there = weight.numel() != 0 and weight.ndim == 2 and not weight.is_meta
    if type(weight).__name__ == "DTensor" or not there:
        raise NotWholeError(
            "model: the weight of its head is sharded, offloaded or empty outside of the model's "
            "forward; use model_token_stats, which reads it within"
        )
    return weight


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode within a context, and restore each part's mode after."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def is_of(module: nn.Module, package: str, *names: str) -> bool:
    """Whether a module is of one of these classes of a package, which is not imported for that."""
    return any(
        cls.__module__.startswith(package) and cls.__name__ in names for cls in type(module).__mro__
    )
