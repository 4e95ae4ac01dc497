"""sequence_logprobs: token log-probs summed, or averaged, over a mask."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrlhf import sequence_logprobs


def in_python(tokens: Tensor, mask: Tensor, average: bool) -> list[float]:
    """The exactly rounded sum of each row, or its mean."""
    results = []
    for row, keep in zip(tokens.double().tolist(), mask.tolist(), strict=True):
        kept = [x for x, k in zip(row, keep, strict=True) if k]
        results.append(math.fsum(kept) / (max(len(kept), 1) if average else 1))
    return results


def example(
    dtype: torch.dtype, tokens: int = 40, garbage: float = math.nan
) -> tuple[Tensor, Tensor]:
    """Log-probs (5, T) with garbage outside the mask; row 2 is masked altogether, row 3 not at
    all.
    """
    mask = torch.rand(5, tokens) < 0.6
    mask[2], mask[3] = False, True
    values = (-5 * torch.rand(5, tokens, dtype=torch.float64)).to(dtype)
    return torch.where(mask, values, garbage), mask


@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("tokens", [0, 1, 37, 1500])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_sums_and_means_are_those_of_the_kept_tokens(
    dtype: torch.dtype, tokens: int, average: bool
) -> None:
    values, mask = example(dtype, tokens)
    found = sequence_logprobs(values, mask, average=average)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    eps = torch.finfo(found.dtype).eps
    # Pairwise summation errs by about eps·log2 T; a dropped token is at least 100 times that.
    for value, expected in zip(found.tolist(), in_python(values, mask, average), strict=True):
        assert abs(value - expected) <= 8 * eps * abs(expected)


@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
def test_a_row_without_tokens_is_zero(average: bool) -> None:
    values = torch.tensor([[math.nan, -math.inf]])
    assert sequence_logprobs(values, torch.zeros(1, 2), average=average).tolist() == [0.0]


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, -1e9])
@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
def test_garbage_outside_the_mask_changes_no_bit_and_has_gradient_zero(
    average: bool, garbage: float, mask_dtype: torch.dtype
) -> None:
    clean, mask = example(torch.float32, garbage=0.0)
    dirty = torch.where(mask, clean, garbage).requires_grad_()
    found = sequence_logprobs(dirty, mask.to(mask_dtype), average=average)
    assert torch.equal(found, sequence_logprobs(clean, mask, average=average))
    weights = torch.randn(5)
    (gradient,) = torch.autograd.grad(found, dirty, weights)
    counts = mask.sum(-1).clamp(min=1) if average else torch.ones(5)
    expected = torch.where(mask, (weights / counts)[:, None], 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
def test_derivatives_of_both_orders_are_right(average: bool) -> None:
    values, mask = example(torch.float64, 4, garbage=0.0)
    values.requires_grad_()

    def sums_of(x: Tensor) -> Tensor:
        return sequence_logprobs(x, mask, average=average)

    assert torch.autograd.gradcheck(sums_of, (values,))
    assert torch.autograd.gradgradcheck(lambda x: sums_of(x).square(), (values,))


def test_strides_do_not_matter() -> None:
    values, mask = example(torch.float64)
    expected = sequence_logprobs(values, mask)
    wide = torch.cat((torch.full((5, 3), math.nan, dtype=torch.float64), values), 1)[:, 3:]
    assert torch.equal(sequence_logprobs(wide, mask), expected)
    turned = sequence_logprobs(values.t().contiguous().t(), mask.t().contiguous().t())
    torch.testing.assert_close(turned, expected, rtol=1e-14, atol=0)
    row = mask[:1].expand(5, 40)
    clean = torch.nan_to_num(values)
    assert torch.equal(sequence_logprobs(clean, row), sequence_logprobs(clean, row.clone()))


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(data=st.data(), average=st.booleans())
def test_any_rows_agree_with_the_exact_sum(data: st.DataObject, average: bool) -> None:
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 6)))
    count = shape[0] * shape[1]
    values = data.draw(st.lists(st.floats(-1e3, 0), min_size=count, max_size=count))
    keep = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    tokens = torch.tensor(values, dtype=torch.float64).reshape(shape)
    mask = torch.tensor(keep, dtype=torch.bool).reshape(shape)
    found = sequence_logprobs(tokens, mask, average=average)
    assert found.tolist() == pytest.approx(in_python(tokens, mask, average), rel=1e-14, abs=1e-300)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda x, mask: torch.nan_to_num(x).sum(-1) / x.shape[1],
        lambda x, mask: sequence_logprobs(x, mask),
        lambda x, mask: sequence_logprobs(x, mask & (torch.arange(40) > 0), average=True),
        lambda x, mask: sequence_logprobs(x.bfloat16(), mask, average=True),
        lambda x, mask: sequence_logprobs(x, mask, average=True) * (1 + 1e-5),
    ],
    ids=["mean over T", "sum", "first token lost", "rounded", "off by 1e-5"],
)
def test_the_exact_mean_tells_it_from(mutant: Any) -> None:
    values, mask = example(torch.float32)
    mask[:, 0] = True
    values = torch.nan_to_num(values, nan=-1.0)
    expected = in_python(values, mask, average=True)
    tolerance = 8 * torch.finfo(torch.float32).eps
    right = sequence_logprobs(values, mask, average=True).tolist()
    assert right == pytest.approx(expected, rel=tolerance, abs=0)
    assert mutant(values, mask).tolist() != pytest.approx(expected, rel=tolerance, abs=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.0], torch.ones(1, 1)), TypeError, "token_logprobs: expected a tensor, got list"),
        ((torch.zeros(2, 3).long(), torch.ones(2, 3)), TypeError, "token_logprobs: .*floating"),
        ((torch.zeros(3), torch.ones(3)), ValueError, r"token_logprobs: .*\(B, T\).*got \(3,\)"),
        ((torch.zeros(1, 2, 3), torch.ones(1, 2, 3)), ValueError, r"token_logprobs: .*\(B, T\)"),
        ((torch.zeros(2, 3), None), TypeError, "mask: expected a tensor, got NoneType"),
        ((torch.zeros(2, 3), torch.ones(2, 3) * 1j), TypeError, "mask: .*boolean or 0/1"),
        ((torch.zeros(2, 3), torch.ones(2, 2)), ValueError, r"mask: .*\(2, 3\).*got \(2, 2\)"),
        ((torch.zeros(2, 3), torch.ones(2, 1)), ValueError, r"mask: .*\(2, 3\).*got \(2, 1\)"),
        ((torch.zeros(2, 3), torch.ones(2, 3, device="meta")), ValueError, "mask: expected on cpu"),
    ],
)
def test_errors_name_the_argument(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sequence_logprobs(*arguments)
