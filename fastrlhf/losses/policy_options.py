"""The options of the policy losses, which travel as one object and are checked once.

`PolicyLossOptions` and what extends it are the keywords of the public functions, for type checkers;
`PolicyOptions` is what these are parsed into, with the defaults. `policy_loss` says what each is.
The tensors that go with them are checked in `policy_arguments.py`.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypedDict, get_args

from torch import Tensor

from fastrlhf.losses.penalties import check_estimator
from fastrlhf.losses.reduce import Reduction, check_reduction
from fastrlhf.losses.signatures import check_options
from fastrlhf.losses.surrogates import SURROGATES, Bounds
from fastrlhf.ops.checks import (
    check_at_least,
    check_bool,
    check_finite,
    check_one_of,
    check_positive,
)
from fastrlhf.ops.ranks import Group
from fastrlhf.ops.tracing import replaced

SurrogateName = Literal["clip", "cispo", "sapo", "plain", "dppo_tv", "dppo_kl", "gmpo", "vespo"]
RatioLevel = Literal["token", "sequence", "sequence-token", "product"]
EstimatorName = Literal["k1", "k2", "k3", "abs", "k1+", "k3+"]


class PolicyLossOptions(TypedDict, total=False):
    """The options that every form of the policy loss takes as keywords; see `policy_loss`.

    Source: as `policy_loss`.

    Example:
        >>> options: fastrlhf.PolicyLossOptions = {"clip_low": 0.2, "clip_high": 0.28}
        >>> old, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2)
        >>> loss, _ = fastrlhf.policy_loss(old + 0.5, old, torch.tensor([1.0]), mask, **options)
        >>> loss
        tensor(-1.2800)
    """

    surrogate: SurrogateName
    ratio_level: RatioLevel
    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_coef: float
    kl_estimator: EstimatorName
    entropy_coef: float
    reduction: Reduction
    normalizer: float | Tensor | None
    sapo_temperatures: tuple[float, float]
    ratio_floor: float
    vespo_shape: tuple[float, float, float, float]
    kl_reference: Literal["ref", "old"]
    kl_bias_correction: bool
    off_policy_mask_threshold: float | None


class PolicyOptionsAndTensors(PolicyLossOptions, total=False):
    """The options of a policy loss, and the optional tensors of its tokens."""

    ref_logprobs: Tensor | None
    rollout_weights: Tensor | None
    kl_weights: Tensor | None


class PolicyArguments(PolicyOptionsAndTensors, total=False):
    """The keywords of `policy_loss`."""

    entropy: Tensor | None
    cu_seqlens: Tensor | None
    group: Group | None


# The optional tensors of tokens, each None by default, in the order of `PolicyTensors`.
OPTIONAL_TOKEN_TENSORS = dict.fromkeys(("ref_logprobs", "rollout_weights", "kl_weights"))
# The keywords of `policy_loss` that are no options; None by default too.
OPTIONAL_ARGUMENTS = {
    **OPTIONAL_TOKEN_TENSORS, **dict.fromkeys(("entropy", "cu_seqlens", "group"))
}  # fmt: skip


class PolicyOptions(NamedTuple):
    """The options of a policy loss with their defaults; see `policy_loss`."""

    surrogate: str = "clip"
    ratio_level: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    reduction: str = "token-mean"
    normalizer: float | Tensor | None = None
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    ratio_floor: float = 0.0
    vespo_shape: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0)
    kl_reference: str = "ref"
    kl_bias_correction: bool = False
    off_policy_mask_threshold: float | None = None

    def checked(self) -> "PolicyOptions":
        """Return the options, numbers as floats.

        Raises:
            TypeError, ValueError: one that is not what it should be, or does not go with another.
        """
        check_one_of("surrogate", self.surrogate, SURROGATES)
        check_one_of("ratio_level", self.ratio_level, get_args(RatioLevel))
        levels = SURROGATES[self.surrogate].ratio_levels
        if self.ratio_level not in levels:
            raise ValueError(
                f"ratio_level: expected {' or '.join(map(repr, levels))} for surrogate "
                f"{self.surrogate!r}, got {self.ratio_level!r}"
            )
        dual_clip = self.dual_clip
        if dual_clip is not None:
            dual_clip = check_at_least("dual_clip", dual_clip, 1)
            if not dual_clip > 1:
                raise ValueError(f"dual_clip: expected more than 1, got {self.dual_clip}")
        two, four = "two numbers, for A > 0 and for the rest", "four numbers, k and λ for each"
        first, second = _positive("sapo_temperatures", self.sapo_temperatures, 2, two)
        shape = _positive("vespo_shape", self.vespo_shape, 4, four)
        check_estimator("kl_estimator", self.kl_estimator)
        check_one_of("kl_reference", self.kl_reference, ("ref", "old"))
        check_bool("kl_bias_correction", self.kl_bias_correction)
        threshold = self.off_policy_mask_threshold
        if threshold is not None:
            threshold = check_finite("off_policy_mask_threshold", threshold)
        return replaced(
            self,
            clip_low=check_at_least("clip_low", self.clip_low, 0),
            clip_high=self._checked_clip_high(),
            dual_clip=dual_clip,
            kl_coef=check_finite("kl_coef", self.kl_coef),
            entropy_coef=check_finite("entropy_coef", self.entropy_coef),
            normalizer=check_reduction(self.reduction, self.normalizer, may_be_none=True),
            sapo_temperatures=(first, second),
            ratio_floor=check_at_least("ratio_floor", self.ratio_floor, 0),
            vespo_shape=(shape[0], shape[1], shape[2], shape[3]),
            off_policy_mask_threshold=threshold,
        )

    def _checked_clip_high(self) -> float:
        """Check clip_high, which is at least 0, but for cispo: its one bound on the ratio,
        1 + clip_high, may lie anywhere above the floor of the ratio.
        """
        if self.surrogate != "cispo":
            return check_at_least("clip_high", self.clip_high, 0)
        clip_high = check_at_least("clip_high", self.clip_high, -1)
        if not 1 + clip_high > self.ratio_floor:
            raise ValueError(
                f"clip_high: expected a bound 1 + clip_high above ratio_floor {self.ratio_floor}, "
                f"got {clip_high}"
            )
        return clip_high

    @classmethod
    def parse(cls, function: str, given: Mapping[str, Any]) -> "PolicyOptions":
        """Make options from the keywords of a function, to which an unknown one is a TypeError."""
        check_options(function, given, cls._fields)
        return cls(**given).checked()

    @property
    def bounds(self) -> Bounds:
        """The bounds of the surrogate, on what it bounds (the ratio, or a difference), and its
        other numbers.
        """
        around = SURROGATES[self.surrogate].around
        low = self.ratio_floor if self.surrogate == "cispo" else around - self.clip_low
        return Bounds(
            low, around + self.clip_high, self.dual_clip, *self.sapo_temperatures, self.vespo_shape
        )

    @property
    def needs_sequences(self) -> bool:
        """Whether the loss of a token depends on the log-probs of its whole sequence."""
        return self.ratio_level != "token" or self.off_policy_mask_threshold is not None


def _positive(name: str, values: Any, count: int, what: str) -> list[float]:
    """Return that many positive numbers as floats."""
    if not isinstance(values, tuple) or len(values) != count:
        raise ValueError(f"{name}: expected {what}, got {values!r}")
    return [check_positive(name, x) for x in values]
