"""Functions that turn a number for each word into another number for each word: casts, division by
a temperature, softmax, products of two tensors, ...

They compute nothing: each returns a lazy tensor with another meaning (see `meaning`). For a call
whose result has no such meaning they return NotImplemented; then the logits are built.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .meaning import Distribution, Kind, Words
from .recipe import Recipe
from .tensor import LazyTensor, derived, form_of, written
from .views import copied, is_one_of_several, same


def dtype_of(recipe: Recipe, *examples: Any, **options: Any) -> torch.dtype:
    """The dtype that a function returns now, autocast included; a call on no tokens tells."""
    given = [
        torch.empty((0, 1), dtype=x.dtype, device=x.device) if isinstance(x, LazyTensor) else x
        for x in examples
    ]
    return recipe.func(*given, **options).dtype


def is_vocab_dim(x: LazyTensor, dim: Any) -> bool:
    return isinstance(dim, int) and -x.ndim <= dim < x.ndim and dim % x.ndim - x.ndim == x.vocab_dim


# Precision and device


def unchanged(recipe: Recipe, x: LazyTensor, **options: Any) -> Any:
    """contiguous, clone."""
    if options.get("memory_format", torch.contiguous_format) is not torch.contiguous_format and (
        options["memory_format"] is not torch.preserve_format
    ):
        return NotImplemented
    if recipe.func is Tensor.contiguous and x.is_contiguous():
        return x
    return same(recipe, x, x.meaning())


def detach(recipe: Recipe, x: LazyTensor) -> Any:
    words = x.meaning()
    if words is None:
        return NotImplemented
    return derived(recipe._replace(grad=False), words, form_of(x), vocab_dim=x.vocab_dim, view=True)


def cast(recipe: Recipe, x: LazyTensor, **options: Any) -> Any:
    """float, half, bfloat16, double."""
    if options:
        return NotImplemented
    dtype = recipe.func(torch.empty(0, dtype=x.dtype)).dtype
    return x if dtype is x.dtype else copied(recipe, x, dtype)


def to(recipe: Recipe, x: LazyTensor, *args: Any, **kwargs: Any) -> Any:
    """to, type: another dtype on the same device."""
    given = [*args, *kwargs.items()]
    dtype, device, copy = x.dtype, x.device, False
    for part in given:
        name, value = part if isinstance(part, tuple) else (None, part)
        if isinstance(value, LazyTensor):
            return NotImplemented
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, Tensor):
            dtype, device = value.dtype, value.device
        elif name == "copy":
            copy = bool(value)
        elif isinstance(value, str | torch.device | int) and not isinstance(value, bool):
            device = torch.device(value)
        elif not isinstance(value, bool) and value is not None:
            return NotImplemented  # a memory format
    if any(isinstance(part, bool) for part in args[2:]) or not dtype.is_floating_point:
        return NotImplemented
    if device.type != x.device.type or device.index not in (None, x.device.index):
        return NotImplemented
    if dtype is x.dtype and not copy:
        return x
    return copied(recipe, x, dtype)


def moved(recipe: Recipe, x: LazyTensor, device: Any = None) -> Any:
    """cpu, cuda: only to the device that it is on already."""
    name = recipe.func.__name__
    there = x.device if device is None else torch.device(name, device)
    return x if x.device.type == name and there == x.device else NotImplemented


# Transformations of logits, and of what was made of them


def negative(recipe: Recipe, x: LazyTensor) -> Any:
    words = x.meaning()
    if words is None or words.kind is Kind.LOGITS:
        return NotImplemented
    return same(recipe, x, words.times(-1.0))


def multiply(recipe: Recipe, x: Any, y: Any, **options: Any) -> Any:
    if options or not isinstance(x, LazyTensor):
        return NotImplemented if options else multiply(recipe, y, x)
    if isinstance(y, LazyTensor):
        return _product(recipe, x, y)
    factor = _number(y)
    return NotImplemented if factor is None else _times(recipe, x, factor)


def divide(recipe: Recipe, x: Any, y: Any, **options: Any) -> Any:
    if options or not isinstance(x, LazyTensor) or isinstance(y, LazyTensor):
        return NotImplemented
    divisor = _number(y)
    if divisor is not None:
        return _times(recipe, x, 1 / divisor) if divisor != 0 else NotImplemented
    words = x.meaning()
    if words is None or words.kind is not Kind.LOGITS or not isinstance(y, Tensor):
        return NotImplemented
    temperature = _of_tokens(x, y)
    if temperature is None:
        return NotImplemented
    return same(recipe, x, words._replace(of=(words.first.divided(temperature),)))


def _number(y: Any) -> float | None:
    """The finite number that y is, if that takes no gradient and no wait for a device; or None."""
    if isinstance(y, Tensor) and type(y) is Tensor and y.ndim == 0 and y.device.type == "cpu":
        y = None if y.requires_grad or y.is_complex() else y.item()
    if isinstance(y, bool) or not isinstance(y, int | float) or not math.isfinite(y):
        return None
    return float(y)


def _times(recipe: Recipe, x: LazyTensor, factor: float) -> Any:
    words = x.meaning()
    if words is None or (words.kind is Kind.LOGITS and not factor > 0):
        return NotImplemented
    return same(recipe, x, words.times(factor))


def _of_tokens(x: LazyTensor, y: Tensor) -> Tensor | None:
    """A divisor as one number for each token; None: it is something else."""
    lead = x.shape[:-1]
    known = type(y) is Tensor and y.device == x.device and y.is_floating_point()
    if not known or y.requires_grad or x.vocab_dim != -1 or y.ndim > x.ndim:
        return None
    if torch.promote_types(x.dtype, y.dtype) != x.dtype and y.ndim:
        return None
    if y.ndim and y.shape[-1] != 1:
        return None
    return (
        (y.squeeze(-1) if y.ndim else y)
        .to(torch.promote_types(y.dtype, torch.float32), copy=True)
        .expand(lead)
    )


def tanh(recipe: Recipe, x: LazyTensor) -> Any:
    words = x.meaning()
    if words is None or words.kind is not Kind.LOGITS:
        return NotImplemented
    of = words.first
    if of.capped or of.temperature is not None or of.offset is not None:
        return NotImplemented
    return same(recipe, x, words._replace(of=(of.tanh(),)))


def add(recipe: Recipe, x: Any, y: Any, **options: Any) -> Any:
    """Add a constant for each word, as BART does."""
    if not isinstance(x, LazyTensor):
        x, y = y, x
    words = x.meaning()
    if options or words is None or words.kind is not Kind.LOGITS or x.vocab_dim != -1:
        return NotImplemented
    of, known = words.first, type(y) in (Tensor, torch.nn.Parameter) and not y.requires_grad
    if not known or y.device != x.device or not y.is_floating_point() or y.ndim > x.ndim:
        return NotImplemented
    if y.numel() != x.shape[-1] or y.shape[-1] != x.shape[-1]:
        return NotImplemented
    if of.capped or of.temperature is not None:
        return NotImplemented
    dtype = torch.promote_types(x.dtype, y.dtype)
    offset = y.reshape(-1).to(torch.promote_types(y.dtype, torch.float32), copy=True)
    return same(recipe, x, words._replace(of=(of.added(offset),)), dtype)


def write(recipe: Recipe, x: Any, y: Any, **options: Any) -> Any:
    """Write in place, x /= y and x *= y; others in the same memory are built if they are used."""
    words = x.meaning() if isinstance(x, LazyTensor) else None
    if options or words is None or words.kind is not Kind.LOGITS or isinstance(y, LazyTensor):
        return NotImplemented
    if x.requires_grad and not recipe.grad:
        return NotImplemented  # under no_grad, the numbers get the factor, their gradient does not
    if x.is_of_others or any(y.is_watched for y in x.history.alive() if y.memory is x.memory):
        return NotImplemented  # their gradients are those of the numbers before the write
    if not words.first.rows.distinct or (x.requires_grad and is_one_of_several(x)):
        return NotImplemented  # PyTorch refuses to write into such views
    divides = "div" in recipe.func.__name__
    number = _number(y)
    if number is not None and number > 0:
        of = words.first.scaled(1 / number if divides else number)
    else:
        temperature = _of_tokens(x, y) if divides and isinstance(y, Tensor) else None
        if temperature is None:
            return NotImplemented
        of = words.first.divided(temperature)
    return written(recipe, x, words._replace(of=(of,)))


# From logits to probabilities


def log_softmax(
    recipe: Recipe, x: LazyTensor, dim: Any = None, *others: Any, dtype: Any = None,
    _stacklevel: int = 3,
) -> Any:  # fmt: skip
    return _softmax(recipe, x, Kind.LOGPROBS, dim, others, dtype)


def softmax(
    recipe: Recipe, x: LazyTensor, dim: Any = None, *others: Any, dtype: Any = None,
    _stacklevel: int = 3,
) -> Any:  # fmt: skip
    return _softmax(recipe, x, Kind.PROBS, dim, others, dtype)


def _softmax(
    recipe: Recipe, x: LazyTensor, kind: Kind, dim: Any, others: tuple[Any, ...], dtype: Any
) -> Any:
    # torch's function takes the dtype third, that of nn.functional fourth.
    dtype = next((x for x in others if isinstance(x, torch.dtype)), dtype)
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    words = x.meaning()
    if words is None or not is_vocab_dim(x, dim):
        return NotImplemented
    if words.kind is Kind.LOGPROBS and words.factor > 0:  # log-probs are logits of the same softmax
        words = Words(Kind.LOGITS, (words.first.scaled(words.factor),))
    if words.kind is not Kind.LOGITS:
        return NotImplemented
    if dtype is None:
        dtype = dtype_of(recipe, x, dim=-1)
    return same(recipe, x, Words(kind, words.of), dtype)


def logarithm(recipe: Recipe, x: LazyTensor) -> Any:
    words = x.meaning()
    if words is None or words.kind is not Kind.PROBS or words.factor != 1:
        return NotImplemented
    return same(recipe, x, Words(Kind.LOGPROBS, words.of), dtype_of(recipe, x))


def exponential(recipe: Recipe, x: LazyTensor) -> Any:
    words = x.meaning()
    if words is None or words.kind is not Kind.LOGPROBS or words.factor != 1:
        return NotImplemented
    return same(recipe, x, Words(Kind.PROBS, words.of), dtype_of(recipe, x))


def clamp(recipe: Recipe, x: LazyTensor, min: Any = None, max: Any = None) -> Any:
    """Clamp log-probs at the least number of their dtype, as entropies do in place of -inf."""
    words, least = x.meaning(), torch.finfo(x.dtype).min
    if not isinstance(min, float) or min > least or max is not None:
        return NotImplemented
    if words is None or words.kind is not Kind.LOGPROBS or words.factor != 1:
        return NotImplemented
    return same(recipe, x, words._replace(kind=Kind.FLOORED_LOGPROBS))


# Functions of two tensors


def _product(recipe: Recipe, x: LazyTensor, y: LazyTensor) -> Any:
    """p·ln p, p·z, p·ln q and p·(ln p - ln q), whose sums over the words `endings` computes."""
    pair = _aligned(x, y)
    if pair is None:
        return NotImplemented
    if pair[0].kind is not Kind.PROBS:
        pair = pair[1], pair[0]
    probs, other = pair
    if probs.kind is not Kind.PROBS:
        return NotImplemented
    p, factor, dtype = probs.first, probs.factor * other.factor, _promoted(x, y)
    if any(of.rules_out for of in (p, *other.of)):
        return NotImplemented
    if other.kind is Kind.LOG_RATIOS:
        for of, sign in ((other.of, 1), (other.of[::-1], -1)):
            if p.same_as(of[0]):
                return same(recipe, x, Words(Kind.DIVERGENCE_TERMS, of, sign * factor), dtype)
    kinds = {
        Kind.LOGPROBS: Kind.ENTROPY_TERMS,
        Kind.FLOORED_LOGPROBS: Kind.ENTROPY_TERMS,
        Kind.LOGITS: Kind.LOGIT_TERMS,
    }
    if other.kind in kinds and p.same_as(other.first):
        return same(recipe, x, Words(kinds[other.kind], (p,), factor), dtype)
    if other.kind is Kind.LOGPROBS:
        return same(recipe, x, Words(Kind.CROSS_TERMS, (p, other.first), factor), dtype)
    return NotImplemented


def subtract(recipe: Recipe, x: Any, y: Any, **options: Any) -> Any:
    """Know ln p - ln q, the log-ratio of two distributions, and z - lse, which is ln p."""
    if options or not isinstance(x, LazyTensor):
        return NotImplemented
    if isinstance(y, LazyTensor):
        pair = _aligned(x, y)
        if pair is None or {words.kind for words in pair} != {Kind.LOGPROBS}:
            return NotImplemented
        p, q = pair
        if p.factor != q.factor:
            return NotImplemented
        return same(
            recipe, x, Words(Kind.LOG_RATIOS, (p.first, q.first), p.factor), _promoted(x, y)
        )
    words = x.meaning()
    if words is None or words.kind is not Kind.LOGITS or not _is_lse_of(y, words.first, x):
        return NotImplemented
    return same(recipe, x, Words(Kind.LOGPROBS, words.of), torch.promote_types(x.dtype, y.dtype))


def _aligned(x: LazyTensor, y: LazyTensor) -> tuple[Words, Words] | None:
    a, b = x.meaning(), y.meaning()
    alike = x.shape == y.shape and x.vocab_dim == y.vocab_dim == -1
    return None if a is None or b is None or not alike else (a, b)


def _promoted(x: LazyTensor, y: LazyTensor) -> torch.dtype:
    return torch.promote_types(x.dtype, y.dtype)


# A computed log-sum-exp notes which distribution it is of, so that z - lse is recognised as ln p.
# The note holds for as long as nobody writes into the log-sum-exp, which its version tells.
def remember_lse(lse: Tensor, of: Distribution) -> None:
    if not lse.is_inference():
        lse._fastrlhf_lse_of = (of, lse._version)  # type: ignore[attr-defined]


def _is_lse_of(y: Any, of: Distribution, x: LazyTensor) -> bool:
    if not isinstance(y, Tensor) or y.shape != (*x.shape[:-1], 1):
        return False
    lse, known = y, getattr(y, "_fastrlhf_lse_of", None)
    if known is None and y._base is not None and _lies_as(y.squeeze(-1), y._base):
        lse, known = y._base, getattr(y._base, "_fastrlhf_lse_of", None)
    if known is None or any(z._backward_hooks or z.retains_grad for z in (y, lse)):
        return False
    whole, version = known
    # A detached log-sum-exp is another tensor, without the note.
    return version == y._version and whole.same_as(of) and y.requires_grad != of.constant


def _lies_as(view: Tensor, base: Tensor) -> bool:
    """Whether a view of a tensor is all of it, in its order."""
    alike = view.shape == base.shape and view.stride() == base.stride()
    return alike and view.storage_offset() == base.storage_offset()
