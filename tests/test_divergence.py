"""Divergences over the vocabulary and their gradients, by kernels and by the eager and the compiled
backend, against textbook formulas in NumPy's fp64.
"""

import itertools

import pytest
import torch
from support.compare import assert_as_accurate, assert_gradient_close, relative_error
from support.divergence_formulas import (
    BACKENDS,
    DTYPES,
    FINE,
    IMPLS,
    MEASURES,
    assert_close_to_oracle,
    assert_rows_as_accurate,
    evaluate,
    largest,
    oracle,
    random_pair,
    transform_of,
)
from support.plain import of_rows, plain_divergence

import fastrlhf

ALL_MEASURES = pytest.mark.parametrize("measure", MEASURES)


def assert_rows_close(found, expected, mask, tolerance):
    """Compare gradients: the largest entry of each row apart from the others, which it would hide;
    rows off the mask are exactly zero.
    """
    assert_gradient_close(found, expected, largest(expected, mask), tolerance)


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
