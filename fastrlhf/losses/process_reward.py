"""Process reward models: the loss of the steps of a solution, and one score from all of them.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_tokens
from fastrlhf.losses.reduce import check_reduction, masked_mean, token_weights
from fastrlhf.ops.checks import (
    check_bool,
    check_dense,
    check_floating,
    check_one_of,
    check_real,
    check_same_device,
    known_on_host,
)
from fastrlhf.ops.ranks import Group
from fastrlhf.reference import Layout, accumulation_dtype, log_sigmoid, sigmoid

Aggregation = Literal["min", "product", "last", "mean"]

AGGREGATIONS = ("min", "product", "last", "mean")
_NO_LABEL = -100


def process_reward_loss(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the cross-entropy of a process reward model at the ends of steps.

    Eager equivalent::

        s = scores if scores.shape == labels.shape else scores[..., 1] - scores[..., 0]
        losses = -labels * F.logsigmoid(s) - (1 - labels) * F.logsigmoid(-s)
        loss = losses[mask].mean()

    Args:
        scores: (B, T), s of a step that is right with probability σ(s); or (B, T, 2), logits of the
            classes wrong and right, of which s is the difference: this is the cross-entropy of
            their softmax.
        labels: (B, T), 1 where the step is right, 0 where it is wrong, or anything between: a share
            of continuations that reached the answer.
        mask: (B, T) bool or 0/1, the ends of steps, one token each; elsewhere scores and labels can
            hold anything. None: all tokens but those labelled -100.
        reduction: "token-mean", over all steps; "sequence-mean", over the sequences' means of their
            steps; "sequence-sum", over the sequences' sums; "constant", the sum over the
            normalizer.
        normalizer: positive number, or 0-d tensor (whose value is not checked), that replaces the
            number of steps or sequences; see `policy_loss` and `global_normalizer`.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last; with
            them, what is (B, T) is (N,) or (1, N).
        group: torch.distributed group over whose ranks the tokens of each sequence are spread, see
            `fastrlhf.losses.ranks`; None: all are here.

    Returns:
        loss: 0-d, fp32 (fp64 for fp64 scores), differentiable with respect to scores, twice too.
        metrics: detached 0-d tensors: "rewards/accuracies", the share of steps with s > 0 where the
            label is above ½, and s ≤ 0 where it is not; "rewards/positives", the share of labels
            above ½.

    A batch without steps has loss 0 and gradient 0.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; on the CPU, labels of
            steps that are not in [0, 1].

    Source: 2312.08935, the loss L_PRM of section 3.2 (with the minus sign that makes it one), there
    "sequence-sum"; labels as shares its Eq. 4.

    Example:
        >>> scores = torch.tensor([[0.0, 2.0, 0.0, -1.0]])
        >>> labels = torch.tensor([[-100.0, 1.0, -100.0, 0.0]])  # two tokens end a step
        >>> loss, metrics = fastrlhf.process_reward_loss(scores, labels)
        >>> loss, metrics["rewards/accuracies"]
        (tensor(0.2201), tensor(1.))
    """
    check_floating("scores", scores)
    check_real("labels", labels)
    scores = _one_score("scores", scores, labels)
    mask = labels != _NO_LABEL if mask is None else mask
    layout = check_tokens("scores", scores, mask, cu_seqlens, group)
    check_same_device("labels", labels, "scores", scores)
    normalizer = check_reduction(reduction, normalizer)
    inside, dtype = mask != 0, scores.dtype
    y = torch.where(inside, labels.detach(), 0).to(dtype)
    _check_labels(y)
    s = torch.where(inside, scores, 0.0)
    # A label of 0 or 1 has one term, even where the other one is infinite.
    losses = torch.where(y > 0, -y * log_sigmoid(s), 0.0)
    losses = losses + torch.where(y < 1, (y - 1) * log_sigmoid(-s), 0.0)
    weights = token_weights(inside, reduction, normalizer, dtype, layout)
    loss = layout.total(losses * weights)
    positive = y > 0.5
    metrics = {"accuracies": (s.detach() > 0) == positive, "positives": positive}
    return loss, {
        f"rewards/{name}": masked_mean(x.to(dtype), inside, layout) for name, x in metrics.items()
    }


def process_reward_scores(
    scores: Tensor,
    mask: Tensor,
    how: Aggregation = "min",
    *,
    log: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Make one score of a sequence from those of its steps, to choose among answers by.

    Eager equivalent, of one sequence, with r = σ(scores[mask]): `r.min()`, `r.prod()`, `r[-1]` or
    `r.mean()`.

    Args:
        scores: (B, T), a step being right with probability σ(score); or (B, T, 2), as
            `process_reward_loss`.
        mask: (B, T) bool or 0/1, the ends of steps; elsewhere scores can hold anything.
        how: "min", "product", "last" or "mean", of the probabilities.
        log: return the logarithm, which orders sequences where the probabilities are too near to 0
            or to 1 to tell apart.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last; with
            them, what is (B, T) is (N,) or (1, N).

    Returns:
        (B,) in [0, 1], with log in nats; fp32 (fp64 for fp64 scores), computed from logarithms.
        Differentiable with respect to scores. A sequence without steps has score 0, and no
        gradient: nothing speaks for it.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; an unknown word for how.

    Source: the product 2305.20050; the minimum 2312.08935, section 3.4; the last step 2408.03314.

    Example:
        >>> scores = torch.tensor([[0.0, 2.0, 0.0, -1.0]])
        >>> ends = torch.tensor([[False, True, False, True]])
        >>> fastrlhf.process_reward_scores(scores, ends, "min")
        tensor([0.2689])
        >>> fastrlhf.process_reward_scores(scores, ends, "product")
        tensor([0.2369])
    """
    check_floating("scores", scores)
    check_dense("mask", mask)
    scores = _one_score("scores", scores, mask, "mask")
    layout = check_tokens("scores", scores, mask, cu_seqlens)
    check_one_of("how", how, AGGREGATIONS)
    check_bool("log", log)
    inside, counts = mask != 0, layout.counts(mask)
    s = torch.where(inside, scores, 0.0)
    r = log_sigmoid(s)
    if how == "min":
        log_scores = _extreme(r, inside, layout, "amin")
    elif how == "mean":
        log_scores = _log_mean(s, r, inside, layout)
    else:
        counted = inside if how == "product" else layout.last(mask)
        log_scores = layout.sums(torch.where(counted, r, 0.0))
    log_scores = torch.where(counts > 0, log_scores, -torch.inf)
    return log_scores if log else log_scores.exp()


def _one_score(name: str, scores: Tensor, like: Tensor, like_name: str = "labels") -> Tensor:
    """Return scores of the shape of another tensor, in fp32 or fp64: as they are, or the difference
    of two logits for each.
    """
    shape = tuple(like.shape)
    if tuple(scores.shape) not in (shape, (*shape, 2)):
        raise ValueError(
            f"{name}: expected shape {shape} (the shape of {like_name}) or {(*shape, 2)}, got "
            f"{tuple(scores.shape)}"
        )
    scores = scores.to(accumulation_dtype(scores.dtype))
    return scores if scores.ndim == like.ndim else scores[..., 1] - scores[..., 0]


def _check_labels(labels: Tensor) -> None:
    """Raise ValueError for a label outside of [0, 1], on the CPU: elsewhere it would be awaited."""
    if known_on_host(labels):
        outside = ~((labels >= 0) & (labels <= 1))
        if outside.any():
            worst = labels[outside][0].item()
            raise ValueError(f"labels: expected numbers in [0, 1] at the mask, got {worst}")


def _log_mean(s: Tensor, r: Tensor, inside: Tensor, layout: Layout) -> Tensor:
    """Compute ln of the mean of e^r within the mask, (B,), for r = ln σ(s): relative to the
    largest, or, where the mean is near 1, from 1 minus the mean, of which no digits are lost.
    """
    counts = layout.counts(inside).clamp(min=1)
    missing = layout.sums(torch.where(inside, sigmoid(-s), 0.0)) / counts
    peak = _extreme(r.detach(), inside, layout, "amax").clamp(min=torch.finfo(r.dtype).min)
    mean = layout.sums(torch.where(inside, (r - layout.spread(peak)).exp(), 0.0)) / counts
    none = layout.sums((inside & (r > -torch.inf)).to(r.dtype)) == 0
    # A branch that is not taken has a slope of 0, which times that of ln 0 would be NaN.
    near, mean = missing < 0.5, torch.where(mean > 0, mean, 1.0)
    far = torch.where(none, -torch.inf, peak + mean.log())
    return torch.where(near, torch.log1p(-missing.clamp(max=0.5)), far)


def _extreme(x: Tensor, inside: Tensor, layout: Layout, how: Any) -> Tensor:
    """Find the least or the largest of each sequence, (B,), within the mask; 0 if it has none."""
    without = torch.inf if how == "amin" else -torch.inf
    values = torch.where(inside, x, without).reshape(-1)
    start = values.new_full((layout.sequences(x),), without)
    extremes = start.scatter_reduce(0, layout.ids(x).reshape(-1), values, how)
    return torch.where(layout.counts(inside) > 0, extremes, 0.0)
