"""Exact divergences over the vocabulary from the hidden states of two models: no logits are built.

A block of tokens at a time, both heads make their logits (`linear_divergence_sides.py`), and the
divergence is computed from them (`divergence.py` has its definition and launches its kernel). While
the logits are there, gradients are computed too (`value_gradients.py`). Those of hidden states
serve any loss: the backward multiplies them by the upstream gradients. Those of the heads are
computed as if the loss gave all values the same weight. If it does not, the backward makes the
logits again. G is the cost of one matmul of tokens × hidden × vocabulary.

Dims: N tokens, n tokens of the mask, H hidden (of each model its own), V vocabulary.
"""

from typing import Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from fastrlhf.reference import capped_logits

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
    checked_measure,
    definition,
)
from .keywords import Unpack
from .linear_arguments import check_head, checked_chunk
from .linear_definition import full_logits
from .linear_divergence_sides import BothLogits, DivergenceOptions, Side, of_side, sides_of
from .linear_head import Weight
from .linear_plans import room_for_slopes
from .linear_precision import exact, matmul_dtype
from .linear_rows import even_spans, live_rows
from .logits_arguments import checked_rows
from .ranks import Group, all_reduced_rows, refuse_transforms_of_ranks
from .scorer import LinearScorer
from .sharded import head_part, same_head_part
from .transform import Transform, check_factor, checked_transform
from .value_gradients import ValueGradients, weigh_alike
from .vocabulary_part import agreed_part, numbered


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
        ref_softcap, ref_scale: those of the reference; "same": as the policy's. For two models,
            `**head.options()` and `**ref_head.options("ref_")` give all six.
        chunk_size: tokens whose logits are held at a time; None: as many as fill 512 MiB in fp32
            with those of each side (64 MiB on a CPU).
        group: as `linear_token_stats`; both weights are cut alike. DTensors need none.
        entropy: return the policy's entropy too, from the same logits, without further matmuls.

    Returns:
        (...) in nats, fp32 (fp64 if a side is). With entropy a tuple (values, entropies); entropies
        are (...) too, 0 outside of the mask, and not differentiable.

    Differentiable, once, with respect to hidden, weight and bias of both sides. Under `torch.func`
    (grad, vmap, jvp, ...) and forward-mode differentiation, all logits are built, and it can be
    differentiated at will; there is no entropy then.

    Cost, in matmuls G of one head with the tokens of the mask (others cost none): 2G for the
    values, and 1G more for each hidden and each weight that needs a gradient. The gradient of a
    head is computed along with the values, for a loss that gives all of them the same weight, as a
    sum or a mean does. For another loss, the backward makes both logits again: 2G, and 1G for each
    weight. Memory: two blocks of logits (and one of slopes for each softcap, where the sides differ
    in softcap or scale); on CUDA their gradients in 16 bits, as with `linear_token_stats`; a
    (..., H) tensor kept for each side whose hidden states need a gradient, in their dtype, but fp32
    for fp16, and an fp32 (V, H) tensor for each weight that does. On a GPU, the host waits once for
    the count of tokens, and where a head is trained, in the backward to learn whether values have
    the same weight. With a group, the forward sends what `kl_divergence` says, of the tokens of the
    mask; the backward sends the gradient of each hidden in an all-reduce.

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
    """Compute the divergence of each token (...) between two scorers; temperature, chunk_size and
    impl are those of `ours`. If asked for, also compute our entropy from the same logits, which has
    no gradient and is 0 outside of the mask.

    `sum_expected`: compute the gradient of a trained head along with the values, for their sum. The
    backward then need not make the logits again, which saves 2G, nor need the weights to be there
    still, unless the loss gives the values different weights.
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
    options = DivergenceOptions(
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
    options: DivergenceOptions,
) -> None:
    """Check that all ranks ask the same question about the same tokens."""
    part, measure = ours.part, options.measure
    assert part is not None
    question = (
        use_triton(options.impl, ours.hidden), measure.swapped, measure.share is not None,
        options.entropy, options.sum_expected,
        *ours.wanted_gradients, *ref.wanted_gradients,
    )  # fmt: skip
    wide = torch.promote_types(*options.dtypes)
    settings = (options.temperature, *options.caps, *options.scales, measure.share)
    compared = {"chunk_size": options.chunk, **numbered(question, wide, *settings)}
    outside_of_graphs(agreed_part)(part.group, part.size, mask, compared, part, token_temperature)


def _definition(
    ours: LinearScorer,
    ref: LinearScorer,
    mask: Tensor,
    transform: Transform,
    options: DivergenceOptions,
) -> Tensor:
    """Compute the divergence from all logits, which torch.func can differentiate and batch."""
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
    """Values and our entropies (N,); both models' logits are made once, a block at a time."""

    @staticmethod
    def forward(ctx, options, mask, token_temperature, *tensors):
        sides = sides_of(options, tensors, ctx.needs_input_grad[3:])
        order = live_rows(mask.reshape(-1).to(torch.int64), 0)
        finished = [_finished(side, options, order.shape[0]) for side in sides]
        sums = torch.promote_types(sides[0].head.sums, sides[1].head.sums)
        values = torch.zeros(mask.numel(), dtype=sums, device=mask.device)
        entropies = torch.zeros_like(values if options.entropy else values[:0])
        kept = []
        with exact(sides[0].hidden):
            for first, last in even_spans(order.shape[0], options.chunk):
                rows = order[first:last]
                block = BothLogits(options, sides, rows, token_temperature)
                values[rows] = block.values
                if options.part is not None:
                    kept.append(block.of_ranks())
                if options.entropy:
                    entropies[rows] = block.entropy().to(sums)
                ones = torch.ones_like(block.values)
                for i, gradients in enumerate(finished):
                    if gradients.wanted:
                        gradients.add(rows, block.d_logits(i, ones, gradients.room))
            of_heads = []
            for i, gradients in enumerate(finished):
                _, bias, *weights = of_side(options, tensors, i)
                of_heads += gradients.of_head(bias, weights)
        ctx.options = options
        ctx.codes = [None if isinstance(x, Tensor) else x for x in tensors]
        dense = [x if isinstance(x, Tensor) else None for x in tensors]
        of_ranks = torch.cat(kept, dim=1) if kept else None
        slopes = [gradients.slopes for gradients in finished]
        ctx.save_for_backward(mask, order, token_temperature, of_ranks, *dense, *slopes, *of_heads)
        ctx.mark_non_differentiable(entropies)
        return values, entropies

    @staticmethod
    def backward(ctx, d_values, _):
        refuse_second_derivative("linear_kl_divergence", "kl_divergence")
        refuse_transforms("linear_kl_divergence's backward", "kl_divergence", d_values)
        options = ctx.options
        mask, order, token_temperature, of_ranks, *rest = ctx.saved_tensors
        dense, rest = rest[: len(ctx.codes)], rest[len(ctx.codes) :]
        slopes, of_sum = rest[:2], rest[2:]
        tensors = [code or x for code, x in zip(ctx.codes, dense, strict=True)]
        upstream = torch.where(mask.reshape(-1), d_values, 0.0)
        d_hiddens: list[Tensor | None] = [None, None]
        if options.sum_expected and weigh_alike(upstream[order]):
            by = upstream[order][:1].sum()
            d_heads = [None if total is None else total * by for total in of_sum]
        else:
            sides = sides_of(options, tensors, ctx.needs_input_grad[3:])
            tokens = _Tokens(order, token_temperature, of_ranks)
            d_hiddens, d_heads = _recomputed(options, sides, tensors, tokens, d_values)
        gradients: list[Tensor | None] = []
        for i in range(2):
            hidden, *head = of_side(options, tensors, i)
            d_hidden = d_hiddens[i]
            if slopes[i] is not None:
                d_hidden = slopes[i] * upstream.unsqueeze(1)
                if options.part is not None:
                    d_hidden = all_reduced_rows(d_hidden, order, options.part.group)
                d_hidden = d_hidden.view(hidden.shape)
            d_head, d_heads = d_heads[: len(head)], d_heads[len(head) :]
            for gradient, x in zip((d_hidden, *d_head), (hidden, *head), strict=True):
                gradients.append(None if gradient is None else gradient.to(x.dtype))
        return None, None, None, *gradients


class _Tokens(NamedTuple):
    """The n tokens of the mask, with what the backward needs to make their logits again."""

    order: Tensor  # (n,) their numbers among all N
    token_temperature: Tensor | None  # of all tokens
    of_ranks: Tensor | None  # (7, n) values and statistics, where ranks share the vocabulary


def _recomputed(
    options: DivergenceOptions,
    sides: list[Side],
    tensors: list[Any],
    tokens: _Tokens,
    d_values: Tensor,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Compute the gradients of hidden states and heads of both sides, making the logits again."""
    order, token_temperature, of_ranks = tokens
    totals = [side.gradients(order.shape[0], _room_for_hidden(side, options)) for side in sides]
    if any(side.trained for side in sides):
        _check_weights_are_there(tensors)
        with exact(sides[0].hidden):
            for first, last in even_spans(order.shape[0], options.chunk):
                rows = order[first:last]
                known = None if of_ranks is None else of_ranks[:, first:last].contiguous()
                block = BothLogits(options, sides, rows, token_temperature, known)
                for i, side in enumerate(sides):
                    if side.trained:
                        d_logits = block.d_logits(i, d_values[rows], totals[i].room)
                        totals[i].add(rows, side.hidden[rows].to(side.head.operands), d_logits)
    d_hiddens, d_heads = [], []
    with exact(sides[0].hidden):
        for i in range(2):
            hidden, bias, *weights = of_side(options, tensors, i)
            d_hidden, *d_head = totals[i].totals(hidden, bias, weights)
            d_hiddens.append(d_hidden)
            d_heads += d_head
    return d_hiddens, d_heads


def _room_for_hidden(side: Side, options: DivergenceOptions) -> Tensor | None:
    """Make zeros for the gradient of hidden states; None if it is not computed in the backward."""
    made_again = side.trained and side.wants.hidden and not _keeps_slope(side, options)
    return torch.zeros_like(side.hidden) if made_again else None


def _check_weights_are_there(tensors: list[Any]) -> None:
    """Raise RuntimeError where a wrapper has taken a weight away since the forward."""
    for x in tensors:
        if isinstance(x, Tensor) and x.numel() and x.untyped_storage().nbytes() == 0:
            raise RuntimeError(
                "model_kl_divergence: a head is sharded, and its weight no longer there in "
                "backward; where the head is trained, weigh all values alike (a sum, a mean)"
            )


def _finished(side: Side, options: DivergenceOptions, rows: int) -> ValueGradients:
    """Make room for those gradients of a side that the forward finishes."""
    slopes = of_sum = None
    if _keeps_slope(side, options):
        slopes = room_for_slopes(side.hidden, alone=side.group is None)
    if side.trained and options.sum_expected:
        of_sum = side.gradients(rows, None)
    return ValueGradients(side.head, side.hidden, slopes, of_sum)


def _keeps_slope(side: Side, options: DivergenceOptions) -> bool:
    """Whether the forward keeps the gradient of each value with respect to its hidden state. It
    does not where the backward makes the logits again for the head anyway, since that gradient is
    computed from them then.
    """
    return side.wants.hidden and (options.sum_expected or not side.trained)
