"""The coefficient of a KL penalty, steered towards a KL that was asked for."""


class AdaptiveKL:
    """The coefficient that steers the KL towards a target (1909.08593, section 2.2)."""

    def __init__(self, coefficient: float, target: float | None, gain: float):
        self.coefficient, self.target, self.gain = coefficient, target, gain

    def update(self, kl: float) -> None:
        """Multiply by 1 + K·clip(KL/target - 1, ±0.2)."""
        if self.target is not None:
            self.coefficient *= 1 + self.gain * min(0.2, max(-0.2, kl / self.target - 1))

    def state_dict(self) -> dict[str, float]:
        """Give what a checkpoint holds."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take it back."""
        self.coefficient = state["coefficient"]
