"""whiten against its formula in 150 digits."""

import math
import statistics
from collections.abc import Callable
from decimal import Decimal

import pytest
import torch
from support.advantage_cases import FINE, GARBAGE, HALF, MASKS
from support.preference_formulas import Expectation, decimals
from torch import Tensor

from fastrlhf import whiten

SHIFT = pytest.mark.parametrize("shift_mean", [True, False], ids=["shifted", "mean kept"])


def expected_whiten(kept: Tensor, shift_mean: bool = True) -> Expectation:
    """What `whiten` must make of the entries of the mask, (n,)."""

    def whitened(x: list[Decimal]) -> list[Decimal]:
        mean = sum(x) / len(x)
        variance = sum((v - mean) ** 2 for v in x) / max(len(x) - 1, 1)
        scale = (variance + Decimal("1e-8")).sqrt()
        return [(v - mean) / scale + (0 if shift_mean else mean) for v in x]

    return Expectation(whitened, decimals(kept))


def to_whiten(dtype: torch.dtype, shape: tuple[int, ...] = (4, 7)) -> tuple[Tensor, Tensor]:
    """Entries, garbage among them, and which of them count: no entry of the first row."""
    mask = torch.rand(shape) < 0.6
    mask[0] = False
    x = (3 + 2 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    return torch.where(mask, x, math.nan).requires_grad_(), mask


@FINE
@SHIFT
@pytest.mark.parametrize("shape", [(4, 7), (30,), (3, 2, 5)])
@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["usual", "of the size of the floor"])
def test_whitened_entries_and_their_gradients_are_those_of_the_formula(
    scale: float, shape: tuple[int, ...], shift_mean: bool, dtype: torch.dtype
) -> None:
    x, mask = to_whiten(dtype, shape)
    x = ((x.detach() - 3) * scale).requires_grad_()
    found = whiten(x, mask, shift_mean=shift_mean)
    assert found.shape == x.shape and found.dtype == dtype
    expected = expected_whiten(x[mask], shift_mean)
    expected.assert_losses(found[mask])
    assert (found[~mask] == 0).all()
    upstream = torch.randn(shape, dtype=dtype)
    (gradient,) = torch.autograd.grad(found, x, upstream)
    expected.assert_gradients(gradient[mask], weights=upstream[mask].tolist())
    assert (gradient[~mask] == 0).all()


def test_an_example_of_whitening_by_hand() -> None:
    # Mean 2; squares 1, 0, 1 over 3 - 1 make variance 1.
    x = torch.tensor([[1.0, 9.0], [2.0, 3.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 0], [1, 1]])
    near = pytest.approx  # but for the 1e-8 that keeps it from dividing by 0
    assert whiten(x, mask).flatten().tolist() == near([-1, 0, 0, 1], rel=1e-8, abs=0)
    shifted = whiten(x, mask, shift_mean=False).flatten().tolist()
    assert shifted == near([1, 0, 2, 3], rel=1e-8, abs=0)


@FINE
def test_the_mean_becomes_zero_and_the_variance_one(dtype: torch.dtype) -> None:
    x, mask = to_whiten(dtype, (40, 50))
    kept = x[mask].tolist()
    found = whiten(x, mask)[mask].tolist()
    eps = torch.finfo(dtype).eps
    assert abs(statistics.fmean(found)) <= 2 * eps
    variance = statistics.variance(kept)
    whitened = variance / (variance + 1e-8)
    assert statistics.variance(found) == pytest.approx(whitened, rel=8 * eps)
    unshifted = whiten(x, mask, shift_mean=False)[mask].tolist()
    assert statistics.fmean(unshifted) == pytest.approx(statistics.fmean(kept), rel=2 * eps)
    assert statistics.variance(unshifted) == pytest.approx(whitened, rel=8 * eps)


@SHIFT
def test_it_is_the_formula_of_trl(shift_mean: bool) -> None:
    # TRL's trainers: moments by masked means, and Bessel's correction afterwards.
    x, mask = to_whiten(torch.float64)
    clean = torch.where(mask, x, 0.0)
    mean = (clean * mask).sum() / mask.sum()
    variance = ((clean - mean) ** 2 * mask).sum() / mask.sum()
    variance = variance * mask.sum() / (mask.sum() - 1)
    trl = (clean - mean) * torch.rsqrt(variance + 1e-8)
    trl = (trl if shift_mean else trl + mean) * mask
    torch.testing.assert_close(whiten(x, mask, shift_mean=shift_mean), trl, rtol=1e-13, atol=1e-15)


@GARBAGE
@SHIFT
@MASKS
def test_garbage_outside_of_the_mask_changes_no_bit_of_what_is_whitened(
    mask_dtype: torch.dtype, shift_mean: bool, garbage: float
) -> None:
    x, mask = to_whiten(torch.float32)
    clean = torch.where(mask, x, 0.0).detach().requires_grad_()
    dirty = torch.where(mask, x, garbage).detach().requires_grad_()
    found = whiten(dirty, mask.to(mask_dtype), shift_mean=shift_mean)
    expected = whiten(clean, mask, shift_mean=shift_mean)
    assert torch.equal(found, expected)
    upstream = torch.randn(mask.shape)
    gradients = [
        torch.autograd.grad(*pair, upstream)[0] for pair in ((found, dirty), (expected, clean))
    ]
    assert torch.equal(*gradients) and (gradients[0][~mask] == 0).all()


@pytest.mark.parametrize("entries", [0, 1])
@pytest.mark.parametrize("shape", [(2, 3), (1, 1)])
@SHIFT
def test_fewer_than_two_entries_have_variance_zero_and_finite_gradients(
    shift_mean: bool, shape: tuple[int, int], entries: int
) -> None:
    x = torch.full(shape, 0.3, requires_grad=True)
    mask = torch.arange(x.numel()).reshape(shape) >= x.numel() - entries
    found = whiten(x, mask, shift_mean=shift_mean)
    assert torch.equal(found, torch.where(mask, 0.0 if shift_mean else 0.3, 0.0))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient, torch.where(mask, 0.0 if shift_mean else 1.0, 0.0))


@pytest.mark.parametrize("entry", [0.1, -0.7, 1000.1])
def test_equal_entries_have_no_deviation_to_scale_up(entry: float) -> None:
    # Their mean is rounded, and what that leaves would be divided by 1e-4.
    found = whiten(torch.full((2, 3), entry), torch.ones(2, 3))
    assert found.flatten().tolist() == pytest.approx([0] * 6, abs=1e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_nothing_to_whiten_is_fine(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    found = whiten(x, torch.ones(shape))
    assert found.shape == shape
    assert torch.autograd.grad(found.sum(), x)[0].shape == shape


@SHIFT
def test_derivatives_of_both_orders_of_whitening_are_right(shift_mean: bool) -> None:
    x, mask = to_whiten(torch.float64, (3, 4))
    x = torch.where(mask, x, 0.0).detach().requires_grad_()

    def whitened(x: Tensor) -> Tensor:
        return whiten(x, mask, shift_mean=shift_mean)

    assert torch.autograd.gradcheck(whitened, (x,))
    assert torch.autograd.gradgradcheck(whitened, (x,))


@HALF
def test_half_precision_is_whitened_in_fp32(dtype: torch.dtype) -> None:
    x, mask = to_whiten(dtype)
    found = whiten(x, mask)
    assert found.dtype == torch.float32
    assert torch.equal(found, whiten(x.float(), mask))
    assert torch.autograd.grad(found.sum(), x)[0].dtype == dtype


def _variance_of_all(x: Tensor, mask: Tensor) -> Tensor:
    kept = x[mask]
    return torch.where(mask, (x - kept.mean()) * (kept.var(correction=0) + 1e-8).rsqrt(), 0.0)


WHITEN_MUTANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean kept": lambda x, mask: whiten(x, mask, shift_mean=False),
    "mask ignored": lambda x, mask: whiten(torch.where(mask, x, 0.0), torch.ones_like(mask)),
    "divided by n": _variance_of_all,
    "only scaled": lambda x, mask: x * (x[mask].var() + 1e-8).rsqrt(),
    "only shifted": lambda x, mask: x - x[mask].mean(),
    "no floor": lambda x, mask: (x - x[mask].mean()) / x[mask].std(),
    "floor of the deviation": lambda x, mask: (x - x[mask].mean()) / (x[mask].std() + 1e-8),
    "rounded": lambda x, mask: whiten(x, mask).bfloat16().float(),
    "off by 1e-5": lambda x, mask: whiten(x, mask) * (1 + 1e-5),
}


@pytest.mark.parametrize("mutant", WHITEN_MUTANTS)
def test_the_comparison_of_whitened_fp32_entries_rejects(mutant: str) -> None:
    x, mask = to_whiten(torch.float32)
    # So small that the floor under the variance counts.
    x = (x.detach() - 3) * 1e-3
    expected = expected_whiten(x[mask])
    expected.assert_losses(whiten(x, mask)[mask])
    with pytest.raises(AssertionError, match="x bound"):
        expected.assert_losses(WHITEN_MUTANTS[mutant](x, mask)[mask])


def test_the_comparison_of_fp32_gradients_of_whitening_rejects_constants() -> None:
    # Were the mean, or the variance, taken for a constant, values would be right all the same.
    x, mask = to_whiten(torch.float32)
    kept = x[mask].detach().requires_grad_()
    expected = expected_whiten(kept)
    weights = torch.randn(kept.shape)
    mean, scale = kept.mean(), (kept.var() + 1e-8).rsqrt()
    for mutant in ((kept - mean.detach()) * scale, (kept - mean) * scale.detach(), 0 * kept):
        (gradient,) = torch.autograd.grad(mutant, kept, weights, retain_graph=True)
        with pytest.raises(AssertionError, match="gradient"):
            expected.assert_gradients(gradient, weights=weights.tolist())
