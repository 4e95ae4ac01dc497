"""The dense Fisher matrix of a softmax, and comparisons of products with it."""

import numpy as np
import pytest
import torch

BACKENDS = pytest.mark.parametrize("impl", ["eager", "compiled", "triton"])
NAN = torch.nan


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def dense_fisher(logits: np.ndarray, temperature: float) -> np.ndarray:
    """(V, V) diag(p) - p pᵀ over T² of one row, in fp64."""
    finite = logits - logits.max()
    weights = np.exp(finite / temperature)
    p = weights / weights.sum()
    matrix = -np.outer(p, p)
    matrix[np.diag_indices(p.size)] += p
    return matrix / temperature**2


def assert_fisher_close(found, logits, tangent, temperature, tolerance, exact) -> None:
    """Compare a product and a quadratic form of (N, V) rows with those of the dense matrix.

    The bound of an entry is relative to its own terms, p_i (|u_i| + E|u|) / T²: entries that have
    little probability are held to the same number of digits as the others.
    """
    product, quadratic = (x.cpu().double().numpy() for x in found)
    z, u = (x.cpu().double().numpy() for x in (logits, tangent))
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).cpu().expand(len(z)).numpy()
    for row, t in enumerate(temperatures):
        matrix = dense_fisher(z[row], t)
        p = np.exp((z[row] - z[row].max()) / t)
        p /= p.sum()
        terms = np.abs(u[row]) + p @ np.abs(u[row])
        error = np.abs(product[row] - matrix @ u[row])
        assert (error <= tolerance * p * terms / t**2).all(), f"error of row {row} of the product"
        error = abs(quadratic[row] - u[row] @ matrix @ u[row])
        assert error <= exact * (p @ terms**2) / t**2, f"error of row {row} of the quadratic form"


def random_rows(rows, vocab, device, dtype=torch.float32, spread=3.0):
    logits = torch.randn(rows, vocab, device=device).mul(spread).to(dtype)
    # A mean that is not 0, so that what forgets it is wrong.
    tangent = (torch.randn(rows, vocab, device=device) + 1).to(dtype)
    return logits, tangent
