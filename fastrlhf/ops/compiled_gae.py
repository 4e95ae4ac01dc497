"""`gae` by a compiled function, for the backend "compiled".

`compiled_rows.ADVANTAGES` does `STEPS` steps of all sequences. It is called for one block of steps
after the other, from the last to the first.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf import reference

from . import compiled_rows
from .compiled import STEPS, NotCompiled
from .compiled_rows import number


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `reference.gae`, B·T > 0; where the function cannot be compiled, by calling it."""
    options: dict[str, Any] = {"gamma": gamma, "lam": lam, "last_values": last_values}
    try:
        return _gae(rewards, values, mask, **options)
    except NotCompiled:
        return reference.gae(rewards, values, mask, **options)


def _gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    last_values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulation_dtype(torch.promote_types(rewards.dtype, values.dtype))
    keep = mask != 0
    rewards, values = (torch.where(keep, x, 0.0).to(dtype) for x in (rewards, values))
    steps = -(-rewards.shape[1] // STEPS)
    # Blocks are whole: sequences are filled up with tokens that do not count, and change nothing.
    missing = steps * STEPS - rewards.shape[1]
    padded = (F.pad(x, (0, missing)).split(STEPS, dim=1) for x in (rewards, values, keep))
    padded = ([x.contiguous() for x in blocks] for blocks in padded)
    after, *following = values.new_zeros(2, len(values)).unbind()
    following = [after if last_values is None else last_values.to(dtype), *following]
    factor = reference.decay(gamma, lam, dtype)
    factors = factor if isinstance(factor, Tensor) else values.new_full((len(values),), factor)
    numbers = number(gamma, values), factors
    blocks_from_the_end = []
    for block in zip(*(reversed(x) for x in padded), strict=True):
        advantages, *following = compiled_rows.ADVANTAGES(*block, *following, *numbers)
        blocks_from_the_end.append(advantages)
    everywhere = torch.cat(blocks_from_the_end[::-1], dim=1)[:, : rewards.shape[1]]
    advantages = torch.where(keep, everywhere, 0.0)
    return advantages, advantages + values
