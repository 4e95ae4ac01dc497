"""Make the scorer that scores tokens by a model's head, however the head is stored.

`at_head.py` calls it with the hidden states that arrive at the head; the scorer itself is in
`fastrlhf/ops/scorer.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastrlhf.ops.kept_ids import Support
from fastrlhf.ops.linear_head import Weight
from fastrlhf.ops.scorer import LinearScorer, Scorer
from fastrlhf.ops.sharded import is_dtensor

from .head_parts import HeadParts
from .logit_map import LogitMap
from .own_module import ModuleScorer
from .tensor_parallel import rows_of_rank, this_ranks


def head_scorer(
    hidden: Tensor,
    head_forward: Callable[..., Tensor],
    parts: HeadParts | None,
    logit_map: LogitMap,
    *,
    temperature: float | Tensor = 1.0,
    chunk_size: int | None = None,
    impl: str = "auto",
    support: Support | None = None,
    rows: Tensor | None = None,
) -> Scorer:
    """Score hidden states (B, T, H) by the parts of a head, or, where they cannot be told or no
    linear map follows them, by the head's own forward (`head_forward`).
    """
    if parts is None or (logit_map.softcap is not None and logit_map.offset is not None):
        if parts is not None and parts.part is not None:
            raise RuntimeError(
                "model: its head is tensor parallel, and its logits are capped and then added to, "
                "which no linear operation does; use token_stats on the model's logits"
            )
        with torch.no_grad():
            vocab = head_forward(hidden[:1, :1]).shape[-1]
        return ModuleScorer(
            hidden, head_forward, logit_map, vocab, temperature, chunk_size, impl, support, rows
        )  # fmt: skip
    wide, weights = with_adapters(parts, hidden)
    if rows is not None:
        wide = wide.flatten(0, -2)
    return LinearScorer(
        wide, weights, logit_map.of_columns(parts.part).folded_bias(parts.bias), temperature,
        logit_map.softcap, logit_map.scale, chunk_size, impl, part=parts.part, support=support,
        rows=rows,
    )  # fmt: skip


def with_adapters(parts: HeadParts, hidden: Tensor) -> tuple[Tensor, list[Weight]]:
    """Widen hidden states by what the adapters make of them, and the weight by their blocks.

    Where ranks share the vocabulary, each has all of an adapter, of which it takes its rows.

    Raises:
        RuntimeError: a dropout there, which every rank would draw for itself.
    """
    blocks, weights = [hidden], [parts.weight]
    for adapter in parts.adapters:
        drops = adapter.dropout.training and getattr(adapter.dropout, "p", 0.0) > 0
        if parts.part is not None and drops:
            raise RuntimeError(
                "model: an adapter around a head that is tensor parallel has a dropout, which each "
                "rank would draw for itself; set lora_dropout=0 there"
            )
        dtype = adapter.down.weight.dtype
        low = adapter.down(adapter.dropout(hidden.to(dtype))) * adapter.scaling
        blocks.append(low.to(hidden.dtype))
        up = adapter.up.weight.to(hidden.dtype)
        if parts.part is not None and is_dtensor(up):  # cut as the head is
            up = this_ranks(up)
        elif parts.part is not None:
            up = rows_of_rank(up, parts.part)
        weights.append(up)
    return torch.cat(blocks, dim=-1) if parts.adapters else hidden, weights
