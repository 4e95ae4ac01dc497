"""The options of the DPO family, which travel as one object and are checked once.

`preference.py` and `linear_preference.py` parse their keywords into them; `dpo_loss` says what each
is.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

from fastrlhf.losses.f_divergence import F_DIVERGENCES, FDivergence
from fastrlhf.losses.signatures import check_options
from fastrlhf.ops.checks import (
    check_at_least,
    check_between,
    check_bool,
    check_finite,
    check_one_of,
    check_positive,
)
from fastrlhf.ops.tracing import replaced
from fastrlhf.reference import MARGIN_LOSSES

PairLossType = Literal[
    "sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair",
    "sppo_hard", "apo_zero", "apo_down", "discopop", "aot", "aot_unpaired", "sft",
]  # fmt: skip

# Types that sort over the batch: the loss of a pair is not known before all log-probs are.
OF_THE_BATCH = ("aot", "aot_unpaired")

# Types that depend on the two scores of a pair by their difference alone. Only these may have other
# scores than the log-ratio: under an f-divergence, a score lacks a term that depends on the prompt,
# which is the same for both sequences and falls out of the difference.
OF_THE_MARGIN = (*MARGIN_LOSSES, "exo_pair", "discopop")


class SharedDPOOptions(TypedDict, total=False):
    """The options of `dpo_loss` but for its type; see there."""

    loss_weights: Sequence[float] | None
    label_smoothing: float
    discopop_tau: float
    rpo_alpha: float
    dpop_lambda: float
    reference_free: bool
    average: bool
    f_divergence: FDivergence
    f_alpha: float
    ld_alpha: float | None
    use_weighting: bool


class DPOOptions(SharedDPOOptions, total=False):
    """The options of `dpo_loss`, for `**options: Unpack[DPOOptions]`; see there.

    Source: as `dpo_loss`.

    Example:
        >>> options: fastrlhf.DPOOptions = {"loss_type": "sigmoid", "label_smoothing": 0.1}
        >>> pair = torch.tensor([-10.0, -14.0]), torch.tensor([-11.0, -13.0])
        >>> losses, _ = fastrlhf.dpo_loss(*pair, torch.tensor([0]), torch.tensor([1]), **options)
        >>> losses
        tensor([0.6181])
    """

    loss_type: PairLossType | Sequence[PairLossType]


class PreferenceOptions(NamedTuple):
    """The options of `dpo_loss` with their defaults."""

    loss_type: str | Sequence[str] = "sigmoid"
    loss_weights: Sequence[float] | None = None
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    rpo_alpha: float = 0.0
    dpop_lambda: float = 0.0
    reference_free: bool = False
    average: bool = False
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False

    @classmethod
    def parse(
        cls, function: str, given: Mapping[str, Any], known: tuple[str, ...]
    ) -> "PreferenceOptions":
        """Make checked options from the keywords of a function, to which an unknown one is a
        TypeError.
        """
        check_options(function, given, cls._fields)
        return cls(**given).checked(known)

    def checked(self, known: tuple[str, ...]) -> "PreferenceOptions":
        """Return the options, numbers as floats and types and weights as tuples of one length.

        Raises:
            TypeError, ValueError: one that is not what it should be, or does not go with another.
        """
        types = _types(self.loss_type, known)
        for name in ("reference_free", "average", "use_weighting"):
            check_bool(name, getattr(self, name))
        check_one_of("f_divergence", self.f_divergence, F_DIVERGENCES)
        smoothing = check_between("label_smoothing", self.label_smoothing, 0, 0.5)
        checked = replaced(
            self,
            loss_type=types,
            loss_weights=_weights(self.loss_weights, len(types)),
            label_smoothing=smoothing,
            discopop_tau=check_positive("discopop_tau", self.discopop_tau),
            rpo_alpha=check_finite("rpo_alpha", check_at_least("rpo_alpha", self.rpo_alpha, 0)),
            dpop_lambda=check_finite(
                "dpop_lambda", check_at_least("dpop_lambda", self.dpop_lambda, 0)
            ),
            f_alpha=check_between("f_alpha", check_positive("f_alpha", self.f_alpha), 0, 1),
            ld_alpha=None
            if self.ld_alpha is None
            else check_between("ld_alpha", self.ld_alpha, 0, 1),
        )
        for loss_type in types:
            checked._check_type(loss_type)
        checked._check_together()
        return checked

    @property
    def types(self) -> dict[str, float]:
        """The weight of each type; of checked options."""
        assert self.loss_weights is not None
        return dict(zip(self.loss_type, self.loss_weights, strict=True))

    @property
    def one_margin_loss(self) -> str | None:
        """The type, if it is all there is to the loss, and has a kernel."""
        plain = PreferenceOptions(
            self.loss_type, (1.0,), self.label_smoothing, self.discopop_tau, f_alpha=self.f_alpha,
            reference_free=self.reference_free,
        )  # fmt: skip
        return self.loss_type[0] if self == plain and self.loss_type[0] in MARGIN_LOSSES else None

    @property
    def averages(self) -> str | None:
        """The option that needs the number of tokens of each sequence, in words; None if none."""
        for name in self.loss_type:
            if name == "sft" or (name in MARGIN_LOSSES and MARGIN_LOSSES[name].average):
                return f"loss_type {name!r}"
        if self.average:
            return "average"
        return "rpo_alpha" if self.rpo_alpha else None

    def _check_type(self, loss_type: str) -> None:
        """Raise for options that do not fit a type."""
        if loss_type == "robust" and self.label_smoothing == 0.5:
            raise ValueError(
                "label_smoothing: expected less than 0.5 for loss_type 'robust', got 0.5"
            )
        if loss_type == "exo_pair" and self.label_smoothing == 0:
            raise ValueError(
                "label_smoothing: expected more than 0 for loss_type 'exo_pair' (its paper takes "
                "1e-3), got 0"
            )
        if loss_type not in (*OF_THE_MARGIN, "sft"):
            which = f"for loss_type {loss_type!r}, which is not one of the margin alone"
            if self.f_divergence != "reverse_kl":
                raise ValueError(
                    f"f_divergence: expected 'reverse_kl' {which}, got {self.f_divergence!r}"
                )
            if self.dpop_lambda != 0:
                raise ValueError(f"dpop_lambda: expected 0 {which}, got {self.dpop_lambda}")
        if self.average and loss_type in MARGIN_LOSSES and MARGIN_LOSSES[loss_type].average:
            raise ValueError(
                f"average: expected False for loss_type {loss_type!r}, which averages by itself"
            )
        if self.use_weighting and loss_type in OF_THE_BATCH:
            raise ValueError(
                f"use_weighting: expected False for loss_type {loss_type!r}, whose losses are of "
                "ranks, not of pairs"
            )

    def _check_together(self) -> None:
        """Raise for options that do not fit each other."""
        if self.dpop_lambda != 0 and self.f_divergence != "reverse_kl":
            raise ValueError(
                f"dpop_lambda: expected 0 with f_divergence {self.f_divergence!r}, got "
                f"{self.dpop_lambda}"
            )
        if self.average and self.ld_alpha is not None:
            raise ValueError(
                "average: expected False with ld_alpha, either of which says how tokens are weighed"
            )


def _types(given: str | Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(given, (tuple, list)):
        if not given:
            raise ValueError("loss_type: expected at least one, got none")
        for name in given:
            check_one_of("loss_type", name, known)
        if len(set(given)) < len(given):
            raise ValueError(f"loss_type: expected different ones, got {given!r}")
        return tuple(given)
    if not isinstance(given, str):
        raise TypeError(
            f"loss_type: expected a string or a tuple of some, got {type(given).__name__}"
        )
    check_one_of("loss_type", given, known)
    return (given,)


def _weights(given: Sequence[float] | None, types: int) -> tuple[float, ...]:
    if given is None:
        return (1.0,) * types
    if not isinstance(given, (tuple, list)):
        raise TypeError(
            f"loss_weights: expected a tuple of numbers or None, got {type(given).__name__}"
        )
    if len(given) != types:
        raise ValueError(
            f"loss_weights: expected {types}, one for each loss_type, got {len(given)}"
        )
    return tuple(check_finite("loss_weights", x) for x in given)
