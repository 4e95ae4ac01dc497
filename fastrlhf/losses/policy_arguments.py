"""The arguments of the policy loss, checked in one place for all of its forms.

The forms start from log-probs (`policy.py`), from logits or hidden states (`fused_policy.py`), or
from a model (`hf/model_policy.py`). All take the same options (`PolicyOptions`), which are parsed
and checked once, and the same tensors beside the log-probs (`PolicyTensors`). `policy_batch` checks
these and makes the `PolicyBatch` of them that the formulas in `policy.py` work on.

Here belongs what only policy losses take; `arguments.py` has the checks that policy and preference
losses share, and `fastrlhf.ops.checks` those of a single argument, whatever it is for.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from fastrlhf.losses.penalties import check_estimator
from fastrlhf.losses.reduce import Reduction, check_reduction, token_weights
from fastrlhf.losses.signatures import check_options
from fastrlhf.losses.surrogates import SURROGATES, Bounds
from fastrlhf.ops import PolicyTokens
from fastrlhf.ops.checks import (
    check_at_least,
    check_bool,
    check_finite,
    check_floating,
    check_mask,
    check_one_of,
    check_positive,
    check_real,
    check_same_device,
    check_shape,
)
from fastrlhf.ops.layout import layout_of
from fastrlhf.ops.ranks import Group
from fastrlhf.reference import ROWS, Layout, accumulation_dtype

SurrogateName = Literal["clip", "cispo", "sapo", "plain", "dppo_tv", "dppo_kl", "gmpo", "vespo"]
RatioLevel = Literal["token", "sequence", "sequence-token", "product"]
EstimatorName = Literal["k1", "k2", "k3", "abs", "k1+", "k3+"]


class PolicyLossOptions(TypedDict, total=False):
    """The options that every form of the policy loss takes as keywords; see `policy_loss`.

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
        return self._replace(
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


# A function that gives each token the sum over the tokens of its sequence.
SequenceSums = Callable[[Tensor], Tensor]

# The tensors that may have one number for each sequence instead of each token.
PER_SEQUENCE = ("advantages", "rollout_weights", "kl_weights")


class PolicyBatch(NamedTuple):
    """The constants of a batch, 0 outside of the mask. Where it says (B, T), packed tokens have the
    shape of their mask, (N,) or (1, N).
    """

    mask: Tensor  # (B, T) bool
    # (B, T) bool: the tokens with a surrogate, which are those of the mask that have an advantage;
    # where the loss of a token depends on its whole sequence, all tokens of sequences with one.
    scored: Tensor
    # (B, T) bool: the tokens whose log-probs are needed. One without a surrogate changes neither
    # the loss nor its gradient, and is only needed where there is a reference or an entropy.
    active: Tensor
    tokens: PolicyTokens  # (B, T) each
    layout: Layout = ROWS

    def sums(self, x: Tensor) -> Tensor:
        """Give each token the sum over the tokens of its sequence."""
        of_sequences = self.layout.sums(torch.where(self.mask, x, 0.0))
        return self.layout.spread(of_sequences).expand(x.shape)


class PolicyTensors(NamedTuple):
    """The tensors that accompany the log-probs of a batch, as the caller gave them; see
    `policy_loss`. The optional ones come in the order of `OPTIONAL_TOKEN_TENSORS`.
    """

    old_logprobs: Tensor | None
    advantages: Tensor
    ref_logprobs: Tensor | None = None
    rollout_weights: Tensor | None = None
    kl_weights: Tensor | None = None


def policy_batch(
    options: PolicyOptions,
    dtype: torch.dtype,
    mask: Tensor,
    *given: Any,
    with_entropy: bool,
    layout: Layout | None = None,
) -> PolicyBatch:
    """Check the tensors that accompany log-probs of a dtype, and clear what the mask hides.

    `given` are the fields of `PolicyTensors`, in their order. They are (B, T), or as a layout says
    that `layout_of` has made of a tensor of the mask's shape.

    Raises:
        TypeError, ValueError: a tensor that does not fit, or is missing for an option.
    """
    check_mask("mask", mask)
    layout = layout_of("mask", mask) if layout is None else layout
    tensors = _with_reference(PolicyTensors(*given), options)
    if tensors.kl_weights is not None and tensors.ref_logprobs is None:
        raise ValueError("kl_weights: expected None without ref_logprobs to be measured against")
    check_real("advantages", tensors.advantages)
    inside = mask != 0
    clearing = _Clearing(inside, layout, accumulation_dtype(dtype))
    advantages = clearing.of("advantages", tensors.advantages)
    assert advantages is not None
    rollout_weights = clearing.of("rollout_weights", tensors.rollout_weights)
    kl_weights = clearing.of("kl_weights", tensors.kl_weights)
    signs, advantages = _weighed(options, advantages, rollout_weights)
    scored = inside & (advantages != 0)
    if options.needs_sequences:  # every token of a sequence has a part in the loss of the others
        scored = inside & layout.spread(layout.counts(scored) > 0)
    active = scored if tensors.ref_logprobs is None and not with_entropy else inside
    tokens = PolicyTokens(
        clearing.of("old_logprobs", tensors.old_logprobs),
        clearing.of("ref_logprobs", tensors.ref_logprobs),
        advantages,
        token_weights(inside, options.reduction, options.normalizer, advantages.dtype, layout),
        kl_weights,
        signs,
    )
    return PolicyBatch(inside, scored, active, tokens, layout)


class _Clearing(NamedTuple):
    """How a tensor is brought into the shape of the mask, with zeros where the mask is not set."""

    inside: Tensor  # (B, T) bool, the mask
    layout: Layout
    dtype: torch.dtype

    def of(self, name: str, x: Tensor | None) -> Tensor | None:
        """Check a tensor and clear it.

        Raises:
            TypeError, ValueError: a dtype, shape or device that does not fit.
        """
        if x is None:
            return None
        shape, sequences = tuple(self.inside.shape), self.layout.sequences(self.inside)
        may_be_of_sequences = name in PER_SEQUENCE
        (check_real if may_be_of_sequences else check_floating)(name, x)
        check_same_device(name, x, "mask", self.inside)
        of_sequences = tuple(x.shape) in ((sequences,), (sequences, 1))
        # Packed tensors of tokens and of sequences can have one shape, and then are of tokens.
        of_tokens = self.layout is not ROWS and tuple(x.shape) == shape
        if may_be_of_sequences and of_sequences and not of_tokens:
            x = self.layout.spread(x.detach().reshape(-1)).expand(shape)
        else:
            what = "the shape of mask" + (", or (B,)" if may_be_of_sequences else "")
            check_shape(name, x, shape, what)
        return torch.where(self.inside, x.detach(), 0.0).to(self.dtype)


def _weighed(
    options: PolicyOptions, advantages: Tensor, rollout_weights: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Multiply advantages by the weights of their rollouts. That weighs the surrogate, which is
    proportional to the advantage, and leaves the penalty as it is.

    Returns also the advantages without the weights, for a surrogate that looks at their sign token
    by token (where the weight is 0, the product has lost the sign, and with it the side on which
    the ratio is bounded); None where they are not needed.
    """
    if rollout_weights is None:
        return None, advantages
    signs = advantages if SURROGATES[options.surrogate].one_by_one else None
    # A token without an advantage keeps none, whatever its weight is: an infinite one included.
    return signs, torch.where(advantages == 0, 0.0, advantages * rollout_weights)


def _with_reference(tensors: PolicyTensors, options: PolicyOptions) -> PolicyTensors:
    """Put the log-probs that the penalty is measured against in the place of ref_logprobs."""
    old_logprobs, ref_logprobs = tensors.old_logprobs, tensors.ref_logprobs
    if options.kl_reference == "old":
        if ref_logprobs is not None:
            raise ValueError(
                "ref_logprobs: expected None for kl_reference 'old', which takes old_logprobs"
            )
        if old_logprobs is None:
            raise ValueError("old_logprobs: expected a tensor for kl_reference 'old', got None")
        return tensors._replace(ref_logprobs=old_logprobs)
    if options.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected a tensor for kl_coef {options.kl_coef}, got None")
    return tensors
