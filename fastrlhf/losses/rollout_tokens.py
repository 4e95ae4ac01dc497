"""How far the policy that is trained is from the one that sampled, for each token and sequence.

An inference engine does not compute the log-probs that the trainer does, even from the same
weights, and often its weights are older. `rollout.py` corrects for that by weights of tokens,
`rejection.py` by leaving some out, and `rollout_metrics.py` measures it; all start from the
`RolloutTokens` that are made here.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_like, check_tokens
from fastrlhf.losses.ratios import saturated
from fastrlhf.ops.checks import check_floating
from fastrlhf.ops.ranks import Group, gathered
from fastrlhf.reference import Layout, accumulation_dtype

# Stands for a log-ratio of inf, so that its sum with -inf is no NaN. Its square is finite in fp32.
_LARGEST = 1e18


class RolloutTokens(NamedTuple):
    """Numbers of the tokens of a batch, 0 outside of the mask; each (B, T), or packed, of the shape
    of the mask.
    """

    inside: Tensor  # bool
    lengths: Tensor  # (B,), of the tokens that are inside
    logprobs: Tensor
    rollout_logprobs: Tensor
    # logprobs - rollout_logprobs, from -inf to 1e18; 0 where both are -inf.
    log_ratio: Tensor
    layout: Layout
    group: Group | None


class Units(NamedTuple):
    """The units that a metric has a number for: the tokens of this rank, or all sequences, of
    which every rank has every number.
    """

    tokens: RolloutTokens
    there: Tensor  # (B, T) or (B,) bool: which are in the mask, or have tokens in it
    number: Tensor  # 0-d, of all ranks
    are_sequences: bool

    def total(self, x: Tensor) -> Tensor:
        """Sum all, over ranks."""
        return x.sum() if self.are_sequences else self.tokens.layout.total(x)

    def mean(self, x: Tensor) -> Tensor:
        """Average over those that are there; 0 if none are.

        Divided before it is summed, so that the sum of the largest ratios is finite.
        """
        return self.total(torch.where(self.there, x, 0.0) / self.number.clamp(min=1))

    def largest(self, x: Tensor) -> Tensor:
        """Find the largest of those that are there; 0 if none are."""
        counted = torch.where(self.there, x, -torch.inf).reshape(-1)
        largest = torch.cat((counted, counted.new_full((1,), -torch.inf))).amax()
        if self.tokens.group is not None and not self.are_sequences:
            largest = gathered(largest, self.tokens.group).amax()
        return torch.where(self.number > 0, largest, 0.0)

    def smallest(self, x: Tensor) -> Tensor:
        """Find the smallest of those that are there; 0 if none are."""
        return -self.largest(-x)

    def on_tokens(self, x: Tensor) -> Tensor:
        """Give each token its own, or that of its sequence: (B, T)."""
        if not self.are_sequences:
            return x
        return self.tokens.layout.spread(x).expand_as(self.tokens.inside)


def rollout_tokens(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    group: Group | None,
) -> RolloutTokens:
    """Check the log-probs that trainer and engine give to the same tokens, and compare them.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; a group that is none.
    """
    layout = check_tokens("logprobs", logprobs, mask, cu_seqlens, group)
    check_floating("rollout_logprobs", rollout_logprobs)
    check_like("rollout_logprobs", rollout_logprobs, "logprobs", logprobs)
    dtype = accumulation_dtype(torch.promote_types(logprobs.dtype, rollout_logprobs.dtype))
    inside = mask != 0
    ours, engines = (torch.where(inside, x.to(dtype), 0.0) for x in (logprobs, rollout_logprobs))
    log_ratio = torch.where(ours == engines, 0.0, ours - engines)
    log_ratio = torch.where(log_ratio == torch.inf, _LARGEST, log_ratio)
    return RolloutTokens(inside, layout.counts(inside), ours, engines, log_ratio, layout, group)


def token_units(tokens: RolloutTokens) -> Units:
    return Units(tokens, tokens.inside, tokens.lengths.sum(), are_sequences=False)


def sequence_units(tokens: RolloutTokens) -> Units:
    there = tokens.lengths > 0
    return Units(tokens, there, there.sum(), are_sequences=True)


def sequence_sums(tokens: RolloutTokens, x: Tensor) -> Tensor:
    """Sum (B, T), which is 0 outside of the mask, to (B,)."""
    return tokens.layout.sums(x)


def sequence_means(tokens: RolloutTokens, x: Tensor) -> Tensor:
    """Average (B, T), which is 0 outside of the mask, to (B,)."""
    return tokens.layout.sums(x) / tokens.lengths.clamp(min=1)


def bounded(x: Tensor) -> Tensor:
    """Let logs of ratios end at ±80 (±700 in fp64), for metrics."""
    return -saturated(-saturated(x))
