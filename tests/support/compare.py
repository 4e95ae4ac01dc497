"""Comparisons that a wrong gradient cannot pass.

Over a large vocabulary the target's entry is nearly all of a row's norm: a tolerance over the whole
tensor passes a gradient whose softmax part is missing. So the target's entries and the rest are
compared apart, each by its relative L2 error, the rest row by row.
"""

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 error of all entries together, relative to what is expected."""
    actual, expected = actual.detach().double(), expected.detach().to(actual.device).double()
    scale = expected.norm()
    error = (actual - expected).norm()
    return float(error / scale) if scale > 0 else float(error)


def gradient_errors(actual: Tensor, expected: Tensor, targets: Tensor) -> tuple[float, float]:
    """Relative L2 errors of (N, V) gradients: of the targets' entries, and of the rest in its worst
    row.
    """
    actual, expected = actual.detach().double(), expected.to(actual.device).double()
    targets = targets.to(actual.device)
    live = targets >= 0
    actual, expected = actual[live], expected[live]
    index = targets[live].long().unsqueeze(1)
    at_targets = relative_error(actual.gather(1, index), expected.gather(1, index))
    rest, expected_rest = actual.scatter(1, index, 0), expected.scatter(1, index, 0)
    scale = expected_rest.norm(dim=1)
    worst = (rest - expected_rest).norm(dim=1) / torch.where(scale > 0, scale, 1.0)
    return at_targets, float(worst.max()) if worst.numel() else 0.0


def assert_gradient_close(
    actual: Tensor, expected: Tensor, targets: Tensor, tolerance: float
) -> None:
    """Assert that both errors are within the tolerance and that ignored rows are exactly zero."""
    at_targets, rest = gradient_errors(actual, expected, targets)
    assert at_targets <= tolerance, f"error of the targets' entries: {at_targets:.2e}"
    assert rest <= tolerance, f"error of the other entries: {rest:.2e}"
    assert not actual[(targets < 0).to(actual.device)].any(), "gradient in an ignored row"
