"""Sum log-probs of tokens to log-probs of sequences.

`linear_preference.py` and `linear_unpaired.py` sum with it; `fastrlhf/reference/layout.py` says
where the tokens of each sequence stand.
"""

from torch import Tensor

from fastrlhf.losses.arguments import check_tokens, every_token
from fastrlhf.ops.checks import check_bool
from fastrlhf.ops.ranks import Group
from fastrlhf.reference import masked_sum, sequence_lengths


def sequence_logprobs(
    token_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    average: bool = False,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
) -> Tensor:
    """Sum token log-probs to sequence log-probs.

    Eager equivalent: `torch.where(mask, token_logprobs, 0).sum(-1)`, divided by `mask.sum(-1)` for
    the average.

    Args:
        token_logprobs: (B, T) in nats; where the mask is 0 it can hold anything.
        mask: (B, T) bool or 0/1; with cu_seqlens, None for all tokens.
        average: mean over the tokens of each sequence; 0 for a sequence without any.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last, of
            log-probs and a mask (N,) or (1, N).
        group: torch.distributed group over whose ranks the tokens of each sequence are spread, see
            `fastrlhf.losses.ranks`; None: all are here.

    Returns:
        (B,) fp32 (fp64 for fp64), differentiable, twice too.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit; neither mask nor cu_seqlens; a
            group that is none, or without this process.

    Source: a definition; the log-likelihood of a sequence, by the chain rule of probability.

    Example:
        >>> token_logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.0, 0.0]])
        >>> mask = torch.tensor([[True, True, True], [True, True, False]])
        >>> fastrlhf.sequence_logprobs(token_logprobs, mask)
        tensor([-3.5000, -4.0000])
        >>> fastrlhf.sequence_logprobs(token_logprobs, mask, average=True)
        tensor([-1.1667, -2.0000])
    """
    if mask is None:
        mask = every_token("token_logprobs", token_logprobs, cu_seqlens)
    layout = check_tokens("token_logprobs", token_logprobs, mask, cu_seqlens, group)
    check_bool("average", average)
    sums = masked_sum(token_logprobs, mask, layout)
    return sums / sequence_lengths(mask, None, sums.dtype, layout) if average else sums
