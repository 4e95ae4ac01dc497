"""Packed sequences in a model: one row of tokens, whose positions start again with each sequence.

From these positions, models of transformers can tell where sequences begin and keep them apart, if
they are given no attention mask and no cache. But not all models do so, and the others would give
wrong numbers without an error. So each model is tried once: no gradient may flow from one sequence
into another. A gradient is tested, not a difference of values, because it is exactly zero or not,
whatever the precision and however small the weights are.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fastrlhf.ops.checks import known_on_host
from fastrlhf.ops.layout import layout_of

from .head_parts import evaluating, head_module, text_config
from .model_inputs import CACHES, TokenBatch, makes_own_positions
from .stand_in import StandIn, logits_of

# For each model: its attention implementation when it was tried, and whether it keeps sequences
# apart.
_tried: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()


def packed_inputs(model: nn.Module, base: Any, batch: TokenBatch) -> dict[str, Any]:
    """Return the model's inputs for packed ids (1, N), with the positions of the tokens in their
    sequences, unless positions are given already.

    Raises:
        TypeError, ValueError: cu_seqlens that do not fit; an attention_mask (1, N), a cache or
            positions that hide from the model where sequences begin; a model that does not keep
            packed sequences apart.
    """
    ids, mask, inputs = batch.input_ids, batch.attention_mask, batch.inputs
    layout = layout_of("input_ids", ids, batch.cu_seqlens)
    assert batch.cu_seqlens is not None
    _refuse_cache(inputs)
    without_positions = makes_own_positions(base, model)
    first = layout.spread(batch.cu_seqlens[:-1].long())
    places = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0) - first
    if not _says_what_each_token_sees(mask):
        if mask is not None:
            raise ValueError(
                "attention_mask: expected None with cu_seqlens: packed tokens have no padding, and "
                "with a mask a model of transformers lets sequences see each other"
            )
        if without_positions:
            raise TypeError(f"model: {type(base).__name__} takes no positions of packed sequences")
        _check_given_positions(inputs.get("position_ids"), places)
        _check_apart(model, base, ids.device)
    if without_positions or "position_ids" in inputs:
        return inputs
    return {**inputs, "position_ids": places}


def check_restarts(model: nn.Module, base: Any, batch: TokenBatch) -> None:
    """Check given positions that start again: they mean packed sequences, also without cu_seqlens.

    Raises:
        TypeError, ValueError: as `packed_inputs`. An attention_mask is checked on the CPU only.
    """
    positions, mask = batch.inputs.get("position_ids"), batch.attention_mask
    if not isinstance(positions, Tensor) or positions.ndim != 2 or _says_what_each_token_sees(mask):
        return
    restarts = positions[:, 1:] <= positions[:, :-1]
    if isinstance(mask, Tensor) and mask.ndim == 2:  # positions of padding do not count
        restarts = restarts & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        if known_on_host(restarts) and restarts.any():
            raise ValueError(
                "attention_mask: expected None where position_ids start again: with a mask, a "
                "model of transformers lets packed sequences see each other"
            )
        return
    if makes_own_positions(base, model):
        return
    if known_on_host(restarts):
        if not restarts.any():
            return
        _refuse_cache(batch.inputs)
    # Whether positions start again matters only for a model that does not keep sequences apart. So
    # only then does the host wait for a GPU to know.
    if not keeps_apart(model, base, positions.device) and bool(restarts.any()):
        _check_apart(model, base, positions.device)


def _refuse_cache(inputs: dict[str, Any]) -> None:
    for name in ("use_cache", *CACHES):
        value = inputs.get(name)
        if value is not None and value is not False:
            raise ValueError(
                f"{name}: expected none with packed sequences: with a cache, a model of "
                "transformers lets them see each other"
            )


def _says_what_each_token_sees(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 4


def _check_given_positions(given: Any, places: Tensor) -> None:
    """On the CPU, raise ValueError for positions (1, N) that start again somewhere else."""
    if not isinstance(given, Tensor) or given.ndim != 2 or not known_on_host(given, places):
        return
    if given.shape != places.shape or not torch.equal(given.diff() == 1, places.diff() == 1):
        raise ValueError(
            "position_ids: expected to go on by 1 within the sequences of cu_seqlens, and to start "
            "again with each, by which a model keeps them apart"
        )


def _check_apart(model: nn.Module, base: Any, device: torch.device) -> None:
    if not keeps_apart(model, base, device):
        attention = getattr(text_config(base), "_attn_implementation", None)
        raise TypeError(
            f"model: {type(base).__name__} (attention {attention!r}) does not keep packed "
            "sequences apart; pad them, or give a 4-d attention_mask"
        )


def keeps_apart(model: nn.Module, base: Any, device: torch.device) -> bool:
    """Whether the model keeps packed sequences apart, which is tried once for each attention."""
    attention = getattr(text_config(base), "_attn_implementation", None)
    known = _tried.get(base)
    if known is None or known[0] != attention:
        known = _tried[base] = attention, not _gradient_crosses(model, base, device)
    return known[1]


def _gradient_crosses(model: nn.Module, base: Any, device: torch.device) -> bool:
    """Whether the hidden states of the second of two packed sequences depend on the first."""
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in model.modules()):
        raise TypeError(
            "model: in FullyShardedDataParallel (FSDP1) it cannot be tried whether packed "
            "sequences are kept apart; use FSDP2, or call this once before the model is wrapped"
        )
    embedded: list[Tensor] = []
    vocab = text_config(base).vocab_size

    def watch(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # a copy, since models may write into it

    def keep(hidden: Tensor, _: Any) -> tuple[Tensor, int]:
        return hidden, vocab

    stand_in = StandIn(head_module(base), type(base).__name__, keep)
    hook = base.get_input_embeddings().register_forward_hook(watch)
    try:
        with (
            torch.inference_mode(False), torch.enable_grad(), evaluating(base), stand_in.in_place(),
            saved_tensors_hooks(_as_it_is, _as_it_is),  # overrides those of an outer checkpoint
        ):  # fmt: skip
            ids = torch.tensor([[5, 6, 7, 8]], device=device) % vocab
            positions = torch.tensor([[0, 1, 0, 1]], device=device)
            output = base(input_ids=ids, position_ids=positions, use_cache=False)
            # The result is tied to the output, because wrappers prepare weights for the backward
            # when a gradient of the output arrives.
            entered = stand_in.result(logits_of(output))
            return _reaches(embedded, entered) if embedded else True  # not known, so not trusted
    finally:
        hook.remove()


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _reaches(embedded: list[Tensor], entered: Tensor) -> bool:
    """Whether a gradient flows from tokens 2 and 3 into the embeddings of tokens 0 and 1."""
    second = entered[:, 2:].float()
    # The weights differ, because the plain sum of normalised states is constant.
    weights = torch.arange(second.numel(), device=second.device).cos().view(second.shape)
    gradients = torch.autograd.grad((second * weights).sum(), embedded, allow_unused=True)
    return any(x is not None and bool((x[:, :2] != 0).any()) for x in gradients)
