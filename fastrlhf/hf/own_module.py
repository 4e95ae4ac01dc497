"""Score tokens by the logits that a head's own module makes, where its matrix cannot be read.

This is done for a chunk of the scored tokens at a time, so that only the logits of one chunk are
held. The backward makes them again.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops.kept_ids import Support, some_of_support
from fastrlhf.ops.kept_stats import KeptQuestion
from fastrlhf.ops.linear_arguments import checked_chunk
from fastrlhf.ops.linear_loss import ChunkStats, LossFunction, check_loss
from fastrlhf.ops.linear_precision import exact
from fastrlhf.ops.linear_rows import live_rows, order_by_group
from fastrlhf.ops.scorer import in_chunks
from fastrlhf.ops.sharded import LogitsPart
from fastrlhf.ops.taken_logits import kept_stats_of_logits
from fastrlhf.ops.token_stats import token_stats
from fastrlhf.ops.transform import checked_transform
from fastrlhf.reference import TokenStats, accumulation_dtype, stats_tuple

from .logit_map import LogitMap


class ModuleScorer(NamedTuple):
    """A `Scorer` that calls the forward of a head's module, and applies the model's map to its
    logits.
    """

    hidden: Tensor  # (B, T, H)
    head_forward: Callable[..., Tensor]  # from (1, n, H) to (1, n, V)
    map: LogitMap
    vocab: int
    temperature: float | Tensor
    chunk_size: int | None
    impl: str
    support: Support | None = None  # the ids to which tokens are restricted
    rows: Tensor | None = None  # (B, T) which of the flattened hidden states predicts each token

    def stats(
        self, targets: Tensor, *, ignore_index: int, entropy: bool = False,
        entropy_grad: bool = True, with_stats: Iterable[str] = (), lse: bool = True,
    ) -> TokenStats:  # fmt: skip
        with_stats = tuple(with_stats)
        rows = live_rows(targets.reshape(-1), ignore_index)
        scored = self._scored(
            targets, rows, ignore_index, entropy, entropy_grad=entropy_grad, with_stats=with_stats
        )

        def of_all(values: Tensor | None) -> Any:
            if values is None:
                return None
            zeros = values.new_zeros(targets.numel())
            return zeros.index_put((rows,), values).view(targets.shape)

        entropies = scored.entropy
        if entropies is not None and not entropy_grad:
            entropies = entropies.detach()
        further = {name: of_all(getattr(scored, name)) for name in with_stats}
        further = {name: x.detach() for name, x in further.items()}
        return stats_tuple(
            of_all(scored.logprob), of_all(entropies), of_all(scored.lse).detach(), further
        )  # fmt: skip

    def loss(
        self, loss_fn: LossFunction, targets: Tensor, *side_inputs: Tensor,
        ignore_index: int, groups: Tensor | None = None, entropy: bool = False,
        with_stats: Iterable[str] = (), lse: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Call the loss once, on the statistics of all tokens. These are held, logits are not."""
        order = live_rows(targets.reshape(-1), ignore_index)
        if groups is not None:
            order, _ = order_by_group(order, groups.reshape(-1))
            groups = groups.reshape(-1)[order]
        scored = self._scored(
            targets, order, ignore_index, entropy, of_loss=True, with_stats=with_stats
        )
        if order.shape[0] == 0:
            return scored.logprob.sum(), {}
        sides = (x.reshape(-1)[order] for x in side_inputs)
        with exact(self.hidden):
            loss, aux = check_loss(loss_fn(scored._replace(groups=groups), *sides))
        return loss.to(scored.logprob.dtype), {name: x.detach() for name, x in aux.items()}

    def logits(self, rows: Tensor) -> Tensor:
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])[rows]
        logits = self.head_forward(hidden.unsqueeze(0))[0]
        return self.map(logits.to(accumulation_dtype(logits.dtype)))

    def _scored(
        self, targets: Tensor, rows: Tensor, ignore_index: int, entropy: bool,
        *, of_loss: bool = False, entropy_grad: bool = True, with_stats: Iterable[str] = (),
    ) -> ChunkStats:  # fmt: skip
        """Compute the statistics of some tokens, given by their numbers among all flattened tokens.
        With `of_loss`, the lse and the mean logit are differentiable.
        """
        flat, temperatures = targets.reshape(-1), None
        with_stats = tuple(with_stats)
        if isinstance(self.temperature, Tensor):
            temperatures = self.temperature.expand(targets.shape).reshape(-1)

        def score(some: Tensor) -> ChunkStats:
            logits = self.logits(some if self.rows is None else self.rows.reshape(-1)[some])
            temperature = self.temperature if temperatures is None else temperatures[some]
            if self.support is not None:
                transform = checked_transform(temperature, None, 1.0, flat[some])
                question = KeptQuestion(
                    transform.flat(logits.dtype), entropy, with_stats, self.impl
                )
                kept = kept_stats_of_logits(
                    LogitsPart(logits, None, None), flat[some],
                    some_of_support(self.support, some), question, ignore_index=ignore_index,
                )  # fmt: skip
                return ChunkStats(**kept._asdict(), groups=None)
            stats = token_stats(
                logits, flat[some], entropy=entropy, entropy_grad=entropy_grad,
                with_stats=with_stats, impl=self.impl, ignore_index=ignore_index,
                temperature=temperature,
            )  # fmt: skip
            chunk = ChunkStats(**stats._asdict(), groups=None)
            if not of_loss:
                return chunk
            if isinstance(temperature, Tensor):
                temperature = temperature.unsqueeze(-1)
            chunk = chunk._replace(lse=(logits / temperature).logsumexp(-1))
            if chunk.mean_logit is not None:
                chunk = chunk._replace(mean_logit=(logits / temperature).mean(-1))
            return chunk

        size = checked_chunk(self.chunk_size, self.vocab, self.hidden.device)
        columns = zip(*in_chunks(score, rows, size), strict=True)
        fields: Any = (None if column[0] is None else torch.cat(column) for column in columns)
        return ChunkStats(*fields)
