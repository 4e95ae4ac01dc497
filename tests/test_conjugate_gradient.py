"""conjugate_gradient, against systems whose solution is known."""

import math

import pytest
import torch
from support.compare import relative_error
from support.one_thread import one_thread  # noqa: F401  of every test in this file
from support.trpo_problems import Batch, bits, device_inputs, same_bits
from torch import Tensor

from fastrlhf import conjugate_gradient


def spd(size: int, condition: float, device) -> Tensor:
    q, _ = torch.linalg.qr(device_inputs(device, size, size))
    values = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64, device=device)
    return q @ torch.diag(values) @ q.T


def residual_of(matrix: Tensor, x: Tensor, target: Tensor) -> float:
    return float((target - matrix @ x).norm() / target.norm())


@pytest.mark.parametrize("condition", [2.0, 10.0, 1e3])
def test_conjugate_gradients_solve_in_as_many_steps_as_dimensions(condition, device) -> None:
    matrix, target = spd(12, condition, device), device_inputs(device, 12)
    # An ill-conditioned system takes some steps more than in exact arithmetic.
    for iterations, bound in ((12, 1e-5 if condition < 100 else 0.1), (24, 1e-10)):
        x, residual = conjugate_gradient(
            lambda v: matrix @ v, target, iterations=iterations, tolerance=0.0
        )
        assert residual_of(matrix, x, target) < bound and residual < bound
    assert relative_error(x, torch.linalg.solve(matrix, target)) < 1e-9
    # A bound that too few steps fail.
    x, _ = conjugate_gradient(lambda v: matrix @ v, target, iterations=6)
    assert residual_of(matrix, x, target) > 1e-5


@pytest.mark.parametrize("iterations", [1, 2, 5, 15])
@pytest.mark.parametrize("condition", [10.0, 1e8])
def test_the_residual_is_the_true_one(iterations, condition, device) -> None:
    matrix, target = spd(30, condition, device), device_inputs(device, 30)
    x, residual = conjugate_gradient(lambda v: matrix @ v, target, iterations=iterations)
    assert residual.shape == () and x.shape == (30,)
    assert float(residual) == pytest.approx(residual_of(matrix, x, target), rel=1e-6, abs=1e-12)


def test_each_iterate_is_the_best_of_its_krylov_space(device) -> None:
    matrix, target = spd(20, 100.0, device), device_inputs(device, 20)
    exact = torch.linalg.solve(matrix, target)
    basis = [target]
    for iterations in range(1, 6):
        x, _ = conjugate_gradient(lambda v: matrix @ v, target, iterations=iterations)
        k = torch.linalg.qr(torch.stack(basis, 1))[0]
        best = k @ torch.linalg.solve(k.T @ matrix @ k, k.T @ target)
        assert relative_error(x, best) < 1e-8
        assert (x - exact) @ matrix @ (x - exact) < exact @ matrix @ exact
        basis.append(matrix @ basis[-1])


def test_systems_that_are_solved_at_once(device) -> None:
    target = device_inputs(device, 9)
    x, residual = conjugate_gradient(lambda v: 4 * v, target, iterations=1)
    torch.testing.assert_close(x, target / 4)
    assert residual < 1e-15
    for iterations in (0, 1, 15):
        x, residual = conjugate_gradient(lambda v: 4 * v, 0 * target, iterations=iterations)
        assert not x.any() and residual == 0
    diagonal = torch.tensor([1.0, 5.0, 1.0, 5.0, 9.0], dtype=torch.float64, device=device)
    target = torch.ones_like(diagonal)
    # As many steps as there are different eigenvalues.
    x, _ = conjugate_gradient(lambda v: diagonal * v, target, iterations=3, tolerance=0.0)
    torch.testing.assert_close(x, 1 / diagonal)
    x, residual = conjugate_gradient(lambda v: diagonal * v, target, iterations=0)
    assert not x.any() and residual == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tolerance", [1e-10, 0.0])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e6])
def test_iterating_far_beyond_convergence_does_no_harm(dtype, tolerance, condition, device) -> None:
    matrix, target = (x.to(dtype) for x in (spd(10, condition, device), device_inputs(device, 10)))
    x, residual = conjugate_gradient(
        lambda v: matrix @ v, target, iterations=1500, tolerance=tolerance
    )
    assert x.isfinite().all() and residual.isfinite()
    true = residual_of(matrix, x, target)
    # What is reached is limited by the rounding of A x, or by the tolerance of the residual.
    rounding = torch.finfo(dtype).eps * float(matrix.norm() * x.norm() / target.norm())
    assert true < 20 * rounding + 1.1 * math.sqrt(tolerance)


def test_it_stays_where_the_tolerance_is_reached(device) -> None:
    matrix, target = spd(30, 1e3, device), device_inputs(device, 30)
    solve = lambda n: conjugate_gradient(lambda v: matrix @ v, target, iterations=n, tolerance=1e-2)  # noqa: E731
    first = next(n for n in range(1, 31) if float(solve(n)[1]) <= 0.1)
    assert 2 < first < 30
    for iterations in (first + 1, first + 20):
        for found, expected in zip(solve(iterations), solve(first), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("signs", ["first", "mixed", "negative", "zero"])
def test_an_operator_that_is_not_definite_gives_finite_numbers(signs, device) -> None:
    diagonal = torch.linspace(1, 2, 8, dtype=torch.float64, device=device)
    if signs == "first":
        diagonal[0] = -20
    elif signs == "mixed":
        diagonal[::2] *= -1
    else:
        diagonal = -diagonal if signs == "negative" else 0 * diagonal
    target = device_inputs(device, 8)
    for iterations in (1, 5, 100):
        x, residual = conjugate_gradient(lambda v: diagonal * v, target, iterations=iterations)
        assert x.isfinite().all() and residual.isfinite()
        if signs in ("negative", "zero"):
            assert not x.any() and residual == 1


def test_a_target_of_nan_is_not_reported_as_solved(device) -> None:
    for bad in (torch.nan, torch.inf):
        target = torch.tensor([1.0, bad], device=device)
        x, residual = conjugate_gradient(lambda v: 2 * v, target)
        assert x.isnan().any() or not residual <= 1
    batch = Batch(device)
    before = bits(batch.params)
    info = batch.step(advantages=batch.advantages.masked_fill(batch.mask != 0, torch.nan))
    assert not info.accepted and same_bits(batch.params, before)
    assert info.cg_residual.isnan()


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_the_solution_scales_with_the_target_in_fp32(scale, device) -> None:
    matrix, target = spd(6, 10.0, device).float(), device_inputs(device, 6).float()
    unit, _ = conjugate_gradient(lambda v: matrix @ v, target)
    x, residual = conjugate_gradient(lambda v: matrix @ v, target * scale)
    assert relative_error(x.double() / scale, unit) < 1e-4
    assert 0 <= residual < 1e-4
