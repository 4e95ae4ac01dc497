"""Programs of what loops do with logits, drawn at random, to be run on plain ones and on lazy ones.

A program is a list of steps. Each is the name of an operation, which of the tensors so far it is
given, and two small numbers by which the operation chooses among its arguments.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Operation = Callable[[Tensor, int, int, list[Tensor]], Any]


class Step(NamedTuple):
    name: str
    of: int  # which of the tensors so far, counted from the last
    a: int
    b: int


def _generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seed) % 2**31)


def _random(x: Tensor, *seed: int) -> Tensor:
    made = torch.randn(x.shape, generator=_generator(*seed), dtype=torch.float64)
    return made.to(x.dtype)


def _ids(x: Tensor, shape: tuple[int, ...], *seed: int) -> Tensor:
    return torch.randint(x.shape[-1], shape, generator=_generator(*seed))


def _mask(x: Tensor, dims: int, *seed: int) -> Tensor:
    return torch.rand(x.shape[:dims], generator=_generator(*seed)) < 0.6


def _dim(x: Tensor, a: int) -> int:
    dims = max(x.ndim, 1)
    return a % (2 * dims) - dims


def _index(x: Tensor, a: int, b: int) -> Any:
    """What users put in brackets."""
    n = len(x) or 1
    numbers = torch.randint(n, (b % 3 + 1,), generator=_generator(a, b))
    return [
        slice(None, -1), slice(1, None), (slice(None), slice(1, None)), (..., slice(None)),
        b % n, -1, None, (None, 0), (slice(None), b % n), (..., 0), (..., -1, slice(None)),
        slice(None, None, 2), (slice(None), slice(b % 3, None, 2)), numbers, (slice(None), numbers),
        (numbers, numbers), _mask(x, 1, a, b), _mask(x, 2, a, b), (..., slice(2, 5)),
        (..., numbers),
        (numbers, slice(None), numbers), (numbers, 0), (slice(None), 0, numbers), slice(0, 0),
        slice(None, None, -1), [0, n - 1], (..., None), (Ellipsis, None, slice(None)),
        (_mask(x, 2, a, b), b % max(x.shape[-1], 1)), (slice(None), _mask(x[0], 1, a, b)), n, True,
        (torch.arange(n)[:, None], numbers[None]), torch.tensor(b % n), (..., torch.tensor(1)),
    ][(a * 8 + b) % 35]  # fmt: skip


def _indexed(x: Tensor, a: int, b: int) -> Tensor:
    """x[...]; one word of each token, where it is computed, does not lie as the view does."""
    found = x[_index(x, a, b)]
    has_words = found.ndim > 0 and found.shape[-1] == x.shape[-1]
    return found if has_words else found.contiguous()


def _targets(x: Tensor, shape: tuple[int, ...], a: int, b: int, vocab: int) -> Tensor:
    made = torch.randint(vocab, shape, generator=_generator(a, b))
    ignored = torch.rand(shape, generator=_generator(b, a, 1)) < (0.4 if a % 4 else 1.1)
    return made.masked_fill(ignored, -100) if b % 2 else made


def _cross_entropy(x: Tensor, a: int, b: int, loss: Any = F.cross_entropy) -> Tensor:
    by_class = x.ndim > 2 and a % 2
    x = x if by_class or x.ndim < 2 else x.flatten(0, -2)
    classes = x.shape[min(1, x.ndim - 1)]
    shape = (x.shape[0], *x.shape[2:]) if x.ndim > 1 else ()
    options: dict[str, Any] = {"reduction": ("mean", "sum", "none")[b % 3]}
    if a == 3:
        options["weight"] = torch.rand(classes, generator=_generator(a), dtype=x.dtype)
    if a == 5 and loss is F.cross_entropy:
        options["label_smoothing"] = 0.1
    return loss(x, _targets(x, shape, a, b, classes), **options)


def _temperature(x: Tensor, a: int) -> Any:
    shape = (*x.shape[:-1], 1)
    per_token = torch.rand(shape, generator=_generator(a), dtype=x.dtype) + 0.5
    return [0.7, 2, torch.tensor(1.3), per_token, per_token[:1], True, -1.5, per_token.double()][a]


def _pickled(x: Tensor) -> Tensor:
    return pickle.loads(pickle.dumps(x.detach()))


def _saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x.detach(), file)
    file.seek(0)
    return torch.load(file)


def _written(write: Callable[[Tensor, int, int], Any]) -> Operation:
    """An operation that writes; under no_grad for half of the numbers."""

    def of(x: Tensor, a: int, b: int, _: list[Tensor]) -> Any:
        with torch.set_grad_enabled(b % 4 != 3):
            found = write(x, a, b)
        return x if found is None else found

    return of


def _set(x: Tensor, a: int, b: int) -> None:
    x[[..., 0, (..., 2), (slice(None), -1), _mask(x, x.ndim, a)][b % 5]] = -1.5


def _through_view(x: Tensor, a: int, b: int) -> None:
    x[:1].div_(1.5) if b % 2 else x.view(-1, x.shape[-1]).mul_(0.5)


def _without_grad(x: Tensor, a: int, b: int) -> Tensor:
    with torch.no_grad():
        return x.log_softmax(-1) if b % 2 else x[:1]


def _others(x: Tensor, a: int, values: list[Tensor]) -> Tensor:
    return values[a % len(values)]


VIEWS: dict[str, Operation] = {
    "index": lambda x, a, b, _: _indexed(x, a, b),
    "view": (
        lambda x, a, b, _: x.view([(-1, x.shape[-1]), (-1,), (*x.shape, 1), (1, *x.shape)][a % 4])
    ),
    "reshape": (
        lambda x, a, b, _: x.reshape([(-1, x.shape[-1]), (1, -1, x.shape[-1]), (-1,)][a % 3])
    ),
    "flatten": lambda x, a, b, _: x.flatten(*[(), (0, 1), (0, -2), (1, 2)][a % 4]),
    "unsqueeze": lambda x, a, b, _: x.unsqueeze(_dim(x, a)),
    "squeeze": lambda x, a, b, _: x.squeeze(*[(), (0,), (-1,), (1,)][a % 4]),
    "transpose": lambda x, a, b, _: x.transpose(_dim(x, a), _dim(x, b)),
    "permute": lambda x, a, b, _: x.permute([n % x.ndim for n in range(a, a + x.ndim)]),
    "mT": lambda x, a, b, _: x.mT if x.ndim > 1 else x,
    "split": lambda x, a, b, _: list(x.split(a % 3 + 1, dim=_dim(x, b))),
    "chunk": lambda x, a, b, _: list(x.chunk(a % 3 + 1, _dim(x, b))),
    "unbind": lambda x, a, b, _: list(x.unbind(_dim(x, b)))[:6],
    "select": lambda x, a, b, _: x.select(_dim(x, a), b % 2),
    "narrow": lambda x, a, b, _: x.narrow(_dim(x, a), 0, b % 3),
    "index_select": lambda x, a, b, _: x.index_select(_dim(x, a), torch.tensor([0, 0, 1][: b % 4])),
    "expand": lambda x, a, b, _: x.expand(*[(2, *x.shape), (-1,) * x.ndim, x.shape][a % 3]),
    "iterate": lambda x, a, b, _: list(x)[:6],
    "masked_select": lambda x, a, b, _: x.masked_select(_mask(x, x.ndim, a)),
}  # fmt: skip
MAPS: dict[str, Operation] = {
    "float": lambda x, a, b, _: x.float(),
    "double": lambda x, a, b, _: x.double(),
    "to": (
        lambda x, a, b, _: x.to(
            [torch.float64, torch.float32, "cpu", x.dtype][a % 4], copy=b % 2 == 1
        )
    ),
    "clone": lambda x, a, b, _: x.clone(),
    "contiguous": lambda x, a, b, _: x.contiguous(),
    "detach": lambda x, a, b, _: x.detach(),
    "divide": lambda x, a, b, _: x / _temperature(x, a),
    "multiply": lambda x, a, b, _: x * [2, 0.5, -1, 0, True, torch.tensor(3.0), 1, 0.25][a],
    "negative": lambda x, a, b, _: -x,
    "softcap": lambda x, a, b, _: 3 * torch.tanh(x / 3),
    "tanh": lambda x, a, b, _: x.tanh(),
    "log_softmax": lambda x, a, b, _: x.log_softmax(-1 if a % 4 else _dim(x, b)),
    "F.log_softmax": (
        lambda x, a, b, _: F.log_softmax(x, -1, dtype=[None, torch.float32, torch.float64][a % 3])
    ),
    "softmax": lambda x, a, b, _: torch.softmax(x, -1),
    "log": lambda x, a, b, _: x.log(),
    "exp": lambda x, a, b, _: x.exp(),
    "minus lse": lambda x, a, b, _: x - x.logsumexp(-1, keepdim=True),
    "minus": lambda x, a, b, values: x - _others(x, a, values),
    "times": lambda x, a, b, values: x * _others(x, a, values),
    "p log p": lambda x, a, b, _: (x.softmax(-1) * x.log_softmax(-1)).sum(-1),
    "p z": lambda x, a, b, _: x.logsumexp(-1) - (x.softmax(-1) * x).sum(-1),
    "kl": lambda x, a, b, values: F.kl_div(
        x.log_softmax(-1), _others(x, a, values).detach().log_softmax(-1),
        reduction=("none", "sum", "mean", "batchmean")[b % 4], log_target=True,
    ),
}  # fmt: skip
ENDS: dict[str, Operation] = {
    "gather": lambda x, a, b, _: x.gather(-1, _ids(x, (*x.shape[:-1], b % 3 + 1), a, b)),
    "gather some": (
        lambda x, a, b, _: x.gather(
            -1, _ids(x, (*(n - a % 2 for n in x.shape[:-1]), 1), a, b)
        ).squeeze(-1)
    ),
    "gather elsewhere": (
        lambda x, a, b, _: x.gather(_dim(x, a), torch.zeros((1,) * x.ndim, dtype=torch.long))
    ),
    "take_along_dim": lambda x, a, b, _: x.take_along_dim(_ids(x, (*x.shape[:-1], 2), a, b), -1),
    "logsumexp": lambda x, a, b, _: x.logsumexp(_dim(x, a) if b % 2 else -1, keepdim=a % 2 == 1),
    "argmax": lambda x, a, b, _: x.argmax(*[(-1,), (), (0,)][a % 3]),
    "max": lambda x, a, b, _: list(x.max(-1 if a % 2 else 0, keepdim=b % 2 == 1)),
    "amax": lambda x, a, b, _: x.amax(-1),
    "topk": lambda x, a, b, _: list(x.topk(min(b % 3 + 1, x.shape[-1]), largest=a % 4 != 3)),
    "sum": lambda x, a, b, _: x.sum(-1 if a % 2 else _dim(x, b), keepdim=b % 2 == 1),
    "sum of all": lambda x, a, b, _: x.sum() if a % 2 else x.mean(),
    "mean": (
        lambda x, a, b, _: x.mean(
            [(-1,), (0, -1), tuple(range(x.ndim)), (0,)][a % 4], keepdim=b % 2 == 1
        )
    ),
    "cross_entropy": lambda x, a, b, _: _cross_entropy(x, a, b),
    "nll_loss": lambda x, a, b, _: _cross_entropy(x.log_softmax(-1), a & 6, b, F.nll_loss),
    "nll_loss of this": lambda x, a, b, _: _cross_entropy(x, a & 6, b, F.nll_loss),
}  # fmt: skip
WRITES: dict[str, Operation] = {
    "div_": _written(lambda x, a, b: x.div_(_temperature(x, a))),
    "mul_": _written(lambda x, a, b: x.mul_([0.5, 2, torch.tensor(0.25), -1][a % 4])),
    "/=": _written(lambda x, a, b: x.__itruediv__(_temperature(x, a))),
    "masked_fill_": _written(lambda x, a, b: x.masked_fill_(_mask(x, x.ndim, a), -2.0)),
    "set": _written(_set),
    "add_": _written(lambda x, a, b: x.add_(_random(x, a))),
    "through a view": _written(_through_view),
    "of a copy": lambda x, a, b, _: x.clone().div_(0.7),
    "zero_": _written(lambda x, a, b: x.zero_()),
    "clamp_": _written(lambda x, a, b: torch.clamp_(x, max=0.3)),
    "out": _written(lambda x, a, b: torch.mul(torch.ones_like(x).detach(), 2, out=x)),
}
UNKNOWN: dict[str, Operation] = {
    "sigmoid": lambda x, a, b, _: x.sigmoid(),
    "sort": lambda x, a, b, _: list(x.sort(-1)),
    "cumsum": lambda x, a, b, _: x.cumsum(-1),
    "cat": lambda x, a, b, values: torch.cat([x, _others(x, a, values)]),
    "stack": lambda x, a, b, values: torch.stack([x, x * 2]),
    "where": lambda x, a, b, values: torch.where(x > 0, x, _others(x, a, values)),
    "einsum": lambda x, a, b, _: torch.einsum("...v,...v->...", x, _random(x, a)),
    "matmul": lambda x, a, b, _: x @ _random(x, a).mT,
    "numpy": lambda x, a, b, _: torch.from_numpy(x.detach().numpy().copy()),
    "tolist": lambda x, a, b, _: torch.tensor(x.tolist()),
    "item": lambda x, a, b, _: x.reshape(-1)[:1] * x.reshape(-1)[0].item(),
    "pickle": lambda x, a, b, _: _pickled(x),
    "save": lambda x, a, b, _: _saved(x),
    "deepcopy": lambda x, a, b, _: copy.deepcopy(x.detach()),
    "pad": lambda x, a, b, _: F.pad(x, (0, 0, 1, 0)),
    "flip": lambda x, a, b, _: x.flip(0),
    "masked_fill": lambda x, a, b, _: x.masked_fill(_mask(x, x.ndim, a), -torch.inf),
    "without gradients": _without_grad,
    "data": lambda x, a, b, _: x.data.clone(),
    "nan_to_num": lambda x, a, b, _: torch.nan_to_num(x),
    "zeros_like": lambda x, a, b, _: torch.zeros_like(x),
    "norm": lambda x, a, b, _: x.norm(),
    "roll": lambda x, a, b, _: x.roll(1, 0),
    "isnan": lambda x, a, b, _: x.isnan(),
    "diagonal": lambda x, a, b, _: x.diagonal(),
    "as_strided": lambda x, a, b, _: x.as_strided((1, x.shape[-1]), (1, 1)),
}  # fmt: skip
OPERATIONS = {**VIEWS, **MAPS, **ENDS, **WRITES, **UNKNOWN}


def run(program: list[Step], logits: Tensor) -> list[tuple[str, Tensor | str]]:
    """What the steps make of logits, one after the other: tensors, and the errors of steps that are
    none for such tensors.
    """
    values, found = [logits], list[tuple[str, Tensor | str]]()
    for step in program:
        x = values[-1 - step.of % len(values)]
        try:
            made = OPERATIONS[step.name](x, step.a, step.b, values)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            found.append((step.name, type(error).__name__))
            continue
        made = made if isinstance(made, list) else [made]
        values += made
        found += [(step.name, x) for x in made]
    return found
