"""Digests of what the library computes: values and gradients, bit for bit."""

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import torch
from torch import Tensor

from support.fuzz.cases import MAKERS
from support.fuzz.draw import Draw
from support.fuzz.judge import leaves_of

from .calls import CALLS


def tensors_in(result: Any) -> Iterator[Tensor]:
    """Every tensor of a nested result, in order; other numbers as tensors."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for name in sorted(result):
            yield from tensors_in(result[name])
    elif isinstance(result, Sequence) and not isinstance(result, str):
        for part in result:
            yield from tensors_in(part)
    elif isinstance(result, bool | int | float):
        yield torch.tensor(result)


def digest(tensors: Sequence[Tensor | None]) -> str:
    """A short name for the dtypes, shapes and bits of tensors."""
    found = hashlib.sha256()
    for x in tensors:
        if x is None:
            found.update(b"none")
            continue
        x = x.detach().contiguous()
        found.update(f"{x.dtype}{tuple(x.shape)}".encode())
        found.update(x.reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return found.hexdigest()[:16]


def digest_of_call(result: Any, leaves: Sequence[Tensor], seed: int) -> str:
    """Of the results and, for random gradients of these, of the gradients of the leaves."""
    outputs = list(tensors_in(result))
    graded = [y for y in outputs if y.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    slopes = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in graded]
    gradients: Sequence[Tensor | None] = ()
    if graded and leaves:
        gradients = torch.autograd.grad(graded, leaves, slopes, allow_unused=True)
    return digest([*outputs, *gradients])


def of_calls() -> Iterator[tuple[str, str]]:
    """Name and digest of each call of `calls.py`, or the error that it ended with."""
    for name, call in CALLS.items():
        torch.manual_seed(0)
        try:
            yield name, digest_of_call(*call(), seed=1)
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}"


def of_random_cases(first: int, count: int) -> Iterator[tuple[str, str]]:
    """Name and digest of the random cases of so many seeds."""
    for seed in range(first, first + count):
        draw = Draw(seed)
        try:
            case = draw.of(*MAKERS)(draw)
            leaves = leaves_of(case, case.tensors)
            wanted = [leaves[name] for name in case.wants]
            yield f"seed {seed}, {case.name}", digest_of_call(case.call(leaves), wanted, seed)
        except Exception as error:
            yield f"seed {seed}", f"{type(error).__name__}: {error}"


def record(first: int, count: int) -> dict[str, str]:
    """Digests of everything, by name."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(of_calls()) | dict(of_random_cases(first, count))
