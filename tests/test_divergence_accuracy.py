"""Divergences of nearly equal distributions, of certain ones and of mixtures that are nearly one
side: they keep their relative accuracy and are never negative.
"""

import math
from functools import partial

import pytest
import torch
from support.compare import relative_error
from support.divergence_formulas import BACKENDS, KINDS, MEASURES, evaluate, oracle, random_pair
from support.plain import of_rows, plain_divergence
from torch import autograd

import fastrlhf


@BACKENDS
@KINDS
@pytest.mark.parametrize("step", [1e-2, 1e-4])
def test_nearly_equal_distributions_keep_the_accuracy_of_the_formula(
    impl, measure, step, device
) -> None:
    logits = torch.randn(4, 700, device=device) * 3
    ref = logits + step * torch.randn(4, 700, device=device)
    expected = oracle(logits, ref, **MEASURES[measure])
    ours = evaluate(logits, ref, impl=impl, **MEASURES[measure])
    eager = of_rows(logits, ref, None, None, **MEASURES[measure])
    rounding = torch.finfo(torch.float32).eps
    assert (ours[0] >= -10 * rounding).all()
    for own, plain, exact in zip(ours, eager, expected, strict=True):
        assert relative_error(own, exact) <= 2 * relative_error(plain, exact) + rounding


def exact_divergence(logits, ref, *, direction, beta=0.5, temperature=1.0):
    """The formula in 50 digits: fp64 itself has none left of a KL of 1e-16. One value a row."""
    mpmath = pytest.importorskip("mpmath", reason="needs mpmath")

    def softmax(row):
        weights = [mpmath.exp(mpmath.mpf(x) / mpmath.mpf(temperature)) for x in row]
        total = mpmath.fsum(weights)
        return [weight / total for weight in weights]

    def kl(a, b):
        pairs = zip(a, b, strict=True)
        return mpmath.fsum(x * mpmath.log(x / y) for x, y in pairs if x > 0)

    def value(p, q):
        if direction != "jsd":
            return kl(p, q) if direction == "reverse" else kl(q, p)
        share = mpmath.mpf(beta)
        m = [x + share * (y - x) for x, y in zip(p, q, strict=True)]
        return share * kl(q, m) + (1 - share) * kl(p, m)

    with mpmath.workdps(50):
        rows = zip(logits.double().tolist(), ref.double().tolist(), strict=True)
        values = [float(value(softmax(x), softmax(y))) for x, y in rows]
        return torch.tensor(values, dtype=torch.float64)


@BACKENDS
@pytest.mark.parametrize("measure", ["reverse", "forward", "jsd 0.1", "jsd 0.5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [1e-1, 1e-3, 1e-4, 1e-6])
def test_nearly_equal_distributions_keep_the_relative_accuracy_of_their_logits(
    impl, measure, dtype, step, device
) -> None:
    logits = 3 * torch.randn(3, 80, dtype=dtype, device=device)
    ref = logits + step * torch.randn(3, 80, dtype=dtype, device=device)
    logits[1, 40:], ref[1, 40:] = -torch.inf, -torch.inf
    options = MEASURES[measure] | {"temperature": 0.7}
    found = fastrlhf.kl_divergence(logits, ref, impl=impl, **options).cpu().double()
    expected = exact_divergence(logits, ref, **options)
    bound = 5e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found, expected, rtol=bound, atol=0)


@BACKENDS
@KINDS
def test_nearly_equal_distributions_are_never_a_negative_distance_apart(
    impl, measure, device
) -> None:
    for dtype in (torch.float32, torch.float64):
        logits = 5 * torch.randn(12, 90, dtype=dtype, device=device)
        ulps = torch.finfo(dtype).eps * torch.randint(-3, 4, logits.shape, device=device)
        shift = torch.randn(12, 1, dtype=dtype, device=device)
        for ref in (logits * (1 + ulps), logits + shift, logits.clone()):
            assert (fastrlhf.kl_divergence(logits, ref, impl=impl, **MEASURES[measure]) >= 0).all()


@BACKENDS
@KINDS
def test_the_gradient_of_nearly_equal_distributions_keeps_its_accuracy(
    impl, measure, device
) -> None:
    logits = 3 * torch.randn(3, 300, device=device)
    ref = logits + 1e-4 * torch.randn(3, 300, device=device)
    expected = oracle(logits, ref, **MEASURES[measure])
    found = evaluate(logits, ref, impl=impl, **MEASURES[measure])
    # The gradient of what is not averaged over is q - p, of two roundings of the size of p.
    for own, exact, side in zip(found[1:], expected[1:], ("reverse", "forward"), strict=True):
        bound = 1e-5 if measure in (side, "jsd 0.1") else 1e-2
        assert relative_error(own, exact) <= bound


@BACKENDS
@KINDS
@pytest.mark.parametrize("offset", [1e2, 1e4, 1e5])
def test_an_offset_of_one_side_costs_nothing(impl, measure, offset, device) -> None:
    """It changes no distribution: the errors are those of the shifted logits in the formula."""
    logits, ref = random_pair(4, 300, device)
    for x, y in ((logits + offset, ref), (logits, ref - offset)):
        expected = oracle(x, y, **MEASURES[measure])
        plain = of_rows(x, y, None, None, **MEASURES[measure])
        found = evaluate(x, y, impl=impl, **MEASURES[measure])
        for own, theirs, exact in zip(found, plain, expected, strict=True):
            bound = 2 * relative_error(theirs, exact) + 2e-6
            assert relative_error(own, exact) <= bound


@BACKENDS
@pytest.mark.parametrize("measure", ["reverse", "jsd 0.1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_equal_sides_are_no_distance_apart(impl, measure, dtype, device) -> None:
    logits = torch.randn(2, 600, dtype=dtype, device=device) * 5
    values, *gradients = evaluate(logits, logits, impl=impl, **MEASURES[measure])
    rounding = 4 * torch.finfo(dtype).eps
    assert values.abs().max() <= rounding
    assert all(gradient.abs().max() <= rounding for gradient in gradients)


@BACKENDS
@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(
    ("dtype", "gaps"),
    [(torch.float32, (80, 87, 90, 100, 110)), (torch.float64, (700, 712, 740, 760))],
)
def test_the_jsd_of_two_certainties_is_that_of_a_choice(impl, beta, dtype, gaps, device) -> None:
    # What one side is sure of has, for the other, a probability near the smallest that there is.
    gaps = torch.tensor(gaps, dtype=dtype, device=device)
    logits = torch.stack((torch.zeros_like(gaps), -gaps), -1)
    values, *gradients = evaluate(logits, logits.flip(-1), direction="jsd", beta=beta, impl=impl)
    choice = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    torch.testing.assert_close(values, torch.full_like(values, choice))
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def jsd_errors(jsd, sides, beta: float) -> list[torch.Tensor]:
    """Relative errors of each value, and of each row of both gradients, in fp32."""
    results = []
    for dtype, function in ((torch.float32, jsd), (torch.float64, plain_divergence)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in sides]
        values = function(*leaves, direction="jsd", beta=beta)
        results.append((values[:, None], *autograd.grad(values.sum(), leaves)))
    return [(a.double() - b).norm(dim=1) / b.norm(dim=1) for a, b in zip(*results, strict=True)]


@BACKENDS
@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("noise", [0.1, 0.45, 1.0, 2.0])
def test_a_mixture_that_is_nearly_one_side_keeps_its_accuracy(noise, beta, impl, device) -> None:
    """The value is of the order of the smaller share, and so are the terms that it is a sum of: the
    plain formula has that accuracy where the shares are equal.
    """
    logits = 3 * torch.randn(4, 67, device=device)
    sides = [logits, logits + noise * torch.randn(4, 67, device=device)]
    found = jsd_errors(partial(fastrlhf.kl_divergence, impl=impl), sides, beta)
    plain = jsd_errors(plain_divergence, sides, 0.5)
    for ours, usual in zip(found, plain, strict=True):
        assert ours.max() <= 4 * usual.max() + 8 * torch.finfo(torch.float32).eps
