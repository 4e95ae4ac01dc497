"""Coefficients that are steered while a policy trains."""

import math
from typing import Any

import pytest
import torch

from fastrlhf import AdaptiveEntropyCoefficient, AdaptiveKLController, FixedKLController


def test_a_kl_controller_goes_towards_its_target() -> None:
    controller = AdaptiveKLController(0.2, target=6.0, horizon=10_000)
    assert controller.value == 0.2
    near = pytest.approx
    # The error 9/6 - 1 = 0.5 is cut at 0.2, that of 5.4 is -0.1, that of inf 0.2.
    assert controller.update(9.0, 256) == near(0.2 * (1 + 0.2 * 0.0256), rel=1e-14)
    second = controller.value * (1 - 0.1 * 0.0512)
    assert controller.update(torch.tensor(5.4), 512) == near(second, rel=1e-7)
    third = controller.value * (1 - 0.2 * 0.0001)
    assert controller.update(-3.0, 1) == near(third, rel=1e-14)
    assert controller.update(math.inf, 100) == near(controller.value)
    before = controller.value
    assert controller.update(6.0, 256) == before == controller.update(0.0, 0)


def test_it_is_the_controller_of_the_paper() -> None:
    """β·(1 + K·clip((KL - target)/target, ±0.2)) with K = 0.1, for a horizon of 10 updates."""
    controller, beta = AdaptiveKLController(0.03, target=10, horizon=640), 0.03
    for kl in (0.0, 8.5, 9.9, 10.3, 11.9, 12.5, 30.0, 9.0):
        beta = beta * (1 + 0.1 * max(-0.2, min(0.2, (kl - 10) / 10)))
        assert controller.update(kl, 64) == pytest.approx(beta, rel=1e-13)


def test_a_fixed_coefficient_stays() -> None:
    controller = FixedKLController(0.05)
    assert controller.update(100.0, 10_000) == controller.value == 0.05
    other = FixedKLController(0.0)
    other.load_state_dict(controller.state_dict())
    assert other == controller


def test_an_entropy_coefficient_holds_the_entropy_up() -> None:
    controller = AdaptiveEntropyCoefficient(target=0.5, delta=0.25, maximum=0.6)
    assert controller.value == 0 == controller.coefficient
    steps = [  # entropy, and then coefficient and what is applied
        (0.4, 0.25, 0.25), (0.5, 0.5, 0.5), (0.1, 0.6, 0.6), (0.51, 0.35, 0.0), (0.9, 0.1, 0.0),
        (math.inf, 0.0, 0.0), (0.9, 0.0, 0.0), (0.2, 0.25, 0.25),
    ]  # fmt: skip
    for entropy, coefficient, applied in steps:
        assert controller.update(torch.tensor(entropy)) == controller.value
        assert controller.coefficient == pytest.approx(coefficient, abs=1e-15)
        assert controller.value == pytest.approx(applied, abs=1e-15)


def test_it_moves_as_that_of_trl() -> None:
    """The state of TRL's trainer, whose defaults these are, over a run of 300 steps."""
    torch.manual_seed(0)
    controller, coefficient = AdaptiveEntropyCoefficient(0.2, coefficient=0.01), 0.01
    for entropy in (0.2 + 0.1 * torch.randn(300).cumsum(0)).tolist():
        coefficient = (
            min(coefficient + 0.005, 1.0) if entropy <= 0.2 else max(coefficient - 0.005, 0.0)
        )
        assert controller.update(entropy) == (coefficient if entropy <= 0.2 else 0.0)
        assert controller.coefficient == coefficient


@pytest.mark.parametrize(
    "make",
    [lambda: AdaptiveKLController(0.1, 1.0, 100), lambda: AdaptiveEntropyCoefficient(1.0, 0.3)],
)
def test_training_resumes_where_it_was(make) -> None:
    def update(controller: Any, x: float) -> float:
        steps = (10,) if isinstance(controller, AdaptiveKLController) else ()
        return controller.update(x, *steps)

    first, second = make(), make()
    for x in (0.5, 3.0, 0.9):
        update(first, x)
    state = first.state_dict()
    assert all(isinstance(x, float) for x in state.values())
    second.load_state_dict(state)
    assert second == first and second.value == first.value
    assert update(second, 0.7) == update(first, 0.7) > 0


def kl(**changes: Any) -> AdaptiveKLController:
    return AdaptiveKLController(**{"init_kl_coef": 0.1, "target": 1.0, "horizon": 10, **changes})


def entropy(**changes: Any) -> AdaptiveEntropyCoefficient:
    return AdaptiveEntropyCoefficient(**{"target": 1.0, "coefficient": 0.5, **changes})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: kl(init_kl_coef=0.0), ValueError, "init_kl_coef"),
        (lambda: kl(target=-1.0), ValueError, "target"),
        (lambda: kl(target="6"), TypeError, "target"),
        (lambda: kl(horizon=0), ValueError, "horizon"),
        (lambda: kl().update(math.nan, 1), ValueError, "current"),
        (lambda: kl().update(torch.tensor(math.nan), 1), ValueError, "current"),
        (lambda: kl().update(torch.ones(2), 1), ValueError, "current"),
        (lambda: kl().update(None, 1), TypeError, "current"),
        (lambda: kl().update(1.0, 1.5), TypeError, "n_steps"),
        (lambda: kl().update(1.0, -1), ValueError, "n_steps"),
        (lambda: kl().update(0.0, 50), ValueError, "n_steps: expected fewer than 5 times"),
        (lambda: kl().load_state_dict({"value": -1.0}), ValueError, "value"),
        (lambda: FixedKLController(-0.1), ValueError, "kl_coef"),
        (lambda: FixedKLController(math.inf), ValueError, "kl_coef"),
        (lambda: entropy(target=math.nan), ValueError, "target"),
        (lambda: entropy(coefficient=2.0), ValueError, "coefficient"),
        (lambda: entropy(delta=0.0), ValueError, "delta"),
        (lambda: entropy(minimum=-1.0), ValueError, "minimum"),
        (lambda: entropy(minimum=0.5, maximum=0.4), ValueError, "minimum"),
        (lambda: entropy(maximum=math.inf), ValueError, "maximum"),
        (lambda: entropy().update(math.nan), ValueError, "entropy"),
        (
            lambda: entropy().load_state_dict({"coefficient": 2.0, "entropy": 1.0}),
            ValueError, "coefficient",
        ),
    ],
)  # fmt: skip
def test_what_is_no_number_is_named(make, error, message) -> None:
    with pytest.raises(error, match=f"^{message}"):
        make()
