"""Comparisons that a wrong gradient cannot pass.

Over a large vocabulary the target's entry is nearly all of a row's norm: a tolerance over the whole
tensor passes a gradient whose softmax part is missing. So the target's entries and the rest are
compared apart, each by its relative L2 error, the rest row by row.

How far a right result in fp32 or below is from the oracle depends on the processor: on the width of
its vectors, on the order in which it adds, on its exponential function. So the budget of such a
result is a multiple of the error that the plain formula makes in the same dtype on the same machine
(`PLAIN` times it), and a few roundings (`ULPS` times eps in fp32 and fp64, once eps below) of the
terms that it is made of, for where the plain formula happens to be exact. `test_compare.py` shows
what that rejects.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PLAIN = 2.0
ULPS = 8.0


def budget(
    plain_error: float, dtype: torch.dtype, size: float = 1.0, ulps: float | None = None
) -> float:
    """The error allowed where the plain formula makes `plain_error`, of terms of `size`."""
    if ulps is None:
        ulps = ULPS if dtype in (torch.float32, torch.float64) else 1.0
    # Below the smallest normal number a rounding is no longer relative, and may be to 0.
    info = torch.finfo(dtype)
    return PLAIN * plain_error + ulps * info.eps * size + info.tiny


def assert_as_accurate(
    found: Tensor,
    plain: Tensor,
    exact: Tensor | float,
    *,
    size: float | None = None,
    ulps: float | None = None,
    of: str = "value",
) -> None:
    """Assert that the largest error of an entry is within the budget: see above.

    `plain` is what the plain formula gives in the same dtype; `size` that of the terms which make
    up an entry (by default, of the largest entry). What is infinite must be so on both sides.
    """
    dtype = found.dtype
    found, plain = (x.detach().cpu().double().flatten() for x in (found, plain))
    exact = torch.as_tensor(exact, dtype=torch.float64).detach().cpu().flatten()
    assert found.shape == plain.shape == exact.shape, of
    finite = exact.isfinite()
    assert torch.equal(found[~finite], exact[~finite]), f"{of}: not infinite where it should be"
    found, plain, exact = found[finite], plain[finite], exact[finite]
    if not exact.numel():
        return
    assert found.isfinite().all(), f"{of}: not finite"
    error = float((found - exact).abs().max())
    of_plain = float((plain - exact).abs().nan_to_num(0.0, 0.0).max())
    bound = budget(of_plain, dtype, float(exact.abs().max()) if size is None else size, ulps)
    assert error <= bound, f"{of}: error {error:.2e}, not {bound:.2e} (plain: {of_plain:.2e})"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 error of all entries together, relative to what is expected."""
    actual, expected = actual.detach().double(), expected.detach().to(actual.device).double()
    scale = expected.norm()
    error = (actual - expected).norm()
    return float(error / scale) if scale > 0 else float(error)


def assert_gradients_as_accurate(
    found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]
) -> None:
    """Assert that the L2 error of each whole gradient is within the budget, relative to it."""
    for a, b, c in zip(found, plain, exact, strict=True):
        error, bound = relative_error(a, c), budget(relative_error(b, c), a.dtype)
        assert error <= bound, f"error of a gradient: {error:.2e}, not {bound:.2e}"


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


def assert_gradient_as_accurate(
    actual: Tensor,
    plain: Tensor,
    expected: Tensor,
    targets: Tensor,
    ulps: float | None = None,
) -> None:
    """The same with the budget as the tolerance of either error: of the targets' entries as the
    plain formula's gradient has it there, and of the rest.
    """
    of_plain = gradient_errors(plain, expected, targets)
    # A plain formula that overflows allows nothing.
    of_plain = [error if math.isfinite(error) else 0.0 for error in of_plain]
    bounds = [budget(error, actual.dtype, ulps=ulps) for error in of_plain]
    at_targets, rest = gradient_errors(actual, expected, targets)
    assert at_targets <= bounds[0], (
        f"error of the targets' entries: {at_targets:.2e}, not {bounds[0]:.2e}"
    )
    assert rest <= bounds[1], f"error of the other entries: {rest:.2e}, not {bounds[1]:.2e}"
    assert not actual[(targets < 0).to(actual.device)].any(), "gradient in an ignored row"
