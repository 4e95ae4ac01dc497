"""The definition of `token_stats` by `log_softmax` and `gather`, which autograd differentiates.

Dims: N tokens, V vocabulary, ... any leading shape.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .effective_logits import capped_logits
from .scalars import accumulation_dtype


class TokenStats(NamedTuple):
    """Statistics of the distribution over the vocabulary at each position; fp32 (fp64 for fp64
    logits).

    logprob: (...,) ln p(target) in nats; exactly 0 where the target is ignored.
    entropy: (...,) in nats, None unless asked for; 0 where the target is ignored.
    lse: (...,) log-sum-exp of the effective logits, not differentiable; 0 where the target is
    ignored.

    The statistics that `with_stats` names are in `FurtherTokenStats`; here they are None.

    Source: as `token_stats`.

    Example:
        >>> stats = fastrlhf.token_stats(torch.zeros(2, 8), torch.tensor([0, 5]), entropy=True)
        >>> logprob, entropy, lse = stats
        >>> entropy
        tensor([2.0794, 2.0794])
    """

    logprob: Tensor
    entropy: Tensor | None
    lse: Tensor

    @property
    def is_top1(self) -> Tensor | None: ...

    @property
    def mean_logit(self) -> Tensor | None: ...

    @property
    def log_sum_sq_probs(self) -> Tensor | None: ...


class FurtherTokenStats(NamedTuple):
    """`TokenStats` with the statistics that `with_stats` names; those that it does not name are
    None. It is a class of its own, so that `logprob, entropy, lse = stats` works for `TokenStats`.

    These are not differentiable. Of the effective logits z, or of their probabilities p:

    is_top1: (...,) bool, z.argmax(-1) == target: of equal logits, the first is on top. False where
    the target is ignored, and without a distribution: where all logits are -inf, or one is NaN or
    inf.
    mean_logit: (...,) z.mean(-1) over the vocabulary, -inf if any of them is; 0 where the target is
    ignored.
    log_sum_sq_probs: (...,) ln Σ p², 0 where all logits are -inf or the target is ignored.

    Source: a definition; the accuracy of the top choice, the mean of the logits, and the log of the
    collision probability.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> further = "is_top1", "mean_logit"
        >>> stats = fastrlhf.token_stats(logits, torch.tensor([0, 1]), with_stats=further)
        >>> stats.is_top1, stats.mean_logit
        (tensor([ True, False]), tensor([1.0000, 0.3333]))
    """

    logprob: Tensor
    entropy: Tensor | None
    lse: Tensor
    is_top1: Tensor | None = None
    mean_logit: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


# What `with_stats` may name.
FURTHER_STATS = FurtherTokenStats._fields[3:]


def stats_tuple(
    logprob: Tensor, entropy: Tensor | None, lse: Tensor, further: dict[str, Tensor]
) -> TokenStats:
    """Make `FurtherTokenStats` if there are further statistics, else `TokenStats`."""
    if further:
        # The class has all fields and properties of TokenStats, though it is not a subclass.
        return cast(TokenStats, FurtherTokenStats(logprob, entropy, lse, **further))
    return TokenStats(logprob, entropy, lse)


def public_stats(stats: TokenStats) -> TokenStats:
    """Detach all statistics but log-prob and entropy, as the public functions promise."""
    named = {name: x for name, x in stats._asdict().items() if x is not None}
    further = {name: named[name].detach() for name in FURTHER_STATS if name in named}
    return stats_tuple(stats.logprob, stats.entropy, stats.lse.detach(), further)


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    entropy_grad: bool = True,
    with_stats: Iterable[str] = (),
) -> TokenStats:
    """Define `fastrlhf.token_stats` by `log_softmax` and `gather`; differentiable to any order.

    A row of nothing but -inf has no distribution: log-prob and lse -inf, entropy 0, gradient 0.
    """
    return public_stats(
        differentiable_stats(
            logits, targets, temperature=temperature, softcap=softcap, scale=scale,
            ignore_index=ignore_index, entropy=entropy, entropy_grad=entropy_grad,
            with_stats=with_stats,
        )
    )  # fmt: skip


def differentiable_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    entropy_grad: bool = True,
    with_stats: Iterable[str] = (),
) -> TokenStats:
    """Define the same statistics, but with gradients of the lse and the mean logit too."""
    targets = targets.long()
    live = targets != ignore_index
    empty = (capped_logits(logits, softcap, scale) == -torch.inf).all(-1)
    regular = (live & ~empty).unsqueeze(-1)
    x = torch.where(regular, logits, 0.0).to(accumulation_dtype(logits.dtype))
    rows_t = (
        temperature.to(x.dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    )
    capped = capped_logits(x, softcap, scale)
    log_p = F.log_softmax(capped / rows_t, dim=-1)
    lse = torch.logsumexp(capped / rows_t, dim=-1)
    index = torch.where(live, targets, 0)
    logprob = log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)

    def of_row(value: Tensor, if_empty: float) -> Tensor:
        return torch.where(live, torch.where(empty, if_empty, value), 0.0)

    row_entropy = None
    if entropy:
        # 0·ln 0 = 0, also for the derivative: a word of probability 0 adds nothing.
        finite_log_p = torch.where(log_p == -torch.inf, 0.0, log_p)
        row_entropy = of_row(-(log_p.exp() * finite_log_p).sum(-1), 0.0)
        row_entropy = row_entropy if entropy_grad else row_entropy.detach()
    further = {}
    if "is_top1" in with_stats:
        top = capped.detach().argmax(-1)
        further["is_top1"] = (top == index) & (lse < torch.inf) & live & ~empty
    if "mean_logit" in with_stats:
        further["mean_logit"] = of_row((capped / rows_t).mean(-1), -torch.inf)
    if "log_sum_sq_probs" in with_stats:
        further["log_sum_sq_probs"] = of_row(torch.logsumexp(2 * log_p.detach(), -1), 0.0)
    return stats_tuple(of_row(logprob, -torch.inf), row_entropy, of_row(lse, -torch.inf), further)


def kept_token_stats(
    logits: Tensor,
    targets: Tensor,
    support: tuple[Tensor, Tensor],
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    with_stats: Iterable[str] = (),
) -> TokenStats:
    """Define `fastrlhf.token_stats` over kept ids by logits that are -inf everywhere else.

    Where a token keeps its target alone, log-prob and entropy are 0, whatever its logit is.
    """
    live = targets != ignore_index
    ids, offsets = support
    token = torch.repeat_interleave(offsets.diff())
    of_live = live.reshape(-1)[token]
    kept = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).view(
        -1, logits.shape[-1]
    )
    kept[token[of_live], ids[of_live].long()] = True
    kept = kept.view(logits.shape)
    counts = kept.sum(-1)
    x = torch.where(kept, logits, 0.0).to(accumulation_dtype(logits.dtype))
    capped = torch.where(kept, capped_logits(x, softcap, scale), -torch.inf)
    certain = (counts == 1).unsqueeze(-1)
    options: dict[str, Any] = {"temperature": temperature, "ignore_index": ignore_index}
    names = [name for name in with_stats if name != "mean_logit"]
    stats = token_stats(
        torch.where(certain, torch.where(kept, 0.0, -torch.inf), capped), targets,
        entropy=entropy, with_stats=names, **options,
    )  # fmt: skip
    lse = torch.where(certain.squeeze(-1), token_stats(capped, targets, **options).lse, stats.lse)
    further = {name: getattr(stats, name) for name in names}
    if "mean_logit" in with_stats:
        total = torch.where(kept, capped, 0.0).sum(-1).detach()
        further["mean_logit"] = torch.where(live, total / counts.clamp(min=1) / temperature, 0.0)
    return stats_tuple(stats.logprob, stats.entropy, lse, further)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> TokenStats:
    """Define `fastrlhf.linear_token_stats`: the statistics of the logits of a linear head."""
    dtype = accumulation_dtype(hidden.dtype)
    live = (targets != ignore_index).unsqueeze(-1)
    # Ignored hidden states may be NaN, and must not reach the weight's gradient, a sum over rows.
    logits = torch.where(live, hidden, 0.0).to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    return token_stats(logits, targets, ignore_index=ignore_index, **options)
