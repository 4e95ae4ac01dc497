"""The budgets of support/compare.py: what they allow, and what they reject."""

import pytest
import torch
from support.compare import (
    assert_as_accurate,
    assert_gradient_as_accurate,
    assert_gradient_close,
    budget,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def values(dtype):
    """Exact values, and what rounding to the dtype makes of them."""
    exact = torch.randn(50, dtype=torch.float64) * 3
    return exact, exact.to(dtype)


@DTYPES
def test_a_rounding_passes(dtype) -> None:
    exact, rounded = values(dtype)
    eps = torch.finfo(dtype).eps
    assert_as_accurate(rounded, rounded, exact)
    # What the plain formula errs by, we may too, twice; and a few roundings where it errs nowhere.
    assert_as_accurate(exact * (1 + 40 * eps), exact * (1 + 21 * eps), exact)
    assert_as_accurate((exact * (1 + 4 * eps)).to(dtype), exact.to(dtype), exact)
    assert budget(0.0, torch.bfloat16) < 0.1


@DTYPES
@pytest.mark.parametrize(
    "mutant",
    ["a thousandth", "one entry", "one entry less", "nothing", "not finite", "sign", "infinite"],
)
def test_a_wrong_value_fails(mutant, dtype) -> None:
    exact, right = values(dtype)
    largest = exact.abs().argmax()
    wrong = right.clone()
    if mutant == "a thousandth":
        wrong = wrong * 1.001
    elif mutant == "one entry":
        wrong[7] += 1e-3 * right[largest].abs()
    elif mutant == "one entry less":
        wrong[largest] = 0
    elif mutant == "nothing":
        wrong = torch.zeros_like(wrong)
    elif mutant == "not finite":
        wrong[3] = torch.nan
    elif mutant == "sign":
        wrong[largest] *= -1
    else:
        exact[3] = torch.inf
    with pytest.raises(AssertionError, match=r"^value: "):
        assert_as_accurate(wrong, right, exact)


def test_a_sum_of_terms_that_cancel_is_judged_by_their_size() -> None:
    exact, found = torch.tensor([1e-6], dtype=torch.float64), torch.tensor([1.5e-6])
    with pytest.raises(AssertionError, match=r"^value: "):
        assert_as_accurate(found, torch.tensor([1e-6]), exact)
    assert_as_accurate(found, torch.tensor([1e-6]), exact, size=1.0)
    with pytest.raises(AssertionError, match=r"^value: "):  # a term of a thousandth is missing
        assert_as_accurate(found + 1e-3, torch.tensor([1e-6]), exact, size=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "mutant", ["zero", "target only", "no softmax at target", "scaled", "late"]
)
def test_a_wrong_gradient_fails(mutant, dtype) -> None:
    logits, targets = torch.randn(4, 800).mul(4).to(dtype), torch.tensor([5, 700, -100, 30])
    p = logits.double().softmax(-1) * (targets >= 0)[:, None]
    index = targets.clamp(min=0)[:, None]
    live = (targets >= 0).double()[:, None]
    exact = torch.zeros_like(p).scatter(1, index, live) - p
    plain = exact.to(dtype)
    assert_gradient_as_accurate(plain, plain, exact, targets)
    assert_gradient_close(plain, exact, targets, budget(0.0, dtype))
    target_part = torch.zeros_like(exact).scatter(1, index, exact.gather(1, index))
    wrong = {
        "zero": torch.zeros_like(exact),
        "target only": target_part,
        "no softmax at target": exact.scatter(1, index, 1.1 * live),
        "scaled": exact * (1.001 if dtype == torch.float32 else 1.02),
        "late": torch.where(torch.arange(800) > 500, 0.0, exact),
    }[mutant]
    with pytest.raises(AssertionError, match=r"^error of"):
        assert_gradient_as_accurate(wrong.to(dtype), plain, exact, targets)
