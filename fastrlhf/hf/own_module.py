"""Statistics by the logits that a head's own module makes, where its matrix cannot be told.

A chunk of the scored tokens at a time, so that no more logits than of a chunk are held; backward
makes them again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastrlhf.ops.backend import under_transform
from fastrlhf.ops.linear_arguments import checked_chunk
from fastrlhf.ops.linear_rows import even_spans
from fastrlhf.ops.token_stats import token_stats
from fastrlhf.reference import TokenStats

from .logit_map import LogitMap


def stats_of_module(
    own: Callable[..., Tensor],
    logit_map: LogitMap,
    hidden: Tensor,
    targets: Tensor,
    options: dict[str, Any],
) -> tuple[TokenStats, int]:
    """Compute `token_stats` of hidden states (B, T, H), and the size of the vocabulary.

    `own` is the forward of the head's module; `options` are those of `token_stats`, and chunk_size.
    """
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    temperature, entropy = options["temperature"], options["entropy"]
    temperatures = None
    if isinstance(temperature, Tensor):
        temperatures = temperature.expand(targets.shape).reshape(-1)
    with torch.no_grad():
        vocab = own(flat[:1].unsqueeze(0)).shape[-1]

    def score(rows: Tensor, some_targets: Tensor, some_temperatures: Tensor | None) -> TokenStats:
        logits = own(rows.unsqueeze(0))[0]
        logits = logit_map(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return token_stats(
            logits, some_targets, entropy=entropy, impl=options["impl"],
            ignore_index=options["ignore_index"],
            temperature=temperature if some_temperatures is None else some_temperatures,
        )  # fmt: skip

    live = (flat_targets != options["ignore_index"]).nonzero()[:, 0]
    size = checked_chunk(options["chunk_size"], vocab, hidden.device)
    found = []
    for first, last in even_spans(live.shape[0], size):
        index = live[first:last]
        some = None if temperatures is None else temperatures[index]
        arguments = flat[index], flat_targets[index], some
        if under_transform() or not torch.is_grad_enabled():
            found.append(score(*arguments))
        else:
            found.append(checkpoint(score, *arguments, use_reentrant=False))
    sums = torch.promote_types(hidden.dtype, torch.float32)

    def whole(parts: list[Tensor]) -> Tensor:
        zeros = flat.new_zeros(flat_targets.shape, dtype=sums)
        filled = zeros.index_put((live,), torch.cat(parts)) if parts else zeros
        return filled.view(targets.shape)

    stats = TokenStats(
        whole([part.logprob for part in found]),
        whole([part.entropy for part in found if part.entropy is not None]) if entropy else None,
        whole([part.lse for part in found]),
    )
    return stats, vocab
