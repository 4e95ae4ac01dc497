"""The reductions of value_loss, against their formulas in 150 digits."""

import math
from decimal import Decimal
from typing import Any

import pytest
import torch
from support.preference_formulas import Expectation, decimals
from torch import Tensor

from fastrlhf import value_loss

FINE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
REDUCTIONS = [
    ("token-mean", None), ("token-mean", 37.5), ("sequence-mean", None), ("sequence-mean", 3.0),
    ("sequence-sum", None), ("sequence-sum", 3.0), ("constant", 28.0), ("none", None),
]  # fmt: skip
REDUCTION = pytest.mark.parametrize(("reduction", "normalizer"), REDUCTIONS, ids=str)
CLIPS = pytest.mark.parametrize("clip_range", [0.2, None])


def batch(
    dtype: torch.dtype, garbage: float = math.nan, shape: tuple[int, int] = (4, 5)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, old values, returns and a mask that has no token of the first sequence."""
    mask = torch.rand(shape) < 0.7
    mask[0], mask[1, :2] = False, True
    old = torch.randn(shape, dtype=torch.float64)
    values, returns = old + 0.4 * torch.randn_like(old), old + torch.randn_like(old)
    x = (torch.where(mask, x, garbage).to(dtype) for x in (values, old, returns))
    values, old, returns = x
    return values.requires_grad_(), old, returns, mask


def expected(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    clip_range: float | None,
    reduction: str,
    normalizer: float | None,
) -> Expectation:
    """The loss, or those of the tokens of the mask, as a function of their values."""
    values, old, returns, mask = inputs
    clip = None if clip_range is None else Decimal(clip_range)
    old_values, targets = decimals(old[mask]), decimals(returns[mask])
    rows = mask.nonzero()[:, 0].tolist()
    sequences = len(mask)

    def of_token(v: Decimal, o: Decimal, target: Decimal) -> Decimal:
        errors = [(v - target) ** 2]
        if clip is not None:
            errors.append((min(max(v, o - clip), o + clip) - target) ** 2)
        return max(errors) / 2

    def losses_of(x: list[Decimal]) -> list[Decimal]:
        losses = [of_token(*token) for token in zip(x, old_values, targets, strict=True)]
        if reduction == "none":
            return losses
        total = sum(losses)
        if reduction == "sequence-mean":
            total = sum(loss / rows.count(row) for loss, row in zip(losses, rows, strict=True))
        usual = {"token-mean": len(losses)}.get(reduction, sequences)
        return [total / Decimal(usual if normalizer is None else normalizer)]

    return Expectation(losses_of, decimals(values[mask]))


@FINE
@CLIPS
@REDUCTION
def test_losses_and_gradients_are_those_of_the_formula(
    reduction: str, normalizer: float | None, clip_range: float | None, dtype: torch.dtype
) -> None:
    values, *_, mask = inputs = batch(dtype)
    options = {"clip_range": clip_range, "reduction": reduction, "normalizer": normalizer}
    loss, metrics = value_loss(*inputs, **options)
    assert loss.dtype == dtype
    want = expected(inputs, clip_range, reduction, normalizer)
    if reduction == "none":
        assert loss.shape == values.shape and (loss[~mask] == 0).all()
        of_tokens = loss[mask]
    else:
        of_tokens = loss.reshape(1)
    # Returns are rounded too, as the values are, and the larger of the two is at most 5.
    want.assert_losses(of_tokens, ulps=8, floor=5.0)
    upstream = torch.randn(of_tokens.shape, dtype=dtype)
    (gradient,) = torch.autograd.grad(of_tokens, values, upstream)
    want.assert_gradients(gradient[mask], weights=upstream.tolist())
    assert (gradient[~mask] == 0).all()
    assert metrics == value_loss(*inputs, clip_range=clip_range)[1]


def test_an_example_by_hand() -> None:
    values = torch.tensor([[2.0, 4.0, 9.0], [6.0, 9.0, 9.0]])
    mask, zeros = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.zeros(2, 3)
    # Halved squares: 2, 8; 18.
    for options, want in (
        ({}, 28 / 3),
        ({"reduction": "sequence-mean"}, (5 + 18) / 2),
        ({"reduction": "sequence-sum"}, (10 + 18) / 2),
        ({"reduction": "constant", "normalizer": 8}, 28 / 8),
        ({"reduction": "sequence-sum", "normalizer": torch.tensor(7)}, 28 / 7),
    ):
        loss, _ = value_loss(values, None, zeros, mask, clip_range=None, **options)
        assert loss.item() == pytest.approx(want), options
    losses, _ = value_loss(values, None, zeros, mask, clip_range=None, reduction="none")
    assert losses.tolist() == [[2, 8, 0], [18, 0, 0]]


@CLIPS
@REDUCTION
def test_packed_tokens_have_the_same_losses(
    reduction: str, normalizer: float | None, clip_range: float | None
) -> None:
    inputs = batch(torch.float64, garbage=0.0)
    options = {"clip_range": clip_range, "reduction": reduction, "normalizer": normalizer}
    loss, _ = value_loss(*inputs, **options)
    borders = torch.arange(0, 21, 5)
    for shape in ((20,), (1, 20)):
        flat = [x.reshape(shape) for x in inputs]
        found, _ = value_loss(*flat, **options, cu_seqlens=borders)
        torch.testing.assert_close(found, loss.reshape(shape) if loss.ndim else loss)


@CLIPS
@REDUCTION
def test_derivatives_of_both_orders_are_right(
    reduction: str, normalizer: float | None, clip_range: float | None
) -> None:
    values, old, returns, mask = batch(torch.float64, garbage=0.0)

    def loss_of(values: Tensor) -> Tensor:
        return value_loss(
            values, old, returns, mask, clip_range=clip_range, reduction=reduction,
            normalizer=normalizer,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss_of, (values,), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss_of, (values,), fast_mode=True)


@REDUCTION
def test_garbage_half_precision_and_nothing_at_all(
    reduction: str, normalizer: float | None
) -> None:
    options = {"reduction": reduction, "normalizer": normalizer}
    values, old, returns, mask = batch(torch.bfloat16, garbage=0.0)
    expected, _ = value_loss(*(x.float() for x in (values, old, returns)), mask, **options)
    dirty = [torch.where(mask, x, math.inf).detach() for x in (values, old, returns)]
    found, _ = value_loss(dirty[0].requires_grad_(), *dirty[1:], mask, **options)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), dirty[0])
    assert (gradient[~mask] == 0).all() and gradient[mask].any()
    for shape in ((2, 3), (0, 3), (2, 0)):
        nothing = torch.full(shape, math.nan, requires_grad=True)
        loss, _ = value_loss(nothing, nothing, nothing, torch.zeros(shape), **options)
        assert not loss.any()
        assert (torch.autograd.grad(loss.sum(), nothing)[0] == 0).all()


def test_what_is_compiled_and_what_is_batched_is_the_same() -> None:
    values, old, returns, mask = batch(torch.float64, garbage=0.0)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            value_loss(x, old, returns, mask, reduction=reduction, normalizer=normalizer)[0]
            for reduction, normalizer in REDUCTIONS
        )

    want = call(values)
    torch.testing.assert_close(torch.compile(call, backend="eager", fullgraph=True)(values), want)
    batched = torch.func.vmap(call)(values[None])
    torch.testing.assert_close(tuple(x[0] for x in batched), want)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"reduction": "mean"}, ValueError, "reduction: .*token-mean, .*none, got 'mean'"),
        ({"reduction": None}, TypeError, "reduction: expected a string, got NoneType"),
        ({"reduction": "constant"}, ValueError, "normalizer: .*for reduction 'constant'"),
        (
            {"reduction": "none", "normalizer": 3},
            ValueError,
            "normalizer: expected None for reduction 'none'",
        ),
        ({"reduction": "sequence-sum", "normalizer": 0}, ValueError, "normalizer: .*positive"),
    ],
)
def test_errors_name_the_argument(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    zeros = torch.zeros(2, 3)
    with pytest.raises(error, match="^" + message):
        value_loss(zeros, zeros, zeros, zeros, **changed)
