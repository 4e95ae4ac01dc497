"""Choose the tokens that a policy loss is about: those at which the policy is unsure.

A selection is a mask (B, T) of constants, to be used as `rollout_weights` of `policy_loss`, so that
means go on to count all tokens.

Dims: B sequences, T tokens of each, n tokens in the mask.
"""

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_like
from fastrlhf.losses.samples import of_all_ranks
from fastrlhf.ops.checks import (
    check_between,
    check_floating,
    check_mask,
)
from fastrlhf.ops.ranks import Group, check_group, sum_over_ranks
from fastrlhf.reference import accumulation_dtype


@torch.no_grad()
def top_entropy_mask(
    entropy: Tensor, mask: Tensor, *, share: float = 0.2, group: Group | None = None
) -> Tensor:
    """Choose the share of the tokens at which the policy has the highest entropy.

    Eager equivalent: `mask & (entropy >= torch.quantile(entropy[mask], 1 - share))`.

    Args:
        entropy: (B, T), or any shape, in nats.
        mask: the same shape, bool or 0/1; entries outside can hold anything.
        share: from 0 to 1, of the n tokens of the mask. The lowest entropy that is chosen is the
            (1 + ⌊share·(n - 1)⌋)-th, and tokens that equal it are chosen too: of equal entropies
            all or none. A share of 0 leaves the highest.
        group: torch.distributed group whose ranks have parts of the batch, of whatever shapes: the
            share is that of all. The host waits for the sizes. None: of this batch alone.

    Returns:
        The shape of entropy, bool, False outside of the mask; not differentiable. An entropy of
        NaN is not chosen, and is none of the n tokens.

    For a loss of these tokens alone, whose means count all (the paper's, and TRL's)::

        policy_loss(..., rollout_weights=top_entropy_mask(entropy, mask))

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; a share that is none; a
            group that is none.

    Source: 2506.01939 ("Beyond the 80/20 rule").

    Example:
        >>> entropy = torch.tensor([[0.1, 2.0, 0.3, 0.2, 1.5]])
        >>> fastrlhf.top_entropy_mask(entropy, torch.ones(1, 5), share=0.4)
        tensor([[False,  True, False, False,  True]])
    """
    check_floating("entropy", entropy)
    check_mask("mask", mask)
    check_like("mask", mask, "entropy", entropy)
    share = check_between("share", share, 0, 1)
    check_group(group)
    inside = mask != 0
    inside = inside & ~entropy.isnan()
    entropy = torch.where(inside, entropy, -torch.inf).to(accumulation_dtype(entropy.dtype))
    (entropies,), _ = of_all_ranks([entropy.reshape(-1)], group)
    # One more entry, so that a batch without tokens has one too.
    in_order = torch.cat((entropies, entropies.new_full((1,), -torch.inf)))
    in_order = in_order.sort(descending=True).values
    before = part_of(share, sum_over_ranks(inside.sum(), group) - 1).clamp(min=0)
    # gather, since in_order[before] would wait for the number.
    return inside & (entropy >= in_order.gather(0, before.unsqueeze(0)))


def part_of(share: float, count: Tensor) -> Tensor:
    """Compute ⌊share·count⌋ of the share as it is written: of 0.29 and 100 it is 29, though the
    float next to 0.29 lies below it.
    """
    return (count.double() * share * (1 + 1e-12)).floor().long()
