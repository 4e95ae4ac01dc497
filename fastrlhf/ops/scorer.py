"""What a loss asks of a head: the statistics of its tokens, or the loss and its gradient at once.

A loss is written once, for anything that scores tokens: hidden states and a weight that somebody
has at hand (`LinearScorer`), or what enters the head in the middle of a model's forward (the
scorers of `fastrlhf/hf/` and `fastrlhf/lazy/`). The losses of `fastrlhf/losses/` that take hidden
states make a scorer by `linear_scorer`, and then ask nothing but its methods.

Dims: K width of the hidden states, V vocabulary.
"""

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastrlhf.reference import Layout, TokenStats, accumulation_dtype, capped_logits

from .backend import under_transform
from .checks import check_integer
from .kept_ids import Support
from .keywords import Unpack
from .layout import layout_of
from .linear_arguments import check_head, checked_problem
from .linear_head import Weight
from .linear_loss import LossFunction, loss_of
from .linear_precision import exact, matmul_dtype
from .linear_problem import LinearInputs, LinearProblem
from .linear_question import QuestionKeywords, TokenQuestion
from .linear_rows import even_spans
from .linear_token_stats import token_stats_of
from .ranks import Group
from .sharded import head_part, replicated
from .tracing import replaced
from .transform import temperatures_of_layout

Result = TypeVar("Result")


class Scorer(Protocol):
    """Scores targets (...) by the hidden states (..., K) that it holds.

    The tokens whose target is `ignore_index` cost nothing, and may hold anything.
    """

    @property
    def hidden(self) -> Tensor: ...

    @property
    def vocab(self) -> int: ...

    @property
    def temperature(self) -> float | Tensor: ...

    @property
    def chunk_size(self) -> int | None: ...

    @property
    def impl(self) -> str: ...

    def stats(
        self, targets: Tensor, *, ignore_index: int, entropy: bool = False,
        entropy_grad: bool = True, with_stats: Iterable[str] = (), lse: bool = True,
    ) -> TokenStats:  # fmt: skip
        """Compute statistics as `linear_token_stats` does. `lse`: whether the caller uses it."""

    def loss(
        self, loss_fn: LossFunction, targets: Tensor, *side_inputs: Tensor,
        ignore_index: int, groups: Tensor | None = None, entropy: bool = False,
        with_stats: Iterable[str] = (), lse: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Compute a loss and its gradient, as `linear_loss` does. `with_stats` names further
        statistics that the loss sees, of which `mean_logit` is differentiable; `lse` says whether
        it uses the lse.
        """

    def logits(self, rows: Tensor) -> Tensor:
        """Compute the logits (n, V) of some hidden states, numbered as if flat: in fp32 or fp64,
        scaled and capped, but without temperature; differentiable.
        """


class LinearScorer(LinearInputs):
    """A weight, in column blocks, applied to hidden states."""

    __slots__ = ()

    def problem(
        self, targets: Tensor, *, ignore_index: int, **question: Unpack[QuestionKeywords]
    ) -> LinearProblem:
        return checked_problem(self, targets, TokenQuestion(ignore_index, **question))

    def stats(
        self, targets: Tensor, *, ignore_index: int, **question: Unpack[QuestionKeywords]
    ) -> TokenStats:
        return token_stats_of(self.problem(targets, ignore_index=ignore_index, **question))

    def loss(
        self, loss_fn: LossFunction, targets: Tensor, *side_inputs: Tensor,
        ignore_index: int, groups: Tensor | None = None, **question: Unpack[QuestionKeywords],
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        problem = self.problem(targets, ignore_index=ignore_index, **question)
        return loss_of(problem, loss_fn, side_inputs, groups)

    def logits(self, rows: Tensor) -> Tensor:
        dtype = self.dtype or matmul_dtype(self.hidden)
        sums = accumulation_dtype(dtype)
        hidden = self._rows(rows).to(dtype)
        with exact(hidden):
            parts = [
                of_block.to(sums) @ weight[0 : weight.shape[0]].to(dtype).to(sums).T
                for of_block, weight in zip(self._blocks(hidden), self.weights, strict=True)
            ]
            made = reduce(torch.add, parts)
            if self.bias is not None:
                made = made + self.bias.to(sums)
            return capped_logits(made, self.softcap, self.scale)

    def _rows(self, rows: Tensor) -> Tensor:
        return self.hidden.reshape(-1, self.hidden.shape[-1])[rows]

    def _blocks(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """The columns of each block of the weight."""
        return hidden.split([weight.shape[1] for weight in self.weights], dim=-1)


def linear_scorer(
    hidden: Tensor,
    weight: Weight,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
    chunk_size: int | None,
    impl: str,
    group: Group | None,
    support: Support | None = None,
    rows: Tensor | None = None,
) -> LinearScorer:
    """Check a head and the group that shares its vocabulary, if any, and make a scorer of it.

    Raises:
        TypeError, ValueError: as `check_head` and `head_part`.
    """
    head = head_part(hidden, [weight], bias, group)
    check_head(head.hidden, head.weights, head.bias, part=head.part)
    return LinearScorer(
        head.hidden, head.weights, head.bias, temperature, softcap, scale, chunk_size, impl,
        part=head.part, support=support, rows=rows,
    )  # fmt: skip


def laid_out(
    scorer: LinearScorer, targets: Tensor, cu_seqlens: Tensor | None
) -> tuple[LinearScorer, Tensor, Layout]:
    """Check the targets of sequences, in rows or packed, and give each token the temperature of its
    sequence.
    """
    targets = replicated("targets", targets)
    check_integer("targets", targets)
    layout = layout_of("targets", targets, cu_seqlens)
    temperature = temperatures_of_layout(scorer.temperature, targets, layout)
    return replaced(scorer, temperature=temperature), targets, layout


def in_chunks(function: Callable[[Tensor], Result], rows: Tensor, size: int) -> list[Result]:
    """Apply a function to some rows at a time, in backward once more, so that no more logits than
    of a chunk are held. To no rows, once too: parameters have a gradient, of zeros, and processes
    that share them make as many calls.
    """
    again = torch.is_grad_enabled() and not under_transform()
    return [
        checkpoint(function, rows[first:last], use_reentrant=False)
        if again
        else function(rows[first:last])
        for first, last in even_spans(rows.shape[0], size) or [(0, 0)]
    ]
