"""Losses of reward models: pairs (Bradley–Terry) and rankings (Plackett–Luce).

`rankings.py` applies the ranking loss to a policy; `process_reward.py` has the loss of a model that
scores single steps.

Dims: P pairs, M items, K groups.
"""

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_like
from fastrlhf.losses.reduce import masked_mean
from fastrlhf.losses.segments import suffix_scan
from fastrlhf.ops.backend import is_batched
from fastrlhf.ops.checks import (
    check_finite,
    check_floating,
    check_integer,
    wide_integers,
)
from fastrlhf.reference import accumulation_dtype, log_add_exp, log_sigmoid


def reward_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margin: Tensor | float | None = None,
    center_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the Bradley–Terry loss of each preference pair, from the scores of a reward model.

    Eager equivalent: `-F.logsigmoid(chosen - rejected - margin) + center_coef * (chosen +
    rejected) ** 2`.

    Args:
        chosen_scores, rejected_scores: (P,).
        margin: (P,), or a number, by how much the chosen score should be higher; None: 0.
        center_coef: weight of the term that keeps scores around 0 (0.01 in its paper).

    Returns:
        losses: (P,), not reduced, fp32 (fp64 for fp64 scores), differentiable with respect to
            scores and margin, twice too.
        metrics: detached 0-d means over pairs, "rewards/chosen", "rewards/rejected",
            "rewards/margins", and "rewards/accuracies" (share of pairs with chosen > rejected).

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit.

    Source: Bradley & Terry (1952), 2203.02155 Eq. 1; margin 2307.09288 Eq. 2; centring 2312.09244.

    Example:
        >>> chosen, rejected = torch.tensor([1.0, 0.5]), torch.tensor([-1.0, 1.0])
        >>> loss, metrics = fastrlhf.reward_loss(chosen, rejected)
        >>> loss, metrics["rewards/accuracies"]
        (tensor([0.1269, 0.9741]), tensor(0.5000))
    """
    check_floating("chosen_scores", chosen_scores)
    if chosen_scores.ndim != 1:
        raise ValueError(f"chosen_scores: expected shape (P,), got {tuple(chosen_scores.shape)}")
    others = {"rejected_scores": rejected_scores}
    if isinstance(margin, Tensor):
        others["margin"] = margin
    elif margin is not None:
        margin = check_finite("margin", margin)
    for name, x in others.items():
        check_floating(name, x)
        check_like(name, x, "chosen_scores", chosen_scores)
    center_coef = check_finite("center_coef", center_coef)
    dtype = accumulation_dtype(torch.promote_types(chosen_scores.dtype, rejected_scores.dtype))
    chosen, rejected = chosen_scores.to(dtype), rejected_scores.to(dtype)
    difference = chosen - rejected
    if isinstance(margin, Tensor):
        margin = margin.to(dtype)
    losses = -log_sigmoid(difference if margin is None else difference - margin)
    if center_coef != 0:
        losses = losses + center_coef * (chosen + rejected).square()
    pairs = torch.ones_like(chosen, dtype=torch.bool)
    with torch.no_grad():
        metrics = {
            "rewards/chosen": masked_mean(chosen, pairs),
            "rewards/rejected": masked_mean(rejected, pairs),
            "rewards/margins": masked_mean(difference, pairs),
            "rewards/accuracies": masked_mean((difference > 0).to(dtype), pairs),
        }
    return losses, metrics


def plackett_luce_loss(scores: Tensor, groups: Tensor, ranks: Tensor) -> Tensor:
    """Compute the Plackett–Luce loss of each ranking, from the scores of its items.

    Eager equivalent, for the scores s_1 … s_K of one ranking, best first: `sum(logsumexp(s[k:]) -
    s[k] for k in range(K))`.

    Args:
        scores: (M,) of the items of all rankings, in any order.
        groups: (M,) integer, which ranking an item belongs to; rankings may differ in length.
        ranks: (M,) integer, the item's place in its ranking, the best the smallest; no two alike
            (drop an item of a tie, or order it by chance).

    Returns:
        One loss for each ranking, in ascending order of their ids, fp32 (fp64 for fp64 scores);
        differentiable, twice too. A ranking of two has the loss of `reward_loss`, a ranking of one
        has 0. On a GPU, the number of rankings is awaited.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; two items of one rank.
        RuntimeError: groups or ranks that torch.func.vmap batches; it may batch scores.

    Source: Plackett (1975), Luce (1959); 2305.18290 appendix A.3.

    Example:
        >>> scores = torch.tensor([2.0, 1.0, -1.0])  # of one prompt, the best first
        >>> fastrlhf.plackett_luce_loss(scores, torch.tensor([0, 0, 0]), torch.tensor([1, 2, 3]))
        tensor([0.4759])
    """
    check_floating("scores", scores)
    if scores.ndim != 1:
        raise ValueError(f"scores: expected shape (M,), got {tuple(scores.shape)}")
    for name, x in (("groups", groups), ("ranks", ranks)):
        check_integer(name, x)
        check_like(name, x, "scores", scores)
    if is_batched(groups, ranks):
        raise RuntimeError(
            "plackett_luce_loss: does not work with groups or ranks batched by torch.func.vmap, "
            "for what they hold decides how many losses there are; give all rankings in one call"
        )
    order = ranks.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    ids, places = wide_integers(groups)[order], ranks[order]
    has_next = torch.zeros_like(ids, dtype=torch.bool)
    has_next[:-1] = ids[1:] == ids[:-1]
    if bool((has_next[:-1] & (places[1:] == places[:-1])).any()):
        raise ValueError(
            "ranks: expected different ranks within a group, got two items of one rank"
        )
    s = scores.to(accumulation_dtype(scores.dtype))[order]
    # The term -(s_k - lse of s_k and those behind) is -ln σ(s_k - lse of those behind), which keeps
    # its accuracy where s_k is far ahead.
    behind = torch.cat((suffix_scan(log_add_exp, s, ids)[1:], s[-1:]))
    terms = torch.where(has_next, -log_sigmoid(torch.where(has_next, s - behind, 0.0)), 0.0)
    first = torch.ones_like(has_next)
    first[1:] = ~has_next[:-1]
    return suffix_scan(torch.add, terms, ids)[first]
