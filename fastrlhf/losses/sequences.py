"""From log-probs of tokens to log-probs of sequences."""

from torch import Tensor

from fastrlhf.losses.arguments import check_tokens
from fastrlhf.ops.checks import check_bool
from fastrlhf.reference import masked_sum, sequence_lengths


def sequence_logprobs(token_logprobs: Tensor, mask: Tensor, *, average: bool = False) -> Tensor:
    """Sum token log-probs to sequence log-probs.

    Eager equivalent: `torch.where(mask, token_logprobs, 0).sum(-1)`, divided by `mask.sum(-1)` for
    the average.

    Args:
        token_logprobs: (B, T) in nats; where the mask is 0 it can hold anything.
        mask: (B, T) bool or 0/1.
        average: mean over the tokens of each sequence; 0 for a sequence without any.

    Returns:
        (B,) fp32 (fp64 for fp64), differentiable.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit.
    """
    check_tokens("token_logprobs", token_logprobs, mask)
    check_bool("average", average)
    sums = masked_sum(token_logprobs, mask)
    return sums / sequence_lengths(mask, None, sums.dtype) if average else sums
