"""value_loss: the clipped squared error of a critic, against its formula in 150 digits."""

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
import torch
from support.preference_formulas import Expectation, decimals
from torch import Tensor

from fastrlhf import value_loss

FINE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
CLIPS = pytest.mark.parametrize("clip_range", [0.2, 0, 0.5, None])


def batch(
    dtype: torch.dtype, shape: tuple[int, int] = (4, 7), garbage: float = math.nan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, old values, returns and mask, garbage outside of it; nothing of the first row
    counts.
    """
    mask = torch.rand(shape) < 0.7
    mask[0] = False
    old = torch.randn(shape, dtype=torch.float64)
    values = old + 0.4 * torch.randn(shape, dtype=torch.float64)
    returns = old + torch.randn(shape, dtype=torch.float64)
    values, old, returns = (torch.where(mask, x, garbage).to(dtype) for x in (values, old, returns))
    return values.requires_grad_(), old, returns, mask


def of_token(v: Decimal, old: Decimal, target: Decimal, clip: Decimal | None) -> Decimal:
    """½ max((V - R)², (V_old + clip(V - V_old, ±c) - R)²), region by region."""
    error = (v - target) ** 2
    if clip is not None and v > old + clip:
        error = max(error, (old + clip - target) ** 2)
    elif clip is not None and v < old - clip:
        error = max(error, (old - clip - target) ** 2)
    return error / 2


def expected_loss(
    values: Tensor,
    old: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float | None,
    normalizer: float | None = None,
) -> tuple[Expectation, Expectation]:
    """What `value_loss` must give, as a function of all its inputs at the tokens of the mask, and
    of the values alone.
    """
    clip = None if clip_range is None else Decimal(clip_range)
    v, o, r = (decimals(x[mask]) for x in (values, old, returns))
    count = len(v)
    divisor = Decimal(max(count, 1) if normalizer is None else normalizer)

    def of_all(x: list[Decimal]) -> list[Decimal]:
        tokens = zip(x[:count], x[count : 2 * count], x[2 * count :], strict=True)
        return [sum((of_token(*token, clip) for token in tokens), Decimal(0)) / divisor]

    return Expectation(of_all, [*v, *o, *r]), Expectation(lambda x: of_all([*x, *o, *r]), v)


@FINE
@CLIPS
@pytest.mark.parametrize("normalizer", [None, 37.5, 3])
def test_loss_and_gradient_are_those_of_the_formula(
    normalizer: float | None, clip_range: float | None, dtype: torch.dtype
) -> None:
    values, *_, mask = inputs = batch(dtype)
    loss, _ = value_loss(*inputs, clip_range=clip_range, normalizer=normalizer)
    assert loss.shape == () and loss.dtype == dtype
    of_all, of_values = expected_loss(*inputs, clip_range, normalizer)
    of_all.assert_losses(loss.reshape(1))
    (gradient,) = torch.autograd.grad(loss, values)
    of_values.assert_gradients(gradient[mask])
    assert (gradient[~mask] == 0).all()


@FINE
def test_an_example_of_each_region_by_hand(dtype: torch.dtype) -> None:
    # The old value is 0 and the return 1; the bounds are ±0.25.
    # 0.125: inside, 0.875² / 2                          gradient 0.125 - 1
    # 0.5: clipped to 0.25, whose error 0.75 is larger   gradient 0: it moved far enough
    # -0.5: clipped to -0.25, whose error is smaller     gradient -0.5 - 1: it must come back
    # 2: clipped to 0.25, whose error is smaller         gradient 2 - 1: it went too far
    values = torch.tensor([[0.125, 0.5, -0.5, 2.0]], dtype=dtype, requires_grad=True)
    ones = torch.ones_like(values)
    loss, metrics = value_loss(values, 0 * ones, ones, ones, clip_range=0.25)
    terms = [0.875**2, 0.75**2, 1.5**2, 1.0]
    assert loss.item() == sum(terms) / 2 / 4
    (gradient,) = torch.autograd.grad(loss, values)
    assert gradient.tolist() == [[-0.875 / 4, 0, -1.5 / 4, 1 / 4]]
    assert metrics["val/clipfrac_avg"].item() == 0.25
    unbounded, metrics = value_loss(values, 0 * ones, ones, ones, clip_range=None)
    assert unbounded.item() == (0.875**2 + 0.5**2 + 1.5**2 + 1.0) / 2 / 4
    assert metrics["val/clipfrac_avg"].item() == 0


def test_the_default_range_is_a_fifth() -> None:
    inputs = batch(torch.float64)
    assert torch.equal(value_loss(*inputs)[0], value_loss(*inputs, clip_range=0.2)[0])
    assert not torch.equal(value_loss(*inputs)[0], value_loss(*inputs, clip_range=None)[0])


def test_a_range_of_zero_lets_no_value_profit_from_moving() -> None:
    values, old, returns, mask = batch(torch.float64, garbage=0.0)
    loss, _ = value_loss(values, old, returns, mask, clip_range=0)
    (gradient,) = torch.autograd.grad(loss, values)
    better = (values - returns).abs() < (old - returns).abs()
    assert (mask & better).any() and (mask & ~better).any()
    assert (gradient[better] == 0).all()
    expected = torch.where(mask, (values - returns) / mask.sum(), 0.0)
    torch.testing.assert_close(gradient[~better], expected[~better], rtol=1e-14, atol=0)


@FINE
@CLIPS
def test_the_metric_is_the_share_of_tokens_whose_clipped_error_is_larger(
    clip_range: float | None, dtype: torch.dtype
) -> None:
    values, old, returns, mask = inputs = batch(dtype, (8, 30))
    _, metrics = value_loss(*inputs, clip_range=clip_range)
    assert list(metrics) == ["val/clipfrac_avg"]
    share = metrics["val/clipfrac_avg"]
    assert share.shape == () and share.dtype == dtype and not share.requires_grad
    clip = None if clip_range is None else Decimal(clip_range)
    tokens = list(zip(*(decimals(x[mask]) for x in (values, old, returns)), strict=True))
    clipped = sum(of_token(*token, clip) > of_token(*token, None) for token in tokens)
    assert (clipped > 0) == (clip_range is not None)
    assert share.item() == pytest.approx(clipped / len(tokens), rel=2 * torch.finfo(dtype).eps)


@FINE
@pytest.mark.parametrize("clip_range", [0.2, math.inf])
def test_no_value_inside_its_range_counts_as_clipped(clip_range: float, dtype: torch.dtype) -> None:
    # Values near 0, of which a sum with an old value would drop digits.
    values = (0.01 * torch.rand(4, 30, dtype=torch.float64)).to(dtype)
    old = torch.full_like(values, 0.15)
    inputs = (old, torch.zeros_like(values), torch.ones_like(values))
    loss, metrics = value_loss(values, *inputs, clip_range=clip_range)
    assert metrics["val/clipfrac_avg"].item() == 0
    assert torch.equal(loss, value_loss(values, *inputs, clip_range=None)[0])


@CLIPS
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e9])
@pytest.mark.parametrize(
    "mask_dtype", [torch.bool, torch.int64, torch.uint8, torch.float32], ids=str
)
def test_garbage_outside_of_the_mask_changes_no_bit_and_has_gradient_zero(
    mask_dtype: torch.dtype, garbage: float, clip_range: float | None
) -> None:
    *tensors, mask = batch(torch.float32, garbage=0.0)
    clean = tensors[0]
    dirty, *others = (torch.where(mask, x, garbage).detach() for x in tensors)
    dirty.requires_grad_()
    expected, metrics = value_loss(*tensors, mask, clip_range=clip_range)
    found, same = value_loss(dirty, *others, mask.to(mask_dtype), clip_range=clip_range)
    assert torch.equal(found, expected) and same == metrics
    (gradient,) = torch.autograd.grad(found, dirty)
    assert torch.equal(gradient, torch.autograd.grad(expected, clean)[0])
    assert (gradient[~mask] == 0).all()


@CLIPS
@pytest.mark.parametrize("normalizer", [None, 8.0])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_a_batch_without_tokens_has_loss_and_gradient_zero(
    shape: tuple[int, int], normalizer: float | None, clip_range: float | None
) -> None:
    values = torch.full(shape, math.nan, requires_grad=True)
    garbage = torch.full(shape, math.inf)
    options = {"clip_range": clip_range, "normalizer": normalizer}
    loss, metrics = value_loss(values, garbage, garbage, torch.zeros(shape), **options)
    assert loss.item() == 0 and metrics["val/clipfrac_avg"].item() == 0
    (gradient,) = torch.autograd.grad(loss, values)
    assert torch.equal(gradient, torch.zeros(shape))


@pytest.mark.parametrize("which", ["values", "old_values", "returns"])
def test_a_nan_that_counts_is_not_hidden_and_reaches_no_other_gradient(which: str) -> None:
    values, old, returns, mask = batch(torch.float32)
    (clean,) = torch.autograd.grad(value_loss(values, old, returns, mask)[0], values)
    broken = {"values": values.detach(), "old_values": old, "returns": returns}
    row, token = mask.nonzero()[3].tolist()
    broken[which][row, token] = math.nan
    broken["values"].requires_grad_()
    loss, _ = value_loss(**broken, mask=mask)
    assert loss.isnan()
    (gradient,) = torch.autograd.grad(loss, broken["values"])
    gradient[row, token] = clean[row, token]
    assert torch.equal(gradient, clean)


@pytest.mark.parametrize(
    "normalizer", [torch.tensor(37.5), torch.tensor(37.5).double(), torch.tensor(37.5).bfloat16()]
)
def test_the_normalizer_can_be_a_tensor(normalizer: Tensor) -> None:
    inputs = batch(torch.float64)
    expected = value_loss(*inputs, normalizer=37.5)[0]
    assert torch.equal(value_loss(*inputs, normalizer=normalizer)[0], expected)
    count = inputs[-1].sum()
    by_count = value_loss(*inputs, normalizer=count)[0]
    assert torch.equal(by_count, value_loss(*inputs)[0])


@CLIPS
def test_parts_of_a_batch_add_up_under_a_common_normalizer(clip_range: float | None) -> None:
    inputs = batch(torch.float64)
    whole, _ = value_loss(*inputs, clip_range=clip_range)
    count = inputs[-1].sum()
    parts = [
        value_loss(*(x[rows] for x in inputs), clip_range=clip_range, normalizer=count)[0]
        for rows in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-14, atol=0)


@CLIPS
def test_old_values_and_returns_are_constants(clip_range: float | None) -> None:
    values, old, returns, mask = batch(torch.float64)
    expected, _ = value_loss(values, old, returns, mask, clip_range=clip_range)
    # Computed from the values, as somebody might who forgets to detach.
    nothing = values - values.detach()
    linked = (old + nothing, returns + nothing)
    loss, _ = value_loss(values, *linked, mask, clip_range=clip_range)
    pair = (torch.autograd.grad(x, values)[0] for x in (loss, expected))
    assert torch.equal(loss, expected) and torch.equal(*pair)


@CLIPS
def test_derivatives_of_both_orders_are_right(clip_range: float | None) -> None:
    values, old, returns, mask = batch(torch.float64, (3, 4), garbage=0.0)

    def loss_of(values: Tensor) -> Tensor:
        return value_loss(values, old, returns, mask, clip_range=clip_range)[0]

    assert torch.autograd.gradcheck(loss_of, (values,))
    assert torch.autograd.gradgradcheck(loss_of, (values,))


@HALF
@CLIPS
def test_half_precision_is_computed_in_fp32(clip_range: float | None, dtype: torch.dtype) -> None:
    values, old, returns, mask = batch(dtype)
    loss, metrics = value_loss(values, old, returns, mask, clip_range=clip_range)
    assert loss.dtype == torch.float32
    wide = (x.float() for x in (values, old, returns))
    expected, same = value_loss(*wide, mask, clip_range=clip_range)
    assert torch.equal(loss, expected) and same == metrics
    assert torch.autograd.grad(loss, values)[0].dtype == dtype


def test_the_dtype_is_that_of_the_values() -> None:
    values, old, returns, mask = batch(torch.float64)
    loss, _ = value_loss(values.float(), old, returns.bfloat16(), mask)
    assert loss.dtype == torch.float32
    loss, _ = value_loss(values, old.float(), returns.bfloat16(), mask)
    assert loss.dtype == torch.float64


def test_strides_do_not_matter() -> None:
    values, old, returns, mask = batch(torch.float64, garbage=0.0)
    expected, _ = value_loss(values, old, returns, mask)
    turned = [x.t().contiguous().t() for x in (values, old, returns, mask)]
    torch.testing.assert_close(value_loss(*turned)[0], expected, rtol=1e-14, atol=0)
    row = mask[1:2].expand(4, 7)
    dense = value_loss(values, old, returns, row.clone())[0]
    assert torch.equal(value_loss(values, old, returns, row)[0], dense)


MUTANTS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "not clipped": lambda *inputs: value_loss(*inputs, clip_range=None)[0],
    "range off": lambda *inputs: value_loss(*inputs, clip_range=0.2001)[0],
    "smaller error": lambda v, o, r, m: (
        torch.minimum((v - r) ** 2, (o + (v - o).clamp(-0.2, 0.2) - r) ** 2)[m].mean() / 2
    ),
    "clipped error": lambda v, o, r, m: ((o + (v - o).clamp(-0.2, 0.2) - r) ** 2)[m].mean() / 2,
    "without the half": lambda *inputs: 2 * value_loss(*inputs)[0],
    "around the return": lambda v, o, r, m: value_loss(v, r, o, m)[0],
    "mean over everything": lambda v, o, r, m: value_loss(v, o, r, m, normalizer=v.numel())[0],
    "sum": lambda *inputs: value_loss(*inputs, normalizer=1)[0],
    "mean of means": lambda *inputs: torch.stack(
        [value_loss(*(x[i : i + 1] for x in inputs))[0] for i in range(1, 4)]
    ).mean(),
    "mask ignored": lambda v, o, r, m: value_loss(v, o, r + 0.1 * ~m, torch.ones_like(m))[0],
    "rounded": lambda v, o, r, m: value_loss(v, o, r.bfloat16(), m)[0],
    "off by 1e-5": lambda *inputs: value_loss(*inputs)[0] * (1 + 1e-5),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_of_an_fp32_loss_rejects(mutant: str) -> None:
    inputs = batch(torch.float32, garbage=0.0)
    expected, _ = expected_loss(*inputs, 0.2)
    expected.assert_losses(value_loss(*inputs)[0].reshape(1))
    with pytest.raises(AssertionError, match="x bound"):
        expected.assert_losses(MUTANTS[mutant](*inputs).reshape(1))


GRADIENT_MUTANTS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "zero": lambda v, o, r, m: 0 * v.sum(),
    "minus": lambda *inputs: -value_loss(*inputs)[0],
    "off by 1e-3": lambda *inputs: 1.001 * value_loss(*inputs)[0],
    "not clipped": lambda *inputs: value_loss(*inputs, clip_range=None)[0],
    "clipped only": MUTANTS["clipped error"],
}


@pytest.mark.parametrize("mutant", GRADIENT_MUTANTS)
def test_the_comparison_of_an_fp32_gradient_rejects(mutant: str) -> None:
    values, *_, mask = inputs = batch(torch.float32, garbage=0.0)
    _, expected = expected_loss(*inputs, 0.2)
    (gradient,) = torch.autograd.grad(value_loss(*inputs)[0], values)
    expected.assert_gradients(gradient[mask])
    (wrong,) = torch.autograd.grad(GRADIENT_MUTANTS[mutant](*inputs), values)
    with pytest.raises(AssertionError, match="gradient"):
        expected.assert_gradients(wrong[mask])


_ZEROS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"values": [[0.0]]}, TypeError, "values: expected a tensor, got list"),
        ({"values": _ZEROS.long()}, TypeError, "^values: .*floating.*int64"),
        ({"values": torch.zeros(3)}, ValueError, r"^values: .*\(B, T\).*got \(3,\)"),
        ({"old_values": None}, TypeError, "old_values: expected a tensor, got NoneType"),
        ({"old_values": _ZEROS.long()}, TypeError, "old_values: .*floating.*int64"),
        ({"old_values": torch.zeros(2, 1)}, ValueError, r"old_values: .*\(2, 3\).*got \(2, 1\)"),
        ({"old_values": _ZEROS.to("meta")}, ValueError, "old_values: expected on cpu"),
        ({"returns": 0.0}, TypeError, "returns: expected a tensor, got float"),
        ({"returns": _ZEROS.cfloat()}, TypeError, "returns: .*real.*complex"),
        ({"returns": torch.zeros(2)}, ValueError, r"returns: .*\(2, 3\).*got \(2,\)"),
        ({"returns": _ZEROS.to("meta")}, ValueError, "returns: expected on cpu"),
        ({"mask": None}, TypeError, "mask: expected a tensor, got NoneType"),
        ({"mask": _ZEROS * 1j}, TypeError, "mask: .*boolean or 0/1"),
        ({"mask": torch.ones(2, 4)}, ValueError, r"mask: .*\(2, 3\).*got \(2, 4\)"),
        ({"mask": _ZEROS.to("meta")}, ValueError, "mask: expected on cpu"),
        ({"clip_range": -0.1}, ValueError, "clip_range: .*at least 0, got -0.1"),
        ({"clip_range": math.nan}, ValueError, "clip_range: .*at least 0, got nan"),
        ({"clip_range": "0.2"}, TypeError, "clip_range: expected a number, got str"),
        ({"normalizer": 0}, ValueError, "normalizer: .*positive.*got 0"),
        ({"normalizer": -1.0}, ValueError, "normalizer: .*positive.*got -1.0"),
        ({"normalizer": torch.ones(2)}, ValueError, r"normalizer: .*0-d tensor, got \(2,\)"),
        ({"normalizer": "mean"}, TypeError, "normalizer: expected a number, got str"),
    ],
)
def test_errors_name_the_argument(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"values": _ZEROS, "old_values": _ZEROS, "returns": _ZEROS, "mask": _ZEROS}
    with pytest.raises(error, match=message):
        value_loss(**{**arguments, **changed})
