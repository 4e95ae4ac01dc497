"""The losses of torch.nn.functional that are known: cross_entropy, nll_loss and kl_div.

They return NotImplemented for a call that is not known in this form; then the logits are built.
"""

from typing import Any

import torch
from torch import Tensor

from . import scores
from .maps import dtype_of
from .meaning import Kind, Words
from .recipe import Recipe
from .report import Cost
from .tensor import LazyTensor, computed
from .views import same


def cross_entropy(
    recipe: Recipe, x: LazyTensor, target: Any, weight: Any = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    """Compute it from lazy logits or log-probs. The target is one word for each token, or the
    probabilities of all words.
    """
    words = x.meaning() if isinstance(x, LazyTensor) else None
    if words is None or words.factor != 1 or words.kind not in (Kind.LOGITS, Kind.LOGPROBS):
        return NotImplemented
    if size_average is not None or reduce is not None:
        return NotImplemented
    if isinstance(target, LazyTensor):
        plain = weight is None and label_smoothing == 0
        return _of_probs(recipe, x, words, target, reduction) if plain else NotImplemented
    return _of_words(recipe, x, words, target, weight, ignore_index, reduction, label_smoothing)


def nll_loss(
    recipe: Recipe, x: LazyTensor, target: Any, weight: Any = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: str = "mean",
) -> Any:  # fmt: skip
    """Compute it from lazy log-probs, with one word for each token as the target."""
    words = x.meaning() if isinstance(x, LazyTensor) else None
    if words is None or words.factor != 1 or words.kind is not Kind.LOGPROBS:
        return NotImplemented
    if size_average is not None or reduce is not None:
        return NotImplemented
    return _of_words(recipe, x, words, target, weight, ignore_index, reduction, 0.0)


def _of_words(
    recipe: Recipe, x: LazyTensor, words: Words, target: Any, weight: Any, ignore_index: int,
    reduction: str, label_smoothing: float,
) -> Any:  # fmt: skip
    of, index = words.first, words.first.rows.numbers
    is_word = isinstance(target, Tensor) and not target.is_floating_point()
    classes_are_words = x.ndim + x.vocab_dim == min(1, x.ndim - 1)
    if not is_word or not classes_are_words or target.shape != index.shape:
        return NotImplemented
    if target.device != x.device or reduction not in ("none", "mean", "sum"):
        return NotImplemented
    if (weight is not None or not scores.is_linear(of)) and label_smoothing != 0:
        return NotImplemented
    if weight is not None and (type(weight) is not Tensor or weight.requires_grad):
        return NotImplemented
    target = target.to(torch.int64)
    live = target != ignore_index
    targets = torch.where(live, target, scores.IGNORED)
    weights = None
    if weight is not None:
        weights = torch.where(live, weight[torch.where(live, target, 0)], 0)

    def compute() -> Tensor:
        if reduction == "none":
            losses = scores.cross_entropy_of(of, targets, label_smoothing=label_smoothing)
            return losses if weights is None else losses * weights
        total = scores.sum_of_cross_entropy(of, targets, weights, label_smoothing)
        # Without any token, gradients are zero whatever the total is divided by, as in PyTorch.
        total = torch.where(live.any(), total, total.detach())
        if reduction == "sum":
            return total
        return total / (live.sum() if weights is None else weights.sum())

    empty = torch.empty(0, dtype=torch.int64, device=x.device)
    dtype = dtype_of(recipe, x, empty)
    cost = Cost(1, 2, 4 if reduction == "none" else 3)
    return computed(recipe, [x], compute, dtype=dtype, cost=cost)


def _of_probs(
    recipe: Recipe, x: LazyTensor, words: Words, target: LazyTensor, reduction: str
) -> Any:
    p, alike = target.meaning(), x.shape == target.shape and x.vocab_dim == target.vocab_dim
    classes_are_words = x.ndim + x.vocab_dim == min(1, x.ndim - 1)
    if p is None or p.kind is not Kind.PROBS or p.factor != 1 or not (alike and classes_are_words):
        return NotImplemented
    pair = p.first, words.first
    if any(of.rules_out for of in pair):
        return NotImplemented
    if reduction not in ("none", "mean", "sum") or not scores.are_comparable(*pair):
        return NotImplemented

    def compute() -> Tensor:
        losses = scores.soft_cross_entropies(*pair)
        return losses if reduction == "none" else getattr(losses, reduction)()

    dtype = dtype_of(recipe, x, target)
    return computed(recipe, [x, target], compute, dtype=dtype, cost=Cost(3, 4, 5))


def kl_div(
    recipe: Recipe, x: Any, target: Any, size_average: Any = None, reduce: Any = None,
    reduction: str = "mean", log_target: bool = False,
) -> Any:  # fmt: skip
    """KL(p || q) of the log-probs of q and the probabilities, or log-probs, of p."""
    both = isinstance(x, LazyTensor) and isinstance(target, LazyTensor)
    if not both or x.shape != target.shape or not x.vocab_dim == target.vocab_dim == -1:
        return NotImplemented
    q, p = x.meaning(), target.meaning()
    if q is None or p is None or size_average is not None or reduce is not None:
        return NotImplemented
    known = q.kind is Kind.LOGPROBS and p.kind is (Kind.LOGPROBS if log_target else Kind.PROBS)
    if not known or p.factor != 1 or q.factor != 1:
        return NotImplemented
    pair = p.first, q.first
    dtype = torch.promote_types(x.dtype, target.dtype)
    if torch.is_autocast_enabled(x.device.type) or any(of.rules_out for of in pair):
        return NotImplemented
    if reduction == "none":
        return same(recipe, x, Words(Kind.DIVERGENCE_TERMS, pair), dtype)
    counts = {"sum": 1, "batchmean": x.shape[0], "mean": x.numel()}
    if reduction not in counts or not scores.are_comparable(*pair):
        return NotImplemented
    parents = [x, target]
    return computed(
        recipe, parents, lambda: scores.divergences(*pair).sum() / counts[reduction], dtype=dtype,
        cost=Cost(2, 3, 4),
    )  # fmt: skip
