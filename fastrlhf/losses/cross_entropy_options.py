"""The loss of a token in supervised fine-tuning, and what is made of the losses of all tokens.

Whatever the form, from logits, from hidden states or inside a model, it is this one formula on the
statistics of tokens.
"""

from typing import Any, Literal, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_like
from fastrlhf.losses.reduce import check_reduction
from fastrlhf.losses.signatures import check_options
from fastrlhf.ops.checks import (
    check_at_least,
    check_between,
    check_one_of,
    check_real,
)

LossType = Literal["nll", "dft"]
Reduction = Literal["mean", "sum", "none"]

LOSS_TYPES = ("nll", "dft")
REDUCTIONS = ("mean", "sum", "none")


class CrossEntropyOptions(TypedDict, total=False):
    """The options of `CrossEntropy`, as keywords."""

    label_smoothing: float
    z_loss: float
    loss_type: LossType


class _Stats(Protocol):
    """The statistics of some tokens that the loss uses."""

    @property
    def logprob(self) -> Tensor: ...

    @property
    def lse(self) -> Tensor: ...

    @property
    def mean_logit(self) -> Tensor | None: ...


class CrossEntropy(NamedTuple):
    """The loss of a token: (1-ε)·nll + ε·(mean of the nll of all words) + ζ·lse², or with "dft"
    sg(p)·nll + ζ·lse², where sg stops the gradient.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    loss_type: str = "nll"

    @classmethod
    def parse(cls, function: str, given: dict[str, Any]) -> "CrossEntropy":
        """Make options from the keywords of a function, to which an unknown one is a TypeError."""
        check_options(function, given, cls._fields)
        return cls(**given).checked()

    def checked(self) -> "CrossEntropy":
        """Return the options, numbers as floats.

        Raises:
            TypeError, ValueError: one that is not what it should be; two that do not go together.
        """
        check_one_of("loss_type", self.loss_type, LOSS_TYPES)
        smoothing = check_between("label_smoothing", self.label_smoothing, 0, 1)
        if smoothing != 0 and self.loss_type == "dft":
            raise ValueError(
                "label_smoothing: expected 0 with loss_type 'dft', which weighs a token by the "
                f"probability of its one label, got {self.label_smoothing}"
            )
        return CrossEntropy(smoothing, check_at_least("z_loss", self.z_loss, 0), self.loss_type)

    @property
    def with_stats(self) -> tuple[str, ...]:
        """Names of the statistics that it uses besides the log-prob and the lse."""
        return ("mean_logit",) if self.label_smoothing else ()

    @property
    def takes_lse(self) -> bool:
        """Whether it looks at the lse."""
        return self.label_smoothing > 0 or self.z_loss > 0

    def of_tokens(self, stats: _Stats, weights: Tensor | None = None) -> Tensor:
        """Compute the losses of some tokens, times their weights, if there are any."""
        fields: tuple[Tensor | None, ...] = (stats.logprob, stats.lse, stats.mean_logit)
        if weights is not None:  # where one is 0, statistics may be infinite or NaN
            counts = weights != 0
            fields = tuple(None if x is None else torch.where(counts, x, 0.0) for x in fields)
        logprob, lse, mean_logit = fields
        assert logprob is not None and lse is not None
        losses = -logprob
        if self.loss_type == "dft":
            p = logprob.detach().exp()
            losses = torch.where(p != 0, losses, 0.0) * p
        if mean_logit is not None:
            over_vocabulary = lse - mean_logit  # the mean of -ln p over all words
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * over_vocabulary
        if self.z_loss != 0:
            losses = losses + self.z_losses(lse)
        return losses if weights is None else losses * weights.to(losses.dtype)

    def z_losses(self, lse: Tensor) -> Tensor:
        """The part of the losses that is the z-loss, without weights."""
        return self.z_loss * lse.square() if self.z_loss else torch.zeros_like(lse)


def check_reduction_of_losses(
    reduction: str, normalizer: float | Tensor | None
) -> float | Tensor | None:
    """Return the normalizer, a number as float. Raise unless the reduction exists and the
    normalizer, if any, is a positive number or a 0-d tensor, of a mean.
    """
    check_one_of("reduction", reduction, REDUCTIONS)
    normalizer = check_reduction("token-mean", normalizer)
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer: expected None for reduction {reduction!r}, which is no mean")
    return normalizer


def checked_weights(weights: Tensor | None, targets: Tensor) -> Tensor | None:
    """Check weights of tokens, and detach them: they are constants."""
    if weights is None:
        return None
    check_real("weights", weights)
    check_like("weights", weights, "targets", targets)
    return weights.detach()


def mean_of(total: Tensor, live: Tensor, normalizer: float | Tensor | None) -> Tensor:
    """Divide a sum by the number of tokens that count, or by what replaces it."""
    by = live.sum().clamp(min=1) if normalizer is None else normalizer
    return total / (by.detach().to(total) if isinstance(by, Tensor) else by)
