"""The inputs of the checks for each token besides its logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

IGNORED = -100


class Tokens(NamedTuple):
    """Inputs for each token besides its logits: (B, T), or (B,) for each sequence."""

    targets: Tensor
    g: Tensor  # upstream gradients, 0 at ignored tokens
    h: Tensor
    temperature: Tensor
    advantages: Tensor
    old: Tensor  # log-probs when the tokens were sampled
    ref: Tensor

    @property
    def live(self) -> Tensor:
        """Mask of the tokens with a target."""
        return self.targets != IGNORED

    @property
    def picked(self) -> Tensor:
        """Indices (B, T, 1) of the targets; any valid index at ignored tokens."""
        return self.targets.clamp(min=0)[..., None]

    def double(self) -> Tokens:
        """Return a copy in fp64."""
        return Tokens(*(x.double() if x.is_floating_point() else x for x in self))
