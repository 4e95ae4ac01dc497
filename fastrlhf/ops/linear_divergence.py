"""Exact divergences over the vocabulary from the hidden states of two models: no logits are built.

A block of tokens at a time, both heads make their logits, and the divergence is read from them. The
gradient of a token's value with respect to its hidden state is a vector that the forward can keep,
whatever comes of the value; where a head is trained too, backward makes the logits again.

Dims: N tokens, n tokens of the mask, H hidden (of each model its own), V vocabulary.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastrlhf.reference import cap_slope, capped_logits

from .backend import (
    check_impl,
    outside_of_graphs,
    refuse_second_derivative,
    refuse_transforms,
    under_transform,
)
from .checks import check_same_device, check_shape
from .divergence import (
    Measure,
    checked_measure,
    checked_rows,
    definition,
    divergence_backward_into,
)
from .head_gradients import Gradients, LogitGradient, as_operands, padded_rows
from .linear_arguments import (
    check_head,
    checked_chunk,
    exact,
    full_logits,
    matmul_dtype,
    wanted_or_detached,
)
from .linear_head import Head, Weight
from .linear_plans import Room, room_for_slopes
from .linear_rows import even_spans, live_rows
from .transform import Transform, check_factor, checked_transform


class _Side(NamedTuple):
    """One model: hidden states (N, H), the head, and what of them needs a gradient."""

    hidden: Tensor
    head: Head
    wants_hidden: bool
    wants_weight: bool
    wants_bias: bool

    @property
    def trained(self) -> bool:
        return self.wants_weight or self.wants_bias

    def logits(self, rows: Tensor) -> Tensor:
        return self.head.logits(self.hidden[rows].to(self.head.operands))


class _Options(NamedTuple):
    measure: Measure
    temperature: float
    caps: tuple[float | None, float | None]  # of the two sides
    scales: tuple[float, float]
    chunk: int
    impl: str
    dtypes: tuple[torch.dtype, torch.dtype]  # of the matmuls of the two sides

    @property
    def one_transform(self) -> bool:
        """Whether both sides scale and cap alike, as the kernel takes it."""
        return self.caps[0] == self.caps[1] and self.scales[0] == self.scales[1]


def linear_kl_divergence(
    hidden: Tensor,
    weight: Weight,
    ref_hidden: Tensor,
    ref_weight: Weight,
    *,
    direction: str = "reverse",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    beta: float = 0.5,
    softcap: float | None = None,
    scale: float = 1.0,
    ref_softcap: float | Literal["same"] | None = "same",
    ref_scale: float | Literal["same"] = "same",
    chunk_size: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute `kl_divergence` of two models from their hidden states and heads.

    Eager equivalent: `kl_divergence(F.linear(hidden, weight, bias), F.linear(ref_hidden,
    ref_weight, ref_bias), ...)`.

    Args:
        hidden: (..., H) of the policy.
        weight: (V, H) of the policy's head, of the same dtype.
        ref_hidden: (..., H') of the reference, whose width may differ.
        ref_weight: (V, H').
        direction, mask, temperature, beta, impl: as `kl_divergence`.
        bias, ref_bias: (V,) or None.
        softcap, scale: of the logits, as `token_stats`.
        ref_softcap, ref_scale: of the reference's; "same": those of the policy. Of two models,
            `**head.options()` and `**ref_head.options("ref_")` give all six.
        chunk_size: tokens whose logits are held at a time; None: as many as fill 512 MiB in fp32
            with those of each side (64 MiB on a CPU).

    Returns:
        (...) in nats, fp32 (fp64 if a side is).

    Differentiable, once, with respect to hidden, weight and bias of both sides. Under `torch.func`
    (grad, vmap, jvp, ...) and forward-mode differentiation, all logits are built, and it can be
    differentiated at will.

    Cost, in matmuls G of one head with the tokens of the mask (others cost none): 2G for the
    values, 1G more for each side whose hidden states alone need a gradient. Where a head needs one,
    backward makes both logits again: 2G, and 1G each for hidden states and weight. Memory: two
    blocks of logits (and one of slopes for each softcap, where the sides differ in softcap or
    scale); on CUDA their gradients in 16 bits, as with `linear_token_stats`; a (..., H) tensor kept
    for each side whose hidden states need a gradient, in their dtype, but fp32 for fp16. On a GPU,
    the count of tokens is awaited once.

    Raises:
        TypeError, ValueError: as `linear_token_stats` and `kl_divergence`.

    Source: 2306.13649 (GKD).
    """
    check_head(hidden, [weight], bias)
    check_head(ref_hidden, [ref_weight], ref_bias, prefix="ref_")
    check_shape("ref_hidden", ref_hidden[..., 0], tuple(hidden.shape[:-1]), "that of hidden but H")
    check_same_device("ref_hidden", ref_hidden, "hidden", hidden)
    if weight.shape[0] != ref_weight.shape[0]:
        raise ValueError(
            f"ref_weight: expected {weight.shape[0]} rows, the vocabulary of weight, got "
            f"{ref_weight.shape[0]}"
        )
    mask = checked_rows(mask, hidden, "hidden")
    check_impl(impl)
    transform = checked_transform(temperature, softcap, scale, mask)
    ref_cap = transform.softcap
    if ref_softcap != "same":
        ref_cap = None if ref_softcap is None else check_factor("ref_softcap", ref_softcap)
    ref_factor = transform.scale if ref_scale == "same" else check_factor("ref_scale", ref_scale)
    options = _Options(
        checked_measure(direction, beta), transform.temperature,
        (transform.softcap, ref_cap), (transform.scale, ref_factor),
        checked_chunk(chunk_size, weight.shape[0], hidden.device), impl,
        (matmul_dtype(hidden), matmul_dtype(ref_hidden)),
    )  # fmt: skip
    if under_transform():
        with exact(hidden):
            logits = full_logits(hidden, weight, bias, mask, options.dtypes[0])
            ref_logits = full_logits(ref_hidden, ref_weight, ref_bias, mask, options.dtypes[1])
            if not options.one_transform:
                logits, ref_logits = (
                    capped_logits(x, cap, factor)
                    for x, cap, factor in zip(
                        (logits, ref_logits), options.caps, options.scales, strict=True
                    )
                )
                transform = transform._replace(softcap=None, scale=1.0)
            return definition(logits, ref_logits, mask, transform, options.measure)
    tensors = (
        hidden.to(options.dtypes[0]), weight, bias,
        ref_hidden.to(options.dtypes[1]), ref_weight, ref_bias,
    )  # fmt: skip
    values = outside_of_graphs(_LinearDivergence.apply)(
        options, mask, transform.token_temperature, *wanted_or_detached(*tensors)
    )
    return values.view(mask.shape)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, mask, token_temperature, *tensors):
        sides = _sides(options, tensors, ctx.needs_input_grad[3:])
        order = live_rows(mask.reshape(-1).to(torch.int64), 0)
        slopes = [
            room_for_slopes(side.hidden, alone=True) if _keeps_slope(side) else None
            for side in sides
        ]
        sums = torch.promote_types(sides[0].head.sums, sides[1].head.sums)
        values = torch.zeros(mask.numel(), dtype=sums, device=mask.device)
        with exact(sides[0].hidden):
            for first, last in even_spans(order.shape[0], options.chunk):
                rows = order[first:last]
                block = _Block(options, sides, rows, token_temperature)
                values[rows] = block.values
                for i, (side, slope) in enumerate(zip(sides, slopes, strict=True)):
                    if slope is not None:
                        ones = torch.ones_like(block.values)
                        d_logits = block.d_logits(i, ones, side.head.room)
                        slope[rows] = side.head.pull_back(d_logits).to(slope.dtype)
        ctx.options = options
        ctx.codes = [None if isinstance(x, Tensor) else x for x in tensors]
        dense = [x if isinstance(x, Tensor) else None for x in tensors]
        ctx.save_for_backward(mask, order, token_temperature, *dense, *slopes)
        return values

    @staticmethod
    def backward(ctx, d_values):
        refuse_second_derivative("linear_kl_divergence", "kl_divergence")
        refuse_transforms("linear_kl_divergence's backward", "kl_divergence", d_values)
        mask, order, token_temperature, *rest = ctx.saved_tensors
        dense, slopes = rest[:6], rest[6:]
        tensors = [code or x for code, x in zip(ctx.codes, dense, strict=True)]
        sides = _sides(ctx.options, tensors, ctx.needs_input_grad[3:])
        found = [
            Gradients(
                side.head,
                order.shape[0],
                torch.zeros_like(side.hidden) if side.trained and side.wants_hidden else None,
                [side.wants_weight],
                side.wants_bias,
            )
            for side in sides
        ]
        if any(side.trained for side in sides):
            with exact(sides[0].hidden):
                for first, last in even_spans(order.shape[0], ctx.options.chunk):
                    rows = order[first:last]
                    block = _Block(ctx.options, sides, rows, token_temperature)
                    for i, side in enumerate(sides):
                        if side.trained:
                            d_logits = block.d_logits(i, d_values[rows], found[i].room)
                            hidden = side.hidden[rows].to(side.head.operands)
                            found[i].add(rows, hidden, d_logits)
        gradients: list[Tensor | None] = []
        for i in range(2):
            hidden, weight, bias = tensors[3 * i : 3 * i + 3]
            with exact(sides[0].hidden):
                d_hidden, d_bias, d_weight = found[i].totals(hidden, bias, [weight])
            if slopes[i] is not None:
                upstream = torch.where(mask.reshape(-1), d_values, 0.0).unsqueeze(1)
                d_hidden = (slopes[i] * upstream).view(hidden.shape)
            for total, x in ((d_hidden, hidden), (d_weight, weight), (d_bias, bias)):
                gradients.append(None if total is None else total.to(x.dtype))
        return None, None, None, *gradients


class _Block:
    """The logits of both models on some tokens, and their divergence."""

    def __init__(
        self,
        options: _Options,
        sides: list[_Side],
        rows: Tensor,
        token_temperature: Tensor | None,
    ):
        logits = [side.logits(rows) for side in sides]
        cap, scale = options.caps[0], options.scales[0]
        # Where the two differ, the kernel gets logits that are scaled and capped already.
        self.slopes: list[Tensor | float] = [1.0, 1.0]
        if not options.one_transform:
            for i in range(2):
                self.slopes[i] = _transform(logits[i], options.caps[i], options.scales[i])
            cap, scale = None, 1.0
        self.swapped, share = options.measure
        self.pair = logits[::-1] if self.swapped else logits
        self.mask = torch.ones_like(rows, dtype=torch.bool)
        if token_temperature is not None:
            token_temperature = token_temperature.reshape(-1)[rows]
        self.transform = Transform(token_temperature, options.temperature, cap, scale)
        self.share, self.impl = share, options.impl
        self.operands = [side.head.operands for side in sides]
        self.sums = [side.head.sums for side in sides]
        self.values, self.stats = torch.ops.fastrlhf.divergence(
            *self.pair, self.mask, *self.transform, share, options.impl
        )

    def d_logits(self, side: int, d_values: Tensor, room: Room) -> LogitGradient:
        """Compute the gradient with respect to the logits of a side, as operands of its matmuls."""
        of_p, (logits_p, logits_q) = (side == 0) != self.swapped, self.pair
        slope, operands = self.slopes[side], self.operands[side]
        unscaled = isinstance(slope, float) and slope == 1.0
        there = None if operands == self.sums[side] else room(len(d_values))
        # fp16 is rounded to once the size of each row is known.
        if there is not None and unscaled and operands != torch.float16:
            out = there
        else:
            out = padded_rows(len(d_values), logits_p.shape[1], self.sums[side], d_values.device)
        divergence_backward_into(
            out, logits_p, logits_q, self.mask, self.stats, d_values.to(self.values.dtype),
            self.transform, self.share, of_p, self.impl,
        )  # fmt: skip
        if not unscaled:
            out.mul_(slope)
        return as_operands(out, operands, there)


def _transform(logits: Tensor, softcap: float | None, scale: float) -> Tensor | float:
    """Scale and cap logits where they are, and return the slope of that."""
    if softcap is None:
        logits.mul_(scale)
        return scale
    slope = cap_slope(logits, softcap, scale).mul_(scale)
    logits.mul_(scale / softcap).tanh_().mul_(softcap)
    return slope


def _sides(options: _Options, tensors, wanted) -> list[_Side]:
    """The policy and the reference."""
    sides = []
    for i, dtype in enumerate(options.dtypes):
        hidden, weight, bias = tensors[3 * i : 3 * i + 3]
        head = Head([weight], bias, dtype)
        sides.append(_Side(hidden.reshape(-1, hidden.shape[-1]), head, *wanted[3 * i : 3 * i + 3]))
    return sides


def _keeps_slope(side: _Side) -> bool:
    return side.wants_hidden and not side.trained
