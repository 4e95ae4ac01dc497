"""Packed sequences in a model: one row of tokens, of which cu_seqlens says where sequences begin.

Models of transformers keep packed sequences apart where positions start again, if they are given no
attention mask. Not all do; those that do not would give wrong numbers without a word, so each model
is tried once.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastrlhf.ops.layout import layout_of

from .head_parts import evaluating, head_module, text_config
from .model_inputs import TokenBatch, makes_own_positions
from .stand_in import StandIn

# For each model that keeps packed sequences apart, the attention with which it was tried.
_apart: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def packed_inputs(model: nn.Module, base: Any, batch: TokenBatch) -> dict[str, Any]:
    """Give packed ids (1, N) the positions that the tokens have in their sequences, unless
    positions are given.

    Raises:
        TypeError, ValueError: cu_seqlens that do not fit; an attention_mask (1, N), which would
            hide from the model where sequences begin; a model that does not keep packed sequences
            apart.
    """
    ids, mask, cu_seqlens = batch.input_ids, batch.attention_mask, batch.cu_seqlens
    layout = layout_of("input_ids", ids, cu_seqlens)
    assert cu_seqlens is not None
    says_what_each_token_sees = isinstance(mask, Tensor) and mask.ndim == 4
    if mask is not None and not says_what_each_token_sees:
        raise ValueError(
            "attention_mask: expected None with cu_seqlens: packed tokens have no padding, and "
            "with a mask a model of transformers lets sequences see each other"
        )
    without_positions = makes_own_positions(base, model)
    if not says_what_each_token_sees:
        if without_positions:
            raise TypeError(f"model: {type(base).__name__} takes no positions of packed sequences")
        check_packing(base, ids.device)
    if without_positions or "position_ids" in batch.inputs:
        return batch.inputs
    place = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    return {**batch.inputs, "position_ids": place - layout.spread(cu_seqlens[:-1].long())}


def check_packing(base: Any, device: torch.device) -> None:
    """Refuse a model in which a sequence depends on the one that is packed before it.

    Raises:
        TypeError: such a model.
    """
    attention = getattr(text_config(base), "_attn_implementation", None)
    if _apart.get(base, base) == attention:
        return
    if _sees_the_one_before(base, device):
        raise TypeError(
            f"model: {type(base).__name__} (attention {attention!r}) does not keep packed "
            "sequences apart; pad them, or give a 4-d attention_mask"
        )
    _apart[base] = attention


@torch.no_grad()
def _sees_the_one_before(base: Any, device: torch.device) -> bool:
    entered: list[Tensor] = []
    vocab = text_config(base).vocab_size

    def keep(hidden: Tensor, _: Any) -> tuple[Tensor, int]:
        entered.append(hidden[:, 2:])
        return hidden, vocab

    positions = torch.tensor([[0, 1, 0, 1]], device=device)
    with evaluating(base):
        for ids in ([[5, 6, 7, 8]], [[9, 6, 7, 8]]):
            with StandIn(head_module(base), type(base).__name__, keep).in_place():
                base(
                    input_ids=torch.tensor(ids, device=device) % vocab, position_ids=positions,
                    use_cache=False,
                )  # fmt: skip
    exact = entered[0].dtype in (torch.float32, torch.float64)
    first, other = (x.double() for x in entered)
    tolerance = 1e-5 if exact else 2**-8
    return bool((first - other).norm() > tolerance * first.norm())
