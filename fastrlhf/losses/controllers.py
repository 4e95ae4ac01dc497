"""Coefficients that are steered while a policy trains: of its KL penalty, of its entropy bonus.

They are numbers on the host, by design: `value` is what the loss of the next step takes. `update`
reads a number, and so waits for a GPU where that is a tensor: call it once a step, with the mean
over the whole batch and all ranks, so that every rank goes on with the same coefficient.
"""

import math
from dataclasses import dataclass, field

from torch import Tensor

from fastrlhf.ops.checks import check_at_least, check_finite, check_positive, check_whole


@dataclass
class FixedKLController:
    """A coefficient that never changes, for code that expects an `AdaptiveKLController`.

    Args:
        kl_coef: at least 0; `value` from then on.

    Source: a definition; a constant.

    Example:
        >>> controller = fastrlhf.FixedKLController(0.05)
        >>> controller.update(12.0, n_steps=256)
        0.05
    """

    kl_coef: float

    def __post_init__(self) -> None:
        self.kl_coef = check_at_least("kl_coef", check_finite("kl_coef", self.kl_coef), 0)

    @property
    def value(self) -> float:
        return self.kl_coef

    def update(self, current: float | Tensor, n_steps: int) -> float:
        """Return the coefficient, whatever the KL is."""
        return self.kl_coef

    def state_dict(self) -> dict[str, float]:
        """Give what a checkpoint holds."""
        return {"value": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take it back."""
        self.kl_coef = check_at_least("value", state["value"], 0)


@dataclass
class AdaptiveKLController:
    """The coefficient of a KL penalty, steered towards a KL.

    Each update multiplies `value` by 1 + clip(KL/target - 1, ±0.2)·n_steps/horizon. (The paper's
    constant K is n_steps/horizon: it has 0.1.)

    Args:
        init_kl_coef: the first coefficient, above 0.
        target: the KL that it is steered to, in nats, of whatever `update` is given: per sequence
            or per token.
        horizon: samples, as `update` counts them in n_steps, after which the coefficient has gone
            up or down by some 20 %, while the KL is 20 % or more away from the target.

    Raises:
        TypeError, ValueError: what is no positive number.

    Source: 1909.08593, section 2.2.

    Example:
        >>> controller = fastrlhf.AdaptiveKLController(init_kl_coef=0.2, target=6.0, horizon=10_000)
        >>> controller.update(12.0, n_steps=256)  # twice the target
        0.201024
    """

    init_kl_coef: float
    target: float
    horizon: float
    value: float = field(init=False)

    def __post_init__(self) -> None:
        self.value = check_positive("init_kl_coef", self.init_kl_coef)
        self.target = check_positive("target", self.target)
        self.horizon = check_positive("horizon", self.horizon)

    def update(self, current: float | Tensor, n_steps: int) -> float:
        """Steer by the KL of a step, a number or a 0-d tensor, and return the new coefficient.

        Args:
            current: the KL, in nats; inf is far above the target.
            n_steps: how many samples it is of, fewer than 5 horizons, which would make the
                coefficient negative.

        Raises:
            TypeError, ValueError: what is no number, NaN included; too many steps.
        """
        kl, steps = _number("current", current), check_whole("n_steps", n_steps, 0)
        if steps >= 5 * self.horizon:
            raise ValueError(
                f"n_steps: expected fewer than 5 times the horizon ({self.horizon}), got {n_steps}"
            )
        error = min(0.2, max(-0.2, kl / self.target - 1))
        self.value *= 1 + error * steps / self.horizon
        return self.value

    def state_dict(self) -> dict[str, float]:
        """Give what a checkpoint holds: the coefficient, but not what it is steered by."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take it back."""
        self.value = check_positive("value", state["value"])


@dataclass
class AdaptiveEntropyCoefficient:
    """The coefficient of an entropy bonus that holds the entropy up to a target.

    Each update moves `coefficient` up by delta if the entropy is at most the target, down by delta
    if it is above. `value`, which the loss takes, is the coefficient while the entropy that was
    last seen is at most the target, and 0 while it is above, and before the first update.

    Args:
        target: in nats, of the mean over tokens that `update` is given. Near what it is early in
            training is usual.
        coefficient: the first one, 0 in the paper.
        delta: how far each update moves it.
        minimum, maximum: where it ends.

    Raises:
        TypeError, ValueError: what is no number; bounds in the wrong order, or a coefficient beyond
            them.

    Source: 2505.22312 (Skywork-OR1), adaptive entropy control. There, the step whose entropy is
    seen takes the coefficient as it was before: that is `coefficient` before the update.

    Example:
        >>> controller = fastrlhf.AdaptiveEntropyCoefficient(target=0.5, delta=0.01)
        >>> controller.update(0.3), controller.update(0.7)
        (0.01, 0.0)
    """

    target: float
    coefficient: float = 0.0
    delta: float = 0.005
    minimum: float = 0.0
    maximum: float = 1.0
    entropy: float = field(init=False, default=math.inf)  # of the last update

    def __post_init__(self) -> None:
        self.target = check_finite("target", self.target)
        self.delta = check_positive("delta", self.delta)
        self.minimum = check_at_least("minimum", check_finite("minimum", self.minimum), 0)
        self.maximum = check_at_least("maximum", check_finite("maximum", self.maximum), 0)
        if self.minimum > self.maximum:
            raise ValueError(
                f"minimum: expected at most maximum ({self.maximum}), got {self.minimum}"
            )
        self.coefficient = self._within("coefficient", self.coefficient)

    @property
    def value(self) -> float:
        return self.coefficient if self.entropy <= self.target else 0.0

    def update(self, entropy: float | Tensor) -> float:
        """Steer by the entropy of a step, a number or a 0-d tensor in nats, and return the new
        value.

        Raises:
            TypeError, ValueError: what is no number, NaN included.
        """
        self.entropy = _number("entropy", entropy)
        step = self.delta if self.entropy <= self.target else -self.delta
        self.coefficient = min(self.maximum, max(self.minimum, self.coefficient + step))
        return self.value

    def state_dict(self) -> dict[str, float]:
        """Give what a checkpoint holds: the coefficient, and the entropy that was last seen."""
        return {"coefficient": self.coefficient, "entropy": self.entropy}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take it back."""
        coefficient = self._within("coefficient", state["coefficient"])
        self.coefficient, self.entropy = coefficient, _number("entropy", state["entropy"])

    def _within(self, name: str, value: float) -> float:
        number = check_finite(name, value)
        if not self.minimum <= number <= self.maximum:
            raise ValueError(
                f"{name}: expected a number in [{self.minimum}, {self.maximum}], got {value}"
            )
        return number


def _number(name: str, value: float | Tensor) -> float:
    """Read a number from a float or a 0-d tensor. Raise for anything else, and for NaN."""
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(f"{name}: expected a number or a 0-d tensor, got {tuple(value.shape)}")
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{name}: expected a number, got nan")
    return check_at_least(name, value, -math.inf)
