"""The Fisher information of the softmax times a tangent, against the dense matrix."""

import math

import numpy as np
import pytest
import torch
from support.compare import relative_error
from support.matmuls import MatmulAudit
from torch import Tensor

import fastrlhf
from fastrlhf import linear_softmax_fisher_product, reference, softmax_fisher_product
from fastrlhf.recipes.memory import peak_memory

BACKENDS = pytest.mark.parametrize("impl", ["eager", "compiled", "triton"])
# Relative to the terms of each entry, see `assert_fisher_close`. fp32 and fp64: some roundings of
# the exponent, which is 30 here. bf16: of the product, which the interpreter truncates to it.
TOLERANCE = {torch.float64: 2e-14, torch.float32: 8e-6, torch.bfloat16: 8e-3}
NAN = torch.nan


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors are small here: threads would spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def layouts(content: Tensor) -> dict[str, Tensor]:
    """(2, 3, 65) tensors of one content in many layouts, by name."""
    new = lambda *shape: content.new_full(shape, NAN)  # noqa: E731
    views = {
        "contiguous": new(2, 3, 65),
        "all but the last position": new(2, 4, 65)[:, :-1],
        "part of the vocabulary": new(2, 3, 80)[..., 7:72],
        "every other token": new(2, 3, 130)[..., ::2],
        "vocabulary first": new(65, 3, 2).permute(2, 1, 0),
        "positions first": new(3, 2, 65).transpose(0, 1),
        "odd offset": new(2 * 3 * 65 + 3)[3:].view(2, 3, 65),
    }
    return {name: view.copy_(content) for name, view in views.items()}


@BACKENDS
@pytest.mark.parametrize("layout", layouts(torch.zeros(2, 3, 65)))
def test_layouts_do_not_matter(impl, layout, device) -> None:
    contents = [torch.randn(2, 3, 65, device=device) for _ in range(2)]
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]], device=device)
    own = (torch.rand(3, 2, device=device) + 0.5).T
    options = {"mask": mask, "temperature": own, "impl": impl}
    expected = softmax_fisher_product(*contents, **options)
    logits, tangent = (layouts(content) for content in contents)
    other = "every other token" if layout == "contiguous" else "contiguous"
    for pair in ((layout, layout), (layout, other), (other, layout)):
        found = softmax_fisher_product(logits[pair[0]], tangent[pair[1]], **options)
        assert found[0].shape == (2, 3, 65) and found[1].shape == (2, 3)
        for value, want in zip(found, expected, strict=True):
            torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-7)


@BACKENDS
def test_expanded_rows(impl, device) -> None:
    logits, tangent = random_rows(4, 30, device)
    single = logits[:1].expand(4, 30)
    expected = softmax_fisher_product(single.contiguous(), tangent, impl=impl)
    found = softmax_fisher_product(single, tangent, impl=impl)
    flat = softmax_fisher_product(tangent, single, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    expected = softmax_fisher_product(tangent, single.contiguous(), impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(flat, expected, strict=True))


@BACKENDS
def test_empty_and_smallest_shapes(impl, device) -> None:
    for shape in ((0, 5), (2, 0, 5), (0, 3, 5)):
        empty = torch.randn(shape, device=device)
        product, quadratic = softmax_fisher_product(empty, empty, impl=impl)
        assert product.shape == shape and quadratic.shape == shape[:-1]
    logits, tangent = (x[0] for x in random_rows(1, 9, device))
    product, quadratic = softmax_fisher_product(logits, tangent, impl=impl)
    assert product.shape == (9,) and quadratic.shape == ()
    assert_fisher_close(
        (product[None], quadratic[None]), logits[None], tangent[None], 1.0, 8e-6, 8e-6
    )


@BACKENDS
@pytest.mark.parametrize("vocab", [1000, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(impl, vocab, dtype, device) -> None:
    rows = 1000 if device.type == "cuda" else 12
    logits, tangent = random_rows(rows, vocab, device, dtype)
    mask = torch.arange(rows, device=device) % 5 != 2
    options = {"impl": impl, "temperature": 0.7}
    found, again = (softmax_fisher_product(logits, tangent, mask=mask, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for row in (0, 1, rows - 1):
        one = slice(row, row + 1)
        alone = softmax_fisher_product(logits[one], tangent[one], **options)
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, found, strict=True))


@BACKENDS
def test_neither_result_is_differentiable_and_inputs_keep_their_bits(impl, device) -> None:
    logits, tangent = (x.requires_grad_() for x in random_rows(3, 20, device))
    before = logits.detach().clone(), tangent.detach().clone()
    product, quadratic = softmax_fisher_product(logits, tangent, impl=impl)
    assert not product.requires_grad and not quadratic.requires_grad
    assert torch.equal(logits, before[0]) and torch.equal(tangent, before[1])


@BACKENDS
def test_a_temperature_tensor_broadcasts(impl, device) -> None:
    logits, tangent = torch.randn(2, 2, 3, 20, device=device)
    own = torch.tensor([[0.5], [2.0]], device=device)
    found = softmax_fisher_product(logits, tangent, temperature=own, impl=impl)
    for i, temperature in enumerate((0.5, 2.0)):
        expected = softmax_fisher_product(logits[i], tangent[i], temperature=temperature, impl=impl)
        for value, want in zip(found, expected, strict=True):
            torch.testing.assert_close(value[i], want)


def test_memory_is_the_product_and_a_bounded_rest(device) -> None:
    logits, tangent = (torch.randn(1200, 20000, device=device).bfloat16() for _ in range(2))
    (product, _), peak = peak_memory(lambda: softmax_fisher_product(logits, tangent), device)
    # On a CPU some chunks of 4 MiB: all of it in fp32 would be 92 MiB a tensor.
    rest = 2**20 if device.type == "cuda" else 10 * 2**22
    assert product.nbytes <= peak <= product.nbytes + rest


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts on the CPU")
@pytest.mark.parametrize("vocab", [1000, 4100, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_inputs_are_read_twice_and_the_product_is_written_once(
    vocab, dtype, monkeypatch
) -> None:
    from support.traffic import counted_traffic

    logits, tangent = random_rows(4, vocab, "cpu", dtype)
    mask = torch.tensor([1, 0, 1, 1])
    with counted_traffic(monkeypatch) as traffic:
        product, quadratic = softmax_fisher_product(logits, tangent, mask=mask, impl="triton")
    row = vocab * dtype.itemsize
    assert traffic.loaded(logits) == traffic.loaded(tangent) == 2 * 3 * row
    assert traffic.stored(logits) == traffic.stored(tangent) == traffic.loaded(product) == 0
    assert traffic.stored(product) == 4 * row and traffic.stored(quadratic) == quadratic.nbytes
    assert sum(traffic.launches.values()) == 1
    assert traffic.loaded() + traffic.stored() <= 16 * row + 4 * 32


@BACKENDS
def test_the_operator_passes_opcheck(impl, device) -> None:
    logits, tangent = random_rows(3, 20, device)
    mask = torch.tensor([True, False, True], device=device)
    own = torch.rand(3, device=device) + 0.5
    operator = torch.ops.fastrlhf.fisher_product.default
    torch.library.opcheck(operator, (logits, tangent.bfloat16(), mask, None, 0.7, impl))
    torch.library.opcheck(operator, (logits.double(), tangent, mask, own, 1.0, impl))


@BACKENDS
def test_it_compiles_whole(impl, device) -> None:
    torch.compiler.reset()
    logits, tangent = torch.randn(2, 4, 6, 37, device=device)
    mask = torch.rand(4, 6, device=device) > 0.3

    def work(logits, tangent, mask):
        product, quadratic = softmax_fisher_product(
            2 * logits, tangent, mask=mask, temperature=0.7, impl=impl
        )
        return product.sum(-1) + quadratic, product

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    for found, plain in zip(
        compiled(logits, tangent, mask), work(logits, tangent, mask), strict=True
    ):
        torch.testing.assert_close(found, plain)


ZEROS = torch.zeros(2, 3, 5)
BAD_INPUT = {
    "integer logits": (TypeError, "logits: .*floating.*int64", {"logits": ZEROS.long()}),
    "fp8 logits": (TypeError, "logits: .*float8", {"logits": ZEROS.to(torch.float8_e4m3fn)}),
    "a list": (TypeError, "logits: expected a tensor, got list", {"logits": [1.0]}),
    "0-d logits": (ValueError, r"logits: .*\(\.\.\., V\)", {"logits": torch.tensor(1.0)}),
    "empty vocabulary": (ValueError, "logits: .*V > 0", {"logits": torch.zeros(2, 3, 0)}),
    "integer tangent": (TypeError, "tangent: .*floating.*int64", {"tangent": ZEROS.long()}),
    "a number as tangent": (TypeError, "tangent: expected a tensor", {"tangent": 1.0}),
    "shape": (ValueError, r"tangent: .*\(2, 3, 5\).*got \(2, 5\)", {"tangent": ZEROS[:, 0]}),
    "device": (ValueError, "tangent: .*meta", {"tangent": ZEROS.to("meta")}),
    "shape of the mask": (ValueError, r"mask: .*\(2, 3\)", {"mask": torch.ones(2, 2)}),
    "device of the mask": (ValueError, "mask: .*meta", {"mask": torch.ones(2, 3, device="meta")}),
    "zero temperature": (ValueError, "temperature: .*positive", {"temperature": 0.0}),
    "one bad temperature": (
        ValueError,
        "temperature: .*positive.*got -1",
        {"temperature": torch.tensor([[1.0, 1, 1], [1, -1, 1]])},
    ),
    "temperatures of another shape": (
        ValueError,
        r"temperature: .*\(2, 3\).*got \(3,\)",
        {"temperature": torch.ones(3)},
    ),
    "unknown impl": (ValueError, "impl: .*'cuda'", {"impl": "cuda"}),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_names_the_argument(case) -> None:
    error, message, arguments = BAD_INPUT[case]
    with pytest.raises(error, match=f"^{message}"):
        softmax_fisher_product(**{"logits": ZEROS, "tangent": ZEROS} | arguments)


# The linear form.

TOKENS, WIDTH, VOCAB = 7, 6, 37
TRANSFORMS = {
    "plain": {},
    "scaled": {"scale": 0.5, "temperature": 0.7},
    "capped": {"softcap": 1.5, "scale": 0.8},
    "all": {"softcap": 1.5, "scale": 0.5, "temperature": torch.linspace(0.5, 2, TOKENS)},
}
# Relative L2 errors. bf16: of the products of the tokens, which are rounded before the last matmul.
LINEAR_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def head_inputs(dtype=torch.float64, device="cpu"):
    """Hidden states, weight, tangent, bias and weight_tangent; a mask with some zeros."""
    shapes = (TOKENS, WIDTH), (VOCAB, WIDTH), (TOKENS, WIDTH), (VOCAB,), (VOCAB, WIDTH)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1], device=device)
    return [torch.randn(s, device=device).to(dtype) for s in shapes], mask


def of_dense_matrices(hidden, weight, tangent, bias, weight_tangent, mask, options):
    """The same in fp64: derivatives of the head by torch.func, and one dense matrix for a token."""
    options = dict(options)
    temperature = options.pop("temperature", 1.0)

    def head(hidden, weight):
        raw = hidden @ weight.T + (0 if bias is None else bias)
        return reference.capped_logits(raw, options.get("softcap"), options.get("scale", 1.0))

    turned = torch.zeros_like(weight) if weight_tangent is None else weight_tangent
    logits, moved = torch.func.jvp(head, (hidden, weight), (tangent, turned))
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(len(hidden)).numpy()
    pairs = zip(logits.numpy(), temperatures, strict=True)
    dense = torch.stack([torch.from_numpy(dense_fisher(z, t)) for z, t in pairs])
    product = (dense @ moved[..., None])[..., 0] * mask[:, None]
    _, pull_back = torch.func.vjp(lambda h: head(h, weight), hidden)
    return pull_back(product)[0], (product * moved).sum(-1)


def linear_case(kind, biased, moving, dtype, device="cpu"):
    """Arguments of the linear form, and what dense matrices make of them."""
    tensors, mask = head_inputs(dtype, device)
    hidden, weight, tangent, bias, weight_tangent = tensors
    bias, weight_tangent = bias if biased else None, weight_tangent if moving else None
    exact = [None if x is None else x.cpu().double()
             for x in (hidden, weight, tangent, bias, weight_tangent)]  # fmt: skip
    expected = of_dense_matrices(*exact, mask.cpu(), TRANSFORMS[kind])
    options = {key: x.to(device) if isinstance(x, Tensor) else x
               for key, x in TRANSFORMS[kind].items()}  # fmt: skip
    named = {"bias": bias, "weight_tangent": weight_tangent, "mask": mask, **options}
    return (hidden, weight, tangent), named, expected


@BACKENDS
@pytest.mark.parametrize("dtype", LINEAR_TOLERANCE)
@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize(("biased", "moving"), [(False, False), (False, True), (True, True)])
def test_the_linear_form_matches_dense_matrices(impl, dtype, kind, biased, moving, device) -> None:
    args, named, expected = linear_case(kind, biased, moving, dtype, device)
    for chunk_size in (None, 2):
        found = linear_softmax_fisher_product(*args, **named, chunk_size=chunk_size, impl=impl)
        assert found[0].shape == (TOKENS, WIDTH) and found[1].shape == (TOKENS,)
        assert found[0].dtype == found[1].dtype == wide(dtype)
        for value, want in zip(found, expected, strict=True):
            assert relative_error(value, want) <= LINEAR_TOLERANCE[dtype]
            assert not value[[2, 4]].any()


def test_each_part_of_the_head_is_seen() -> None:
    args, named, expected = linear_case("all", True, True, torch.float64)
    for name in ("bias", "weight_tangent", "softcap", "scale", "temperature", "mask"):
        without = {key: x for key, x in named.items() if key != name}
        found = linear_softmax_fisher_product(*args, **without)
        for value, want in zip(found, expected, strict=True):
            assert relative_error(value, want) > 2 * LINEAR_TOLERANCE[torch.bfloat16], name


def test_the_linear_form_reads_nothing_of_masked_rows() -> None:
    args, named, _ = linear_case("all", True, True, torch.float64)
    clean = linear_softmax_fisher_product(*args, **named)
    args[0][[2, 4]], args[2][[2, 4]] = NAN, torch.inf
    found = linear_softmax_fisher_product(*args, **named)
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))
    nothing = linear_softmax_fisher_product(*args, **named | {"mask": torch.zeros(TOKENS)})
    assert not nothing[0].any() and not nothing[1].any()


def test_the_linear_form_of_any_leading_shape() -> None:
    (hidden, weight, tangent), _, _ = linear_case("plain", False, False, torch.float64)
    flat = linear_softmax_fisher_product(hidden[:6], weight, tangent[:6])
    cut = [x[:6].view(3, 2, WIDTH).transpose(0, 1) for x in (hidden, tangent)]
    product, quadratic = linear_softmax_fisher_product(cut[0], weight, cut[1])
    assert product.shape == (2, 3, WIDTH) and quadratic.shape == (2, 3)
    torch.testing.assert_close(product.transpose(0, 1).reshape(6, WIDTH), flat[0])
    torch.testing.assert_close(quadratic.T.reshape(6), flat[1])
    for shape in ((0, WIDTH), (2, 0, WIDTH)):
        empty = torch.zeros(shape, dtype=torch.float64)
        product, quadratic = linear_softmax_fisher_product(empty, weight, empty)
        assert product.shape == shape and quadratic.shape == shape[:-1]


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("kept", [32, 12])
def test_as_many_matmuls_as_documented_and_no_logits(moving, kept) -> None:
    tokens, width, vocab, chunk = 32, 32, 1000, 8
    hidden, tangent = torch.randn(2, tokens, width)
    weight, turned = torch.randn(vocab, width), torch.randn(vocab, width)
    mask = torch.arange(tokens) < kept
    with MatmulAudit() as audit:
        linear_softmax_fisher_product(
            hidden, weight, tangent, weight_tangent=turned if moving else None, mask=mask,
            chunk_size=chunk, bias=torch.randn(vocab), softcap=20.0,
        )  # fmt: skip
    assert audit.operations / (2 * kept * vocab * width) == pytest.approx(3 + moving)
    # A weight, or a few rows of logits: no (N, V).
    assert audit.largest <= max(chunk * vocab, vocab * width)


def test_the_linear_workspace_does_not_grow_with_the_tokens() -> None:
    largest = []
    for tokens in (32, 256):
        hidden, tangent = torch.randn(2, tokens, 4)
        with MatmulAudit() as audit:
            linear_softmax_fisher_product(hidden, torch.randn(5000, 4), tangent, chunk_size=16)
        largest.append(audit.largest)
    assert largest == [16 * 5000] * 2


def test_the_linear_form_is_not_differentiable_and_keeps_its_inputs() -> None:
    args, named, _ = linear_case("all", True, True, torch.float64)
    before = [x.clone() for x in args]
    args = [x.requires_grad_() for x in args]
    found = linear_softmax_fisher_product(*args, **named)
    again = linear_softmax_fisher_product(*args, **named)
    assert not any(x.requires_grad for x in found)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


HIDDEN, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(5, 4)
BAD_HEAD = {
    "integer hidden": (TypeError, "hidden: ", {"hidden": HIDDEN.long()}),
    "width": (ValueError, "(weight|hidden): ", {"weight": torch.zeros(5, 3)}),
    "integer tangent": (TypeError, "tangent: .*floating", {"tangent": HIDDEN.long()}),
    "shape of tangent": (ValueError, r"tangent: .*\(2, 3, 4\)", {"tangent": HIDDEN[:, :2]}),
    "device of tangent": (ValueError, "tangent: .*meta", {"tangent": HIDDEN.to("meta")}),
    "integer turn": (TypeError, "weight_tangent: .*floating", {"weight_tangent": WEIGHT.long()}),
    "shape of turn": (ValueError, r"weight_tangent: .*\(5, 4\)", {"weight_tangent": WEIGHT.T}),
    "device of turn": (ValueError, "weight_tangent: .*meta", {"weight_tangent": WEIGHT.to("meta")}),
    "bias": (ValueError, "bias: ", {"bias": torch.zeros(4)}),
    "mask": (ValueError, r"mask: .*\(2, 3\)", {"mask": torch.zeros(3)}),
    "temperature": (ValueError, "temperature: .*positive", {"temperature": -1.0}),
    "softcap": (ValueError, "softcap: .*positive", {"softcap": 0.0}),
    "scale": (ValueError, "scale: .*positive", {"scale": math.inf}),
    "chunk_size": (ValueError, "chunk_size: ", {"chunk_size": 0}),
    "impl": (ValueError, "impl: .*'cuda'", {"impl": "cuda"}),
}


@pytest.mark.parametrize("case", BAD_HEAD)
def test_bad_input_of_the_linear_form_names_the_argument(case) -> None:
    error, message, arguments = BAD_HEAD[case]
    with pytest.raises(error, match=f"^{message}"):
        linear_softmax_fisher_product(
            **{"hidden": HIDDEN, "weight": WEIGHT, "tangent": HIDDEN} | arguments
        )
