"""The tensors of a policy loss, checked in one place for all of its forms.

The forms start from log-probs (`policy.py`), from logits or hidden states (`fused_policy.py`), or
from a model (`hf/model_policy.py`). All take the same options, which `policy_options.py` checks,
and the same tensors beside the log-probs (`PolicyTensors`). `policy_batch` checks these, and makes
the `PolicyBatch` of them that the formulas in `policy.py` work on.

Here belongs what only policy losses take; `arguments.py` has the checks that policy and preference
losses share, and `fastrlhf.ops.checks` those of a single argument, whatever it is for.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.losses.policy_options import PolicyOptions
from fastrlhf.losses.reduce import token_weights
from fastrlhf.losses.surrogates import SURROGATES
from fastrlhf.ops import PolicyTokens
from fastrlhf.ops.checks import (
    check_floating,
    check_mask,
    check_real,
    check_same_device,
    check_shape,
)
from fastrlhf.ops.layout import layout_of
from fastrlhf.ops.tracing import replaced
from fastrlhf.reference import ROWS, Layout, accumulation_dtype

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
        return replaced(tensors, ref_logprobs=old_logprobs)
    if options.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected a tensor for kl_coef {options.kl_coef}, got None")
    return tensors
