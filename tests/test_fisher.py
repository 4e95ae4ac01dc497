"""The Fisher information of the softmax times a tangent, against the dense matrix."""

import pytest
import torch
from support.compare import relative_error
from support.fisher_matrices import BACKENDS, NAN, assert_fisher_close, random_rows, wide
from support.one_thread import one_thread  # noqa: F401  of every test in this file
from torch import Tensor

import fastrlhf
from fastrlhf import softmax_fisher_product

# Relative to the terms of each entry, see `assert_fisher_close`. fp32 and fp64: some roundings of
# the exponent, which is 30 here. bf16: of the product, which the interpreter truncates to it.
TOLERANCE = {torch.float64: 2e-14, torch.float32: 8e-6, torch.bfloat16: 8e-3}


def temperature_of(kind: str, rows: int, device) -> float | Tensor:
    own = torch.linspace(0.7, 2.0, rows, dtype=torch.float64, device=device)
    return {"one": 1.0, "number": 0.7, "per token": own}[kind]


@BACKENDS
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("vocab", [1, 2, 33, 1000, 4100])
@pytest.mark.parametrize("kind", ["number", "per token"])
def test_products_match_the_dense_matrix(impl, dtype, vocab, kind, device) -> None:
    logits, tangent = random_rows(2, vocab, device, dtype)
    temperature = temperature_of(kind, 2, device)
    product, quadratic = softmax_fisher_product(logits, tangent, temperature=temperature, impl=impl)
    assert product.shape == (2, vocab) and product.dtype == dtype
    assert quadratic.shape == (2,) and quadratic.dtype == wide(dtype)
    bounds = TOLERANCE[dtype], TOLERANCE[wide(dtype)]
    assert_fisher_close((product, quadratic), logits, tangent, temperature, *bounds)


def mutants(logits: Tensor, tangent: Tensor, temperature: float) -> dict[str, Tensor]:
    """Products with a mistake in each."""
    p = (logits / temperature).softmax(-1)
    mean = (p * tangent).sum(-1, keepdim=True)
    true = p * (tangent - mean) / temperature**2
    cold = logits.softmax(-1)
    late = torch.arange(logits.shape[1]) >= logits.shape[1] - 8
    return {
        "none": true,
        "zero": 0 * true,
        "no mean": p * tangent / temperature**2,
        "a mean without weights": p * (tangent - tangent.mean(-1, keepdim=True)) / temperature**2,
        "no temperature outside": true * temperature**2,
        "T instead of T²": true * temperature,
        "no temperature inside": cold
        * (tangent - (cold * tangent).sum(-1, keepdim=True))
        / temperature**2,
        "the likeliest entry alone": true * (p == p.amax(-1, keepdim=True)),
        "of the tangent alone": tangent - mean,
        "without the last columns": torch.where(late, 0.0, true),
        "a mean without the last columns": p
        * (tangent - torch.where(late, 0.0, p * tangent).sum(-1, keepdim=True))
        / temperature**2,
        "scaled": true * 1.001,
    }


MUTANTS = list(mutants(torch.zeros(1, 9), torch.zeros(1, 9), 1.0))


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("vocab", [33, 1000])
def test_the_comparison_rejects_mutants(mutant, vocab) -> None:
    logits, tangent = (x.double() for x in random_rows(2, vocab, "cpu"))
    logits[:, -1] = logits.mean() + 4  # so that there is something in the last columns
    every = mutants(logits, tangent, 0.7)
    right = (every["none"] * tangent).sum(-1)
    bounds = TOLERANCE[torch.float32], TOLERANCE[torch.float32]
    if mutant == "none":
        return assert_fisher_close((every[mutant], right), logits, tangent, 0.7, *bounds)
    with pytest.raises(AssertionError, match="of the product"):
        assert_fisher_close((every[mutant], right), logits, tangent, 0.7, *bounds)
    if mutant not in ("the likeliest entry alone", "of the tangent alone"):
        wrong = (every[mutant] * tangent).sum(-1)
        with pytest.raises(AssertionError, match="of the quadratic form"):
            assert_fisher_close((every["none"], wrong), logits, tangent, 0.7, *bounds)
    return None


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m not in ("none", "scaled")])
def test_the_bound_of_bf16_rejects_mutants_too(mutant) -> None:
    logits, tangent = (x.double() for x in random_rows(2, 33, "cpu", torch.bfloat16))
    every = mutants(logits, tangent, 0.7)
    right = (every["none"] * tangent).sum(-1)
    with pytest.raises(AssertionError, match="of the product"):
        assert_fisher_close(
            (every[mutant], right), logits, tangent, 0.7, TOLERANCE[torch.bfloat16], 1e-6
        )


@BACKENDS
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_it_is_the_hessian_of_both_divergences(impl, direction, device) -> None:
    logits, tangent = random_rows(3, 41, device, torch.float64)
    x = logits.clone().requires_grad_()
    kl = fastrlhf.kl_divergence(x, logits, direction=direction, temperature=0.7).sum()
    (slope,) = torch.autograd.grad(kl, x, create_graph=True)
    (expected,) = torch.autograd.grad(slope, x, tangent)
    product, _ = softmax_fisher_product(logits, tangent, temperature=0.7, impl=impl)
    assert relative_error(product, expected) < 1e-13
    assert relative_error(product * 0.7, expected) > 0.1


@BACKENDS
def test_it_is_symmetric_and_positive_semidefinite(impl, device) -> None:
    logits, u = random_rows(6, 300, device, torch.float64)
    v = torch.randn_like(u)
    own = temperature_of("per token", 6, device)
    options = {"temperature": own, "impl": impl}
    of_u, square_u = softmax_fisher_product(logits, u, **options)
    of_v, square_v = softmax_fisher_product(logits, v, **options)
    torch.testing.assert_close((v * of_u).sum(-1), (u * of_v).sum(-1), rtol=1e-12, atol=1e-13)
    assert (square_u > 0).all() and (square_v > 0).all()
    # The variance of a sum is not the sum of variances: the form is not diagonal.
    _, square = softmax_fisher_product(logits, u + v, **options)
    torch.testing.assert_close(square, square_u + square_v + 2 * (v * of_u).sum(-1))
    assert not torch.allclose(square, square_u + square_v)


@BACKENDS
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_quadratic_form_is_the_variance_of_the_tangent(impl, dtype, device) -> None:
    logits, u = random_rows(4, 500, device, dtype)
    p = (logits.double() / 1.3).softmax(-1)
    variance = (p * (u.double() - (p * u.double()).sum(-1, keepdim=True)) ** 2).sum(-1)
    product, quadratic = softmax_fisher_product(logits, u, temperature=1.3, impl=impl)
    assert relative_error(quadratic * 1.3**2, variance) < TOLERANCE[wide(dtype)]
    assert relative_error((product.double() * u.double()).sum(-1), quadratic) < TOLERANCE[dtype]


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("constant", [1.0, -1e4])
def test_a_constant_tangent_gives_rounding(impl, dtype, constant, device) -> None:
    logits, tangent = random_rows(3, 5000, device, dtype)
    flat = torch.full_like(logits, constant)
    product, quadratic = softmax_fisher_product(logits, flat, impl=impl)
    p = logits.double().softmax(-1)
    # Some units in the last place of the constant, times the probability; the variance squares it.
    rounding = 8 * torch.finfo(dtype).eps * abs(constant)
    assert (product.double().abs() <= rounding * p * 1.001).all()
    assert (quadratic >= 0).all() and (quadratic <= rounding**2).all()
    # What a constant adds to another tangent is of that size too.
    moved, variance = softmax_fisher_product(logits, tangent + constant, impl=impl)
    plain, expected = softmax_fisher_product(logits, tangent, impl=impl)
    floor = rounding * p + 1e-5 * plain.double().abs()
    assert ((moved - plain).double().abs() <= floor).all()
    torch.testing.assert_close(variance, expected, rtol=2 * rounding + 1e-5, atol=0)


@BACKENDS
@pytest.mark.parametrize("garbage", [NAN, torch.inf])
def test_entries_without_probability_take_no_part(impl, garbage, device) -> None:
    logits, tangent = random_rows(5, 4100, device)
    logits[0, :2048] = -torch.inf  # whole tiles at the start
    logits[1, 2048:] = -torch.inf
    logits[2, ::2] = -torch.inf
    logits[3] = -torch.inf
    logits[3, 4099] = 2.0  # nothing but one entry
    dead = logits == -torch.inf
    product, quadratic = softmax_fisher_product(
        logits, tangent.masked_fill(dead, garbage), temperature=0.7, impl=impl
    )
    assert not product[dead].any() and not product[3].any() and quadratic[3] == 0
    clean = tangent.masked_fill(dead, 0.0)
    bounds = TOLERANCE[torch.float32], TOLERANCE[torch.float32]
    assert_fisher_close((product, quadratic), logits, clean, 0.7, *bounds)


@BACKENDS
def test_a_row_of_nothing_but_minus_infinity_gives_zero(impl, device) -> None:
    for vocab in (1, 100, 4100):
        logits, tangent = random_rows(3, vocab, device)
        clean = softmax_fisher_product(logits, tangent, impl=impl)
        logits[1], tangent[1] = -torch.inf, NAN
        found = softmax_fisher_product(logits, tangent, impl=impl)
        for value, expected in zip(found, clean, strict=True):
            assert not value[1].any()
            assert torch.equal(value[[0, 2]], expected[[0, 2]])


@BACKENDS
@pytest.mark.parametrize("garbage", [NAN, torch.inf, -torch.inf, 1e30])
def test_masked_rows_are_exactly_zero_whatever_they_hold(impl, garbage, device) -> None:
    logits, tangent = random_rows(4, 70, device)
    mask = torch.tensor([0, 1, 0, 1], device=device)
    clean = softmax_fisher_product(logits, tangent, impl=impl)
    logits[[0, 2]], tangent[[0, 2]] = garbage, garbage
    for kind in (mask, mask.bool(), mask.float()):
        found = softmax_fisher_product(logits, tangent, mask=kind, impl=impl)
        for value, expected in zip(found, clean, strict=True):
            assert not value[[0, 2]].any()
            assert torch.equal(value[[1, 3]], expected[[1, 3]])


@BACKENDS
@pytest.mark.parametrize("where", ["logits", "tangent"])
@pytest.mark.parametrize("vocab", [1, 100, 4100])
def test_a_live_row_with_nan_says_nan_and_leaves_the_others_alone(
    impl, where, vocab, device
) -> None:
    logits, tangent = random_rows(3, vocab, device)
    clean = softmax_fisher_product(logits, tangent, impl=impl)
    (logits if where == "logits" else tangent)[1, vocab // 2] = NAN
    found = softmax_fisher_product(logits, tangent, impl=impl)
    assert found[0][1].isnan().all() and found[1][1].isnan()
    for value, expected in zip(found, clean, strict=True):
        assert torch.equal(value[[0, 2]], expected[[0, 2]])


@BACKENDS
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float64),
        (torch.float64, torch.bfloat16),
    ],
)
def test_logits_and_tangent_of_different_dtypes(impl, dtypes, device) -> None:
    logits, tangent = random_rows(3, 77, device)
    logits, tangent = logits.to(dtypes[0]), tangent.to(dtypes[1])
    product, quadratic = softmax_fisher_product(logits, tangent, impl=impl)
    sums = wide(torch.promote_types(*dtypes))
    assert product.dtype == dtypes[1] and quadratic.dtype == sums
    assert_fisher_close(
        (product, quadratic), logits, tangent, 1.0, TOLERANCE[dtypes[1]], TOLERANCE[sums]
    )


@BACKENDS
@pytest.mark.parametrize("size", [1e4, 3e4])
def test_large_logits_do_not_overflow(impl, size, device) -> None:
    logits, tangent = random_rows(3, 50, device, torch.float64)
    logits[:, 3] = logits[:, 7] = size
    product, quadratic = softmax_fisher_product(logits, tangent, impl=impl)
    half = (tangent[:, 3] - tangent[:, 7]) / 4
    torch.testing.assert_close(product[:, 3], half)
    torch.testing.assert_close(product[:, 7], -half)
    torch.testing.assert_close(quadratic, 4 * half**2)
