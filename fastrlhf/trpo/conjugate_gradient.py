"""Conjugate gradients: solve A x = b, given nothing but products of A with vectors.

Each product with the Fisher matrix of a model is a forward and a backward (`fisher.py`), so that a
handful of them is all that `trpo_step` can afford. Targets and operators of any scale are solved
alike: everything is divided by its largest element, and multiplied back at the end.

Dims: D elements of a vector.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastrlhf.ops.checks import (
    check_at_least,
    check_floating,
    check_same_device,
    check_shape,
    check_whole,
)

from .parameters import wide


def conjugate_gradient(
    operator: Callable[[Tensor], Tensor],
    target: Tensor,
    *,
    iterations: int = 15,
    tolerance: float = 1e-10,
) -> tuple[Tensor, Tensor]:
    """Solve operator(x) = target for a symmetric positive definite operator.

    Eager equivalent, as far as it has converged: `torch.linalg.solve(A, target)`.

    Args:
        operator: x (D,) → A x (D,).
        target: (D,).
        iterations: at most so many products.
        tolerance: once |target - A x|² / |target|² is no more than this, x stays as it is.

    Returns:
        x (D,), and the relative residual |target - A x| / |target| (0-d), as the recurrence of the
        method has it.

    A target of 0 has the solution 0. Residuals below the square of what the dtype resolves count as
    none. The scales of operator and target do not matter, as long as x itself can be represented.
    Nothing waits for a GPU.

    Raises:
        TypeError, ValueError: a target that is no vector; an operator that makes something else of
            a vector; an option out of range.

    Source: Hestenes & Stiefel, "Methods of conjugate gradients for solving linear systems" (1952).

    Example:
        >>> matrix, target = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([2.0, 2.0])
        >>> solution, residual = fastrlhf.conjugate_gradient(lambda v: matrix @ v, target)
        >>> solution
        tensor([1.0000, 0.5000])
    """
    if not callable(operator):
        raise TypeError(f"operator: expected a function, got {type(operator).__name__}")
    check_floating("target", target)
    if target.ndim != 1:
        raise ValueError(f"target: expected shape (D,), got {tuple(target.shape)}")
    iterations = check_whole("iterations", iterations, 0)
    tolerance = check_at_least("tolerance", tolerance, 0)
    size = _largest(target)
    residual = wide(target) / size
    x, direction = torch.zeros_like(residual), residual
    start = square = residual @ residual
    # Below this floor, rounding has parted the residual of the recurrence from target - A x, so
    # that going on gains nothing; and its square would soon underflow.
    floor = torch.maximum(start * tolerance, start * torch.finfo(start.dtype).eps ** 4)
    first_product_size = torch.ones_like(start)
    for i in range(iterations):
        # Direction and product are divided by their largest elements, so that the curvature
        # neither over- nor underflows, whatever the scale of the operator, and even where the
        # residual is nearly gone.
        length = _largest(direction)
        unit = direction / length
        # A copy, since an operator may write into what it is given.
        product = operator(unit.to(target.dtype, copy=True))
        check_floating("operator(x)", product)
        check_shape("operator(x)", product, tuple(target.shape), "the shape of target")
        check_same_device("operator(x)", product, "target", target)
        product = wide(product)
        product_size = _largest(product)
        first_product_size = product_size if i == 0 else first_product_size
        product = product / product_size
        curvature = unit @ product
        # Once converged, or where the operator turns out not to be positive definite, x stays as
        # it is. The loop goes on, since to leave it would wait for a GPU.
        going = (square > floor) & (curvature > 0)
        step = square / length / torch.where(going, curvature, 1.0)
        x = torch.where(going, x + step * (first_product_size / product_size) * unit, x)
        residual = torch.where(going, residual - step * product, residual)
        new_square = torch.where(going, residual @ residual, square)
        share = new_square / torch.where(going, square, 1.0)
        direction = torch.where(going, residual + share * direction, direction)
        square = new_square
    relative = torch.where(start == 0, 0.0, (square / torch.where(start == 0, 1.0, start)).sqrt())
    return (x * (size / first_product_size)).to(target.dtype), relative.to(target.dtype)


def _largest(x: Tensor) -> Tensor:
    """Largest magnitude (0-d), to divide by; 1 if all elements are zero, or there are none."""
    if x.numel() == 0:
        return wide(x.new_ones(()))
    largest = wide(x).abs().max()
    return torch.where(largest == 0, 1.0, largest)
