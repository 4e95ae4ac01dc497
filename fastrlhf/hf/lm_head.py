"""Find the head of a causal language model, and how its logits become the model's.

Three things are read: the module of the output embeddings, whose class must be one that is known
here; what the config says about the logits after it (a scale, a softcap); and, around the module,
the wrappers of peft. Anything else is an error and not a guess: an adapter that starts at zero
would agree with any guess at first.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrlhf.ops.linear_head import QuantizedWeight, Weight


class LMHead(NamedTuple):
    """Logits are softcap·tanh(scale·(W·h + b) / softcap), or scale·(W·h + b) without a softcap."""

    weight: Weight  # (V, H)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `linear_token_stats` and its relatives."""
        return {"bias": self.bias, "scale": self.scale, "softcap": self.softcap}


class Adapter(NamedTuple):
    """A LoRA adapter of the head, which adds scaling·up(down(dropout(h)))."""

    down: nn.Linear
    up: nn.Linear
    dropout: nn.Module
    scaling: float


class HeadParts(NamedTuple):
    """A head as it is stored: a matrix, and adapters that are not merged into it."""

    weight: Weight
    bias: Tensor | None
    adapters: list[Adapter]


def lm_head(model: nn.Module) -> LMHead:
    """Find the weight, bias, scale and softcap with which a causal language model makes its logits.

    Eager equivalent: `linear_token_stats(hidden, head.weight, targets, **head.options())` is
    `token_stats(model(...).logits, targets)`, for the hidden states that reach the head.

    Args:
        model: any AutoModelForCausalLM; wrapped by peft, DistributedDataParallel or torch.compile
            or not.

    Returns:
        LMHead with the model's own tensors. The weight of a head that bitsandbytes quantized is a
        QuantizedWeight, which the operations dequantize in slices. A LoRA adapter on the head is
        added to it, W + scaling·B·A, in a matrix of its own and differentiably, but without the
        adapter's dropout; `model_token_stats` does neither build the matrix nor leave dropout out.

    Raises:
        TypeError: a head of a class that is not known here.
        RuntimeError: a weight that is sharded or empty outside of the model's forward (FSDP,
            ZeRO-3): use `model_token_stats`.
    """
    base = base_model(model)
    parts = head_parts(head_module(base))
    scale, softcap = logit_transform(base)
    weight = parts.weight
    for adapter in parts.adapters:
        dense = weight[0 : weight.shape[0]]
        update = adapter.up.weight @ adapter.down.weight * adapter.scaling
        weight = dense + update.to(dense.dtype)
    return LMHead(weight, parts.bias, scale, softcap)


def base_model(model: Any) -> Any:
    """Take off the wrappers of a model, down to the one that transformers made."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):  # peft
            model = model.get_base_model()
        elif not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):  # DDP, FSDP
            model = model.module
        else:
            break
    if not hasattr(model, "get_output_embeddings"):
        raise TypeError(
            f"model: expected a causal language model of transformers, got {type(model).__name__}"
        )
    return model


def head_module(base: Any) -> nn.Module:
    """Find the module that makes the logits."""
    module = base.get_output_embeddings()
    if not isinstance(module, nn.Module):
        raise TypeError(f"model: {type(base).__name__} has no output embeddings")
    return module


def logit_transform(base: Any) -> tuple[float, float | None]:
    """Read from the config by what the logits are multiplied, and how they are capped."""
    config = base.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        factor = getattr(config, name, None)
        if isinstance(factor, str):
            raise TypeError(
                f"model: the {name} of its config is {factor!r}, which fastrlhf does not know; use "
                "token_stats on the model's logits"
            )
        scale *= 1.0 if factor is None else factor
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return scale, getattr(config, "final_logit_softcapping", None)  # Gemma


def head_parts(module: Any) -> HeadParts:
    """Read a head of a known class.

    Raises:
        TypeError, RuntimeError: as `lm_head`.
    """
    if _is(module, "peft.", "ModulesToSaveWrapper"):
        active = not module.disable_adapters and module.active_adapters
        saved = module.modules_to_save
        return head_parts(saved[module.active_adapters[0]] if active else module.original_module)
    if _is(module, "peft.tuners.lora", "Linear", "Linear4bit", "Linear8bitLt"):
        return _lora_parts(module)
    if _is(module, "bitsandbytes.", "Linear4bit"):
        return HeadParts(_four_bit(module), module.bias, [])
    if _is(module, "bitsandbytes.", "Linear8bitLt"):
        return HeadParts(_eight_bit(module), module.bias, [])
    if type(module).forward is not nn.Linear.forward:
        raise TypeError(
            f"model: its head is a {type(module).__module__}.{type(module).__name__}, of which "
            "fastrlhf does not know what it computes; use token_stats on the model's logits"
        )
    return HeadParts(_whole(module.weight), module.bias, [])


def _lora_parts(module: Any) -> HeadParts:
    base = module.get_base_layer()
    if module.merged and module.disable_adapters:
        module.unmerge()  # as its own forward would
    weight, bias, _ = head_parts(base)
    adapters = []
    if not (module.merged or module.disable_adapters):
        for name in module.active_adapters:
            if name not in module.lora_A:
                continue
            if (
                name in module.lora_variant
                or getattr(module.lora_B[name], "bias", None) is not None
            ):
                raise TypeError(
                    f"model: the adapter {name!r} on its head is not plain LoRA (DoRA, a bias, or "
                    "another variant), which fastrlhf does not compute"
                )
            down, up = module.lora_A[name], module.lora_B[name]
            adapters.append(Adapter(down, up, module.lora_dropout[name], module.scaling[name]))
    return HeadParts(weight, bias, adapters)


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
    holder = module.state if module.state.CB is not None else module.weight
    if getattr(holder, "CB", None) is None:
        return _whole(module.weight)
    codes, scales = holder.CB, holder.SCB
    return QuantizedWeight(codes, scales.float() / 127, codes.shape[1], None, torch.float32)


def _whole(weight: Tensor) -> Tensor:
    """Raise unless a weight is all there."""
    if type(weight).__name__ == "DTensor" or weight.numel() == 0 or weight.ndim != 2:
        raise RuntimeError(
            "model: the weight of its head is sharded or empty outside of the model's forward; "
            "use model_token_stats, which reads it within"
        )
    return weight


def _is(module: nn.Module, package: str, *names: str) -> bool:
    """Whether a module's class is one of a package's, told without importing the package."""
    return any(
        cls.__module__.startswith(package) and cls.__name__ in names for cls in type(module).__mro__
    )
