"""Functions of rows through `torch.compile`: what runs where there is no Triton.

A function of `fastrlhf.reference` reads a few rows of logits in many passes when PyTorch runs it
operation by operation. PyTorch's compiler makes one or two loops of it, in which a row stays in the
cache and nothing of its size is written but the result. Such a function is compiled once for each
combination of dtypes and options, for rows of any number and length: with an example, so that no
size of a real call is taken for a constant. Where there is no compiler, or it fails, callers go on
without it.
"""

import contextlib
import functools
import logging
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LOG = logging.getLogger("fastrlhf")

# Sizes of the examples: larger than any number of threads, so that rows are what these share; no
# two alike, and none that a loop divides by, so that nothing follows from them; and of columns some
# runs (see `compiled_rows`) and a rest. But a loop over
# tokens is unrolled, so many at a time.
STEPS = 32
_EXAMPLE_SIZES = {"m": 263, "n": 257, "v": 5147, "s": STEPS}

_OPTIONS: dict[str, Any] = {
    # Rows that are found by number, with what there is of each: many reads, which are no reason to
    # put what comes of them into memory before it is used twice.
    "realize_reads_threshold": 16,
    # The numbers of rows are made here, and never outside of a matrix.
    "assert_indirect_indexing": False,
    "cpp.use_decompose_tanh": False,  # which is wrong of small numbers
}

_compiling = threading.RLock()


class NotCompiled(Exception):
    """There is no compiled function here; eager PyTorch can do it."""


@functools.cache
def compiler_is_there() -> bool:
    """Whether PyTorch will find a C++ compiler, as far as can be told without loading its own, and
    vector instructions to use: without them nothing is gained, and sums lose places.
    """
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if on_x86 and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return False
    if "1" in (os.environ.get(f"TORCH{name}_DISABLE") for name in ("_COMPILE", "DYNAMO")):
        return False
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX") or default) is not None


class _Kind(NamedTuple):
    """What of a tensor a compiled function depends on."""

    dtype: torch.dtype
    device: torch.device
    gaps: bool = False  # whether rows of a matrix start further apart than they are long


Kinds = tuple[_Kind | None, ...]
Compiled = Callable[..., tuple[Tensor, ...]]


class _Variant(NamedTuple):
    """A function compiled for tensors of some kinds."""

    call: Compiled
    code: CodeType | None

    def is_kept(self) -> bool:
        """Whether the compiler still has it, which `torch.compiler.reset` makes it forget."""
        return self.code is None or _is_compiled(self.code)


class RowFunction:
    """A function of tensors with named dimensions, compiled when it is first used.

    Its results have the rows that are asked for as their first dimension, and it may write into
    tensors whose dimensions are in capitals.
    """

    def __init__(self, function: Compiled, dimensions: str):
        """`dimensions` of each argument, a word each: `m` rows of a matrix and `n` of them that
        are asked for, `v` columns, `s` steps of a loop, of which there are always as many;
            "." for a number.
        """
        self.function = function
        self.dimensions = dimensions.split()
        self._variants: dict[Hashable, _Variant] = {}

    def __call__(self, *tensors: Tensor | None, **options: Hashable) -> tuple[Tensor, ...]:
        """Call it. Raise `NotCompiled` where that cannot be."""
        watched = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
        if watched or torch.jit.is_tracing():
            raise NotCompiled  # the compiler does not look into what modes and tracers do
        # Of no graph, as the example was.
        plain = (None if x is None else x.detach() for x in tensors)
        copies = [_at_least_two(x, of) for x, of in zip(plain, self.dimensions, strict=True)]
        compiled = self._variant(tuple(None if x is None else _kind(x) for x in copies), options)
        with torch.no_grad():
            found = compiled(*copies)
        for x, copy, of in zip(tensors, copies, self.dimensions, strict=True):
            if of.isupper() and x is not None and copy is not None and len(copy) != len(x):
                x.detach().copy_(copy[:1])
        numbers = tensors[self.dimensions.index("n")]
        assert numbers is not None
        return tuple(x[:1] for x in found) if len(numbers) == 1 else found

    def _variant(self, kinds: Kinds, options: dict[str, Hashable]) -> Compiled:
        key = kinds, tuple(options.items())
        variant = self._variants.get(key)
        if variant is None or not variant.is_kept():
            with _compiling:
                variant = self._variants.get(key)
                if variant is None or not variant.is_kept():
                    variant = self._variants[key] = self._compiled(kinds, options)
        return variant.call

    def _compiled(self, kinds: Kinds, options: dict[str, Hashable]) -> _Variant:
        if not compiler_is_there():
            raise NotCompiled
        start = time.perf_counter()
        example = [
            None if kind is None else _example(of, kind)
            for kind, of in zip(kinds, self.dimensions, strict=True)
        ]
        name, function = self.function.__name__.strip("_"), _copied(self.function, options)
        try:
            compiled = torch.compile(
                function, dynamic=True, fullgraph=True,
                options={**_OPTIONS, "guard_filter_fn": _unguarded},
            )  # fmt: skip
            with _plainly():
                compiled(*example)
            if not _is_compiled(function.__code__):
                raise RuntimeError("PyTorch's compiler is turned off")
        except Exception as error:  # whatever a compiler can fail of
            reason = str(error).strip().partition("\n")[0]
            _LOG.warning("%s is not compiled, and runs eagerly: %s", name, reason)
            return _Variant(_not_compiled, None)
        _LOG.info("compiled %s in %.1f s", name, time.perf_counter() - start)
        return _Variant(compiled, function.__code__)


def _unguarded(guards: Sequence[Any]) -> list[bool]:
    """Have the compiler ask nothing before it calls what it made.

    What that depends on is in the kinds of the tensors, and no number is compiled in. All else that
    it would ask (grad and inference mode, autocast, threads, ...) changes nothing, but would make
    it compile anew, with the sizes of the call at hand.
    """
    return [False for _ in guards]


def _is_compiled(code: CodeType) -> bool:
    return bool(torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code))


def _not_compiled(*_: Tensor | None) -> tuple[Tensor, ...]:
    raise NotCompiled


def _copied(function: Compiled, options: dict[str, Hashable]) -> Compiled:
    """The function with options of its own, and code of its own: the compiler keeps a few
    compilations of each code object, and then no more.
    """
    code = function.__code__.replace()
    copy = FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
    copy.__kwdefaults__ = {**(function.__kwdefaults__ or {}), **options}
    return copy


def _kind(x: Tensor) -> _Kind:
    return _Kind(x.dtype, x.device, x.ndim == 2 and x.stride(0) != x.shape[1])


def _example(dimensions: str, kind: _Kind) -> Tensor:
    """A tensor of that kind: ones, which are numbers of rows and columns too."""
    if dimensions == ".":
        return torch.ones((), dtype=kind.dtype, device=kind.device)
    sizes = [_EXAMPLE_SIZES[letter] for letter in dimensions.lower()]
    if kind.gaps:
        wider = torch.ones(sizes[0], sizes[1] + 17, dtype=kind.dtype, device=kind.device)
        return wider[:, : sizes[1]]
    return torch.ones(sizes, dtype=kind.dtype, device=kind.device)


def _at_least_two(x: Tensor | None, dimensions: str) -> Tensor | None:
    """A lone row comes twice: the compiler would take the 1 for a constant."""
    if x is None or dimensions[0] not in "mnMN" or len(x) != 1:
        return x
    return torch.cat((x, x))


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Compile in the same state whenever that is; and without sizes that are equal by chance."""
    import torch.fx.experimental._config as config

    with (
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
    ):
        yield
