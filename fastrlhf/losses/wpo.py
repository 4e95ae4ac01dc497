"""Weights of sequences by how likely the policy is to sample them: WPO.

`preference.py` multiplies the losses of pairs by these weights.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_tokens, every_token
from fastrlhf.ops.checks import check_floating, check_same_device, check_shape
from fastrlhf.ops.ranks import Group
from fastrlhf.reference import Layout, accumulation_dtype, masked_sum, sequence_lengths


def wpo_weights(
    logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    log_sum_sq_probs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
) -> Tensor:
    """Weigh each sequence by the geometric mean of its tokens' probabilities under the policy, as
    WPO does; a pair has the product of the weights of its two sequences.

    Eager equivalent: `(torch.where(mask, logprobs - log_sum_sq_probs, 0).sum(-1) /
    mask.sum(-1)).exp().detach()`.

    Args:
        logprobs: (B, T) log-probs of tokens under the policy, in nats; where the mask is 0 they can
            hold anything.
        mask: (B, T) bool or 0/1; with cu_seqlens, None for all tokens.
        log_sum_sq_probs: (B, T) ln Σ_v p(v)² of each token's distribution, as `model_token_stats`
            and its relatives return with `with_stats=("log_sum_sq_probs",)`: the paper's sampled
            alignment, by which a token sampled from the policy has a weight of about 1, however
            sure the policy is. None: the probabilities as they are.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last, of
            tensors (N,) or (1, N).
        group: torch.distributed group over whose ranks the tokens of each sequence are spread, see
            `fastrlhf.losses.ranks`; None: all are here.

    Returns:
        (B,) fp32 (fp64 for fp64), positive, detached; 1 for a sequence without tokens.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; neither mask nor
            cu_seqlens.

    Source: 2406.11827.

    Example:
        >>> logprobs = torch.tensor([[-0.1, -0.3], [-2.0, 0.0]])
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> fastrlhf.wpo_weights(logprobs, mask)
        tensor([0.8187, 0.1353])
    """
    if mask is None:
        mask = every_token("logprobs", logprobs, cu_seqlens)
    layout = check_tokens("logprobs", logprobs, mask, cu_seqlens, group)
    if log_sum_sq_probs is not None:
        check_log_sum_sq_probs(log_sum_sq_probs, "logprobs", logprobs)
    return weights_of(logprobs, log_sum_sq_probs, mask, layout)


def check_log_sum_sq_probs(log_sum_sq_probs: Tensor, name: str, logprobs: Tensor) -> None:
    check_floating("log_sum_sq_probs", log_sum_sq_probs)
    shape = tuple(logprobs.shape)
    check_shape("log_sum_sq_probs", log_sum_sq_probs, shape, f"the shape of {name}")
    check_same_device("log_sum_sq_probs", log_sum_sq_probs, name, logprobs)


@torch.no_grad()
def weights_of(
    logprobs: Tensor, log_sum_sq_probs: Tensor | None, mask: Tensor, layout: Layout
) -> Tensor:
    """Compute what `wpo_weights` returns, of arguments that are checked."""
    logprobs = logprobs.detach().to(accumulation_dtype(logprobs.dtype))
    if log_sum_sq_probs is not None:
        logprobs = logprobs - log_sum_sq_probs.detach()
    sums = masked_sum(logprobs, mask, layout)
    return torch.exp(sums / sequence_lengths(mask, None, sums.dtype, layout))
