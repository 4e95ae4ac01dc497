"""Exact divergences over the vocabulary from the hidden states of two models: no logits are built.

A block of tokens at a time, both heads make their logits, and the divergence is read from them. The
gradient of a token's value with respect to its hidden state is a vector that the forward can keep,
whatever comes of the value. That with respect to a head is a sum over tokens: it is computed along
with the values as if all weighed the same, as in a sum or a mean; if they turn out not to, backward
makes the logits again.

Dims: N tokens, n tokens of the mask, H hidden (of each model its own), V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from fastrlhf.reference import cap_slope, capped_logits

from .backend import (
    backend_of,
    check_impl,
    outside_of_graphs,
    refuse_second_derivative,
    refuse_transforms,
    under_transform,
    use_triton,
    wanted_or_detached,
)
from .checks import check_bool, check_same_device, check_shape
from .divergence import (
    Measure,
    checked_measure,
    definition,
    divergence_backward_into,
)
from .divergence_over_ranks import divergence_over_ranks
from .head_gradients import Gradients, LogitGradient, as_operands, padded_rows
from .keywords import Unpack
from .linear_arguments import check_head, checked_chunk
from .linear_definition import full_logits
from .linear_head import Head, Weight
from .linear_plans import Needs, Room, room_for_slopes
from .linear_precision import exact, matmul_dtype
from .linear_rows import even_spans, live_rows
from .logits_arguments import checked_rows
from .ranks import Group, all_reduced_rows, refuse_transforms_of_ranks
from .scorer import LinearScorer
from .sharded import head_part, same_head_part
from .stats_over_ranks import statistics_over_ranks
from .transform import Transform, check_factor, checked_transform
from .vocabulary_part import NOT_HERE, VocabularyPart, agreed_part, numbered


class _Side(NamedTuple):
    """One model: hidden states (N, H), the head, and what of them needs a gradient."""

    hidden: Tensor
    head: Head
    wants: Needs
    group: Group | None  # of ranks that share the vocabulary

    @property
    def trained(self) -> bool:
        return self.wants.head

    def gradients(self, rows: int, hidden: Tensor | None) -> Gradients:
        return Gradients(self.head, rows, hidden, self.wants.weights, self.wants.bias, self.group)

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
    blocks: tuple[int, int]  # column blocks of the weights of the two sides
    sum_expected: bool  # see `divergence_of`
    entropy: bool  # of ours is asked for
    part: VocabularyPart | None  # of a vocabulary that ranks share

    @property
    def one_transform(self) -> bool:
        """Whether both sides scale and cap alike, as the kernel takes it."""
        return self.caps[0] == self.caps[1] and self.scales[0] == self.scales[1]


class LinearKLOptions(TypedDict, total=False):
    """The keywords of `linear_kl_divergence`."""

    direction: str
    mask: Tensor | None
    bias: Tensor | None
    ref_bias: Tensor | None
    temperature: float | Tensor
    beta: float
    softcap: float | None
    scale: float
    ref_softcap: float | Literal["same"] | None
    ref_scale: float | Literal["same"]
    chunk_size: int | None
    impl: str
    group: Group | None


@overload
def linear_kl_divergence(
    hidden: Tensor,
    weight: Weight,
    ref_hidden: Tensor,
    ref_weight: Weight,
    *,
    entropy: Literal[False] = False,
    **options: Unpack[LinearKLOptions],
) -> Tensor: ...
@overload
def linear_kl_divergence(
    hidden: Tensor,
    weight: Weight,
    ref_hidden: Tensor,
    ref_weight: Weight,
    *,
    entropy: Literal[True],
    **options: Unpack[LinearKLOptions],
) -> tuple[Tensor, Tensor]: ...
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
    group: Group | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
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
        group: as `linear_token_stats`; both weights are cut alike. DTensors need none.
        entropy: return the policy's entropy too, from the same logits, at no matmul more.

    Returns:
        (...) in nats, fp32 (fp64 if a side is). With entropy (values, entropies), of which the
        second are (...) too, 0 outside of the mask, and not differentiable.

    Differentiable, once, with respect to hidden, weight and bias of both sides. Under `torch.func`
    (grad, vmap, jvp, ...) and forward-mode differentiation, all logits are built, and it can be
    differentiated at will; there is no entropy then.

    Cost, in matmuls G of one head with the tokens of the mask (others cost none): 2G for the
    values, and 1G more for each hidden and each weight that needs a gradient. That of a head is
    computed along with the values, for a loss that weighs all of them alike, as a sum or a mean
    does. For one that does not, backward makes both logits again: 2G, and 1G for each weight.
    Memory: two blocks of logits (and one of slopes for each softcap, where the sides differ in
    softcap or scale); on CUDA their gradients in 16 bits, as with `linear_token_stats`; a (..., H)
    tensor kept for each side whose hidden states need a gradient, in their dtype, but fp32 for
    fp16, and an fp32 (V, H) tensor for each weight that does. On a GPU, the count of tokens is
    awaited once, and where a head is trained, backward awaits whether values weigh alike. With a
    group, what is sent forward is as `kl_divergence` says, of the tokens of the mask; backward an
    all-reduce of the gradient of each hidden.

    Raises:
        TypeError, ValueError: as `linear_token_stats` and `kl_divergence`.
        RuntimeError: an entropy under `torch.func` transforms.

    Source: 2306.13649 (GKD).

    Example:
        >>> hidden, weight = torch.eye(2, requires_grad=True), torch.eye(2)
        >>> ref_hidden, ref_weight = torch.zeros(2, 3), torch.zeros(2, 3)  # of another width
        >>> divergence = fastrlhf.linear_kl_divergence(hidden, weight, ref_hidden, ref_weight)
        >>> divergence.mean().backward()
        >>> divergence.detach()
        tensor([0.1109, 0.1109])
    """
    check_bool("entropy", entropy)
    if entropy:
        refuse_transforms("linear_kl_divergence(entropy=True)", "linear_token_stats beside it")
    head = head_part(hidden, [weight], bias, group)
    ref_head = same_head_part(ref_hidden, [ref_weight], ref_bias, head.part, prefix="ref_")
    check_head(*head[:3], part=head.part)
    check_head(*ref_head[:3], prefix="ref_", part=head.part)
    check_impl(impl)
    transform = checked_transform(temperature, softcap, scale, head.hidden[..., 0])
    ref_cap, ref_factor = transform.softcap, transform.scale
    if ref_softcap != "same":
        ref_cap = None if ref_softcap is None else check_factor("ref_softcap", ref_softcap)
    if ref_scale != "same":
        ref_factor = check_factor("ref_scale", ref_scale)
    ours = LinearScorer(
        *head[:3], temperature, softcap, scale, chunk_size, impl, part=head.part
    )  # fmt: skip
    ref = LinearScorer(*ref_head[:3], 1.0, ref_cap, ref_factor, part=head.part)
    values, entropies = divergence_of(
        ours, ref, mask, direction=direction, beta=beta, sum_expected=True, entropy=entropy
    )
    return values if entropies is None else (values, entropies)


def divergence_of(
    ours: LinearScorer,
    ref: LinearScorer,
    mask: Tensor | None,
    *,
    direction: str,
    beta: float,
    sum_expected: bool,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute the divergence of each token (...) from what scores them; the options are ours. And
    if asked for, our entropy from the same logits, a value without gradient, 0 outside of the mask.

    `sum_expected`: compute the gradient of a trained head along with the values, for their sum.
    That saves the logits that backward would make again, 2G, and the weights need not be there any
    more, unless backward weighs the values differently.
    """
    hidden = ours.hidden
    check_shape("ref_hidden", ref.hidden[..., 0], tuple(hidden.shape[:-1]), "that of hidden but H")
    check_same_device("ref_hidden", ref.hidden, "hidden", hidden)
    if ours.vocab != ref.vocab:
        raise ValueError(
            f"ref_weight: expected {ours.vocab} rows, the vocabulary of weight, got {ref.vocab}"
        )
    rows, ref_rows = (side.weights[0].shape[0] for side in (ours, ref))
    if rows != ref_rows:
        raise ValueError(f"ref_weight: expected {rows} rows, as weight has here, got {ref_rows}")
    mask = checked_rows(mask, hidden, "hidden")
    transform = checked_transform(ours.temperature, ours.softcap, ours.scale, mask)
    options = _Options(
        checked_measure(direction, beta), transform.temperature,
        (transform.softcap, ref.softcap), (transform.scale, ref.scale),
        checked_chunk(ours.chunk_size, ours.most_columns, hidden.device),
        backend_of(ours.impl, hidden, mask.numel() * rows),
        (matmul_dtype(hidden), matmul_dtype(ref.hidden)),
        (len(ours.weights), len(ref.weights)), sum_expected, entropy, ours.part,
    )  # fmt: skip
    if ours.part is not None:
        refuse_transforms_of_ranks("linear_kl_divergence")
        _agree(ours, ref, mask, transform.token_temperature, options)
    if under_transform() and not entropy:
        return _definition(ours, ref, mask, transform, options), None
    tensors = [
        x
        for side, dtype in zip((ours, ref), options.dtypes, strict=True)
        for x in (side.hidden.to(dtype), side.bias, *side.weights)
    ]
    values, entropies = outside_of_graphs(_LinearDivergence.apply)(
        options, mask, transform.token_temperature, *wanted_or_detached(*tensors)
    )
    return values.view(mask.shape), entropies.view(mask.shape) if entropy else None


def _agree(
    ours: LinearScorer,
    ref: LinearScorer,
    mask: Tensor,
    token_temperature: Tensor | None,
    options: _Options,
) -> None:
    """Check that all ranks ask the same, of the same tokens."""
    part, measure = ours.part, options.measure
    assert part is not None
    question = (
        use_triton(options.impl, ours.hidden), measure.swapped, measure.share is not None,
        options.entropy, options.sum_expected,
        *ours.wanted_gradients, *ref.wanted_gradients,
    )  # fmt: skip
    wide = torch.promote_types(*options.dtypes)
    settings = (options.temperature, *options.caps, *options.scales, measure.share)
    asked = {"chunk_size": options.chunk, **numbered(question, wide, *settings)}
    outside_of_graphs(agreed_part)(part.group, part.size, mask, asked, part, token_temperature)


def _definition(
    ours: LinearScorer, ref: LinearScorer, mask: Tensor, transform: Transform, options: _Options
) -> Tensor:
    """The divergence by all logits, in what torch.func can differentiate and batch."""
    with exact(ours.hidden):
        logits, ref_logits = (
            full_logits(
                side.hidden, torch.cat([w[0 : w.shape[0]] for w in side.weights], dim=1),
                side.bias, mask, dtype,
            )
            for side, dtype in zip((ours, ref), options.dtypes, strict=True)
        )  # fmt: skip
        if not options.one_transform:
            logits, ref_logits = (
                capped_logits(x, cap, factor)
                for x, cap, factor in zip(
                    (logits, ref_logits), options.caps, options.scales, strict=True
                )
            )
            transform = transform._replace(softcap=None, scale=1.0)
        return definition(logits, ref_logits, mask, transform, options.measure)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, mask, token_temperature, *tensors):
        sides = _sides(options, tensors, ctx.needs_input_grad[3:])
        order = live_rows(mask.reshape(-1).to(torch.int64), 0)
        slopes = [
            room_for_slopes(side.hidden, alone=side.group is None)
            if _keeps_slope(side, options)
            else None
            for side in sides
        ]
        summed = [
            side.gradients(order.shape[0], None) if side.trained and options.sum_expected else None
            for side in sides
        ]
        sums = torch.promote_types(sides[0].head.sums, sides[1].head.sums)
        values = torch.zeros(mask.numel(), dtype=sums, device=mask.device)
        entropies = torch.zeros_like(values if options.entropy else values[:0])
        kept = []  # what backward would otherwise have to ask other ranks again
        with exact(sides[0].hidden):
            for first, last in even_spans(order.shape[0], options.chunk):
                rows = order[first:last]
                block = _Block(options, sides, rows, token_temperature)
                values[rows] = block.values
                if options.part is not None:
                    kept.append(torch.cat((block.values.unsqueeze(0), block.stats)))
                if options.entropy:
                    entropies[rows] = block.entropy().to(sums)
                for i, (side, slope, found) in enumerate(zip(sides, slopes, summed, strict=True)):
                    if slope is None and found is None:
                        continue
                    room = side.head.room if found is None else found.room
                    d_logits = block.d_logits(i, torch.ones_like(block.values), room)
                    if slope is not None:
                        slope[rows] = side.head.pull_back(d_logits).to(slope.dtype)
                    if found is not None:
                        found.add(rows, side.hidden[rows].to(side.head.operands), d_logits)
            known = [
                total
                for i, found in enumerate(summed)
                for total in _head_totals(found, _of_side(options, tensors, i))
            ]
        ctx.options = options
        ctx.codes = [None if isinstance(x, Tensor) else x for x in tensors]
        dense = [x if isinstance(x, Tensor) else None for x in tensors]
        of_ranks = torch.cat(kept, dim=1) if kept else None
        ctx.save_for_backward(mask, order, token_temperature, of_ranks, *dense, *slopes, *known)
        ctx.mark_non_differentiable(entropies)
        return values, entropies

    @staticmethod
    def backward(ctx, d_values, _):
        refuse_second_derivative("linear_kl_divergence", "kl_divergence")
        refuse_transforms("linear_kl_divergence's backward", "kl_divergence", d_values)
        options = ctx.options
        mask, order, token_temperature, of_ranks, *rest = ctx.saved_tensors
        dense, rest = rest[: len(ctx.codes)], rest[len(ctx.codes) :]
        slopes, known = rest[:2], rest[2:]
        tensors = [code or x for code, x in zip(ctx.codes, dense, strict=True)]
        wanted = ctx.needs_input_grad[3:]
        upstream = torch.where(mask.reshape(-1), d_values, 0.0)
        hiddens: list[Tensor | None] = [None, None]
        if options.sum_expected and _are_alike(upstream[order]):
            by = upstream[order][:1].sum()
            heads = [None if total is None else total * by for total in known]
        else:
            sides = _sides(options, tensors, wanted)
            hiddens, heads = _recomputed(
                options, sides, tensors, order, token_temperature, d_values, of_ranks
            )
        gradients: list[Tensor | None] = []
        for i in range(2):
            hidden, *head = _of_side(options, tensors, i)
            d_hidden = hiddens[i]
            if slopes[i] is not None:
                d_hidden = slopes[i] * upstream.unsqueeze(1)
                if options.part is not None:
                    d_hidden = all_reduced_rows(d_hidden, order, options.part.group)
                d_hidden = d_hidden.view(hidden.shape)
            of_head, heads = heads[: len(head)], heads[len(head) :]
            for total, x in zip((d_hidden, *of_head), (hidden, *head), strict=True):
                gradients.append(None if total is None else total.to(x.dtype))
        return None, None, None, *gradients


def _recomputed(
    options: _Options,
    sides: list[_Side],
    tensors: list[Any],
    order: Tensor,
    token_temperature: Tensor | None,
    d_values: Tensor,
    of_ranks: Tensor | None,  # values and statistics (7, n), where ranks share the vocabulary
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of both hidden states, and of both heads, from logits that are made again."""
    rows_of_hidden = [
        torch.zeros_like(side.hidden)
        if side.trained and side.wants.hidden and not _keeps_slope(side, options)
        else None
        for side in sides
    ]
    found = [
        side.gradients(order.shape[0], hidden)
        for side, hidden in zip(sides, rows_of_hidden, strict=True)
    ]
    if any(side.trained for side in sides):
        _check_weights_are_there(tensors)
        with exact(sides[0].hidden):
            for first, last in even_spans(order.shape[0], options.chunk):
                rows = order[first:last]
                known = None if of_ranks is None else of_ranks[:, first:last].contiguous()
                block = _Block(options, sides, rows, token_temperature, known)
                for i, side in enumerate(sides):
                    if side.trained:
                        d_logits = block.d_logits(i, d_values[rows], found[i].room)
                        found[i].add(rows, side.hidden[rows].to(side.head.operands), d_logits)
    hiddens, heads = [], []
    with exact(sides[0].hidden):
        for i in range(2):
            hidden, bias, *weights = _of_side(options, tensors, i)
            d_hidden, *d_head = found[i].totals(hidden, bias, weights)
            hiddens.append(d_hidden)
            heads += d_head
    return hiddens, heads


def _check_weights_are_there(tensors: list[Any]) -> None:
    """Raise RuntimeError where a wrapper has taken a weight away since the forward."""
    for x in tensors:
        if isinstance(x, Tensor) and x.numel() and x.untyped_storage().nbytes() == 0:
            raise RuntimeError(
                "model_kl_divergence: a head is sharded, and its weight no longer there in "
                "backward; where the head is trained, weigh all values alike (a sum, a mean)"
            )


def _are_alike(values: Tensor) -> bool:
    return not values.numel() or bool((values == values[0]).all())


class _Block:
    """The logits of both models on some tokens, and their divergence."""

    def __init__(
        self,
        options: _Options,
        sides: list[_Side],
        rows: Tensor,
        token_temperature: Tensor | None,
        known: Tensor | None = None,
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
        self.part = options.part
        if self.part is None:
            self.values, self.stats = torch.ops.fastrlhf.divergence(
                *self.pair, self.mask, *self.transform, share, options.impl
            )
        elif known is not None:  # by the forward
            self.values, self.stats = known[0], known[1:]
        else:
            self.values, self.stats = divergence_over_ranks(
                self.pair[0],
                self.pair[1],
                self.mask,
                self.transform,
                share,
                self.part,
                options.impl,
            )

    def entropy(self) -> Tensor:
        """Our entropy of each token."""
        ours = self.pair[1 if self.swapped else 0]
        if self.part is not None:
            nowhere = torch.full_like(self.mask, NOT_HERE, dtype=torch.int64)
            return statistics_over_ranks(
                ours, nowhere, self.transform, self.part, True, (), self.impl
            )[1]
        targets = torch.zeros_like(self.mask, dtype=torch.int64)
        return torch.ops.fastrlhf.token_stats(
            ours, targets, *self.transform, -100, True, False, self.impl
        )[1]

    def d_logits(self, side: int, d_values: Tensor, room: Room) -> LogitGradient:
        """Compute the gradient with respect to the logits of a side, as operands of its matmuls."""
        of_p, (logits_p, logits_q) = (side == 0) != self.swapped, self.pair
        if logits_p.shape[1] == 0:  # of a rank that has nothing of the vocabulary
            return LogitGradient(logits_p.to(self.operands[side]), None)
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


def _of_side(options: _Options, tensors: Sequence[Any], side: int) -> list[Any]:
    """Hidden states, bias and column blocks of the weight of a side."""
    first = 2 + options.blocks[0]
    return list(tensors[:first] if side == 0 else tensors[first:])


def _sides(options: _Options, tensors: Sequence[Any], wanted: Sequence[bool]) -> list[_Side]:
    """The policy and the reference."""
    sides = []
    for i, dtype in enumerate(options.dtypes):
        hidden, bias, *weights = _of_side(options, tensors, i)
        wants_hidden, wants_bias, *wants_weights = _of_side(options, wanted, i)
        head = Head(weights, bias, dtype)
        needs = Needs(wants_hidden, wants_weights, wants_bias)
        group = None if options.part is None else options.part.group
        sides.append(_Side(hidden.reshape(-1, hidden.shape[-1]), head, needs, group))
    return sides


def _head_totals(found: Gradients | None, tensors: list[Any]) -> list[Tensor | None]:
    """Gradients of bias and weights, none where none were asked for."""
    hidden, bias, *weights = tensors
    return [None] * len(tensors[1:]) if found is None else found.totals(hidden, bias, weights)[1:]


def _keeps_slope(side: _Side, options: _Options) -> bool:
    return side.wants.hidden and (options.sum_expected or not side.trained)
