"""Token statistics and their gradient, by kernels and by the eager backend, against the oracle."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.compare import (
    assert_as_accurate,
    assert_gradient_as_accurate,
    assert_gradient_close,
    budget,
    gradient_errors,
    relative_error,
)
from support.oracle import options_of, token_stats_oracle
from support.plain import of_tokens, plain_token_stats

import fastrlhf
from fastrlhf import reference
from fastrlhf.recipes.memory import peak_memory

IMPLS = ["eager", "compiled", "triton"]
BACKENDS = pytest.mark.parametrize("impl", IMPLS)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def evaluate(logits, targets, *, g=None, h=None, impl="triton", **options):
    """Statistics of (N, V) logits, and the gradient of Σ g·logprob + h·entropy."""
    x = logits.detach().clone().requires_grad_()
    stats = fastrlhf.token_stats(x, targets, entropy=h is not None, impl=impl, **options)
    upstream = [torch.ones_like(stats.logprob) if g is None else g.to(stats.logprob)]
    outputs = [stats.logprob]
    if h is not None:
        outputs, upstream = [*outputs, stats.entropy], [*upstream, h.to(stats.entropy)]
    (gradient,) = torch.autograd.grad(outputs, x, upstream)
    return stats, gradient


def random_rows(rows, vocab, device, dtype=torch.float32, spread=4.0):
    """Logits, targets with an ignored row of NaN (if there are three rows), and coefficients g,
    h.
    """
    logits = torch.randn(rows, vocab, device=device).mul(spread).to(dtype)
    targets = torch.randint(vocab, (rows,), device=device)
    targets[0] = logits[0].argmax()  # a likely target, for which 1 - p(target) is not 1
    if rows > 2:
        targets[2], logits[2] = -100, torch.nan
    return logits, targets, *(torch.randn(rows, device=device) for _ in range(2))


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 33, 1000, 4128, 5003])
@pytest.mark.parametrize("kind", ["plain", "scaled", "capped", "all"])
def test_values_and_gradients_match_the_oracle(impl, dtype, vocab, kind, device) -> None:
    logits, targets, g, h = random_rows(5, vocab, device, dtype)
    options = options_of(kind, 5, device)
    expected = token_stats_oracle(logits, targets, g=g, h=h, **options)
    stats, gradient = evaluate(logits, targets, g=g, h=h, impl=impl, **options)
    plain, plain_gradient = of_tokens(logits, targets, g, h, **options)
    for name, by_plain in zip(("logprob", "entropy", "lse"), plain, strict=True):
        value, exact = getattr(stats, name), getattr(expected, name)
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        # Each is made of logits of that size, or of a unit, that cancel.
        size = max(1.0, float(expected.lse.abs().max()))
        assert_as_accurate(value, by_plain, exact, size=size, of=name)
        assert value[2] == 0
    if vocab > 1:
        # A logit of 16 rounds by as many eps of a nat, and so does the probability, relatively.
        ulps = 16.0 if dtype in (torch.float32, torch.float64) else None
        assert_gradient_as_accurate(gradient, plain_gradient, expected.gradient, targets, ulps)
    assert gradient.dtype == dtype


@pytest.mark.parametrize(
    "mutant", ["zero", "target only", "no softmax at target", "scaled", "late"]
)
def test_the_gradient_comparison_rejects_mutants(mutant, device) -> None:
    logits, targets, g, _ = random_rows(5, 1000, device)
    true = token_stats_oracle(logits, targets, g=g).gradient
    index = targets.cpu().clamp(min=0).unsqueeze(1)
    live = (targets.cpu() >= 0).unsqueeze(1)
    wrong = {
        "zero": torch.zeros_like(true),
        "target only": torch.zeros_like(true).scatter(1, index, true.gather(1, index)),
        "no softmax at target": true.scatter(1, index, g.cpu().double().unsqueeze(1)) * live,
        "scaled": true * 1.0001,
        "late": torch.where(torch.arange(1000) > 990, 0.0, true),
    }[mutant]
    with pytest.raises(AssertionError, match="error of"):
        assert_gradient_close(wrong, true, targets, budget(1e-5, torch.float32))


def eager_in(dtype, logits, targets, **transform):
    """The formula as trainers write it, evaluated in `dtype`, with its gradient for g = 1."""
    x = logits.detach().to(dtype).requires_grad_()
    z = reference.capped_logits(x, transform.get("softcap"), transform.get("scale", 1.0))
    z = z / transform.get("temperature", 1.0)
    logprob = F.log_softmax(z, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    (gradient,) = torch.autograd.grad(logprob.sum(), x)
    return logprob.detach(), gradient


@BACKENDS
@pytest.mark.parametrize("spread", [1.0, 10.0, 1e4])
@pytest.mark.parametrize("transform", [{}, {"softcap": 30.0}, {"temperature": 0.7, "scale": 0.3}])
def test_errors_are_at_most_twice_those_of_the_eager_formula(
    impl, spread, transform, device
) -> None:
    logits = torch.randn(32, 3000, device=device) * spread
    targets = torch.randint(3000, (32,), device=device)
    expected = token_stats_oracle(logits, targets, **transform)
    stats, gradient = evaluate(logits, targets, impl=impl, **transform)
    logprob, eager_gradient = eager_in(torch.float32, logits, targets, **transform)
    assert relative_error(stats.logprob, expected.logprob) <= 2 * relative_error(
        logprob, expected.logprob
    )
    ours = gradient_errors(gradient, expected.gradient, targets)
    eager = gradient_errors(eager_gradient, expected.gradient, targets)
    rounding = torch.finfo(torch.float32).eps
    assert all(a <= 2 * b + rounding for a, b in zip(ours, eager, strict=True)), (ours, eager)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_probability_of_nearly_one_keeps_its_relative_accuracy(impl, dtype, device) -> None:
    logits = torch.zeros(4, 50, dtype=dtype, device=device)
    logits[:, 7] = torch.tensor([15.0, 20.0, 30.0, 80.0])
    targets = torch.full((4,), 7, device=device)
    expected = token_stats_oracle(logits, targets)
    stats, gradient = evaluate(logits, targets, impl=impl)
    assert (stats.logprob < 0).all()
    torch.testing.assert_close(
        stats.logprob.cpu().double(), expected.logprob, rtol=100 * torch.finfo(dtype).eps, atol=0
    )
    torch.testing.assert_close(
        gradient[:, 7].cpu().double(), expected.gradient[:, 7],
        rtol=100 * torch.finfo(dtype).eps, atol=0,
    )  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_probability_of_nine_tenths_and_more_keeps_its_relative_accuracy(
    impl, dtype, device
) -> None:
    # Where the rest weighs little beside the target, the sum of both is rounded.
    logits = torch.zeros(100, 2, dtype=dtype, device=device)
    logits[:, 1] = torch.linspace(2.0, 7.0, 100, dtype=dtype)
    targets = torch.ones(100, dtype=torch.long, device=device)
    expected = token_stats_oracle(logits, targets)
    stats, gradient = evaluate(logits, targets, impl=impl)
    for found, wanted in (
        (stats.logprob, expected.logprob), (gradient[:, 1], expected.gradient[:, 1])
    ):  # fmt: skip
        torch.testing.assert_close(
            found.cpu().double(), wanted, rtol=24 * torch.finfo(dtype).eps, atol=0
        )


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_beyond_the_cap_a_gradient_keeps_its_relative_accuracy(impl, dtype, device) -> None:
    logits = torch.linspace(-16, 16, 33, dtype=dtype, device=device).view(1, -1)
    targets = torch.tensor([20], device=device)
    expected = token_stats_oracle(logits, targets, softcap=2.0)
    _, gradient = evaluate(logits, targets, impl=impl, softcap=2.0)
    assert 0 < expected.gradient[0, -1].abs() < 1e-6  # the slope is 4e^-16
    torch.testing.assert_close(
        gradient.cpu().double(), expected.gradient, rtol=100 * torch.finfo(dtype).eps, atol=0
    )


@BACKENDS
def test_large_logits_in_several_splits(impl, device) -> None:
    logits = torch.randn(2, 20011, device=device) * 1e3
    targets = logits.argmax(-1) - torch.tensor([0, 1], device=device)
    expected = token_stats_oracle(logits, targets)
    stats, gradient = evaluate(logits, targets, impl=impl)
    assert expected.logprob[0] > -1 and expected.logprob[1] < -100
    torch.testing.assert_close(
        stats.logprob.cpu().double(), expected.logprob, rtol=1e-5, atol=1e-30
    )
    torch.testing.assert_close(gradient.cpu().double(), expected.gradient, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("logits_at_once", [10, 40, 100])
def test_the_size_of_the_eager_chunks_does_not_matter(logits_at_once, monkeypatch, device) -> None:
    logits, targets, g, h = random_rows(6, 33, device)
    expected = token_stats_oracle(logits, targets, g=g, h=h)
    module = sys.modules["fastrlhf.ops.token_stats"]  # whose name in the package is the function's
    monkeypatch.setattr(module, "_EAGER_CHUNK_LOGITS", logits_at_once)
    stats, gradient = evaluate(logits, targets, g=g, h=h, impl="eager")
    torch.testing.assert_close(stats.logprob.cpu().double(), expected.logprob, rtol=1e-5, atol=1e-5)
    assert_gradient_close(gradient, expected.gradient, targets, 1e-5)


@BACKENDS
def test_the_slope_of_either_statistic_may_be_zero(impl, device) -> None:
    logits, targets, g, h = random_rows(5, 33, device)
    g[0] = h[1] = g[3] = h[3] = 0.0
    expected = token_stats_oracle(logits, targets, g=g, h=h)
    _, gradient = evaluate(logits, targets, g=g, h=h, impl=impl)
    assert_gradient_close(gradient, expected.gradient, targets, 1e-5)
    assert gradient[0].any() and gradient[1].any() and not gradient[3].any()


def gradient_with_lse(logits, targets, g, h, l, impl, *, operator=None, **options):
    """The gradient of Σ g·logprob + h·entropy + l·lse, by the operators: `token_stats` gives the
    lse no gradient.
    """
    ops = torch.ops.fastrlhf
    own = options.get("temperature", 1.0)
    temperature = (own, 1.0) if isinstance(own, torch.Tensor) else (None, own)
    transform = (*temperature, options.get("softcap"), options.get("scale", 1.0))
    logprob, entropy, _, *rest = ops.token_stats(
        logits, targets, *transform, -100, h is not None, False, impl
    )
    slopes = [None if x is None else x.to(logprob) for x in (g, h, l)]
    saved = (logits, targets, logprob, entropy, *rest, *slopes[:2], *transform, impl)
    return (operator or ops.token_stats_backward)(*saved, slopes[2])


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 33, 1000, 5003])
@pytest.mark.parametrize("kind", ["plain", "scaled", "capped", "all"])
@pytest.mark.parametrize("of", ["lse", "logprob and lse", "all three"])
def test_the_gradient_of_the_lse_matches_the_oracle(impl, dtype, vocab, kind, of, device) -> None:
    logits, targets, g, h = random_rows(5, vocab, device, dtype)
    l = torch.randn(5, device=device)
    g = torch.zeros_like(g) if of == "lse" else g
    h = h if of == "all three" else None
    options = options_of(kind, 5, device)
    expected = token_stats_oracle(logits, targets, g=g, h=h, l=l, **options).gradient
    gradient = gradient_with_lse(logits, targets, g, h, l, impl, **options)
    _, plain = of_tokens(logits, targets, g, h, l, **options)
    ulps = 16.0 if dtype in (torch.float32, torch.float64) else None
    assert_gradient_as_accurate(gradient, plain, expected, targets, ulps)
    assert gradient.dtype == dtype


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_tails_keep_their_relative_accuracy_beside_the_lse(impl, dtype, device) -> None:
    logits = torch.zeros(4, 50, dtype=dtype, device=device)
    logits[:, 7] = torch.tensor([20.0, 80.0, -20.0, -80.0])
    targets = torch.full((4,), 7, device=device)
    # At the target, g·(1 - p) is seen beside l·p where p is nearly 1 if l is as small as 1 - p.
    l = torch.tensor([1e-8, 1e-33, 1e8, 1e-3], dtype=dtype, device=device)
    g = torch.tensor([1.0, 1.0, 1e-3, 0.0], dtype=dtype, device=device)
    expected = token_stats_oracle(logits, targets, g=g, l=l).gradient
    gradient = gradient_with_lse(logits, targets, g, None, l, impl)
    torch.testing.assert_close(
        gradient.cpu().double(), expected, rtol=200 * torch.finfo(dtype).eps, atol=0
    )


@BACKENDS
def test_slopes_that_cancel_leave_the_logit_of_the_target(impl, device) -> None:
    # The log-prob and the lse add up to it.
    logits, targets, g, _ = random_rows(5, 1000, device)
    gradient = gradient_with_lse(logits, targets, g, None, g, impl)
    live = targets != -100
    index = targets[live].unsqueeze(1)
    torch.testing.assert_close(gradient[live].gather(1, index)[:, 0], g[live], rtol=1e-6, atol=0)
    assert not gradient[live].scatter(1, index, 0.0).any() and not gradient[~live].any()


@BACKENDS
def test_any_slope_may_be_zero_and_only_all_of_them_end_a_row(impl, device) -> None:
    logits, targets, g, h = random_rows(9, 33, device)
    l = torch.randn(9, device=device)
    slopes = torch.stack([g, h, l])
    # Row 2 is ignored; the other eight have each combination of zeros.
    live = [i for i in range(9) if i != 2]
    zero = torch.tensor([[bool(i >> k & 1) for i in range(8)] for k in range(3)], device=device)
    slopes[:, live] = torch.where(zero, 0.0, slopes[:, live])
    expected = token_stats_oracle(logits, targets, g=slopes[0], h=slopes[1], l=slopes[2]).gradient
    for into in (False, True):
        memory = logits.clone()
        ops = torch.ops.fastrlhf
        operator = ops.token_stats_backward_ if into else None
        found = gradient_with_lse(memory, targets, *slopes, impl, operator=operator)
        gradient = memory if into else found
        assert_gradient_close(gradient, expected, targets, 1e-5)
        assert gradient.any(-1).tolist() == [i in live[:7] for i in range(9)]


@BACKENDS
def test_the_lse_of_a_masked_vocabulary_makes_no_nan(impl, device) -> None:
    logits = torch.randn(5, 40000, device=device)  # more than two splits
    targets = torch.randint(20000, 30000, (5,), device=device)
    logits[0, :16384] = -torch.inf  # a whole split
    logits[1, targets[1]] = -torch.inf  # the target itself
    logits[2] = -torch.inf
    logits[2, targets[2]] = 3.0  # nothing but the target
    logits[3] = -torch.inf  # nothing at all
    targets[4], logits[4] = -100, torch.nan
    g, h = torch.ones(5, device=device), torch.full((5,), 0.5, device=device)
    # What a square makes of an lse of -inf.
    l = torch.tensor([2.0, 2.0, 2.0, -torch.inf, torch.nan], device=device)
    expected = token_stats_oracle(logits, targets, g=g, h=h, l=l).gradient
    gradient = gradient_with_lse(logits, targets, g, h, l, impl)
    rows = slice(0, 3)
    _, plain = of_tokens(logits[rows], targets[rows], g[rows], h[rows], l[rows])
    assert_as_accurate(gradient[rows], plain, expected[rows])
    assert gradient[1, targets[1]] == 1
    assert not gradient[3:].any()


@BACKENDS
def test_without_a_slope_of_the_lse_the_bits_are_those_of_before(impl, device) -> None:
    logits, targets, g, h = random_rows(5, 1000, device)
    zero = torch.zeros(5, device=device)
    for slope in (h, None):
        without = gradient_with_lse(logits, targets, g, slope, None, impl)
        _, expected = evaluate(logits, targets, g=g, h=slope, impl=impl)
        assert torch.equal(without, expected)
        found = gradient_with_lse(logits, targets, g, slope, zero, impl)
        torch.testing.assert_close(found, without, rtol=1e-6, atol=1e-9)


@BACKENDS
def test_masked_vocabulary_makes_no_nan_wherever_it_stands(impl, device) -> None:
    vocab = 40000  # more than two splits
    logits = torch.randn(7, vocab, device=device)
    targets = torch.randint(20000, 30000, (7,), device=device)
    logits[0, :4096] = -torch.inf  # whole tiles at the start
    logits[1, :16384] = -torch.inf  # a whole split at the start
    logits[2, 16384:] = -torch.inf
    targets[2] = 5
    logits[3, ::2] = -torch.inf
    targets[3] = 20001
    logits[4, targets[4]] = -torch.inf  # the target itself
    logits[5] = -torch.inf
    logits[5, targets[5]] = 3.0  # nothing but the target
    logits[6] = -torch.inf  # nothing at all
    g, h = torch.ones(7), torch.full((7,), 0.5)
    expected = token_stats_oracle(logits, targets, g=g, h=h)
    stats, gradient = evaluate(logits, targets, g=g.to(device), h=h.to(device), impl=impl)
    plain = plain_token_stats(logits, targets)
    for name, by_plain in zip(("logprob", "entropy"), plain[:2], strict=True):
        exact = getattr(expected, name)
        assert_as_accurate(getattr(stats, name), by_plain, exact, of=name)
    assert stats.logprob[4] == stats.logprob[6] == -torch.inf
    assert stats.logprob[5] == 0 and stats.entropy[5] == 0
    assert not gradient[6].any()
    regular = [0, 1, 2, 3]
    _, by_plain = of_tokens(logits[:5], targets[:5], *(x.to(device) for x in (g[:5], h[:5])))
    assert_gradient_as_accurate(
        gradient[regular], by_plain[regular], expected.gradient[regular], targets[regular]
    )
    assert_as_accurate(gradient[4], by_plain[4], expected.gradient[4], of="gradient")
    assert not gradient.isnan().any()


@BACKENDS
def test_a_live_row_with_nan_says_nan_and_leaves_the_others_alone(impl, device) -> None:
    logits = torch.randn(3, 100, device=device)
    targets = torch.tensor([1, 2, 3], device=device)
    clean, clean_gradient = evaluate(logits, targets, h=torch.ones(3), impl=impl)
    logits[1, 50] = torch.nan
    stats, gradient = evaluate(logits, targets, h=torch.ones(3), impl=impl, softcap=None)
    assert stats.logprob[1].isnan() and stats.entropy[1].isnan() and gradient[1].isnan().any()
    for row in (0, 2):
        assert stats.logprob[row] == clean.logprob[row]
        assert torch.equal(gradient[row], clean_gradient[row])


@BACKENDS
@pytest.mark.parametrize("vocab", [1, 2, 100, 20000])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_row_of_nothing_but_nan_says_nan(impl, vocab, softcap, device) -> None:
    logits = torch.full((2, vocab), torch.nan, device=device)
    targets = torch.tensor([0, vocab - 1], device=device)
    h = torch.ones(2, device=device)
    stats, gradient = evaluate(logits, targets, h=h, impl=impl, softcap=softcap)
    for value in (stats.logprob, stats.entropy, stats.lse, gradient):
        assert value.isnan().all()


@BACKENDS
@pytest.mark.parametrize("at_target", [True, False])
def test_an_infinite_logit_says_nan_as_log_softmax_does(impl, at_target, device) -> None:
    logits = torch.randn(1, 50, device=device)
    logits[0, 7] = torch.inf
    targets = torch.tensor([7 if at_target else 8], device=device)
    stats, gradient = evaluate(logits, targets, impl=impl)
    assert stats.logprob.isnan().all() and gradient.isnan().any()


@BACKENDS
def test_a_live_nan_passes_through_the_cap(impl, device) -> None:
    logits = torch.randn(1, 10, device=device)
    logits[0, 4] = torch.nan
    stats, _ = evaluate(logits, torch.tensor([2], device=device), impl=impl, softcap=5.0)
    assert stats.logprob.isnan().all()


@BACKENDS
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("inplace", [False, True])
def test_ignored_rows_are_exactly_zero_whatever_they_hold(impl, garbage, inplace, device) -> None:
    logits = torch.randn(4, 70, device=device)
    targets = torch.tensor([-100, 5, -100, 69], device=device)
    logits[0], logits[2] = garbage, garbage
    g = torch.tensor([torch.nan, 1.0, torch.inf, 2.0], device=device)
    stats, gradient = evaluate(
        logits, targets, g=g, h=g, impl=impl, inplace_backward=inplace, softcap=3.0
    )
    for value in (stats.logprob, stats.entropy, stats.lse, gradient):
        assert not value[[0, 2]].any()
        assert value[[1, 3]].isfinite().all()


@BACKENDS
def test_any_integer_can_mark_ignored_targets(impl, device) -> None:
    logits = torch.randn(3, 10, device=device)
    for ignore_index, targets in ((0, [0, 1, 2]), (-1, [-1, 1, 2]), (7, [7, 1, 2])):
        index = torch.tensor(targets, device=device)
        stats = fastrlhf.token_stats(logits, index, ignore_index=ignore_index, impl=impl)
        assert stats.logprob[0] == 0 and (stats.logprob[1:] < 0).all()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_targets_of_any_integer_dtype(impl, dtype, device) -> None:
    logits = torch.randn(4, 100, device=device)
    targets = torch.tensor([0, 99, 50, 3], device=device)
    expected = fastrlhf.token_logprobs(logits, targets, impl=impl)
    unaligned = torch.cat([targets[:1], targets]).to(dtype)[1:]
    assert torch.equal(fastrlhf.token_logprobs(logits, unaligned, impl=impl), expected)


@BACKENDS
def test_empty_and_smallest_shapes(impl, device) -> None:
    for shape in ((0, 5), (2, 0, 5), (0, 3, 5)):
        logits = torch.randn(shape, device=device, requires_grad=True)
        targets = torch.zeros(shape[:-1], dtype=torch.long, device=device)
        stats = fastrlhf.token_stats(logits, targets, entropy=True, impl=impl)
        assert stats.logprob.shape == stats.entropy.shape == stats.lse.shape == shape[:-1]
        stats.logprob.sum().backward()
        assert logits.grad.shape == shape
    logits = torch.randn(5, device=device, requires_grad=True)
    value = fastrlhf.token_logprobs(logits, torch.tensor(3, device=device), impl=impl)
    plain, exact = logits.log_softmax(-1)[3], logits.double().log_softmax(-1)[3]
    assert_as_accurate(value, plain, exact)
    certain = torch.randn(2, 1, device=device, requires_grad=True)
    stats = fastrlhf.token_stats(
        certain, torch.zeros(2, dtype=torch.long, device=device), entropy=True, impl=impl
    )
    (stats.logprob + stats.entropy).sum().backward()
    assert not stats.logprob.any() and not stats.entropy.any() and not certain.grad.any()


def layouts(device):
    """(B, T, V) = (2, 3, 65) logits of one content in many layouts, by name."""
    content = torch.randn(2, 3, 65, device=device)

    def filled(view: torch.Tensor) -> torch.Tensor:
        return view.copy_(content)

    new = lambda *shape: torch.full(shape, torch.nan, device=device)  # noqa: E731
    return content, {
        "contiguous": content.clone(),
        "all but the last position": filled(new(2, 4, 65)[:, :-1]),
        "all but the first position": filled(new(2, 4, 65)[:, 1:]),
        "part of the vocabulary": filled(new(2, 3, 80)[..., 7:72]),
        "every other token": filled(new(2, 3, 130)[..., ::2]),
        "vocabulary first": filled(new(65, 3, 2).permute(2, 1, 0)),
        "positions first": filled(new(3, 2, 65).transpose(0, 1)),
        "odd offset": filled(new(2 * 3 * 65 + 3)[3:].view(2, 3, 65)),
    }


# One worker compiles for all: what the compiler needs before its first kernel takes a while.
INDUCTOR = pytest.param("inductor", marks=pytest.mark.xdist_group("inductor"))


@BACKENDS
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", layouts("cpu")[1])
def test_layouts_do_not_matter(impl, inplace, layout, device) -> None:
    content, views = layouts(device)
    targets = torch.randint(65, (2, 3), device=device)
    targets[1, 1] = -100
    expected, gradient = evaluate(content, targets, impl=impl)
    leaf = views[layout].requires_grad_()
    logits = leaf.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())
    stats = fastrlhf.token_stats(logits, targets, impl=impl, inplace_backward=inplace)
    (found,) = torch.autograd.grad(stats.logprob.sum(), logits)
    exact = token_stats_oracle(content.flatten(0, 1), targets.flatten())
    assert_as_accurate(stats.logprob, expected.logprob, exact.logprob)
    assert_gradient_as_accurate(
        found.flatten(0, 1), gradient.flatten(0, 1), exact.gradient, targets.flatten()
    )


@BACKENDS
@pytest.mark.parametrize("inplace", [False, True])
def test_expanded_logits_and_upstream_gradients(impl, inplace, device) -> None:
    row = torch.randn(1, 30, device=device, requires_grad=True)
    targets = torch.tensor([1, 2, 29], device=device)
    logprobs = fastrlhf.token_logprobs(
        row.expand(3, 30), targets, impl=impl, inplace_backward=inplace
    )
    (gradient,) = torch.autograd.grad(logprobs.mean(), row)
    plain, exact = (
        torch.autograd.grad(x.log_softmax(-1)[0, targets].mean(), x)[0]
        for x in (row, row.detach().double().requires_grad_())
    )
    assert_as_accurate(gradient, plain, exact)


@BACKENDS
def test_offsets_past_2_to_the_31_elements(impl, device) -> None:
    vocab, stride = 262144, 2**31 + 16
    # Two rows, far apart in memory of which only they are ever touched.
    memory = torch.empty(stride + vocab, dtype=torch.bfloat16, device=device)
    logits = memory.as_strided((2, vocab), (stride, 1))
    content = torch.randn(2, vocab, device=device).bfloat16()
    logits.copy_(content)
    targets = torch.tensor([5, vocab - 1], device=device)
    expected = fastrlhf.token_logprobs(content, targets, impl=impl)
    assert torch.equal(fastrlhf.token_logprobs(logits, targets, impl=impl), expected)


@BACKENDS
@pytest.mark.parametrize("vocab", [1000, 20011])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(impl, vocab, dtype, device) -> None:
    rows = 1000 if device.type == "cuda" else 12
    logits, targets, g, h = random_rows(rows, vocab, device, dtype)
    targets, logits = torch.where(targets < 0, 0, targets), logits.nan_to_num(0.0)
    options = {"impl": impl, "temperature": 0.7}
    stats, gradient = evaluate(logits, targets, g=g, h=h, **options)
    again, gradient_again = evaluate(logits, targets, g=g, h=h, **options)
    assert torch.equal(stats.logprob, again.logprob) and torch.equal(gradient, gradient_again)
    for row in (0, 1, rows - 1):
        one = slice(row, row + 1)
        alone, gradient_alone = evaluate(logits[one], targets[one], g=g[one], h=h[one], **options)
        for name in ("logprob", "entropy", "lse"):
            assert torch.equal(getattr(alone, name), getattr(stats, name)[one]), name
        assert torch.equal(gradient_alone, gradient[one])


@BACKENDS
def test_backward_in_place_gives_the_same_bits_in_the_memory_of_the_logits(impl, device) -> None:
    leaf = torch.randn(5, 300, device=device, requires_grad=True)
    targets = torch.tensor([1, -100, 299, 0, 7], device=device)
    _, expected = evaluate(leaf, targets, impl=impl)
    logits = leaf * 1.0
    logprobs = fastrlhf.token_logprobs(logits, targets, impl=impl, inplace_backward=True)
    (gradient,) = torch.autograd.grad(logprobs.sum(), leaf)
    assert torch.equal(gradient, expected)
    assert torch.equal(logits.detach(), expected)


@BACKENDS
def test_overwritten_logits_are_refused_by_autograd(impl, device) -> None:
    leaf = torch.randn(2, 30, device=device, requires_grad=True)
    logits = leaf * 1.0
    targets = torch.tensor([1, 2], device=device)
    logprobs = fastrlhf.token_logprobs(logits, targets, impl=impl, inplace_backward=True)
    other_loss = logits.square().sum()
    logprobs.sum().backward(retain_graph=True)
    for later in (logprobs, other_loss):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            later.sum().backward()


@BACKENDS
@pytest.mark.parametrize("step", [1, 19])
def test_overlapping_windows_are_not_overwritten(impl, step, device) -> None:
    memory = torch.randn(60, device=device)
    before, targets = memory.clone(), torch.tensor([1, 2, 3], device=device)
    windows = memory.unfold(0, 20, step)[:3]
    _, expected = evaluate(windows, targets, impl=impl)
    leaf = windows.requires_grad_()
    fastrlhf.token_logprobs(leaf, targets, impl=impl, inplace_backward=True).sum().backward()
    assert torch.equal(leaf.grad, expected)
    assert torch.equal(memory.detach(), before)


@BACKENDS
def test_windows_that_only_touch_are_overwritten(impl, device) -> None:
    memory = torch.randn(60, device=device)
    windows, targets = memory.unfold(0, 20, 20), torch.tensor([1, 2, 3], device=device)
    _, expected = evaluate(windows, targets, impl=impl)
    leaf = windows.requires_grad_()
    fastrlhf.token_logprobs(leaf, targets, impl=impl, inplace_backward=True).sum().backward()
    assert torch.equal(memory.detach(), expected.view(-1))


@BACKENDS
def test_a_leaf_may_be_overwritten_too(impl, device) -> None:
    logits = torch.randn(2, 30, device=device, requires_grad=True)
    targets = torch.tensor([1, 2], device=device)
    _, expected = evaluate(logits, targets, impl=impl)
    fastrlhf.token_logprobs(logits, targets, impl=impl, inplace_backward=True).sum().backward()
    assert torch.equal(logits.grad, expected)


@BACKENDS
def test_what_was_not_asked_for_is_not_there(impl, device) -> None:
    logits = torch.randn(2, 9, device=device, requires_grad=True)
    targets = torch.tensor([1, 2], device=device)
    stats = fastrlhf.token_stats(logits, targets, impl=impl)
    assert stats.entropy is None
    assert stats.logprob.requires_grad and not stats.lse.requires_grad
    with torch.no_grad():
        assert not fastrlhf.token_stats(logits, targets, impl=impl).logprob.requires_grad


@BACKENDS
def test_a_temperature_tensor_broadcasts(impl, device) -> None:
    logits = torch.randn(2, 3, 20, device=device)
    targets = torch.randint(20, (2, 3), device=device)
    own = torch.tensor([[0.5], [2.0]], device=device)
    found = fastrlhf.token_logprobs(logits, targets, temperature=own, impl=impl)
    for i, temperature in enumerate((0.5, 2.0)):
        expected = fastrlhf.token_logprobs(
            logits[i], targets[i], temperature=temperature, impl=impl
        )
        torch.testing.assert_close(found[i], expected)


def test_auto_is_eager_on_the_cpu() -> None:
    logits, targets = torch.randn(3, 50), torch.tensor([1, 2, 3])
    auto = fastrlhf.token_logprobs(logits, targets)
    assert torch.equal(auto, fastrlhf.token_logprobs(logits, targets, impl="eager"))


LOGITS, TARGETS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
BAD_INPUT = {
    "integer logits": (TypeError, "logits: .*floating.*int64", {"logits": LOGITS.long()}),
    "fp8 logits": (TypeError, "logits: .*float8", {"logits": LOGITS.to(torch.float8_e4m3fn)}),
    "a list": (TypeError, "logits: expected a tensor, got list", {"logits": [1.0]}),
    "0-d logits": (ValueError, r"logits: .*\(\.\.\., V\)", {"logits": torch.tensor(1.0)}),
    "empty vocabulary": (ValueError, "logits: .*V > 0", {"logits": torch.zeros(2, 3, 0)}),
    "floating targets": (TypeError, "targets: .*integer", {"targets": TARGETS.float()}),
    "boolean targets": (TypeError, "targets: .*integer", {"targets": TARGETS.bool()}),
    "shape": (ValueError, r"targets: .*\(2, 3\).*got \(2, 2\)", {"targets": TARGETS[:, 1:]}),
    "device": (ValueError, "targets: .*meta", {"targets": TARGETS.to("meta")}),
    "target too large": (ValueError, r"targets: .*\[0, 5\).*got 5", {"targets": TARGETS + 5}),
    "negative target": (ValueError, r"targets: .*\[0, 5\).*got -1", {"targets": TARGETS - 1}),
    "zero temperature": (ValueError, "temperature: .*positive", {"temperature": 0.0}),
    "infinite temperature": (ValueError, "temperature: .*finite", {"temperature": torch.inf}),
    "temperature None": (TypeError, "temperature: .*number", {"temperature": None}),
    "one bad temperature": (
        ValueError,
        "temperature: .*positive.*got -1",
        {"temperature": torch.tensor([[1.0, 1, 1], [1, -1, 1]])},
    ),
    "temperatures of another shape": (
        ValueError,
        r"temperature: .*\(2,\).*\(2, 3\), got \(3,\)",
        {"temperature": torch.ones(3)},
    ),
    "integer temperatures": (TypeError, "temperature: .*floating", {"temperature": TARGETS + 1}),
    "differentiable temperature": (
        ValueError,
        "temperature: .*without gradient",
        {"temperature": torch.ones(2, 3, requires_grad=True)},
    ),
    "zero softcap": (ValueError, "softcap: .*positive", {"softcap": 0.0}),
    "negative softcap": (ValueError, "softcap: .*positive", {"softcap": -30.0}),
    "zero scale": (ValueError, "scale: .*positive", {"scale": 0.0}),
    "unknown impl": (ValueError, "impl: .*'cuda'", {"impl": "cuda"}),
}


@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.parametrize("operation", [fastrlhf.token_stats, fastrlhf.token_logprobs])
def test_bad_input_names_the_argument(case, operation) -> None:
    error, message, arguments = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        operation(**{"logits": LOGITS, "targets": TARGETS} | arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bad", ["targets[1] = 5", "temperature[1] = 0.0"])
def test_bad_values_on_a_gpu_trap_in_the_kernel(bad) -> None:
    code = f"""
import torch, fastrlhf
targets, temperature = torch.zeros(3, dtype=torch.long), torch.ones(3)
{bad}
logits = torch.zeros(3, 5, device="cuda")
fastrlhf.token_stats(logits, targets.cuda(), temperature=temperature.cuda())
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "fastrlhf: a t" in done.stdout + done.stderr


def test_the_eager_backend_holds_a_bounded_fp32_copy(monkeypatch) -> None:
    held = []
    forward = reference.token_stats_forward
    backward = reference.token_stats_backward

    def recorded(function):
        def call(logits, *args, **kwargs):
            held.append(logits.numel())
            return function(logits, *args, **kwargs)

        return call

    monkeypatch.setattr(reference, "token_stats_forward", recorded(forward))
    monkeypatch.setattr(reference, "token_stats_backward", recorded(backward))
    logits = torch.randn(300, 20000, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(20000, (300,))
    fastrlhf.token_logprobs(logits, targets, impl="eager").sum().backward()
    assert len(held) == 2 * 6 and max(held) <= 2**20
    assert sum(held) == 2 * logits.numel()


@pytest.mark.parametrize("inplace", [False, True])
def test_peak_memory_is_the_gradient_and_a_bounded_rest(inplace, device) -> None:
    logits = torch.randn(1200, 20000, device=device).bfloat16()
    leaf = logits.requires_grad_()
    targets = torch.randint(20000, (1200,), device=device)

    def work() -> None:
        logprobs = fastrlhf.token_logprobs(leaf.view_as(leaf), targets, inplace_backward=inplace)
        logprobs.sum().backward()

    _, peak = peak_memory(work, device)
    rest = 2**20 if device.type == "cuda" else 6 * 2**22
    assert peak <= (0 if inplace else leaf.nbytes) + rest


def training_step(impl, inplace):
    """A step from hidden states to a DPO loss, with everything that fastrlhf puts in between."""

    def step(hidden, weight, ids, mask, ref):
        targets = fastrlhf.shift_targets(ids, mask)
        stats = fastrlhf.token_stats(
            hidden @ weight.T, targets, entropy=True, softcap=20.0, impl=impl,
            inplace_backward=inplace,
        )  # fmt: skip
        index = torch.arange(2, device=ids.device), torch.arange(2, 4, device=ids.device)
        losses, _ = fastrlhf.dpo_loss(stats.logprob, ref, *index, mask=targets != -100, impl=impl)
        return losses.mean() - 0.01 * stats.entropy.mean()

    return step


@BACKENDS
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_a_training_step_compiles_whole(impl, inplace, backend, device) -> None:
    torch.compiler.reset()
    hidden = torch.randn(4, 6, 8, device=device, requires_grad=True)
    weight = torch.randn(37, 8, device=device, requires_grad=True)
    ids = torch.randint(37, (4, 6), device=device)
    inputs = (ids, torch.rand(4, 6, device=device) > 0.3, torch.randn(4, device=device))
    step = training_step(impl, inplace)
    results = []
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    for function, sides in (
        (step, (hidden, weight)),
        (torch.compile(step, fullgraph=True, backend=backend), (hidden, weight)),
        (step, exact),
    ):
        loss = function(*sides, *inputs)
        results.append((loss, *torch.autograd.grad(loss, sides)))
    for plain, compiled, right in zip(*results, strict=True):
        assert_as_accurate(compiled, plain, right)


@BACKENDS
def test_the_operators_pass_opcheck(impl, device) -> None:
    logits = torch.randn(3, 20, device=device, requires_grad=True)
    targets = torch.tensor([1, -100, 19], device=device)
    options = (None, 0.7, 5.0, 1.0, -100, True, False, impl)
    operator = torch.ops.fastrlhf.token_stats.default
    torch.library.opcheck(operator, (logits, targets, *options))
    logprob, entropy, _, peak, log_norm = (x.detach() for x in operator(logits, targets, *options))
    saved = (logits.detach(), targets, logprob, entropy, peak, log_norm, logprob, entropy)
    transform = (None, 0.7, 5.0, 1.0, impl)
    torch.library.opcheck(torch.ops.fastrlhf.token_stats_backward.default, (*saved, *transform))
    torch.library.opcheck(torch.ops.fastrlhf.token_stats_backward_.default, (*saved, *transform))
    into = torch.empty(3, 20, device=device)
    for name, destination in (("", ()), ("_", ()), ("_into", (into,))):
        operator = getattr(torch.ops.fastrlhf, f"token_stats_backward{name}").default
        torch.library.opcheck(operator, (*destination, *saved, *transform, logprob))
