"""The oracle of the supervised losses: the papers' formulas, one token at a time, in 60 digits.

Nothing here is written for accuracy or speed, and nothing comes from the library or from torch.
Derivatives are central differences, exact to 20 digits. What a paper holds constant (`sg`) is taken
from a second copy of the logits, which no difference moves.

Dims: N tokens, V vocabulary, S steps.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from mpmath import mp, mpf
from torch import Tensor

mp.dps = 60
_STEP = mpf("1e-25")


def exactly(x: Tensor) -> list:
    """Nested lists of what a tensor holds."""
    return [exactly(y) for y in x] if x.ndim else mpf(x.item())


class TokenLoss(NamedTuple):
    """Options of the loss of a token, by the names of the library."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    loss_type: str = "nll"
    temperature: float = 1.0
    softcap: float | None = None
    scale: float = 1.0

    def __call__(self, logits: list[mpf], held: list[mpf], target: int) -> mpf:
        """The loss of one token, from its logits and those that `sg` looks at."""
        p, log_total = self._distribution(logits)
        epsilon, words = mpf(self.label_smoothing), len(logits)
        label = [epsilon / words for _ in logits]
        label[target] += 1 - epsilon
        loss = -sum(q * mp.log(x) for q, x in zip(label, p, strict=True) if q)
        if self.loss_type == "dft":
            loss *= self._distribution(held)[0][target]
        return loss + mpf(self.z_loss) * log_total**2

    def _distribution(self, logits: list[mpf]) -> tuple[list[mpf], mpf]:
        z = [mpf(self.scale) * x for x in logits]
        if self.softcap is not None:
            z = [self.softcap * mp.tanh(x / self.softcap) for x in z]
        weights = [mp.exp(x / mpf(self.temperature)) for x in z]
        total = sum(weights)
        return [w / total for w in weights], mp.log(total)


def token_losses(
    loss: TokenLoss, logits: Tensor, targets: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The weighted losses (N,) of tokens, 0 where the target is below 0, and the gradient (N, V) of
    each with respect to its logits.
    """
    losses, gradients = [], []
    for i, target in enumerate(targets.tolist()):
        if target < 0:
            losses.append(mpf(0))
            gradients.append([mpf(0)] * logits.shape[-1])
            continue
        row = exactly(logits[i])
        weight = mpf(1) if weights is None else exactly(weights[i])
        losses.append(weight * loss(row, row, target))
        slopes = derivatives(lambda x, row=row, target=target: loss(x, row, target), row)
        gradients.append([weight * d for d in slopes])
    return _tensor(losses), torch.stack([_tensor(row) for row in gradients])


def derivatives(function: Callable[[list[mpf]], mpf], at: Sequence[mpf]) -> list[mpf]:
    """Central differences of a function of several numbers."""
    found = []
    for i, x in enumerate(at):
        above, below = list(at), list(at)
        above[i], below[i] = x + _STEP, x - _STEP
        found.append((function(above) - function(below)) / (2 * _STEP))
    return found


def step_losses(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-y·ln r - (1-y)·ln(1-r) of each step (S,), with r = σ(score), and its derivative."""

    def loss(score: mpf, label: mpf) -> mpf:
        r, one_minus_r = 1 / (1 + mp.exp(-score)), 1 / (1 + mp.exp(score))
        return -label * mp.log(r) - (1 - label) * mp.log(one_minus_r)

    pairs = list(zip(exactly(scores), exactly(labels), strict=True))
    slopes = [derivatives(lambda x, y=y: loss(x[0], y), [s])[0] for s, y in pairs]
    return _tensor([loss(*pair) for pair in pairs]), _tensor(slopes)


def log_score(scores: list[mpf], how: str) -> mpf:
    """Ln of the score of a sequence whose steps are right with probabilities σ(score)."""
    r = [1 / (1 + mp.exp(-x)) for x in scores]
    if how == "product":
        return mp.log(mp.fprod(r))
    return mp.log({"min": min(r), "last": r[-1], "mean": sum(r) / len(r)}[how])


def _tensor(x: Sequence[mpf]) -> Tensor:
    return torch.tensor([float(y) for y in x], dtype=torch.float64)
