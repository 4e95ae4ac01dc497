"""Functions that choose among the tokens of logits, or lay them out anew: indexing, reshape, split.

A lazy tensor has one number for each token, which says where the token's words come from (see
`meaning.Rows`). These numbers are an ordinary tensor, laid out as the tokens are. So a view of the
lazy tensor is the same view of that tensor, from which its shape and strides follow.

Dims: V vocabulary.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .meaning import LAID_OUT, View, Words
from .recipe import Recipe
from .tensor import LazyTensor, derived, form_of


def of_rows(index: Tensor, vocab: int, dtype: torch.dtype, vocab_dim: int = -1) -> Tensor:
    """A tensor on the meta device, laid out as numbers of tokens (...) are, each with V words."""
    strides = [n * vocab for n in index.stride()]
    made = torch.empty_strided((*index.shape, vocab), (*strides, 1), dtype=dtype, device="meta")
    return made.movedim(-1, vocab_dim)


def viewed(
    recipe: Recipe, x: LazyTensor, view: View, step: Any, *, distinct: bool = True,
    dtype: torch.dtype | None = None, vocab_dim: int = -1, is_part: bool = False,
) -> Any:  # fmt: skip
    """Some tokens of a tensor, chosen or laid out by a view of their numbers. `is_part`: whether
    this is one of the parts that a loop goes through.
    """
    words = x.meaning()
    if words is None or x.stride(x.vocab_dim) != 1:
        return NotImplemented
    if is_part:
        words = words.marked_as_whole()
    words = words.viewed(view, step, distinct=distinct)
    vocab = x.shape[x.vocab_dim]
    like = of_rows(words.first.rows.numbers, vocab, dtype or x.dtype, vocab_dim)
    return derived(recipe, words, like, vocab_dim=vocab_dim, view=True)


def same(
    recipe: Recipe, x: LazyTensor, words: Words | None, dtype: torch.dtype | None = None
) -> Any:
    """The same tokens with `words` as their meaning, laid out as the function lays them out."""
    if words is None:
        return NotImplemented
    args, kwargs = tree_map(_form, (recipe.args, recipe.kwargs))
    form = recipe.func(*args, **kwargs).to(dtype or x.dtype)
    return derived(recipe, _lying_as(words, x, form), form, vocab_dim=x.vocab_dim)


def copied(recipe: Recipe, x: LazyTensor, dtype: torch.dtype | None = None) -> Any:
    """A copy of the same numbers, which is laid out as `x` where `x` has no gaps."""
    words = x.meaning()
    if words is None:
        return NotImplemented
    form = torch.empty_like(form_of(x), dtype=dtype)
    return derived(recipe, _lying_as(words, x, form), form, vocab_dim=x.vocab_dim)


def _form(x: Any) -> Any:
    return form_of(x) if isinstance(x, Tensor) else x


def _lying_as(words: Words, x: LazyTensor, form: Tensor) -> Words:
    """The same words, with numbers of tokens that are laid out as the tensor `form`.

    Where the words of a token do not lie in one piece they stay as they are, since `viewed` then
    knows no view of the result.
    """
    form = form.movedim(x.vocab_dim, -1)
    strides = [n // form.shape[-1] for n in form.stride()[:-1]]
    if form.stride(-1) != 1:
        return words

    def laid_out(numbers: Tensor) -> Tensor:
        if list(numbers.stride()) == strides:
            return numbers
        made = torch.empty_strided(numbers.shape, strides, dtype=numbers.dtype, device=x.device)
        return made.copy_(numbers)

    return words._replace(of=tuple(of.laid_out(laid_out) for of in words.of))


def getitem(recipe: Recipe, x: LazyTensor, index: Any) -> Any:
    """x[index], where all words of a token are taken."""
    given = index if isinstance(index, tuple) else (index,)
    parts = of_all_dims(given, x.ndim)
    if parts is None or (len(parts) and parts[-1] != slice(None)):
        return NotImplemented
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if any(isinstance(part, LazyTensor | list) for part in parts):
        return NotImplemented
    whole = tuple(parts[:-1])
    if not whole:
        return NotImplemented
    chosen = [part for part in tensors if part.dtype not in (torch.bool, torch.uint8)]
    step = ("getitem", tuple(map(_told, whole)))
    return viewed(recipe, x, lambda rows: rows[whole], step, distinct=not chosen)


def with_tensors(index: Any, x: LazyTensor) -> Any:
    """An index whose lists of numbers are tensors, as PyTorch takes them."""

    def tensor(part: Any) -> Any:
        numbers = isinstance(part, list) and all(type(n) is int for n in part)
        return torch.tensor(part, dtype=torch.int64, device=x.device) if numbers else part

    return tuple(map(tensor, index)) if isinstance(index, tuple) else tensor(index)


def of_all_dims(given: tuple[Any, ...], dims: int) -> list[Any] | None:
    """An index for each dimension; the last for that of the vocabulary. None: it is not known."""
    counts = [_dims_of(part) for part in given]
    if None in counts or sum(part is Ellipsis for part in given) > 1:
        return None
    missing = dims - sum(n for n in counts if n is not None)
    if missing < 0:
        return None
    filled = [slice(None)] * missing
    at = next((i for i, part in enumerate(given) if part is Ellipsis), len(given))
    parts = [*given[:at], *filled, *given[at + 1 :]]
    return parts if _dims_of(parts[-1]) == 1 else None


def _dims_of(part: Any) -> int | None:
    """How many dimensions a part of an index is for."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, bool):
        return None
    if isinstance(part, Tensor):
        return part.ndim if part.dtype in (torch.bool, torch.uint8) else 1
    return 1 if isinstance(part, int | slice) else None


def _told(x: Any) -> Any:
    """A key that tells an index from others. It keeps a tensor, lest its id become another's."""
    if not isinstance(x, Tensor):
        return repr(x)
    # A tensor of inference mode does not tell whether it was written into, so it equals no other.
    return object() if x.is_inference() else (_Kept(x), x._version)


class _Kept:
    def __init__(self, x: Tensor):
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Kept) and self.x is other.x

    def __hash__(self) -> int:
        return id(self.x)


def reshape(recipe: Recipe, x: LazyTensor, *shape: Any) -> Any:
    """view, reshape, flatten, squeeze, ...: whatever keeps the order of numbers."""
    if any(isinstance(part, torch.dtype) for part in shape):
        return NotImplemented
    # Where PyTorch has no view of x, this raises its error.
    shaped = recipe.func(form_of(x), *recipe.args[1:], **recipe.kwargs).shape
    if not shaped or shaped[-1] != x.shape[-1]:
        return NotImplemented
    lead = shaped[:-1]
    return viewed(recipe, x, lambda rows: rows.reshape(lead), (LAID_OUT, lead))


def transpose(recipe: Recipe, x: LazyTensor, *dims: Any, **named: Any) -> Any:
    """transpose, permute, movedim, mT: the vocabulary may become any dimension."""
    words = x.meaning()
    if words is None:
        return NotImplemented
    order = torch.empty(list(range(1, x.ndim + 1)), device="meta")
    moved = recipe.func(order, *recipe.args[1:], **recipe.kwargs)
    if moved.ndim != x.ndim:
        return NotImplemented
    at = [n - 1 for n in moved.shape]
    own = x.ndim + x.vocab_dim
    vocab_dim = at.index(own) - x.ndim
    lead = [n - (n > own) for n in at if n != own]
    return viewed(
        recipe, x, lambda rows: rows.permute(lead), ("permute", tuple(lead)), vocab_dim=vocab_dim
    )


def parts(recipe: Recipe, x: LazyTensor, *args: Any, **kwargs: Any) -> Any:
    """split, chunk, unbind, ...: several views of one tensor, along tokens."""
    words = x.meaning()
    if words is None or x.ndim < 2:
        return NotImplemented
    vocab = x.shape[-1]
    of_form = recipe.func(torch.empty(x.shape, device="meta"), *args, **kwargs)
    if any(not part.ndim or part.shape[-1] != vocab for part in of_form):
        return NotImplemented
    dim = _dim_of(recipe, args, kwargs)
    if dim is None or dim % x.ndim == x.ndim - 1:
        return NotImplemented
    name, dim, start, parts = recipe.func.__name__, dim % x.ndim, 0, []
    for n, form in enumerate(of_form):
        of_part = recipe._replace(func=Part(recipe.func, n))
        step: Any = (name, repr(args), repr(kwargs), n)
        if len(of_form) == 1:
            step = (LAID_OUT, form.shape[:-1])
        if name == "unbind":
            view = partial(torch.select, dim=dim, index=n)
        else:
            view = partial(torch.narrow, dim=dim, start=start, length=form.shape[dim])
            start += form.shape[dim]
        is_part = len(of_form) >= _PARTS_OF_A_LOOP
        parts.append(viewed(of_part, x, view, step, is_part=is_part))
    return tuple(parts)


# From so many parts on, a loop over all of them is expected. Of two, such as a prompt and its
# completion, often one alone is wanted.
_PARTS_OF_A_LOOP = 3
# How many arguments of a function come before dim.
_BEFORE_DIM = {"split": 1, "chunk": 1, "unbind": 0, "tensor_split": 1, "split_with_sizes": 1}


def is_one_of_several(x: LazyTensor) -> bool:
    """Whether this is one of several views that a call made, such as split, or a view of one."""
    while x.recipe is not None and isinstance(of := x.recipe.args[0], LazyTensor):
        if of.memory is not x.memory:
            break
        if isinstance(x.recipe.func, Part):
            return True
        x = of
    return False


def _dim_of(recipe: Recipe, args: Any, kwargs: Any) -> int | None:
    before = _BEFORE_DIM.get(recipe.func.__name__)
    if before is None:
        return None
    return kwargs.get("dim", args[before] if len(args) > before else 0)


class Part:
    """A function that returns the n-th of those that another function returns."""

    def __init__(self, function: Any, n: int):
        self.function, self.n = function, n
        self.__name__ = function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)[self.n]


def one_dim(recipe: Recipe, x: LazyTensor, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    """select, narrow, index_select: along tokens."""
    if not isinstance(dim, int) or not -x.ndim <= dim < x.ndim or dim % x.ndim == x.ndim - 1:
        return NotImplemented
    at = dim % x.ndim
    given = [*args, *kwargs.values()]
    step = (recipe.func.__name__, at, tuple(map(_told, given)))
    distinct = recipe.func.__name__ != "index_select"
    return viewed(
        recipe, x, lambda rows: recipe.func(rows, at, *args, **kwargs), step, distinct=distinct
    )


def iterate(recipe: Recipe, x: LazyTensor) -> Any:
    """The rows of x, one after the other."""
    if x.ndim < 2:
        return NotImplemented
    return iter(x.unbind(0))


def expand(recipe: Recipe, x: LazyTensor, *sizes: Any) -> Any:
    shape = recipe.func(
        torch.empty(x.shape, device="meta"), *recipe.args[1:], **recipe.kwargs
    ).shape
    if shape[-1] != x.shape[-1] or x.shape[-1] == 1:
        return NotImplemented
    lead, distinct = shape[:-1], shape.numel() == x.numel()
    return viewed(recipe, x, lambda rows: rows.expand(lead), ("expand", lead), distinct=distinct)


def broadcast(recipe: Recipe, *tensors: Any) -> Any:
    """broadcast_tensors: each is expanded to their common shape."""
    if not all(isinstance(x, Tensor) for x in tensors):
        return NotImplemented
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    return tuple(x.expand(shape) for x in tensors)
