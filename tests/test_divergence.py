"""Divergences over the vocabulary and their gradients, by kernels and by the eager backend, against
textbook formulas in NumPy's fp64.
"""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from support.compare import (
    assert_as_accurate,
    assert_gradient_as_accurate,
    assert_gradient_close,
    relative_error,
)
from support.plain import of_rows, plain_divergence
from torch import autograd

import fastrlhf

IMPLS = ["eager", "compiled", "triton"]
BACKENDS = pytest.mark.parametrize("impl", IMPLS)
MEASURES = {
    "reverse": {"direction": "reverse"},
    "forward": {"direction": "forward"},
    "jsd 0.1": {"direction": "jsd", "beta": 0.1},
    "jsd 0.5": {"direction": "jsd", "beta": 0.5},
    "jsd 0.9": {"direction": "jsd", "beta": 0.9},
}
ALL_MEASURES = pytest.mark.parametrize("measure", MEASURES)
# One of each kind: where it is the code that matters, and not the numbers.
KINDS = pytest.mark.parametrize("measure", ["reverse", "forward", "jsd 0.1"])

FINE = (torch.float64, torch.float32)
DTYPES = [(dtype, dtype) for dtype in (*FINE, torch.float16, torch.bfloat16)] + [
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float16),
    (torch.bfloat16, torch.float64),
]


def softmax(x, temperature, softcap, scale):
    """Probabilities, their logarithms, and the derivative of the effective logits."""
    z, chain = scale * x, np.full_like(x, scale)
    if softcap is not None:
        z, chain = softcap * np.tanh(z / softcap), scale / np.cosh(z / softcap) ** 2
    z = z / temperature
    log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
    return np.exp(log_p), log_p, chain / temperature


def relative_entropy(p, log_p, log_q):
    """KL(p‖q): what p rules out does not count."""
    possible = p > 0
    return (p[possible] * (log_p[possible] - log_q[possible])).sum()


def row_oracle(x, y, *, direction, beta=0.5, temperature=1.0, softcap=None, scale=1.0):
    """Divergence of one row, and its gradients with respect to both logits.

    The derivatives with respect to the probabilities, times these, go through the softmax:
    dz = p·(f' - Σp·f').
    """
    p, log_p, chain_p = softmax(x, temperature, softcap, scale)
    q, log_q, chain_q = softmax(y, temperature, softcap, scale)
    with np.errstate(invalid="ignore", divide="ignore"):
        if direction == "reverse":
            value = relative_entropy(p, log_p, log_q)
            by_p, by_q = np.where(p > 0, p * (log_p - log_q + 1), 0), -p
        elif direction == "forward":
            value = relative_entropy(q, log_q, log_p)
            by_p, by_q = -q, np.where(q > 0, q * (log_q - log_p + 1), 0)
        else:
            log_m = np.logaddexp(log_p + np.log(1 - beta), log_q + np.log(beta))
            value = beta * relative_entropy(q, log_q, log_m)
            value += (1 - beta) * relative_entropy(p, log_p, log_m)
            by_p = np.where(p > 0, (1 - beta) * p * (log_p - log_m), 0)
            by_q = np.where(q > 0, beta * q * (log_q - log_m), 0)
        return value, (by_p - p * by_p.sum()) * chain_p, (by_q - q * by_q.sum()) * chain_q


def oracle(logits, ref, mask=None, *, g=None, temperature=1.0, **options):
    """Evaluate `row_oracle` for every row of (N, V): values, and the gradients of Σ g·value."""
    x, y = (t.detach().cpu().double() for t in (logits, ref))
    values, d_x, d_y = torch.zeros(x.shape[0]).double(), torch.zeros_like(x), torch.zeros_like(x)
    for i in range(x.shape[0]):
        if mask is not None and not mask[i]:
            continue
        own = float(temperature[i]) if isinstance(temperature, torch.Tensor) else temperature
        value, *slopes = row_oracle(x[i].numpy(), y[i].numpy(), temperature=own, **options)
        values[i] = value
        upstream = 1.0 if g is None else float(g[i])
        d_x[i], d_y[i] = (upstream * torch.from_numpy(slope) for slope in slopes)
    return values, d_x, d_y


def evaluate(logits, ref, *, g=None, **options):
    """Values of kl_divergence, and the gradients of Σ g·value with respect to both sides."""
    x, y = (t.detach().clone().requires_grad_() for t in (logits, ref))
    values = fastrlhf.kl_divergence(x, y, **options)
    upstream = torch.ones_like(values) if g is None else g.to(values)
    return values.detach(), *autograd.grad(values, (x, y), upstream)


def random_pair(rows, vocab, device, dtypes=(torch.float32, torch.float32), spread=2.0):
    """Logits of both sides, which agree in part."""
    common = torch.randn(rows, vocab, device=device)
    own = [torch.randn(rows, vocab, device=device) for _ in range(2)]
    return [(spread * (common + 0.5 * x)).to(t) for x, t in zip(own, dtypes, strict=True)]


def assert_rows_close(found, expected, mask, tolerance):
    """Compare gradients: the largest entry of each row apart from the others, which it would hide;
    rows off the mask are exactly zero.
    """
    assert_gradient_close(found, expected, largest(expected, mask), tolerance)


def assert_rows_as_accurate(found, plain, expected, mask, ulps=None):
    """The same, with the budget that the plain formula's errors give."""
    assert_gradient_as_accurate(found, plain, expected, largest(expected, mask), ulps)


def largest(gradient, mask):
    return torch.where(mask.cpu(), gradient.abs().argmax(1), -1)


def assert_close_to_oracle(found, plain, expected):
    """Compare values, and both gradients entry by entry."""
    for name, own, by_plain, exact in zip(
        ("value", "policy", "reference"), found, plain, expected, strict=True
    ):
        assert_as_accurate(own, by_plain, exact, size=1.0 if name == "value" else None, of=name)


def transform_of(kind: str, rows: int, device) -> dict:
    own = torch.linspace(0.6, 2.0, rows, dtype=torch.float64, device=device)
    return {
        "plain": {},
        "scaled": {"scale": 0.6, "temperature": 0.7},
        "capped": {"softcap": 12.0, "scale": 1.5},
        "all": {"softcap": 8.0, "scale": 0.7, "temperature": own},
    }[kind]


def oracle_cases():
    """Backend, measure, dtypes and transform. What takes the compiler longest is for `make
    test-all`: measures other than the first in fp16 and in two dtypes at once.
    """
    for impl, case in itertools.product(IMPLS, dict.fromkeys(oracle_cases_of_a_backend())):
        measure, dtypes, _ = case
        usual = measure == "reverse" or (len({*dtypes}) == 1 and torch.float16 not in dtypes)
        exhaustive = impl == "compiled" and not usual
        yield pytest.param(impl, *case, marks=[pytest.mark.exhaustive] if exhaustive else [])


def oracle_cases_of_a_backend():
    """Measure, dtypes and transform: all dtypes and all transforms, but not all of both."""
    fp32 = DTYPES[1]
    for measure in ("reverse", "forward", "jsd 0.1"):
        yield from ((measure, fp32, kind) for kind in ("plain", "scaled", "capped", "all"))
        yield from ((measure, dtypes, kind) for dtypes in DTYPES for kind in ("all",))
    yield from ((measure, fp32, "plain") for measure in ("jsd 0.5", "jsd 0.9"))
    yield from (("jsd 0.1", dtypes, "plain") for dtypes in DTYPES)


@pytest.mark.parametrize(("impl", "measure", "dtypes", "kind"), [*oracle_cases()])
def test_values_and_gradients_match_the_oracle(impl, measure, dtypes, kind, device) -> None:
    # Each transform meets its own vocabulary: less than a tile, part of one, nearly one, several.
    vocab = {"plain": 1000, "scaled": 4100, "capped": 2, "all": 33}[kind]
    logits, ref = random_pair(3, vocab, device, dtypes)
    mask = torch.tensor([True, False, True], device=device)
    logits[1], ref[1] = torch.nan, torch.inf
    g = torch.tensor([1.0, torch.nan, -0.7], device=device)
    options = MEASURES[measure] | transform_of(kind, 3, device)
    expected = oracle(logits, ref, mask, g=g, **options)
    found = evaluate(logits, ref, g=g, mask=mask, impl=impl, **options)
    wider = torch.promote_types(torch.promote_types(*dtypes), torch.float32)
    assert found[0].dtype == wider and found[0][1] == 0
    plain = of_rows(logits, ref, mask, g, **options)
    assert_as_accurate(found[0], plain[0], expected[0], size=max(1.0, expected[0].max()))
    for gradient, by_plain, of_oracle, dtype in zip(
        found[1:], plain[1:], expected[1:], dtypes, strict=True
    ):
        assert gradient.dtype == dtype
        # The log-ratio of a token less the mean one: terms of a few units that cancel.
        assert_rows_as_accurate(
            gradient, by_plain, of_oracle, mask, 32.0 if dtype in FINE else None
        )


@BACKENDS
@pytest.mark.parametrize("measure", ["reverse", "jsd 0.1"])
@pytest.mark.parametrize("shape", [(5,), (2, 2, 5), (2, 0, 5), (0, 5), (2, 1)])
def test_any_shape(impl, measure, shape, device) -> None:
    logits, ref = (torch.randn(shape, device=device) for _ in range(2))
    values, *gradients = evaluate(logits, ref, impl=impl, **MEASURES[measure])
    assert values.shape == shape[:-1]
    rows = [x.reshape(-1, shape[-1]) for x in (logits, ref)]
    assert_close_to_oracle(
        (values, *gradients),
        of_rows(logits, ref, None, None, **MEASURES[measure]),
        oracle(*rows, **MEASURES[measure]),
    )


@BACKENDS
def test_the_ends_of_the_jsd_are_the_forward_and_the_reverse_kl(impl, device) -> None:
    logits, ref = random_pair(3, 50, device)
    for beta, direction in ((0, "forward"), (0.0, "forward"), (1, "reverse"), (1.0, "reverse")):
        end = evaluate(logits, ref, direction="jsd", beta=beta, impl=impl)
        kl = evaluate(logits, ref, direction=direction, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(end, kl, strict=True))
    # The direction in which it leads: its value at a small beta is beta times that KL.
    for beta, direction in ((1e-3, "forward"), (1 - 1e-3, "reverse")):
        x, y = logits.double(), ref.double()
        near = fastrlhf.kl_divergence(x, y, direction="jsd", beta=beta, impl=impl)
        kl = fastrlhf.kl_divergence(x, y, direction=direction, impl=impl)
        torch.testing.assert_close(near / min(beta, 1 - beta), kl, rtol=2e-2, atol=0)


@BACKENDS
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_jsd_is_symmetric(impl, beta, device) -> None:
    logits, ref = random_pair(2, 200, device)
    one = evaluate(logits, ref, direction="jsd", beta=beta, impl=impl)
    two = evaluate(ref, logits, direction="jsd", beta=1 - beta, impl=impl)
    exact = oracle(logits, ref, direction="jsd", beta=beta)
    assert_close_to_oracle(one, (two[0], two[2], two[1]), exact)
    assert_close_to_oracle((two[0], two[2], two[1]), one, exact)


def wrong_gradients(logits, ref, true, **options):
    """What a mistake would give for the gradient with respect to the policy: reverse or jsd."""
    other = {"direction": "forward"}
    if options["direction"] == "jsd":
        other = {"direction": "jsd", "beta": 1 - options["beta"]}
    p = torch.softmax(logits.double() / options["temperature"], -1)
    q = torch.softmax(ref.double() / options["temperature"], -1)
    beta = options.get("beta", 1.0)
    of_p = 1 - beta if options["direction"] == "jsd" else 1.0
    of_m = q if options["direction"] == "reverse" else beta * q + (1 - beta) * p
    without_mean = of_p * p * (p.log() - of_m.log()) / options["temperature"]
    return {
        "zero": torch.zeros_like(true),
        "swapped direction": oracle(logits, ref, temperature=options["temperature"], **other)[1],
        "the other side": oracle(logits, ref, **options)[2],
        "no mean": without_mean,
        "no temperature": oracle(logits, ref, **options | {"temperature": 1.0})[1],
        "temperature once too few": true * options["temperature"],
        "scaled": true * 1.0001,
        "late": torch.where(torch.arange(logits.shape[1]) > 990, 0.0, true),
    }


@pytest.mark.parametrize("options", [MEASURES["reverse"], MEASURES["jsd 0.1"]])
def test_the_gradient_comparison_rejects_mutants(options) -> None:
    logits, ref = random_pair(4, 1000, "cpu")
    options = options | {"temperature": 0.7}
    true = oracle(logits, ref, **options)[1]
    mask = torch.ones(4, dtype=torch.bool)
    assert_rows_close(true, true, mask, 0.0)
    for name, wrong in wrong_gradients(logits, ref, true, **options).items():
        with pytest.raises(AssertionError, match="error of"):
            assert_rows_close(wrong, true, mask, 5e-5)
            pytest.fail(f"passed: {name}", pytrace=False)


def test_the_comparison_of_values_rejects_mutants() -> None:
    logits, ref = random_pair(4, 1000, "cpu")
    true = oracle(logits, ref, direction="jsd", beta=0.1, temperature=0.7)[0]
    for wrong in (
        {"direction": "jsd", "beta": 0.9, "temperature": 0.7},
        {"direction": "jsd", "beta": 0.1},
        {"direction": "reverse", "temperature": 0.7},
        {"direction": "forward", "temperature": 0.7},
    ):
        assert relative_error(oracle(logits, ref, **wrong)[0], true) > 1e-2


def assert_within_budget(logits, ref, ours, options) -> None:
    """Assert that value and gradients err at most twice as much as the eager formula in fp32."""
    expected, eager = oracle(logits, ref, **options), of_rows(logits, ref, None, None, **options)
    rounding = torch.finfo(torch.float32).eps
    # A log-ratio rounds, and the mean one that cancels it, differently.
    p, q = (torch.softmax(x.cpu().double() / 0.7, -1) for x in (logits, ref))
    terms = expected[0], *(p.norm() * expected[0].max() for p in (p, q))
    for name, own, plain, exact, size in zip(
        ("value", "policy", "reference"), ours, eager, expected, terms, strict=True
    ):
        found, by_eager = ((x.cpu().double() - exact).norm() for x in (own, plain))
        bound = 2 * by_eager + 4 * rounding * torch.as_tensor(size).norm()
        assert found <= bound, f"{name}: {found:.2e}, not {bound:.2e}"


@BACKENDS
@ALL_MEASURES
@pytest.mark.parametrize("spread", [1.0, 10.0, 1e4])
def test_errors_are_at_most_twice_those_of_the_eager_formula(impl, measure, spread, device) -> None:
    logits, ref = (torch.randn(4, 600, device=device) * spread for _ in range(2))
    options = MEASURES[measure] | {"temperature": 0.7}
    assert_within_budget(logits, ref, evaluate(logits, ref, impl=impl, **options), options)


@ALL_MEASURES
@pytest.mark.parametrize("spread", [1.0, 10.0])
@pytest.mark.parametrize("mutant", ["value", "policy", "reference"])
def test_that_budget_rejects_an_error_of_a_thousandth_of_the_value(
    mutant, measure, spread, device
) -> None:
    logits, ref = (torch.randn(4, 600, device=device) * spread for _ in range(2))
    options = MEASURES[measure] | {"temperature": 0.7}
    ours = dict(
        zip(("value", "policy", "reference"), evaluate(logits, ref, **options), strict=True)
    )
    # Not of the gradient itself, which is nothing but rounding where a jsd is saturated.
    ours[mutant] = ours[mutant].clone()
    ours[mutant].view(-1)[0] += 1e-3 * ours["value"].max()
    with pytest.raises(AssertionError, match=f"^{mutant}: "):
        assert_within_budget(logits, ref, ours.values(), options)


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


def masked_vocabularies(device, vocab=5000):
    """Logits of both sides with -inf at the same places of each row, several tiles in all."""
    logits, ref = random_pair(5, vocab, device)
    for x in (logits, ref):
        x[0, :2100] = -torch.inf  # whole tiles at the start
        x[1, 1000:] = -torch.inf
        x[2, ::2] = -torch.inf
        x[3] = -torch.inf
        x[3, 4000] = 3.0  # nothing but one token
        x[4, :-1:3] = -torch.inf
    return logits, ref


@BACKENDS
@KINDS
def test_masked_vocabulary_makes_no_nan_wherever_it_stands(impl, measure, device) -> None:
    logits, ref = masked_vocabularies(device)
    options = MEASURES[measure] | {"temperature": 0.7}
    expected = oracle(logits, ref, **options)
    found = evaluate(logits, ref, impl=impl, **options)
    plain = of_rows(logits, ref, None, None, **options)
    assert_as_accurate(found[0], plain[0], expected[0], size=1.0)
    regular = [0, 1, 2, 4]
    every = torch.ones(4, dtype=torch.bool)
    for own, by_plain, exact in zip(found[1:], plain[1:], expected[1:], strict=True):
        assert own.isfinite().all()
        assert_rows_as_accurate(own[regular], by_plain[regular], exact[regular], every, 32.0)
        assert_as_accurate(own[3], by_plain[3], exact[3], size=1.0)


@BACKENDS
@KINDS
def test_masked_vocabulary_makes_no_nan_in_a_gradient_to_be_differentiated(
    impl, measure, device
) -> None:
    logits, ref = (x[:, :40].detach() for x in masked_vocabularies(device))
    ref[2:4, 7] = logits[2:4, 7] = 1.0  # no row is empty
    logits[0, :9], ref[0, :9] = 1.0, 2.0
    expected = evaluate(logits, ref, impl=impl, **MEASURES[measure])[1:]
    sides = logits.requires_grad_(), ref.requires_grad_()
    values = fastrlhf.kl_divergence(*sides, impl=impl, **MEASURES[measure])
    found = autograd.grad(values.sum(), sides, create_graph=True)
    exact = oracle(logits, ref, **MEASURES[measure])[1:]
    for a, b, right in zip(found, expected, exact, strict=True):
        assert_as_accurate(a, b, right)
    norms = sum(gradient.square().sum() for gradient in found)
    assert all(gradient.isfinite().all() for gradient in autograd.grad(norms, sides))


@BACKENDS
def test_where_only_one_side_is_possible(impl, device) -> None:
    logits, ref = random_pair(2, 3000, device)
    ref[0, 5] = ref[1, :2500] = -torch.inf
    for direction, wide, narrow in (("reverse", logits, ref), ("forward", ref, logits)):
        values = fastrlhf.kl_divergence(wide, narrow, direction=direction, impl=impl)
        assert (values == torch.inf).all()
        # The other way round, terms without probability are nothing, whatever the other side is.
        options = {"direction": direction}
        found = evaluate(narrow, wide, impl=impl, **options)
        plain = of_rows(narrow, wide, None, None, **options)
        assert_close_to_oracle(found, plain, oracle(narrow, wide, **options))
    # The mixture of a jsd is possible wherever a side is.
    for beta in (0.1, 0.5):
        options = {"direction": "jsd", "beta": beta}
        found = evaluate(logits, ref, impl=impl, **options)
        plain = of_rows(logits, ref, None, None, **options)
        assert_close_to_oracle(found, plain, oracle(logits, ref, **options))


@BACKENDS
@pytest.mark.parametrize("gap", [40.0, 140.0, 1e4])
def test_a_probability_that_rounds_to_zero_counts_as_zero(impl, gap, device) -> None:
    # Token 1 is impossible for the reference and, but for a gap of 40, too unlikely for fp32. (The
    # others make a wide row, in which one lane of a kernel never sees the likeliest token.)
    logits = torch.full((1, 3000), -0.5 * gap, device=device)
    ref = torch.zeros(1, 3000, device=device)
    logits[0, 0], logits[0, 1], ref[0, 1] = 0.0, -gap, -torch.inf
    values, d_logits, d_ref = evaluate(logits, ref, impl=impl)
    if gap == 40:
        assert values == torch.inf
        return
    without = torch.arange(3000, device=device) != 1
    expected = evaluate(logits[:, without], ref[:, without], impl=impl)
    exact = oracle(logits[:, without], ref[:, without], direction="reverse")[0]
    # Of log-ratios as large as the gap.
    assert_as_accurate(values, expected[0], exact, size=max(gap, float(exact)))
    assert d_logits.isfinite().all() and d_ref.isfinite().all()


@BACKENDS
@KINDS
def test_a_row_of_nothing_but_minus_infinity(impl, measure, device) -> None:
    logits, ref = random_pair(3, 60, device)
    logits[0], ref[1] = -torch.inf, -torch.inf
    logits[2] = ref[2] = -torch.inf
    values, *gradients = evaluate(logits, ref, impl=impl, **MEASURES[measure])
    assert not values.isnan().any() and values[2] == 0
    # Without a distribution on the side that is averaged over, there is nothing to add up; on the
    # other, nothing is possible.
    if measure in ("reverse", "forward"):
        expected = [0.0, torch.inf] if measure == "reverse" else [torch.inf, 0.0]
        assert values[:2].tolist() == expected
    for gradient in gradients:
        assert not gradient[2].any()
        assert not gradient[:2][values[:2].isfinite()].isnan().any()


@KINDS
def test_all_backends_agree_on_a_side_of_nothing_but_minus_infinity(measure, device) -> None:
    logits, ref = random_pair(2, 60, device)
    logits[0], ref[1] = -torch.inf, -torch.inf
    eager, *others = (
        fastrlhf.kl_divergence(logits, ref, impl=impl, **MEASURES[measure]) for impl in IMPLS
    )
    for other in others:
        torch.testing.assert_close(eager, other)


@BACKENDS
@pytest.mark.parametrize("measure", ["reverse", "jsd 0.1"])
@pytest.mark.parametrize(
    ("side", "garbage"),
    [("policy", torch.nan), ("reference", torch.nan), ("both", torch.nan), ("both", torch.inf)],
)
def test_a_live_row_with_garbage_says_nan_and_leaves_the_others_alone(
    impl, measure, garbage, side, device
) -> None:
    logits, ref = random_pair(3, 100, device)
    clean = evaluate(logits, ref, impl=impl, **MEASURES[measure])
    if side != "reference":
        logits[1, 50] = garbage
    if side != "policy":
        ref[1, 50] = garbage
    found = evaluate(logits, ref, impl=impl, **MEASURES[measure])
    assert found[0][1].isnan()
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])


@BACKENDS
@pytest.mark.parametrize("measure", ["reverse", "jsd 0.1"])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_masked_rows_are_exactly_zero_whatever_they_hold(impl, measure, garbage, device) -> None:
    logits, ref = random_pair(5, 70, device)
    mask = torch.tensor([0, 1, 0, 0, 1], device=device)
    logits[0] = ref[2] = logits[3] = ref[3] = garbage
    g = torch.tensor([torch.nan, 1.0, torch.inf, 1.0, 2.0], device=device)
    own = torch.tensor([torch.nan, 0.5, 0.0, -1.0, 2.0], device=device)
    found = evaluate(
        logits, ref, g=g, mask=mask, temperature=own, softcap=30.0, impl=impl, **MEASURES[measure]
    )
    for x in found:
        assert not x[mask == 0].any()
        assert x[mask == 1].isfinite().all() and x[mask == 1].any()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_a_mask_of_any_dtype(impl, dtype, device) -> None:
    logits, ref = random_pair(3, 20, device)
    mask = torch.tensor([1, 0, 1], device=device)
    found = fastrlhf.kl_divergence(logits, ref, mask=mask.to(dtype), impl=impl)
    assert torch.equal(found, fastrlhf.kl_divergence(logits, ref, impl=impl) * mask)


@BACKENDS
def test_a_mask_of_nothing(impl, device) -> None:
    logits, ref = (torch.full((2, 3, 9), torch.nan, device=device) for _ in range(2))
    mask = torch.zeros(2, 3, dtype=torch.bool, device=device)
    for x in evaluate(logits, ref, mask=mask, impl=impl):
        assert not x.any()


def layouts(device):
    """(B, T, V) = (2, 2, 33) logits of one content in many layouts, by name."""
    content = torch.randn(2, 2, 33, device=device)

    def filled(view: torch.Tensor) -> torch.Tensor:
        return view.copy_(content)

    new = lambda *shape: torch.full(shape, torch.nan, device=device)  # noqa: E731
    return content, {
        "contiguous": content.clone(),
        "all but the first position": filled(new(2, 3, 33)[:, 1:]),
        "strided part of the vocabulary": filled(new(2, 2, 80)[..., 7:73:2]),
        "vocabulary first": filled(new(33, 2, 2).permute(2, 1, 0)),
        "positions first": filled(new(2, 2, 33).transpose(0, 1)),
    }


@BACKENDS
@pytest.mark.parametrize("layout", layouts("cpu")[1])
def test_layouts_do_not_matter(impl, layout, device) -> None:
    content, views = layouts(device)
    other = torch.randn(2, 2, 33, device=device)
    # A transposed mask, and another layout for the other side.
    mask = torch.tensor([[1, 0], [1, 1]], device=device).T
    options = {"mask": mask, "impl": impl, **MEASURES["jsd 0.1"]}
    for sides, contents in (
        ((views[layout], other.mT.contiguous().mT), (content, other)),
        ((other, views[layout]), (other, content)),
    ):
        expected = evaluate(*contents, **options)
        x, y = (side.detach().requires_grad_() for side in sides)
        values = fastrlhf.kl_divergence(x, y, **options)
        found = values, *autograd.grad(values.sum(), (x, y))
        exact = oracle(*(x.flatten(0, 1) for x in contents), mask.flatten(), **MEASURES["jsd 0.1"])
        assert_close_to_oracle(found, expected, exact)


@BACKENDS
@KINDS
def test_expanded_rows_and_upstream_gradients(impl, measure, device) -> None:
    row = torch.randn(1, 1, 30, device=device, requires_grad=True)
    ref = torch.randn(2, 1, 30, device=device, requires_grad=True)
    sides = row.expand(2, 3, 30), ref.expand(2, 3, 30)
    values = fastrlhf.kl_divergence(*sides, impl=impl, **MEASURES[measure])
    found = autograd.grad(values.mean(), (row, ref))
    value, d_row, d_ref = oracle(row.expand(2, 1, 30)[:, 0], ref[:, 0], **MEASURES[measure])
    by_plain = plain_divergence(*sides, **MEASURES[measure])
    plain = by_plain, *autograd.grad(by_plain.mean(), (row, ref))
    exact = value[:, None].expand(2, 3), d_row.mean(0)[None, None], d_ref[:, None] / 2
    assert_close_to_oracle((values, *found), plain, exact)


@BACKENDS
@pytest.mark.parametrize("measure", ["reverse", "jsd 0.5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(impl, measure, dtype, device) -> None:
    rows = 1000 if device.type == "cuda" else 4
    logits, ref = random_pair(rows, 1500, device, (dtype, dtype))
    g = torch.randn(rows, device=device)
    options = {"impl": impl, "temperature": 0.7, **MEASURES[measure]}
    batch, again = (evaluate(logits, ref, g=g, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    for row in (0, rows - 1):
        one = slice(row, row + 1)
        alone = evaluate(logits[one], ref[one], g=g[one], **options)
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, batch, strict=True))


@BACKENDS
def test_only_what_needs_a_gradient_gets_one(impl, device) -> None:
    for wanted in ((True, False), (False, True), (False, False)):
        sides = random_pair(2, 20, device)
        for side, want in zip(sides, wanted, strict=True):
            side.requires_grad_(want)
        values = fastrlhf.kl_divergence(*sides, impl=impl)
        assert values.requires_grad == any(wanted)
        if any(wanted):
            values.sum().backward()
        assert [side.grad is not None for side in sides] == list(wanted)


@BACKENDS
def test_one_tensor_for_both_sides_gets_the_sum_of_both_gradients(impl, device) -> None:
    x = torch.randn(2, 20, dtype=torch.float64, device=device, requires_grad=True)
    values = fastrlhf.kl_divergence(x, 0.5 * x, impl=impl)
    _, d_own, d_half = evaluate(x, 0.5 * x, impl=impl)
    for create_graph in (False, True):
        (found,) = autograd.grad(values.sum(), x, retain_graph=True, create_graph=create_graph)
        torch.testing.assert_close(found, d_own + 0.5 * d_half)


@BACKENDS
@pytest.mark.parametrize("measure", ["forward", "jsd 0.1"])
def test_derivatives_of_both_orders(impl, measure, device) -> None:
    sides = [torch.randn(2, 4, dtype=torch.float64, device=device) for _ in range(2)]
    mask = torch.tensor([False, True], device=device)
    options = MEASURES[measure] | transform_of("all", 2, device)

    def values(x, y):
        return fastrlhf.kl_divergence(x, y, mask=mask, impl=impl, **options)

    inputs = [side.requires_grad_() for side in sides]
    assert autograd.gradcheck(values, inputs, fast_mode=True, rtol=1e-6, atol=1e-7)
    assert autograd.gradgradcheck(values, inputs, fast_mode=True, rtol=1e-6, atol=1e-7)
    # A side alone takes another way through the second derivative.
    inputs[1].requires_grad_(False)
    assert autograd.gradgradcheck(values, inputs, fast_mode=True, rtol=1e-6, atol=1e-7)


@BACKENDS
@pytest.mark.parametrize("measure", ["reverse", "jsd 0.1"])
def test_a_training_step_compiles_whole(impl, measure, device) -> None:
    torch.compiler.reset()
    hidden = torch.randn(2, 3, 8, device=device, requires_grad=True)
    weight, ref = torch.randn(37, 8, device=device), torch.randn(2, 3, 37, device=device)
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]], device=device)

    def step(hidden):
        values = fastrlhf.kl_divergence(
            hidden @ weight.T.to(hidden),
            ref.to(hidden),
            mask=mask,
            softcap=20.0,
            impl=impl,
            **MEASURES[measure],
        )
        return values.sum() / mask.sum()

    results = []
    for function, x in (
        (step, hidden),
        (torch.compile(step, fullgraph=True, backend="aot_eager"), hidden),
        (step, hidden.detach().double().requires_grad_()),
    ):
        loss = function(x)
        results.append((loss, *autograd.grad(loss, x)))
    for plain, compiled, exact in zip(*results, strict=True):
        assert_as_accurate(compiled, plain, exact)


@BACKENDS
@pytest.mark.parametrize("share", [None, 0.3])
def test_the_operators_pass_opcheck(impl, share, device) -> None:
    logits, ref = (x.requires_grad_() for x in random_pair(3, 20, device))
    mask = torch.tensor([True, False, True], device=device)
    own = torch.tensor([0.5, 1.0, 2.0], device=device)
    forward = torch.ops.fastrlhf.divergence.default
    backward = torch.ops.fastrlhf.divergence_backward.default
    transform = (own, 1.0, None, 0.5) if share is None else (None, 0.7, 5.0, 1.0)
    arguments = logits, ref, mask, *transform, share, impl
    torch.library.opcheck(forward, arguments)
    values, stats = (x.detach() for x in forward(*arguments))
    saved = logits.detach(), ref.detach(), mask, stats, values
    for of_p, dtype in ((True, torch.bfloat16), (False, None)):
        torch.library.opcheck(backward, (*saved, *transform, share, of_p, impl, dtype))


@BACKENDS
def test_a_temperature_tensor_broadcasts(impl, device) -> None:
    logits, ref = (torch.randn(2, 3, 20, device=device) for _ in range(2))
    own = torch.tensor([[0.5], [2.0]], device=device)
    found = fastrlhf.kl_divergence(logits, ref, temperature=own, impl=impl)
    for i, temperature in enumerate((0.5, 2.0)):
        expected = fastrlhf.kl_divergence(logits[i], ref[i], temperature=temperature, impl=impl)
        torch.testing.assert_close(found[i], expected)


def test_auto_is_eager_on_the_cpu() -> None:
    logits, ref = random_pair(3, 50, "cpu")
    auto = fastrlhf.kl_divergence(logits, ref)
    assert torch.equal(auto, fastrlhf.kl_divergence(logits, ref, impl="eager"))
    reverse = fastrlhf.kl_divergence(logits, ref, direction="reverse", beta=0.1)
    assert torch.equal(auto, reverse)


def test_divergences_are_not_negative() -> None:
    hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
    from hypothesis import strategies as st

    @hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
    @hypothesis.given(data=st.data())
    def check(data) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        lead = data.draw(st.lists(st.integers(1, 2), max_size=2))
        vocab, step = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 3))
        spread, apart = data.draw(st.floats(0, 50)), data.draw(st.floats(0, 5))
        x = (torch.randn(*lead, vocab * step, device=device) * spread)[..., ::step]
        y = x + torch.randn(*lead, vocab, device=device) * apart
        measure = MEASURES[data.draw(st.sampled_from(list(MEASURES)))]
        # Rounding is relative to the log-ratios, which are averaged.
        rounding = 4 * torch.finfo(torch.float32).eps * (1 + spread + apart)
        flat = [side.reshape(-1, vocab) for side in (x, y)]
        expected = oracle(*flat, **measure)[0]
        by_plain = plain_divergence(*flat, **measure)
        for impl in IMPLS:
            values = fastrlhf.kl_divergence(x, y, impl=impl, **measure)
            assert values.shape == tuple(lead)
            assert (values >= -rounding).all()
            assert_as_accurate(values.reshape(-1), by_plain, expected, size=1 + spread + apart)

    check()


needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter counts bytes on machines without a GPU"
)


def traffic_of(logits, ref, monkeypatch, *, g=None, **options):
    """Traffic of the forward and of the backward, and the gradients."""
    pytest.importorskip("triton", reason="needs triton")
    from support.traffic import counted_traffic

    with counted_traffic(monkeypatch) as forward:
        values = fastrlhf.kl_divergence(logits, ref, impl="triton", **options)
    wanted = [x for x in (logits, ref) if x.requires_grad]
    with counted_traffic(monkeypatch) as backward:
        gradients = autograd.grad(values, wanted, torch.ones_like(values) if g is None else g)
    return forward, backward, gradients


@needs_interpreter
@KINDS
@pytest.mark.parametrize("dtypes", [DTYPES[1], DTYPES[4]])
def test_kernels_read_and_write_the_logits_as_often_as_they_must(
    measure, dtypes, monkeypatch
) -> None:
    reads = 2
    vocab = 2100
    for wanted in ((False, True), (True, True)):
        logits, ref = random_pair(2, vocab, "cpu", dtypes)
        logits.requires_grad_(wanted[0]), ref.requires_grad_(wanted[1])
        forward, backward, gradients = traffic_of(logits, ref, monkeypatch, **MEASURES[measure])
        assert forward.launches.total() == 1 and backward.launches.total() == sum(wanted)
        assert forward.stored() <= 2 * 7 * 4
        for x in (logits, ref):
            assert forward.loaded(x) == reads * x.nbytes
            assert backward.loaded(x) == sum(wanted) * x.nbytes
            assert backward.stored(x) == 0
        for gradient in gradients:
            assert backward.stored(gradient) == gradient.nbytes
            assert backward.loaded(gradient) == 0
        # Everything else, the mask and statistics, is small beside the logits.
        assert forward.loaded() <= reads * (logits.nbytes + ref.nbytes) + 2 * 20
        tiles = -(-vocab // 256)
        assert backward.loaded() <= sum(wanted) * (logits.nbytes + ref.nbytes + 2 * tiles * 40)


@needs_interpreter
@pytest.mark.parametrize("measure", ["reverse", "jsd 0.5"])
def test_masked_rows_and_those_without_an_upstream_gradient_are_not_read(
    measure, monkeypatch
) -> None:
    logits, ref = (x.requires_grad_() for x in random_pair(6, 1000, "cpu"))
    mask, g = torch.tensor([1, 0, 1, 1, 0, 1]), torch.tensor([1.0, 1.0, 0.0, 2.0, 0.0, 0.0])
    forward, backward, gradients = traffic_of(
        logits, ref, monkeypatch, g=g, mask=mask, **MEASURES[measure]
    )
    row = 1000 * 4
    for x in (logits, ref):
        assert forward.loaded(x) == 2 * 4 * row
        assert backward.loaded(x) == 2 * 2 * row
    for gradient in gradients:
        assert backward.stored(gradient) == gradient.nbytes
        assert gradient.any(-1).tolist() == [True, False, False, True, False, False]


@needs_interpreter
def test_a_frozen_reference_costs_no_launch_and_launches_do_not_grow_with_rows(monkeypatch) -> None:
    for rows in (1, 7):
        logits, ref = random_pair(rows, 100, "cpu")
        forward, backward, _ = traffic_of(logits.requires_grad_(), ref, monkeypatch)
        assert forward.launches.total() == backward.launches.total() == 1


def test_the_eager_backend_works_on_a_bounded_number_of_rows(monkeypatch) -> None:
    held = []
    for name in ("divergence_and_stats", "divergence_backward"):
        function = getattr(fastrlhf.reference, name)

        def call(x, *args, function=function, **kwargs):
            held.append(x.numel())
            return function(x, *args, **kwargs)

        monkeypatch.setattr(fastrlhf.reference, name, call)
    logits = torch.randn(90, 20000).bfloat16().requires_grad_()
    mask = torch.arange(90) % 3 > 0
    ref = torch.randn(1, 20000).bfloat16().expand(90, -1)
    fastrlhf.kl_divergence(logits, ref, mask=mask, impl="eager").sum().backward()
    assert len(held) == 2 * 2 and max(held) <= 2**20
    assert sum(held) == 2 * 60 * 20000


LOGITS = torch.zeros(2, 3, 5)
BAD_INPUT = {
    "integer logits": (TypeError, "^logits: .*floating.*int64", {"logits": LOGITS.long()}),
    "fp8 logits": (TypeError, "^logits: .*float8", {"logits": LOGITS.to(torch.float8_e4m3fn)}),
    "a list": (TypeError, "^ref_logits: expected a tensor, got list", {"ref_logits": [1.0]}),
    "integer reference": (TypeError, "^ref_logits: .*int64", {"ref_logits": LOGITS.long()}),
    "0-d logits": (ValueError, r"^logits: .*\(\.\.\., V\)", {"logits": torch.tensor(1.0)}),
    "empty vocabulary": (ValueError, "^logits: .*V > 0", {"logits": torch.zeros(2, 3, 0)}),
    "another vocabulary": (
        ValueError,
        r"^ref_logits: .*\(2, 3, 5\).*got \(2, 3, 6\)",
        {"ref_logits": torch.zeros(2, 3, 6)},
    ),
    "one row for all": (ValueError, "^ref_logits: ", {"ref_logits": torch.zeros(1, 3, 5)}),
    "device": (ValueError, "^ref_logits: .*meta", {"ref_logits": LOGITS.to("meta")}),
    "unknown direction": (ValueError, "^direction: .*'kl'", {"direction": "kl"}),
    "direction None": (TypeError, "^direction: .*NoneType", {"direction": None}),
    "large beta": (ValueError, "^beta: .*got 1.5", {"direction": "jsd", "beta": 1.5}),
    "negative beta": (ValueError, "^beta: .*got -0.1", {"direction": "jsd", "beta": -0.1}),
    "beta NaN": (ValueError, "^beta: .*nan", {"direction": "jsd", "beta": math.nan}),
    "beta None": (TypeError, "^beta: .*number", {"direction": "jsd", "beta": None}),
    "mask of another shape": (
        ValueError,
        r"^mask: .*\(2, 3\).*got \(2,\)",
        {"mask": torch.ones(2)},
    ),
    "complex mask": (TypeError, "^mask: ", {"mask": torch.ones(2, 3, dtype=torch.cfloat)}),
    "list for a mask": (TypeError, "^mask: .*list", {"mask": [[1, 1, 1], [1, 1, 1]]}),
    "mask elsewhere": (ValueError, "^mask: .*meta", {"mask": torch.ones(2, 3, device="meta")}),
    "zero temperature": (ValueError, "^temperature: .*positive", {"temperature": 0.0}),
    "temperature None": (TypeError, "^temperature: .*number", {"temperature": None}),
    "one bad temperature": (
        ValueError,
        "^temperature: .*positive.*got -1",
        {"temperature": torch.tensor([[1.0, 1, 1], [1, -1, 1]])},
    ),
    "temperatures of another shape": (
        ValueError,
        r"^temperature: .*\(2, 3\).*got \(3,\)",
        {"temperature": torch.ones(3)},
    ),
    "differentiable temperature": (
        ValueError,
        "^temperature: .*without gradient",
        {"temperature": torch.ones(2, 3, requires_grad=True)},
    ),
    "zero softcap": (ValueError, "^softcap: .*positive", {"softcap": 0.0}),
    "zero scale": (ValueError, "^scale: .*positive", {"scale": 0.0}),
    "unknown impl": (ValueError, "^impl: .*'cuda'", {"impl": "cuda"}),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_names_the_argument(case) -> None:
    error, message, arguments = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        fastrlhf.kl_divergence(**{"logits": LOGITS, "ref_logits": LOGITS} | arguments)


def test_bad_temperatures_do_not_speak_of_arguments_that_are_not_there() -> None:
    for temperature in (torch.ones(3), torch.ones(2, 3, device="meta")):
        with pytest.raises(ValueError, match=r"^temperature: ") as error:
            fastrlhf.kl_divergence(LOGITS, LOGITS, temperature=temperature)
        assert "targets" not in str(error.value)


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
