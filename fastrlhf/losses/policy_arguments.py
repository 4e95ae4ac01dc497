"""What all forms of the policy loss take: options, and a batch of tokens, checked and cleared.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.losses.penalties import check_estimator
from fastrlhf.losses.reduce import check_reduction, token_weights
from fastrlhf.losses.surrogates import SURROGATES, Bounds
from fastrlhf.ops import PolicyTokens
from fastrlhf.ops.checks import (
    check_at_least,
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
from fastrlhf.reference import ROWS, Layout, accumulation_dtype


class PolicyOptions(NamedTuple):
    """The options of a policy loss that are no tensors, with their defaults; see `policy_loss`."""

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

    def checked(self) -> "PolicyOptions":
        """Return the options, numbers as floats.

        Raises:
            TypeError, ValueError: one that is not what it should be.
        """
        check_one_of("surrogate", self.surrogate, SURROGATES)
        check_one_of("ratio_level", self.ratio_level, ("token", "sequence"))
        dual_clip = self.dual_clip
        if dual_clip is not None:
            dual_clip = check_at_least("dual_clip", dual_clip, 1)
            if not dual_clip > 1:
                raise ValueError(f"dual_clip: expected more than 1, got {self.dual_clip}")
        if not isinstance(self.sapo_temperatures, tuple) or len(self.sapo_temperatures) != 2:
            raise ValueError(
                "sapo_temperatures: expected two numbers, for A > 0 and for the rest, got "
                f"{self.sapo_temperatures!r}"
            )
        first, second = (check_positive("sapo_temperatures", x) for x in self.sapo_temperatures)
        check_estimator("kl_estimator", self.kl_estimator)
        return self._replace(
            clip_low=check_at_least("clip_low", self.clip_low, 0),
            clip_high=check_at_least("clip_high", self.clip_high, 0),
            dual_clip=dual_clip,
            kl_coef=check_finite("kl_coef", self.kl_coef),
            entropy_coef=check_finite("entropy_coef", self.entropy_coef),
            normalizer=check_reduction(self.reduction, self.normalizer),
            sapo_temperatures=(first, second),
        )

    @classmethod
    def parse(cls, function: str, given: dict[str, Any]) -> "PolicyOptions":
        """Make options from the keywords of a function, to which an unknown one is a TypeError."""
        for name in given:
            if name not in cls._fields:
                known = ", ".join(cls._fields)
                raise TypeError(f"{function}: unexpected option {name!r}; expected one of {known}")
        return cls(**given).checked()

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.clip_low, self.clip_high, self.dual_clip, *self.sapo_temperatures)


class PolicyBatch(NamedTuple):
    """The constants of a batch, as if there were nothing outside of the mask. Where it says (B, T),
    packed tokens have the shape of their mask, (N,) or (1, N).
    """

    mask: Tensor  # (B, T) bool
    # (B, T) bool: tokens that the surrogate is of, those of the mask that have an advantage.
    scored: Tensor
    # (B, T) bool: tokens that are looked at. With no advantage, no reference and no entropy to look
    # at, a token changes neither the loss nor its gradient.
    active: Tensor
    tokens: PolicyTokens  # (B, T) each
    layout: Layout = ROWS


def policy_batch(
    options: PolicyOptions,
    dtype: torch.dtype,
    mask: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None,
    *,
    with_entropy: bool,
    layout: Layout | None = None,
) -> PolicyBatch:
    """Check the tensors that accompany log-probs of a dtype, and clear what the mask hides. They
    are (B, T), or as a layout says that `layout_of` has made of a tensor of the mask's shape.

    Raises:
        TypeError, ValueError: a tensor that does not fit, or is missing for an option.
    """
    check_mask("mask", mask)
    layout = layout_of("mask", mask) if layout is None else layout
    if options.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected a tensor for kl_coef {options.kl_coef}, got None")
    check_real("advantages", advantages)
    shape, sequences, inside = tuple(mask.shape), layout.sequences(mask), mask != 0

    def cleared(name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        per_sequence = name in ("advantages", "rollout_weights")
        (check_real if per_sequence else check_floating)(name, x)
        check_same_device(name, x, "mask", mask)
        of_sequences = tuple(x.shape) in ((sequences,), (sequences, 1))
        # Packed tensors of either kind can have the same shape, and then are of tokens.
        of_tokens = layout is not ROWS and tuple(x.shape) == shape
        if per_sequence and of_sequences and not of_tokens:
            x = layout.spread(x.detach().reshape(-1)).expand(shape)
        else:
            what = "the shape of mask" + (", or (B,)" if per_sequence else "")
            check_shape(name, x, shape, what)
        return torch.where(inside, x.detach(), 0.0).to(accumulation_dtype(dtype))

    gain = cleared("advantages", advantages)
    assert gain is not None
    rollout = cleared("rollout_weights", rollout_weights)
    if rollout is not None:
        # The surrogates are homogeneous in the advantage, so this weighs them, and not the penalty.
        # A token without an advantage has none, whatever its weight: one that overflowed included.
        gain = torch.where(gain == 0, 0.0, gain * rollout)
    scored = inside & (gain != 0)
    if options.ratio_level == "sequence":  # its tokens share a ratio
        scored = inside & layout.spread(layout.counts(scored) > 0)
    active = scored if ref_logprobs is None and not with_entropy else inside
    weights = token_weights(inside, options.reduction, options.normalizer, gain.dtype, layout)
    old, ref = cleared("old_logprobs", old_logprobs), cleared("ref_logprobs", ref_logprobs)
    return PolicyBatch(inside, scored, active, PolicyTokens(old, ref, gain, weights), layout)
