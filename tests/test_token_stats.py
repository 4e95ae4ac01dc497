"""Token statistics and their gradient, by kernels and by the eager backend, against the oracle."""

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
from support.plain import of_tokens
from support.token_stats_rows import BACKENDS, DTYPES, evaluate, random_rows

import fastrlhf
from fastrlhf import reference


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
