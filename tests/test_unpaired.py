"""kto_loss: labels of single sequences, against the oracle."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.preference_formulas import Expectation, expected_kto, expected_rewards
from torch import Tensor

from fastrlhf import kto_loss

DESIRABLE = torch.tensor([True, False, True, False, True])
FINE = [torch.float64, torch.float32]


def sums(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probs of 5 sequences under policy and reference."""
    ref = -60 * torch.rand(5, dtype=torch.float64)
    pi = ref + 6 * torch.randn(5, dtype=torch.float64)
    return pi.to(dtype).requires_grad_(), ref.to(dtype).requires_grad_()


def assert_right(
    found: tuple[Tensor, Tensor], pi: Tensor, ref: Tensor, expected: Expectation, beta: float
) -> None:
    """Compare losses, rewards and gradients with the oracle."""
    losses, rewards = found
    # 1 - σ may be a difference of numbers of size one.
    expected.assert_losses(losses)
    expected_rewards(pi, ref, beta).assert_losses(rewards)
    assert not rewards.requires_grad
    upstream = torch.randn(5, dtype=torch.float64).to(losses.dtype)
    found_gradients = torch.autograd.grad(losses, (pi, ref), upstream)
    # σ' = σ(1 - σ), from which a slope loses digits once σ is nearly one.
    expected.assert_gradients(*found_gradients, weights=upstream.tolist(), floor=beta)


@pytest.mark.parametrize("dtype", FINE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.5)])
@pytest.mark.parametrize("kl", [-3.0, 0.0, 0.7, 25.0])
def test_values_rewards_and_gradients_are_those_of_the_paper(
    kl: float, weights: tuple[float, float], beta: float, dtype: torch.dtype
) -> None:
    pi, ref = sums(dtype)
    found = kto_loss(
        pi, ref, DESIRABLE, kl, beta, desirable_weight=weights[0], undesirable_weight=weights[1]
    )
    assert found[0].dtype == found[1].dtype == dtype
    # The baseline is an input too, rounded like the others.
    given_kl = torch.tensor(kl, dtype=dtype).item()
    assert_right(
        found, pi, ref, expected_kto(pi, ref, DESIRABLE, [given_kl] * 5, beta, *weights), beta
    )


def test_the_baseline_can_be_a_number_or_a_tensor_for_all_or_for_each() -> None:
    pi, ref = sums(torch.float64)
    expected = kto_loss(pi, ref, DESIRABLE, 2.0)[0]
    same: list[Any] = [2, torch.tensor(2.0), torch.tensor(2), torch.full((5,), 2.0).bfloat16()]
    for kl in same:
        assert torch.equal(kto_loss(pi, ref, DESIRABLE, kl)[0], expected)
    kl = torch.tensor([-1.0, 0.5, 2.0, -3.0, 4.0], dtype=torch.float64)
    losses, rewards = kto_loss(pi, ref, DESIRABLE, kl)
    oracle = expected_kto(pi, ref, DESIRABLE, kl.tolist(), 0.1, 1.0, 1.0)
    assert_right((losses, rewards), pi, ref, oracle, 0.1)


@pytest.mark.parametrize("shape", [(), (5,)], ids=["0-d", "each"])
def test_no_gradient_goes_through_the_baseline(shape: tuple[int, ...]) -> None:
    pi, ref = sums(torch.float64)
    # An estimate that depends on the policy: its path must not count.
    kl = (pi - ref).mean().abs().expand(shape)
    losses, _ = kto_loss(pi, ref, DESIRABLE, kl)
    constant, _ = kto_loss(pi, ref, DESIRABLE, kl.detach())
    assert torch.equal(losses, constant)
    for one, other in zip(
        torch.autograd.grad(losses.sum(), (pi, ref)),
        torch.autograd.grad(constant.sum(), (pi, ref)),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32], ids=str)
def test_labels_can_be_zeros_and_ones(dtype: torch.dtype) -> None:
    pi, ref = sums(torch.float64)
    found = kto_loss(pi, ref, DESIRABLE.to(dtype), 1.0)[0]
    assert torch.equal(found, kto_loss(pi, ref, DESIRABLE, 1.0)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    pi, ref = sums(dtype)
    losses, rewards = kto_loss(pi, ref, DESIRABLE, 1.0)
    assert losses.dtype == rewards.dtype == torch.float32
    assert torch.equal(losses, kto_loss(pi.float(), ref.float(), DESIRABLE, 1.0)[0])


@pytest.mark.parametrize("dtype", FINE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("score", [-1e5, -500.0, -1e-3, 1e-3, 500.0, 1e5])
def test_extreme_scores_stay_finite_and_right(score: float, dtype: torch.dtype) -> None:
    pi = torch.full((5,), score, dtype=dtype).requires_grad_()
    ref = torch.full((5,), -0.25, dtype=dtype).requires_grad_()
    oracle = expected_kto(pi, ref, DESIRABLE, [0.5] * 5, 0.1, 1.0, 1.0)
    assert_right(kto_loss(pi, ref, DESIRABLE, 0.5), pi, ref, oracle, 0.1)


def test_derivatives_of_both_orders_are_right() -> None:
    pi, ref = sums(torch.float64)

    def losses_of(pi: Tensor, ref: Tensor) -> Tensor:
        return kto_loss(pi, ref, DESIRABLE, 0.7, desirable_weight=1.5)[0]

    assert torch.autograd.gradcheck(losses_of, (pi, ref))
    assert torch.autograd.gradgradcheck(losses_of, (pi, ref))


def test_an_empty_batch_gives_empty_results() -> None:
    losses, rewards = kto_loss(torch.zeros(0), torch.zeros(0), torch.zeros(0) > 0, 0.0)
    assert losses.shape == rewards.shape == (0,)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    score=st.floats(-200, 200),
    kl=st.floats(0, 50),
    beta=st.floats(0.01, 2),
    weight=st.floats(0, 3),
)
def test_the_two_labels_of_one_sequence_add_up_to_the_weight(
    score: float, kl: float, beta: float, weight: float
) -> None:
    # 1 - σ(x) and 1 - σ(-x) are the two sides of one coin.
    pi = torch.tensor([score, score], dtype=torch.float64)
    losses, _ = kto_loss(
        pi,
        torch.zeros_like(pi),
        torch.tensor([True, False]),
        kl,
        beta,
        desirable_weight=weight,
        undesirable_weight=weight,
    )
    assert losses.sum().item() == pytest.approx(weight, rel=1e-14)
    assert (losses >= 0).all()


@pytest.mark.parametrize(
    "mutant",
    [
        lambda pi, ref: kto_loss(pi, ref, ~DESIRABLE, 0.7),
        lambda pi, ref: kto_loss(pi, ref, DESIRABLE, 0.0),
        lambda pi, ref: kto_loss(pi, ref, DESIRABLE, 0.7 * (1 + 1e-3)),
        lambda pi, ref: kto_loss(pi, ref, DESIRABLE, 0.7, 0.1 * (1 + 1e-4)),
        lambda pi, ref: kto_loss(pi, 0 * ref, DESIRABLE, 0.7),
        lambda pi, ref: kto_loss(pi, ref, DESIRABLE, 0.7, undesirable_weight=1.001),
    ],
    ids=["labels", "no baseline", "baseline off", "beta off", "no reference", "weight off"],
)
def test_the_comparison_of_fp32_losses_rejects(mutant: Any) -> None:
    pi, ref = sums(torch.float32)
    expected = expected_kto(pi, ref, DESIRABLE, [0.7] * 5, 0.1, 1.0, 1.0)
    expected.assert_losses(kto_loss(pi, ref, DESIRABLE, 0.7)[0])
    with pytest.raises(AssertionError, match="x bound"):
        expected.assert_losses(mutant(pi, ref)[0])


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.001, math.nan])
def test_the_comparison_of_fp32_gradients_rejects(factor: float) -> None:
    pi, ref = sums(torch.float32)
    expected = expected_kto(pi, ref, DESIRABLE, [0.7] * 5, 0.1, 1.0, 1.0)
    d_pi, d_ref = torch.autograd.grad(kto_loss(pi, ref, DESIRABLE, 0.7)[0].sum(), (pi, ref))
    expected.assert_gradients(d_pi, d_ref, floor=0.1)
    with pytest.raises(AssertionError, match="gradient"):
        expected.assert_gradients(factor * d_pi, d_ref, floor=0.1)
    with pytest.raises(AssertionError, match="gradient"):
        expected.assert_gradients(d_pi, factor * d_ref, floor=0.1)


_FOUR = torch.zeros(4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"pi_logps": [0.0]}, TypeError, "pi_logps: expected a tensor, got list"),
        ({"pi_logps": _FOUR.long()}, TypeError, "pi_logps: .*floating.*int64"),
        ({"pi_logps": torch.zeros(4, 2)}, ValueError, r"pi_logps: .*\(B,\), got \(4, 2\)"),
        ({"ref_logps": _FOUR.long()}, TypeError, "ref_logps: .*floating.*int64"),
        ({"ref_logps": _FOUR > 0}, TypeError, "ref_logps: .*floating.*bool"),
        ({"ref_logps": torch.zeros(3)}, ValueError, r"ref_logps: .*\(4,\).*got \(3,\)"),
        ({"ref_logps": _FOUR.to("meta")}, ValueError, "ref_logps: expected on cpu"),
        ({"desirable": [True] * 4}, TypeError, "desirable: expected a tensor, got list"),
        ({"desirable": _FOUR * 1j}, TypeError, "desirable: .*boolean or 0/1"),
        ({"desirable": torch.ones(4, 1)}, ValueError, r"desirable: .*\(4,\).*got \(4, 1\)"),
        ({"kl": torch.zeros(3)}, ValueError, r"kl: .*\(4,\).*got \(3,\)"),
        ({"kl": torch.zeros(4, 1)}, ValueError, r"kl: .*\(4,\).*got \(4, 1\)"),
        ({"beta": 0.0}, ValueError, "beta: .*positive.*got 0.0"),
        ({"beta": -1.0}, ValueError, "beta: .*positive.*got -1.0"),
        ({"beta": None}, TypeError, "beta: expected a number, got NoneType"),
    ],
)
def test_errors_name_the_argument(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"pi_logps": _FOUR, "ref_logps": _FOUR, "desirable": _FOUR > 0, "kl": 0.0}
    with pytest.raises(error, match=message):
        kto_loss(**{**arguments, **changed})
