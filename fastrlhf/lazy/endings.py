"""Functions that reduce the words of each token to few numbers: gather, argmax, logsumexp, sum, ...

Here a chain of lazy tensors ends, since numbers have to be returned. `scores` computes them from
what entered the head, without building logits. A function here returns NotImplemented for a call
that is not known in this form; then the logits are built (see `building`).

Dims: V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import scores
from .maps import dtype_of, is_vocab_dim, remember_lse
from .meaning import Distribution, Kind, Words
from .recipe import Recipe
from .report import Cost
from .tensor import LazyTensor, computed
from .views import Part, of_all_dims

_OF_FEW_WORDS = Cost(0, 0, 0)  # products with a few rows of the weight, no matmul of all words
_OF_LOGPROBS = Cost(1, 2, 4, of_statistics=True)
_OF_ONE_LOOK = Cost(1, 1, 1)
_OF_MEAN_OF_ALL_WORDS = Cost(1, 5, 8)  # 5 and 8 only if a gradient comes, which is seldom
_COSTS = {
    Kind.LOGITS: _OF_FEW_WORDS,  # their mean is a product with the mean row of the weight
    Kind.LOGPROBS: Cost(1, 2, 3),
    Kind.ENTROPY_TERMS: Cost(1, 3, 4, of_statistics=True),
    Kind.LOGIT_TERMS: Cost(1, 3, 4, of_statistics=True),
    Kind.DIVERGENCE_TERMS: Cost(2, 3, 4),
    Kind.CROSS_TERMS: Cost(3, 4, 5),
}

# Functions that take chosen words


def gather(recipe: Recipe, x: LazyTensor, dim: int, index: Tensor, **options: Any) -> Any:
    """Take the numbers of one word of each token, or of several."""
    words = x.meaning()
    alike = isinstance(index, Tensor) and index.ndim == x.ndim and index.device == x.device
    if options.get("sparse_grad") or not alike or x.vocab_dim != -1 or not is_vocab_dim(x, dim):
        return NotImplemented
    lead = index.shape[:-1]
    if words is None or any(n > m for n, m in zip(lead, x.shape[:-1], strict=True)):
        return NotImplemented
    if lead != x.shape[:-1]:
        corner = tuple(slice(n) for n in lead)
        words = words.viewed(lambda rows: rows[corner], ("corner", lead))
    return _of_words(recipe, x, words, index.squeeze(-1) if index.shape[-1] == 1 else index,
                     index.shape)  # fmt: skip


def take_along_dim(recipe: Recipe, x: LazyTensor, indices: Any, dim: Any = None) -> Any:
    """Gather, where the indices need no broadcasting; other calls are not known."""
    known = isinstance(indices, Tensor) and dim is not None and indices.ndim == x.ndim
    if not known or indices.shape[:-1] != x.shape[:-1]:
        return NotImplemented
    return gather(recipe, x, dim, indices)


def pick(recipe: Recipe, x: LazyTensor, index: Any) -> Any:
    """x[..., ids]: one word for each token, as a number or a tensor, after indices of tokens."""
    given = index if isinstance(index, tuple) else (index,)
    parts, words = of_all_dims(given, x.ndim), x.meaning()
    if parts is None or words is None or x.vocab_dim != -1 or any(p is None for p in parts):
        return NotImplemented
    *lead, ids = parts
    vocab = x.shape[-1]
    is_view = not any(isinstance(part, Tensor) and part.ndim for part in parts)
    if is_view and (words.kind is Kind.LOGITS or torch.is_inference_mode_enabled()):
        return NotImplemented  # writing into the view would write into the logits
    if isinstance(ids, int):
        if any(isinstance(part, Tensor) for part in lead) or not -vocab <= ids < vocab:
            return NotImplemented
        ids = torch.tensor(ids % vocab, device=x.device)
    elif not isinstance(ids, Tensor) or ids.dtype in (torch.bool, torch.uint8):
        return NotImplemented
    step = ("pick", repr(lead)) if not any(isinstance(p, Tensor) for p in lead) else (object(),)
    chosen = words.viewed(
        lambda rows: rows[tuple(lead)], step, distinct=not any(isinstance(p, Tensor) for p in lead)
    )
    shape = chosen.first.rows.numbers.shape
    if all(isinstance(part, Tensor) and part.dtype is torch.int64 for part in lead) and lead:
        shape = torch.broadcast_shapes(shape, ids.shape)
        chosen = chosen.viewed(lambda rows: rows.expand(shape), ("expand", shape), distinct=False)
        ids = ids.expand(shape)
    elif any(not isinstance(part, slice) for part in lead) and ids.ndim:
        return NotImplemented  # PyTorch puts the dimensions of such a result in another order
    else:
        shape = torch.Size((*shape, *ids.shape))
        if ids.ndim > 1:
            return NotImplemented
        ids = ids.expand(shape)
    ids = torch.where(ids < 0, ids + vocab, ids)
    result = _of_words(recipe, x, chosen, ids, shape)
    if is_view and result is not NotImplemented:
        x.history.viewed(x, result)
    return result


def _of_words(
    recipe: Recipe, x: LazyTensor, words: Words, targets: Tensor, shape: torch.Size
) -> Any:  # fmt: skip
    # A copy, since backward and later questions read the targets when the caller may have written
    # into them.
    compute = _of_targets(words, targets.to(torch.int64, copy=True))
    if compute is None:
        return NotImplemented
    cost = _OF_FEW_WORDS if words.kind is Kind.LOGITS else _OF_LOGPROBS
    if targets.ndim > words.first.rows.numbers.ndim and words.first.part_of is None:
        cost = cost._replace(of_statistics=False)  # several words are scored in their own pass
    return computed(recipe, [x], lambda: compute().view(shape), dtype=x.dtype, cost=cost)


def _of_targets(words: Words, targets: Tensor) -> Callable[[], Tensor] | None:
    of, factor = words.first, words.factor
    if words.kind is Kind.LOGPROBS:
        return lambda: scores.logprobs(of, targets) * factor
    if words.kind is Kind.PROBS:
        return lambda: scores.logprobs(of, targets).exp() * factor
    if words.kind is Kind.LOGITS and scores.is_linear(of):
        return lambda: scores.picked(of, targets)
    return None


# Functions that find the largest words


def argmax(recipe: Recipe, x: LazyTensor, dim: Any = None, keepdim: bool = False) -> Any:
    of = _ordered(x)
    if of is None or not is_vocab_dim(x, dim):
        return NotImplemented
    with torch.no_grad():
        return _without_graph(
            recipe, x, lambda: _best(of, x, partial(torch.argmax, dim=-1, keepdim=keepdim), keepdim)
        )


def largest(recipe: Recipe, x: LazyTensor, *args: Any, **kwargs: Any) -> Any:
    """max, amax: over the words. The gradient goes to the first of equal words, as that of max."""
    dim = kwargs.get("dim", args[0] if args else None)
    keepdim = kwargs.get("keepdim", args[1] if len(args) > 1 else False)
    of, words = _ordered(x), x.meaning()
    if isinstance(dim, tuple | list) and len(dim) == 1:
        (dim,) = dim
    if of is None or words is None or not is_vocab_dim(x, dim):
        return NotImplemented
    at = _without_graph(recipe, x, lambda: _best(of, x, partial(torch.argmax, dim=-1), False))
    both = recipe.func.__name__ == "max"
    of_values = recipe._replace(func=Part(recipe.func, 0)) if both else recipe
    shape = torch.Size((*at.shape, 1)) if keepdim else at.shape
    values = _of_words(of_values, x, words, at, shape)
    if values is NotImplemented or not both:
        return values
    return torch.return_types.max((values, at.view(shape)))


def topk(
    recipe: Recipe, x: LazyTensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> Any:
    of, words = _ordered(x), x.meaning()
    if of is None or words is None or not is_vocab_dim(x, dim):
        return NotImplemented

    def of_chunk(logits: Tensor) -> Tensor:
        return logits.topk(k, -1, largest, sorted).indices

    at = _without_graph(recipe, x, lambda: _best(of, x, of_chunk, True))
    values = _of_words(
        recipe._replace(func=Part(recipe.func, 0)), x, words, at.squeeze(-1) if k == 1 else at,
        at.shape,
    )  # fmt: skip
    return values if values is NotImplemented else torch.return_types.topk((values, at))


def _ordered(x: LazyTensor) -> Distribution | None:
    """The distribution whose logits order the words as these numbers do; None if none is known."""
    words = x.meaning()
    known = (Kind.LOGITS, Kind.LOGPROBS, Kind.PROBS)
    if words is None or words.kind not in known or x.vocab_dim != -1 or not words.factor > 0:
        return None
    of = words.first
    # With an offset, plain tensors would have the order of sums that are rounded twice.
    return of if scores.is_linear(of) and of.offset is None else None


def _best(
    of: Distribution, x: LazyTensor, reduce: Callable[[Tensor], Tensor], keepdim: bool
) -> Tensor:
    parts = scores.best(of, reduce, x.dtype)
    return torch.cat(parts).view((*x.shape[:-1], *parts[0].shape[1:]))


def _without_graph(recipe: Recipe, x: LazyTensor, compute: Callable[[], Tensor]) -> Tensor:
    return computed(recipe._replace(grad=False), [x], compute, dtype=torch.int64, cost=_OF_ONE_LOOK)


# Sums over all words


def logsumexp(recipe: Recipe, x: LazyTensor, dim: Any = None, keepdim: bool = False) -> Any:
    words = x.meaning()
    if isinstance(dim, tuple | list) and len(dim) == 1:
        (dim,) = dim
    if words is None or not is_vocab_dim(x, dim) or not scores.is_linear(words.first):
        return NotImplemented
    of, factor = words.first, words.factor
    of_power = words.kind is Kind.LOGPROBS and factor > 0  # ln Σ p^factor
    if words.kind is not Kind.LOGITS and not of_power:
        return NotImplemented
    shape = [1 if n - x.ndim == x.vocab_dim else size for n, size in enumerate(x.shape)]

    def compute() -> Tensor:
        lse = scores.log_sum_exp(of.scaled(factor) if of_power else of)
        if of_power:
            lse = lse - factor * scores.log_sum_exp(of)
        return lse.view(shape) if keepdim else lse

    cost = Cost(2, 4, 8) if of_power else _OF_LOGPROBS
    result = computed(recipe, [x], compute, dtype=dtype_of(recipe, x, dim=-1), cost=cost)
    if not of_power:
        remember_lse(result, of)
    return result


def add_up(
    recipe: Recipe, x: LazyTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    """sum, mean: over the words, and perhaps over tokens too."""
    words = x.meaning()
    dims = range(x.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    if any(not -x.ndim <= n < x.ndim for n in dims):
        return NotImplemented
    dims = [n % x.ndim for n in dims]
    if words is None or x.vocab_dim != -1 or x.ndim - 1 not in dims:
        return NotImplemented
    of_token = _sum_over_words(words)
    if of_token is None:
        return NotImplemented
    is_mean, vocab = recipe.func.__name__ == "mean", x.shape[-1]
    dtype = dtype_of(recipe, x, dim=-1, dtype=dtype)

    def compute() -> Tensor:
        sums = of_token().unsqueeze(-1)
        return sums.mean(dims, keepdim) / vocab if is_mean else sums.sum(dims, keepdim)

    cost = _COSTS[words.kind]
    by_all_words = words.kind is Kind.LOGITS and not scores.has_mean_row(words.first)
    if by_all_words:
        cost = _OF_MEAN_OF_ALL_WORDS
    return computed(recipe, [x], compute, dtype=dtype, cost=cost, again_for_gradient=by_all_words)


def _sum_over_words(words: Words) -> Callable[[], Tensor] | None:
    """A function that computes the sum over the words of each token; None: there is none."""
    of, factor = words.first, words.factor
    linear = scores.is_linear(of)
    compute: Any = {
        Kind.ENTROPY_TERMS: lambda: -scores.entropies(of),
        Kind.LOGIT_TERMS: (lambda: scores.expected_logits(of)) if linear else None,
        Kind.LOGPROBS: (lambda: scores.sum_of_logprobs(of)) if linear else None,
        Kind.LOGITS: (lambda: scores.mean_logits(of) * of.source.vocab) if linear else None,
    }.get(words.kind)
    if words.kind is Kind.DIVERGENCE_TERMS and scores.are_comparable(*words.of):
        compute = lambda: scores.divergences(*words.of)  # noqa: E731
    if words.kind is Kind.CROSS_TERMS and scores.are_comparable(*words.of):
        compute = lambda: -scores.soft_cross_entropies(*words.of)  # noqa: E731
    return None if compute is None else lambda: compute() * factor
