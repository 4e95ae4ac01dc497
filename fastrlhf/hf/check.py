"""Describe, in words, what is unusual about a model and a batch.

It finds the head by `lm_head.py` and the scored tokens by `model_inputs.py`, and asks
`causality.py` and `packing.py` whether the model fits.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .causality import check_causal
from .head_parts import base_model, check_weights, head_module, text_config
from .lm_head import lm_head
from .model_inputs import (
    TokenBatch,
    check_ids,
    check_keywords,
    check_model,
    given_inputs,
    makes_own_positions,
)
from .packing import packed_inputs

_OF_TOKENS = ("input_ids", "attention_mask", "cu_seqlens")
_MASKS = ("mask", "completion_mask", "loss_mask", "response_mask")


def check(model: nn.Module, batch: Mapping[str, Any]) -> list[str]:
    """Look for what usually is a mistake in a batch, or is unusual about a model.

    Eager equivalent: none. It runs a forward of a few tokens where the head is not known yet, and
    looks at what the tensors hold, so call it once before training and not in the loop.

    Args:
        model: as `model_token_stats`.
        batch: input_ids (B, T); attention_mask (B, T); cu_seqlens, where sequences are packed; the
            mask of the tokens to score (B, T) as "mask", "completion_mask", "loss_mask" or
            "response_mask"; what else the forward takes.

    Returns:
        A sentence for each finding; none if everything is as it usually is: tokens of the prompt or
        of padding that are scored, a mask that is not aligned with input_ids or scores nothing, an
        end of sequence that is not scored, padding on the left without positions, a head that
        cannot be told, a model that scales or caps its logits.

    Raises:
        TypeError, ValueError: input_ids that are none.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1))
        >>> fastrlhf.check(model, {"input_ids": torch.tensor([[3, 1, 4, 1, 5]])})
        ['mask: none is given, so the tokens of prompts are scored too']
    """
    ids = batch["input_ids"]
    check_ids(ids)
    mask_name = next((name for name in _MASKS if name in batch), None)
    attention = batch.get("attention_mask")
    inputs = {name: value for name, value in batch.items() if name not in (*_OF_TOKENS, mask_name)}
    findings = _of_model(model, inputs)
    cu_seqlens = batch.get("cu_seqlens")
    if cu_seqlens is not None:
        packed = TokenBatch(ids, attention, given_inputs(inputs), cu_seqlens=cu_seqlens)
        findings += _of_packing(model, packed)
    attended = torch.ones_like(ids, dtype=torch.bool)
    if isinstance(attention, Tensor) and attention.ndim == 2:
        if attention.shape != ids.shape or bool(((attention != 0) & (attention != 1)).any()):
            return [*findings, "attention_mask: is not of 0 and 1 in the shape of input_ids"]
        attended = attention != 0
        if bool((attended[:, 1:] & ~attended[:, :-1]).any()) and inputs.get("position_ids") is None:
            findings += _of_left_padding(model)
    elif attention is None and _has_padding(model, ids):
        findings.append(
            "attention_mask: none is given, but input_ids end in padding, which is scored"
        )
    if mask_name is None:
        return [*findings, "mask: none is given, so the tokens of prompts are scored too"]
    return findings + _of_mask(model, mask_name, batch[mask_name], ids, attended)


def _of_model(model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    findings = []
    base = base_model(model)
    name = type(base).__name__
    for looked_at in (
        lambda: check_weights(head_module(base), name),
        lambda: check_model(base, name),
        lambda: check_keywords(base, inputs),
        lambda: check_causal(base),
    ):
        try:
            looked_at()
        except (TypeError, ValueError, RuntimeError) as error:
            findings.append(str(error))
    if findings:
        return findings
    try:
        head = lm_head(model)
    except (TypeError, ValueError, RuntimeError) as error:
        return [f"lm_head is not for this model: {error}"]
    if head.scale != 1.0:
        findings.append(f"model: {name} multiplies its logits by {head.scale:g}")
    if head.softcap is not None:
        findings.append(f"model: {name} caps its logits at {head.softcap:g}")
    if head.bias is not None and bool((head.bias < torch.finfo(torch.float16).min).any()):
        findings.append(f"model: {name} rules out some words, whose log-probs are -inf")
    if model.training and any(
        isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules()
    ):
        findings.append(
            "model: is in training mode and has dropout, so log-probs vary between calls"
        )
    return findings


def _of_packing(model: nn.Module, packed: TokenBatch) -> list[str]:
    try:
        packed_inputs(model, base_model(model), packed)
    except (TypeError, ValueError) as error:
        return [str(error)]
    return []


def _of_left_padding(model: nn.Module) -> list[str]:
    if makes_own_positions(base_model(model), model):
        return [
            "attention_mask: sequences are padded on the left and no position_ids are given; the "
            "model makes positions of its own, perhaps of padding too"
        ]
    return [
        "attention_mask: sequences are padded on the left and no position_ids are given; fastrlhf "
        "makes them, the model's own forward does not"
    ]


def _has_padding(model: Any, ids: Tensor) -> bool:
    padding = getattr(text_config(base_model(model)), "pad_token_id", None)
    return padding is not None and bool((ids[:, -1] == padding).any())


def _of_mask(model: Any, name: str, mask: Any, ids: Tensor, attended: Tensor) -> list[str]:
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        return [
            f"{name}: is not aligned with input_ids {tuple(ids.shape)}, one for each token: {shape}"
        ]
    if bool(((mask != 0) & (mask != 1)).any()):
        return [f"{name}: holds other numbers than 0 and 1"]
    scored, findings = mask != 0, []
    if bool((scored & ~attended).any()):
        findings.append(f"{name}: scores tokens of padding")
    empty = int((~scored[:, 1:]).all(1).sum())
    if empty:
        findings.append(f"{name}: scores no token of {empty} of {len(ids)} sequences")
    first = attended.int().argmax(1, keepdim=True)
    if bool(scored.gather(1, first).any()):
        findings.append(
            f"{name}: scores the first token of a sequence, which nothing predicts: is the prompt "
            "scored?"
        )
    last = attended & ~torch.cat((attended[:, 1:], torch.zeros_like(attended[:, :1])), dim=1)
    unscored = int((last & ~scored & scored.any(1, keepdim=True)).any(1).sum())
    if unscored:
        findings.append(
            f"{name}: leaves out the last token of {unscored} of {len(ids)} sequences: is the end "
            "of sequence scored?"
        )
    return findings
