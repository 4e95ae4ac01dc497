"""The coefficient of a KL penalty, adapted so that the KL approaches a target."""


class AdaptiveKL:
    """A coefficient that steers the KL towards a target (arXiv:1909.08593, section 2.2).

    Without a target the coefficient stays as it is.
    """

    def __init__(self, coefficient: float, target: float | None, gain: float):
        self.coefficient, self.target, self.gain = coefficient, target, gain

    def update(self, kl: float) -> None:
        """Multiply the coefficient by 1 + K·clip(KL/target - 1, ±0.2), where K is `gain`."""
        if self.target is not None:
            self.coefficient *= 1 + self.gain * min(0.2, max(-0.2, kl / self.target - 1))

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint stores of this object."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self.coefficient = state["coefficient"]
