"""Which tokens cost a policy its entropy: those where advantage and log-prob go together.

The entropy of a policy falls by what the covariance of the two is, to which few tokens contribute
most. A selection of them is a mask (B, T) of constants. Nobody waits for a GPU, but with a group
for the sizes that ranks have.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed, n tokens in the
mask.
"""

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_generator, check_like, check_tokens
from fastrlhf.losses.samples import of_all_ranks
from fastrlhf.losses.selection import part_of
from fastrlhf.ops.checks import (
    check_between,
    check_finite,
    check_mask,
    check_real,
    check_same_device,
    check_shape,
)
from fastrlhf.ops.ranks import Group, check_group, sum_over_ranks
from fastrlhf.reference import Layout, accumulation_dtype


@torch.no_grad()
def clip_cov_mask(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    eligible: Tensor | None = None,
    generator: torch.Generator | None = None,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
) -> Tensor:
    """Choose at random a few of the tokens that cost the most entropy, and keep the others
    (Clip-Cov).

    Eager equivalent, with means over the mask::

        cov = (advantages - advantages.mean()) * (logprobs - logprobs.mean())
        candidates = (mask & (low <= cov) & (cov <= high)).nonzero()
        dropped = candidates[torch.randperm(len(candidates))[: max(int(share * mask.sum()), 1)]]

    Args:
        logprobs: (B, T) log-probs under the policy that is trained, in nats, finite in the mask.
        advantages: (B, T), or (B,) one for each sequence.
        mask: (B, T) bool or 0/1, the tokens that count; entries outside can hold anything.
        share: how many are dropped: ⌊share·n⌋ of the n tokens of the mask, but at least one, as far
            as there are candidates.
        low, high: bounds of the covariance of a candidate, which may equal them.
        eligible: (B, T) bool or 0/1, the tokens that can be candidates at all; None: all of the
            mask. (verl leaves out those that are clipped already, whose gradient is 0.)
        generator: where the choice comes from, on the device of logprobs; None: PyTorch's own. Over
            ranks, each draws for its own tokens.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last; with
            them, what is (B, T) is (N,) or (1, N).
        group: torch.distributed group whose ranks have parts of the batch, of whatever shapes:
            means and share are those of all. The host waits for the sizes. None: of this alone.

    Returns:
        (B, T) bool: the tokens of the mask that keep their gradient.

    As in the paper, the others count in the means::

        policy_loss(..., rollout_weights=clip_cov_mask(logprobs.detach(), advantages, mask))

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; a share that is none;
            bounds in the wrong order; a generator of another device; a group that is none.

    Source: 2505.22617, section 4 (Clip-Cov); that at least one is dropped is its authors' code.

    Example:
        >>> logprobs = torch.tensor([[-0.1, -0.1, -2.0, -3.0]])
        >>> advantages = torch.tensor([[3.0, 0.0, 0.0, -3.0]])
        >>> fastrlhf.clip_cov_mask(logprobs, advantages, torch.ones(1, 4))
        tensor([[False,  True,  True,  True]])
    """
    covariance, inside = _covariances(logprobs, advantages, mask, cu_seqlens, group)
    share, low = check_between("share", share, 0, 1), check_finite("low", low)
    high = check_finite("high", high)
    if low > high:
        raise ValueError(f"low: expected at most high ({high}), got {low}")
    candidates = inside & (covariance >= low) & (covariance <= high)
    if eligible is not None:
        check_mask("eligible", eligible)
        check_like("eligible", eligible, "logprobs", logprobs)
        candidates = candidates & (eligible != 0)
    check_generator(generator, "logprobs", logprobs)
    # fp64, so that no two draws are equal.
    draws = torch.rand(
        logprobs.shape, dtype=torch.float64, device=logprobs.device, generator=generator
    )
    dropped = _largest(torch.where(candidates, draws, -torch.inf), inside, share, group)
    return inside & ~dropped


@torch.no_grad()
def kl_cov_mask(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    share: float = 0.002,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
) -> Tensor:
    """Choose the tokens that cost the most entropy, which are to get a KL penalty (KL-Cov).

    Eager equivalent, for the covariances of `clip_cov_mask`: `mask`, where the covariance is among
    the `max(int(share * mask.sum()), 1)` largest.

    Args:
        logprobs, advantages, mask, cu_seqlens, group: see `clip_cov_mask`.
        share: how many are chosen: ⌊share·n⌋ of the n tokens of the mask, but at least one if there
            are any. Of equal covariances, the tokens that come first.

    Returns:
        (B, T) bool, not differentiable.

    The paper's loss has no clip, and |ln π - ln π_old| as the penalty of these tokens: with
    `policy_loss`, ref_logprobs=old_logprobs, kl_estimator="abs", a kl_coef (1.0 in the paper's
    code) and this mask as kl_weights.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; a share that is none; a
            group that is none.

    Source: 2505.22617, section 4 (KL-Cov); that at least one is chosen is its authors' code.

    Example:
        >>> logprobs = torch.tensor([[-0.1, -0.1, -2.0, -3.0]])
        >>> advantages = torch.tensor([[3.0, 0.0, 0.0, -3.0]])
        >>> fastrlhf.kl_cov_mask(logprobs, advantages, torch.ones(1, 4), share=0.25)
        tensor([[False, False, False,  True]])
    """
    covariance, inside = _covariances(logprobs, advantages, mask, cu_seqlens, group)
    share = check_between("share", share, 0, 1)
    return _largest(torch.where(inside, covariance, -torch.inf), inside, share, group)


def _covariances(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    group: Group | None,
) -> tuple[Tensor, Tensor]:
    """Check the arguments. Returns (A - mean A)·(ln π - mean ln π) (B, T), and which tokens count.

    Its mean over the tokens is the covariance of A and ln π, by which a step lowers the entropy.
    """
    layout = check_tokens("logprobs", logprobs, mask, cu_seqlens)
    check_group(group)
    inside = mask != 0
    advantages = _advantages_of_tokens(advantages, logprobs, layout)
    dtype = accumulation_dtype(torch.promote_types(logprobs.dtype, advantages.dtype))
    count = sum_over_ranks(inside.sum(), group).clamp(min=1)

    def centred(x: Tensor) -> Tensor:
        x = torch.where(inside, x.to(dtype), 0.0)
        return torch.where(inside, x - sum_over_ranks(x.sum(), group) / count, 0.0)

    return centred(advantages) * centred(logprobs), inside


def _advantages_of_tokens(advantages: Tensor, logprobs: Tensor, layout: Layout) -> Tensor:
    """Check advantages, and give each token that of its sequence where they are (B,)."""
    check_real("advantages", advantages)
    check_same_device("advantages", advantages, "logprobs", logprobs)
    shape, sequences = tuple(logprobs.shape), layout.sequences(logprobs)
    # There may be as many packed tokens (N,) as sequences; advantages are then those of tokens.
    if tuple(advantages.shape) == (sequences,) != shape:
        return layout.spread(advantages).expand(shape)
    check_shape("advantages", advantages, shape, "the shape of logprobs, or (B,)")
    return advantages


def _largest(scores: Tensor, inside: Tensor, share: float, group: Group | None) -> Tensor:
    """Tell which scores are among the ⌊share·n⌋ largest, at least one, of those that are not -inf.

    Over ranks, the largest are those of all of them.
    """
    (all_scores,), this_rank = of_all_ranks([scores.reshape(-1)], group)
    wanted = part_of(share, sum_over_ranks(inside.sum(), group)).clamp(min=1)
    order = all_scores.argsort(descending=True, stable=True)
    is_first = torch.arange(len(order), device=order.device) < wanted
    chosen = torch.zeros_like(is_first).scatter(0, order, is_first)
    return chosen[this_rank].view(scores.shape) & (scores > -torch.inf)
