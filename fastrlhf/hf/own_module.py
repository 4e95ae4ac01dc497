"""Scores tokens by the logits that a head's own module makes, where its matrix cannot be told.

A chunk of the scored tokens at a time, so that no more logits than of a chunk are held; backward
makes them again.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops.linear_arguments import checked_chunk, exact
from fastrlhf.ops.linear_loss import ChunkStats, LossFunction, check_loss
from fastrlhf.ops.linear_rows import live_rows, order_by_group
from fastrlhf.ops.scorer import in_chunks
from fastrlhf.ops.token_stats import token_stats
from fastrlhf.reference import TokenStats, accumulation_dtype

from .logit_map import LogitMap


class ModuleScorer(NamedTuple):
    """A `Scorer` of the forward of a head's module, and of what its model does to the logits."""

    hidden: Tensor  # (B, T, H)
    own: Callable[..., Tensor]  # from (1, n, H) to (1, n, V)
    map: LogitMap
    vocab: int
    temperature: float | Tensor
    chunk_size: int | None
    impl: str

    def stats(self, targets: Tensor, *, ignore_index: int, entropy: bool = False) -> TokenStats:
        return self._stats(targets, ignore_index, entropy, lse_has_slope=False)

    def loss(
        self, loss_fn: LossFunction, targets: Tensor, *side_inputs: Tensor,
        ignore_index: int, groups: Tensor | None = None, entropy: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """All tokens in one chunk, of which only the statistics are held."""
        order = live_rows(targets.reshape(-1), ignore_index)
        if order.shape[0] == 0:
            return self.logits(order).sum(), {}
        if groups is not None:
            order, _ = order_by_group(order, groups.reshape(-1))
        found = self._stats(targets, ignore_index, entropy, lse_has_slope=True)

        def ordered(x: Tensor) -> Tensor:
            return x.reshape(-1)[order]

        stats = ChunkStats(
            ordered(found.logprob),
            None if found.entropy is None else ordered(found.entropy),
            ordered(found.lse),
            None if groups is None else ordered(groups),
        )
        with exact(self.hidden):
            loss, aux = check_loss(loss_fn(stats, *map(ordered, side_inputs)))
        return loss.to(found.logprob.dtype), {name: x.detach() for name, x in aux.items()}

    def logits(self, rows: Tensor) -> Tensor:
        logits = self.own(self._rows(rows).unsqueeze(0))[0]
        return self.map(logits.to(accumulation_dtype(logits.dtype)))

    def mean_logits(self, rows: Tensor) -> Tensor:
        def means(some: Tensor) -> Tensor:
            return self.logits(some).mean(-1)

        return torch.cat(in_chunks(means, rows, self._chunk) or [means(rows)])

    @property
    def _chunk(self) -> int:
        return checked_chunk(self.chunk_size, self.vocab, self.hidden.device)

    def _rows(self, rows: Tensor) -> Tensor:
        return self.hidden.reshape(-1, self.hidden.shape[-1])[rows]

    def _stats(
        self, targets: Tensor, ignore_index: int, entropy: bool, *, lse_has_slope: bool
    ) -> TokenStats:
        flat, temperatures = targets.reshape(-1), None
        if isinstance(self.temperature, Tensor):
            temperatures = self.temperature.expand(targets.shape).reshape(-1)

        def score(rows: Tensor) -> TokenStats:
            logits = self.logits(rows)
            temperature = self.temperature if temperatures is None else temperatures[rows]
            stats = token_stats(
                logits, flat[rows], entropy=entropy, impl=self.impl, ignore_index=ignore_index,
                temperature=temperature,
            )  # fmt: skip
            if not lse_has_slope:
                return stats
            if isinstance(temperature, Tensor):
                temperature = temperature.unsqueeze(-1)
            return stats._replace(lse=(logits / temperature).logsumexp(-1))

        rows = live_rows(flat, ignore_index)
        # Without any token too, so that the parameters of the head have a gradient, of zeros.
        parts = in_chunks(score, rows, self._chunk) or [score(rows)]
        dtype = accumulation_dtype(self.hidden.dtype)

        def whole(values: list[Tensor]) -> Tensor:
            zeros = self.hidden.new_zeros(flat.shape, dtype=dtype)
            return zeros.index_put((rows,), torch.cat(values).to(dtype)).view(targets.shape)

        entropies = [part.entropy for part in parts if part.entropy is not None]
        return TokenStats(
            whole([part.logprob for part in parts]),
            whole(entropies) if entropy else None,
            whole([part.lse for part in parts]),
        )
