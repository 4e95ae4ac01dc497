"""The loss of a value model (critic).

The returns that it fits are those of `gae` (`fastrlhf/ops/gae.py`) or of `returns.py`; `reduce.py`
has the weights of the tokens.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_like, check_tokens
from fastrlhf.losses.reduce import Reduction, check_reduction, masked_mean, token_weights
from fastrlhf.ops.checks import (
    check_at_least,
    check_floating,
    check_real,
)
from fastrlhf.ops.ranks import Group
from fastrlhf.reference import accumulation_dtype


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float | None = 0.2,
    reduction: Reduction = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute PPO's clipped squared error of a value model, by default averaged over tokens.

    Eager equivalent::

        clipped = values.clamp(old_values - clip_range, old_values + clip_range)
        losses = torch.max((values - returns) ** 2, (clipped - returns) ** 2) / 2
        loss = losses[mask].mean()

    Args:
        values: (B, T) of the model that is trained.
        old_values: (B, T) at the time of sampling; not looked at without a clip_range, and may
            be None then.
        returns: (B, T) to be predicted, see `gae`.
        mask: (B, T) bool or 0/1, the tokens that count; the others can hold anything.
        clip_range: how far a value may move from its old one before the loss stops to reward it;
            None for no bound.
        reduction: "token-mean" (over the batch), "sequence-mean" (of each sequence's mean over its
            tokens), "sequence-sum" (mean over sequences of sums), "constant" (sum over the
            normalizer, which it needs), or "none": the losses of tokens, 0 outside of the mask.
        normalizer: positive number, or 0-d tensor (whose value is not checked), that replaces the
            number of tokens, or of sequences, for batches that are spread over steps or devices;
            see `global_normalizer`. None for "none".
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last; with
            them, what is (B, T) is (N,) or (1, N). The loss is the same.
        group: torch.distributed group over whose ranks the tokens of each sequence are spread, see
            `fastrlhf.losses.ranks`; None: all are here.

    Returns:
        loss: 0-d, for "none" the shape of values, fp32 (fp64 for fp64 values), differentiable with
            respect to values, twice too.
        metrics: detached 0-d tensors; "val/clipfrac_avg" is the share of tokens whose loss is that
            of the clipped value.

    A batch without tokens has loss 0 and gradient 0.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; clip_range < 0; an unknown
            reduction, or one that the normalizer does not go with.

    Source: PPO's reference implementation, with the ½ of 2005.12729 and TRL.

    Example:
        >>> values, old_values = torch.tensor([[0.5, 1.0]]), torch.tensor([[0.4, 0.2]])
        >>> returns, mask = torch.tensor([[1.0, 1.0]]), torch.ones(1, 2)
        >>> loss, metrics = fastrlhf.value_loss(values, old_values, returns, mask)
        >>> loss, metrics["val/clipfrac_avg"]
        (tensor(0.1525), tensor(0.5000))
    """
    layout = check_tokens("values", values, mask, cu_seqlens, group)
    others = {"returns": returns}
    if clip_range is not None:
        clip_range = check_at_least("clip_range", clip_range, 0)
        others["old_values"] = old_values  # type: ignore[assignment]
    for name, x in others.items():
        (check_real if name == "returns" else check_floating)(name, x)
        check_like(name, x, "values", values)
    normalizer = check_reduction(reduction, normalizer, may_be_none=True)
    inside, dtype = mask != 0, accumulation_dtype(values.dtype)
    values = torch.where(inside, values, 0.0).to(dtype)
    target = torch.where(inside, returns.detach(), 0.0).to(dtype)
    losses = (values - target).square()
    clipped = torch.zeros_like(inside)
    if clip_range is not None and old_values is not None:
        old = torch.where(inside, old_values.detach(), 0.0).to(dtype)
        bounded = values.clamp(old - clip_range, old + clip_range)
        of_bounded = (bounded - target).square()
        clipped = of_bounded > losses
        losses = torch.maximum(losses, of_bounded)
    metrics = {"val/clipfrac_avg": masked_mean(clipped.to(dtype), inside, layout)}
    losses = losses / 2 * token_weights(inside, reduction, normalizer, dtype, layout)
    return losses if reduction == "none" else layout.total(losses), metrics
