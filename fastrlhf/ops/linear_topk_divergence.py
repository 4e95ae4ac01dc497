"""`topk_kl_divergence` from the student's hidden states.

It is the divergence of a student from a teacher of which only the likeliest words are known. The
student's logits are built for one block of tokens at a time. The formulas are those of
`topk_divergence.py`. `value_gradients.py` says which gradients are computed with the values, and
when the backward has to make the logits again. G is the cost of one matmul of tokens × hidden ×
vocabulary.

Dims: N tokens, n tokens of the mask, k words, H hidden, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, autograd

from .backend import (
    backend_of,
    check_impl,
    outside_of_graphs,
    refuse_second_derivative,
    refuse_transforms,
    under_transform,
    wanted_or_detached,
)
from .bucket_divergence import BucketMeasure, bucket_divergence
from .bucket_logits import bucket_logits, write_bucket_gradient
from .head_gradients import Gradients, LogitGradient, as_operands
from .linear_arguments import check_head, checked_chunk
from .linear_definition import full_logits
from .linear_head import Head, Weight
from .linear_plans import Room, room_for_slopes
from .linear_precision import exact, matmul_dtype
from .linear_rows import even_spans, live_rows
from .logits_arguments import checked_rows
from .sharded import is_dtensor
from .teacher_words import TeacherWords, checked_words
from .topk_divergence import Direction, divergence_by_definition
from .transform import Transform, check_temperatures_on_host, checked_transform
from .value_gradients import ValueGradients, weigh_alike


class _Options(NamedTuple):
    measure: BucketMeasure
    transform: Transform
    chunk: int
    impl: str
    dtype: torch.dtype  # of the matmuls


def linear_topk_kl_divergence(
    hidden: Tensor,
    weight: Weight,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    *,
    direction: Direction = "forward",
    tail: bool = True,
    renormalize: bool = False,
    beta: float = 0.5,
    skew: float = 0.1,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute `topk_kl_divergence` of a student from its hidden states and head.

    Eager equivalent: `topk_kl_divergence(F.linear(hidden, weight, bias), teacher_logprobs,
    teacher_ids, ...)`.

    Args:
        hidden: (..., H) of the student.
        weight: (V, H) of its head, of the same dtype.
        teacher_logprobs, teacher_ids, direction, tail, renormalize, beta, skew, mask, temperature:
            as `topk_kl_divergence`.
        bias: (V,) or None.
        softcap, scale, impl: as `token_stats`.
        chunk_size: tokens whose logits are held at a time; None: as many as fill 512 MiB in fp32
            (64 MiB on a CPU).

    Returns:
        (...) in nats, fp32 (fp64 for fp64 hidden states).

    Differentiable, once, with respect to hidden, weight and bias. Under `torch.func` (grad, vmap,
    jvp, ...) and forward-mode differentiation, all logits are built, and it can be differentiated
    at will.

    Cost, in matmuls G of the tokens of the mask (others cost none): G for the values, 2G where
    hidden or weight needs a gradient, 3G where both do. The gradient of the head is computed along
    with the values, for a loss that gives all of them the same weight, as a sum or a mean does. For
    another loss, the backward makes the logits again: G, and 1G for the weight. Memory: a block of
    logits; on CUDA their gradient in 16 bits, as with `linear_token_stats`; a (..., H) tensor kept
    where hidden needs a gradient, in its dtype, but fp32 for fp16, and an fp32 (V, H) tensor where
    weight does. On a GPU, the host waits once for the count of tokens, and where the head is
    trained, in the backward to learn whether values have the same weight.

    Raises:
        TypeError, ValueError: as `linear_token_stats` and `topk_kl_divergence`.

    Source: as `topk_kl_divergence`.

    Example:
        >>> hidden, weight = torch.ones(1, 4, requires_grad=True), torch.zeros(8, 4)
        >>> teacher = torch.tensor([[0.6, 0.3]]).log(), torch.tensor([[3, 5]])  # log-probs, ids
        >>> divergence = fastrlhf.linear_topk_kl_divergence(hidden, weight, *teacher)
        >>> divergence.detach()
        tensor([1.0023])
        >>> divergence.sum().backward()
    """
    for name, x in (("hidden", hidden), ("weight", weight)):
        if is_dtensor(x):
            raise TypeError(f"{name}: expected a tensor, got a DTensor, which is not served here")
    check_head(hidden, [weight], bias)
    measure = BucketMeasure(direction, tail, renormalize, beta, skew).checked()
    mask = checked_rows(mask, hidden, "hidden")
    words = checked_words(teacher_logprobs, teacher_ids, mask, weight.shape[0])
    transform = checked_transform(temperature, softcap, scale, mask)
    check_temperatures_on_host(transform.token_temperature, mask)
    check_impl(impl)
    dtype, keep = matmul_dtype(hidden), mask.reshape(-1)
    options = _Options(
        measure, transform.flat(dtype), checked_chunk(chunk_size, weight.shape[0], hidden.device),
        backend_of(impl, hidden, mask.numel() * weight.shape[0]), dtype,
    )  # fmt: skip
    if under_transform():
        with exact(hidden):
            logits = full_logits(hidden, weight, bias, mask, dtype)
            values = divergence_by_definition(logits, words, keep, transform, measure)
        return values.view(mask.shape)
    values = outside_of_graphs(_LinearTopkDivergence.apply)(
        options, words, keep, *wanted_or_detached(hidden.to(dtype), bias, weight)
    )
    return values.view(mask.shape)


class _LinearTopkDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, words, keep, hidden, bias, weight):
        wants_hidden, *wants_head = ctx.needs_input_grad[3:]
        blocks = _Blocks(options, words, hidden, bias, weight)
        order = live_rows(keep.to(torch.int64), 0)
        slopes = room_for_slopes(blocks.hidden, alone=True) if wants_hidden else None
        of_sum = blocks.gradients(order.shape[0], *wants_head) if any(wants_head) else None
        finished = ValueGradients(blocks.head, blocks.hidden, slopes, of_sum)
        values = torch.zeros(keep.shape, dtype=blocks.head.sums, device=keep.device)
        with exact(hidden):
            for first, last in even_spans(order.shape[0], options.chunk):
                rows = order[first:last]
                if not finished.wanted:
                    values[rows] = blocks.values(rows)
                    continue
                values[rows], d_logits = blocks.values_and_gradient(rows, None, finished.room)
                finished.add(rows, d_logits)
            of_head = finished.of_head(bias, [weight])
        ctx.options, ctx.words, ctx.hidden_shape = options, words, hidden.shape
        ctx.codes = None if isinstance(weight, Tensor) else weight
        dense = weight if isinstance(weight, Tensor) else None
        ctx.save_for_backward(keep, order, hidden, bias, dense, slopes, *of_head)
        return values

    @staticmethod
    def backward(ctx, d_values):
        refuse_second_derivative("linear_topk_kl_divergence", "topk_kl_divergence")
        refuse_transforms("linear_topk_kl_divergence's backward", "topk_kl_divergence", d_values)
        keep, order, hidden, bias, dense, slopes, *of_head = ctx.saved_tensors
        weight = dense if ctx.codes is None else ctx.codes
        upstream = torch.where(keep, d_values, 0.0)
        d_hidden, of_rows = None, upstream[order]
        if slopes is not None:
            d_hidden = (slopes * upstream.unsqueeze(1)).to(hidden.dtype).view(ctx.hidden_shape)
        wants_head = ctx.needs_input_grad[4:]
        if any(wants_head) and of_rows.numel():
            if weigh_alike(of_rows):
                of_head = [None if total is None else total * of_rows[0] for total in of_head]
            else:
                blocks = _Blocks(ctx.options, ctx.words, hidden, bias, weight)
                of_head = _recomputed(blocks, order, of_rows, wants_head, bias, weight)
        d_bias, d_weight = (
            None if total is None else total.to(x.dtype)
            for total, x in zip(of_head, (bias, weight), strict=True)
        )
        return None, None, None, d_hidden, d_bias, d_weight


def _recomputed(
    blocks: "_Blocks",
    order: Tensor,
    d_values: Tensor,
    wants_head: tuple[bool, bool],
    bias: Tensor | None,
    weight: Any,
) -> list[Tensor | None]:
    """Compute the gradients of bias and weight from logits that are made again, given the upstream
    gradients (n,) of the values.
    """
    gradients = blocks.gradients(order.shape[0], *wants_head)
    with exact(blocks.hidden):
        for first, last in even_spans(order.shape[0], blocks.options.chunk):
            rows = order[first:last]
            _, d_logits = blocks.values_and_gradient(rows, d_values[first:last], gradients.room)
            gradients.add(rows, blocks.operands(rows), d_logits)
        return gradients.totals(blocks.hidden, bias, [weight])[1:]


class _Blocks:
    """The student's logits of some tokens at a time, and what is computed of them."""

    def __init__(
        self,
        options: _Options,
        words: TeacherWords,
        hidden: Tensor,
        bias: Tensor | None,
        weight: Any,
    ):
        self.options, self.words = options, words
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.head = Head([weight], bias, options.dtype)

    def gradients(self, rows: int, bias: bool, weight: bool) -> Gradients:
        return Gradients(self.head, rows, None, [weight], bias)

    def operands(self, rows: Tensor) -> Tensor:
        return self.hidden[rows].to(self.head.operands)

    def values(self, rows: Tensor) -> Tensor:
        """Compute the divergence (n,) of some tokens."""
        return self._scored(rows)[0]

    def values_and_gradient(
        self, rows: Tensor, d_values: Tensor | None, room: Room
    ) -> tuple[Tensor, LogitGradient]:
        """Compute the divergence (n,) of some tokens, and the gradient of its sum, weighted by
        d_values (n,) if given, with respect to their logits, in the dtype of the matmuls.
        """
        values, buckets, logits, stats = self._scored(rows, grad=True)
        upstream = torch.ones_like(values) if d_values is None else d_values.to(values)
        (d_buckets,) = autograd.grad(values, buckets, upstream)
        operands = self.head.operands
        rounded = room(len(rows)) if operands != logits.dtype else None
        # The gradient can be written in the operands' dtype at once, except in fp16, to which it is
        # rounded when the largest number of each row is known.
        out = logits if rounded is None or operands == torch.float16 else rounded
        write_bucket_gradient(
            out, logits, self.words.ids[rows], torch.ones_like(rows, dtype=torch.bool), stats,
            d_buckets, self._transform(rows), self.options.impl,
        )  # fmt: skip
        return values.detach(), as_operands(out, operands, rounded)

    def _transform(self, rows: Tensor) -> Transform:
        transform = self.options.transform
        tokens = transform.token_temperature
        return transform if tokens is None else transform._replace(token_temperature=tokens[rows])

    def _scored(
        self, rows: Tensor, *, grad: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return the values (n,), the buckets that they were computed from, the logits, and the
        peak and log_norm of the other words.
        """
        logits, words = self.head.logits(self.operands(rows)), self.words.at(rows)
        whole_block, impl = torch.ones_like(rows, dtype=torch.bool), self.options.impl
        buckets, *stats = bucket_logits(
            logits, words.ids, whole_block, self._transform(rows), impl=impl
        )
        with torch.set_grad_enabled(grad):
            buckets = buckets.detach().requires_grad_(grad)
            values = bucket_divergence(
                buckets, words.buckets(buckets), whole_block, self.options.measure, impl
            )
        return values, buckets, logits, (stats[0], stats[1])
