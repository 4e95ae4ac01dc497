"""kl_penalty: accuracy, and that its expected value and gradient are those of the divergence."""

import math

import pytest
import torch
from support.policy_batches import FINE, batch, evaluate
from support.policy_formulas import ESTIMATORS
from torch import Tensor

from fastrlhf import kl_penalty, policy_loss


@FINE
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-3, 0.1, 0.13, 1.0, 20.0, 79.0])
def test_penalties_keep_their_relative_accuracy(
    size: float, estimator: str, dtype: torch.dtype
) -> None:
    mpmath = pytest.importorskip("mpmath", reason="needs mpmath")
    ref = torch.tensor([size, -size], dtype=dtype)
    logprobs = torch.zeros(2, dtype=dtype)
    found = kl_penalty(logprobs, ref, estimator)
    for value, given_ref in zip(found.tolist(), ref.tolist(), strict=True):
        x = mpmath.mpf(given_ref)
        kinds = {"k1": -x, "k2": x**2 / 2, "k3": mpmath.exp(x) - 1 - x, "abs": abs(x)}
        exact = kinds[estimator.rstrip("+")]
        bound = {torch.float32: 2e-6, torch.float64: 3e-13}[dtype]
        assert abs(value - exact) <= bound * abs(exact)


def test_the_naive_k3_would_fail_that() -> None:
    x = torch.tensor(1e-4)
    naive = x.exp() - 1 - x
    assert abs(naive / kl_penalty(torch.tensor(0.0), x, "k3") - 1) > 1


def divergences(policy: Tensor, ref: Tensor) -> dict[str, Tensor]:
    log_p, log_q = policy.log_softmax(-1), ref.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    return {
        "none": 0 * p.sum(),
        "reverse": (p * (log_p - log_q)).sum(),
        "forward": (q * (log_q - log_p)).sum(),
        "variation": (p - q).abs().sum(),
    }


@pytest.mark.parametrize(
    ("estimator", "of"),
    [("k1", "none"), ("k2", "reverse"), ("k3", "forward"), ("abs", "variation"),
     ("k1+", "reverse"), ("k3+", "reverse")],
)  # fmt: skip
def test_the_expected_gradient_is_that_of_the_divergence_in_the_docstring(
    estimator: str, of: str
) -> None:
    # The expectation is a sum over all of a small vocabulary, not a sample.
    policy = torch.randn(7, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(7, dtype=torch.float64)
    log_p = policy.log_softmax(-1)
    expected_penalty = (
        log_p.detach().exp() * kl_penalty(log_p, ref.log_softmax(-1), estimator)
    ).sum()
    (found,) = torch.autograd.grad(expected_penalty, policy, retain_graph=True)
    for name, divergence in divergences(policy, ref).items():
        (gradient,) = torch.autograd.grad(divergence, policy, retain_graph=True)
        close = torch.allclose(found, gradient, rtol=1e-10, atol=1e-12)
        assert close == (name == of), name


@pytest.mark.parametrize(
    ("estimator", "exact"),
    [("k1", True), ("k3", True), ("k2", False), ("k1+", True), ("k3+", True)],
)
def test_the_expected_value_is_the_divergence(estimator: str, exact: bool) -> None:
    for distance in (1.0, 0.01):
        policy = torch.randn(7, dtype=torch.float64)
        ref = policy + distance * torch.randn(7, dtype=torch.float64)
        log_p, log_q = policy.log_softmax(-1), ref.log_softmax(-1)
        found = (log_p.exp() * kl_penalty(log_p, log_q, estimator)).sum()
        error = abs(float(found / divergences(policy, ref)["reverse"]) - 1)
        assert error <= (1e-9 if exact else 2 * distance)


def of_one_token(estimator: str, policy: Tensor, old: Tensor, ref: Tensor) -> Tensor:
    """The corrected penalty, in expectation over the old policy."""
    log_p, log_old, log_q = (x.log_softmax(-1) for x in (policy, old, ref))
    losses = policy_loss(
        log_p[:, None], log_old[:, None], torch.zeros(len(policy)), torch.ones(len(policy), 1),
        ref_logprobs=log_q[:, None], kl_coef=1.0, kl_estimator=estimator, kl_bias_correction=True,
        reduction="none",
    )[0]  # fmt: skip
    return (log_old.exp() * losses[:, 0]).sum()


def test_the_corrected_k3_and_its_gradient_are_those_of_the_divergence() -> None:
    policy, old, ref = torch.randn(3, 7, dtype=torch.float64)
    policy.requires_grad_()
    found, exact = of_one_token("k3", policy, old, ref), divergences(policy, ref)["reverse"]
    torch.testing.assert_close(found, exact)
    found_slope, slope = (
        torch.autograd.grad(x, policy, retain_graph=True)[0] for x in (found, exact)
    )
    torch.testing.assert_close(found_slope, slope)
    # k1 has the value and, corrected, the gradient too; k2 has neither.
    assert not torch.isclose(of_one_token("k2", policy, old, ref), exact, rtol=1e-3)


@FINE
@pytest.mark.parametrize("x", [1e-4, -1e-4, 0.9, 1.1, -3.0, 30.0])
def test_the_slope_of_the_corrected_k3_keeps_its_relative_accuracy(
    x: float, dtype: torch.dtype
) -> None:
    # -r·x, in which r·e^x, far larger or nearly the same, must leave no rounding.
    lp = torch.tensor([[-30.5]], dtype=dtype)
    old, ref = lp + 0.25, lp + x
    arguments = {
        "logprobs": lp, "old_logprobs": old, "advantages": torch.zeros(1), "mask": torch.ones(1, 1),
        "ref_logprobs": ref, "kl_coef": 1.0, "kl_bias_correction": True,
    }  # fmt: skip
    found = evaluate(arguments)[1].double()
    exact = -math.exp(float((lp - old).double())) * (ref - lp).double()
    assert abs(float(found / exact) - 1) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_token_that_the_policy_forbids_has_no_corrected_penalty(estimator: str) -> None:
    arguments = batch(torch.float32) | {"kl_coef": 0.1, "kl_bias_correction": True}
    arguments["kl_estimator"] = estimator
    arguments["logprobs"][0, 1] = -math.inf
    loss, gradient, _ = evaluate(arguments)
    assert loss.isfinite() and gradient.isfinite().all()
