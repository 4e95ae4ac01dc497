"""What the checks know of each token besides its logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

IGNORED = -100


class Tokens(NamedTuple):
    """What is known of each token besides its logits: (B, T), of a sequence (B,)."""

    targets: Tensor
    g: Tensor  # gradients from outside, 0 where a token is ignored
    h: Tensor
    temperature: Tensor
    advantages: Tensor
    old: Tensor  # log-probs when the tokens were sampled
    ref: Tensor

    @property
    def live(self) -> Tensor:
        """The tokens with a target."""
        return self.targets != IGNORED

    @property
    def picked(self) -> Tensor:
        """Indices of the targets, (B, T, 1), whatever is ignored."""
        return self.targets.clamp(min=0)[..., None]

    def double(self) -> Tokens:
        """The same in fp64."""
        return Tokens(*(x.double() if x.is_floating_point() else x for x in self))
