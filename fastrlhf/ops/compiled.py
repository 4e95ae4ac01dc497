"""The backend "compiled": functions of rows through `torch.compile`, where Triton does not run.

When PyTorch runs a function of `fastrlhf.reference` operation by operation, each operation passes
over all of the rows. PyTorch's compiler makes one or two loops of it, in which a row stays in the
cache and nothing of its size is written but the result. A function is compiled once for each
combination of dtypes and options, and then serves rows of any number and length. It is compiled
with an example, not with the tensors of a real call, so that no size of these becomes a constant of
the code. Where there is no compiler, or it fails, callers go on eagerly.

`RowFunction` does all of this; `compiled_rows.py` says how rows are given to one, and has those
that several operations use.
"""

import contextlib
import contextvars
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
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

_LOG = logging.getLogger("fastrlhf")

# A compiled loop over the steps of a sequence (`gae`) is unrolled, and does this many at a time.
STEPS = 32

# Sizes of the examples. The compiler could assume that sizes are always equal if two are equal
# here, that a size is always 1 if it is 1 here, and that nothing is ever left over if rows or
# columns fill vector registers here. So none of that is the case. The columns are a few whole runs
# (see `compiled_rows`) and a rest.
_EXAMPLE_SIZES = {"m": 263, "n": 257, "v": 5147, "s": STEPS}

_OPTIONS: dict[str, Any] = {
    # The functions read many tensors: rows by their numbers, and a few numbers of each row. A value
    # made of up to so many reads is computed again for each use, not written to memory.
    "realize_reads_threshold": 16,
    # Numbers of rows are made by this package and never lie outside of a matrix: no need to assert.
    "assert_indirect_indexing": False,
    "cpp.use_decompose_tanh": False,  # the decomposition is inaccurate for small numbers
    # The rows are shared by as many threads as there are when a function runs. The number here only
    # keeps the compiler from making code for the number of threads that there are now.
    "cpp.threads": 2,
    "cpp.dynamic_threads": True,
}

_OFF = "PyTorch's compiler is turned off"

_compiling = threading.RLock()
_required = contextvars.ContextVar("_required", default=False)


class NotCompiled(Exception):
    """No compiled function can be had for this call; the caller can do it in eager PyTorch."""


class NotInPlace(Exception):
    """A function would read numbers that it has overwritten; the caller can have it write to
    another tensor.
    """


@contextlib.contextmanager
def required() -> Iterator[None]:
    """Raise RuntimeError where a function cannot be compiled, with the reason."""
    token = _required.set(True)
    try:
        yield
    finally:
        _required.reset(token)


@functools.cache
def compiler_is_there() -> bool:
    """Whether PyTorch will find a C++ compiler, as far as can be told without loading PyTorch's
    own; and whether the CPU has vector instructions: without them nothing is gained, and sums lose
    accuracy.
    """
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if on_x86 and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return False
    if "1" in (os.environ.get(f"TORCH{name}_DISABLE") for name in ("_COMPILE", "DYNAMO")):
        return False
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX") or default) is not None


class _Kind(NamedTuple):
    """The properties of a tensor that a compiled function depends on."""

    dtype: torch.dtype
    device: torch.device
    gaps: bool = False  # whether rows of a matrix start further apart than they are long


Kinds = tuple[_Kind | None, ...]
Compiled = Callable[..., tuple[Tensor, ...]]


class _Variant(NamedTuple):
    """A function compiled for tensors of some kinds."""

    call: Compiled
    code: CodeType | None  # None where the compiler failed
    in_place: bool  # whether its result may take the place of the matrix that it reads

    def is_settled(self) -> bool:
        """Whether nothing has to be compiled (again): because the compiler failed before, or still
        has the function, which `torch.compiler.reset` makes it forget.
        """
        return not _required.get() if self.code is None else _is_compiled(self.code)


class RowFunction:
    """A function of tensors with named dimensions, compiled when it is first used.

    The first dimension of its results is that of the rows asked for. It may write into arguments
    whose dimensions are in capitals. The same tensor may be given as one to write and one to read;
    where that would go wrong, a call raises `NotInPlace`.
    """

    def __init__(self, function: Compiled, dimensions: str, **compiler_options: Any):
        """`dimensions` has a word for each argument, a letter for each of its dimensions: `m` rows
        of a matrix, `n` of these that are asked for, `v` columns, `s` steps of a loop, whose number
        is always `STEPS`; "." is a 0-d tensor. `compiler_options` are added to those of all
        functions.
        """
        self.function = function
        self.compiler_options = compiler_options
        self.dimensions = dimensions.split()
        self._variants: dict[Hashable, _Variant] = {}
        self._said: set[str] = set()

    def __call__(self, *tensors: Tensor | None, **options: Hashable) -> tuple[Tensor, ...]:
        """Call the compiled function.

        Raises:
            NotCompiled, NotInPlace: it cannot be had, or not for these tensors.
        """
        watched = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
        if watched or torch.jit.is_tracing() or is_fx_symbolic_tracing():
            # Modes and tracers watch each operation, and compiled code would hide these from them.
            self._refuse("a mode or a tracer is at work")
        # The example required no gradient, so the compiled code must not be given tensors that do.
        plain = (None if x is None else x.detach() for x in tensors)
        copies = [_at_least_two(x, of) for x, of in zip(plain, self.dimensions, strict=True)]
        variant = self._variant(tuple(None if x is None else _kind(x) for x in copies), options)
        numbers = tensors[self.dimensions.index("n")]
        assert numbers is not None
        # A lone row comes twice (see `_at_least_two`): in place, the second time would read what
        # the first has written.
        if self._reads_what_it_writes(tensors) and not (variant.in_place and len(numbers) > 1):
            raise NotInPlace
        with torch.no_grad():
            results = variant.call(*copies)
        for x, copy, of in zip(tensors, copies, self.dimensions, strict=True):
            if of.isupper() and x is not None and copy is not None and len(copy) != len(x):
                x.detach().copy_(copy[:1])
        return tuple(x[:1] for x in results) if len(numbers) == 1 else results

    def _reads_what_it_writes(self, tensors: Sequence[object]) -> bool:
        into = [x for x, of in zip(tensors, self.dimensions, strict=True) if of.isupper()]
        return any(sum(x is y for y in tensors) > 1 for x in into)

    def _variant(self, kinds: Kinds, options: dict[str, Hashable]) -> _Variant:
        key = kinds, tuple(options.items()), torch.are_deterministic_algorithms_enabled()
        variant = self._variants.get(key)
        if variant is None or not variant.is_settled():
            with _compiling:
                variant = self._variants.get(key)
                if variant is None or not variant.is_settled():
                    variant = self._variants[key] = self._compiled(kinds, options)
        elif _runs_otherwise():
            self._refuse(_OFF)
        return variant

    def _compiled(self, kinds: Kinds, options: dict[str, Hashable]) -> _Variant:
        if not compiler_is_there():
            raise NotCompiled
        # It may be off only for a while: nothing is recorded, so that a later call tries again.
        if _is_off():
            self._refuse(_OFF)
        start = time.perf_counter()
        name, function = self.function.__name__.strip("_"), _copied(self.function, options)
        try:
            compiled = torch.compile(
                function, dynamic=True, fullgraph=True,
                options={**_OPTIONS, **self.compiler_options, "guard_filter_fn": _unguarded},
            )  # fmt: skip
            with _plainly():
                compiled(*map(_example, self.dimensions, kinds))
                in_place = self._is_one_loop(compiled, kinds)
            if not _is_compiled(function.__code__):
                raise RuntimeError("nothing came of it")
        except Exception as error:  # a compiler can fail in any way
            # It was turned off while it was compiling, which is not a failure of the compiler.
            if _is_off():
                self._refuse(_OFF)
            if _required.get():
                raise RuntimeError(f"{name} cannot be compiled: {_reason(error)}") from error
            _LOG.warning("%s is not compiled, and runs eagerly: %s", name, _reason(error))
            return _Variant(_not_compiled, None, False)
        _LOG.info("compiled %s in %.1f s", name, time.perf_counter() - start)
        return _Variant(compiled, function.__code__, in_place)

    def _is_one_loop(self, compiled: Compiled, kinds: Kinds) -> bool:
        """Whether the function may write its result over the matrix that it reads. Of a formula
        without sums the compiler makes one loop, which reads each number before it writes one in
        its place. But it does not promise that, so it is tried.
        """
        if self.dimensions[0] != "MV" or kinds[0] != kinds[self.dimensions.index("mv")]:
            return False
        apart = [_probe(of, kind) for of, kind in zip(self.dimensions, kinds, strict=True)]
        in_place = _probe("MV", kinds[0])  # the same numbers as in the matrix that is read
        compiled(*apart)
        compiled(*(
            in_place if of.lower() == "mv" else x
            for x, of in zip(apart, self.dimensions, strict=True)
        ))  # fmt: skip
        assert in_place is not None and apart[0] is not None
        return torch.equal(in_place, apart[0])

    def _refuse(self, reason: str) -> NoReturn:
        """Do without the compiled function in this call, and log the reason once."""
        name = self.function.__name__.strip("_")
        if _required.get():
            raise RuntimeError(f"{name} cannot be compiled: {reason}")
        if reason not in self._said:
            _LOG.warning("%s is not compiled, and runs eagerly: %s", name, reason)
        self._said.add(reason)
        raise NotCompiled


def _unguarded(guards: Sequence[Any]) -> list[bool]:
    """Drop all guards: the compiler then checks nothing before it calls the code that it made.

    That code depends on the kinds of the tensors alone, by which the variants are told apart, and
    no size is compiled in. All else that guards would check (grad and inference mode, autocast,
    threads, ...) makes no difference to it, but would make the compiler compile anew, with the
    sizes of the call at hand.
    """
    return [False for _ in guards]


def _reason(error: Exception) -> str:
    """Return the first line of the error, and the C++ compiler's first complaint in it."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return "; ".join([first, *[line.strip() for line in more if "error:" in line][:1]])


def _is_off() -> bool:
    """Whether `torch.compiler.set_stance` or the compiler's configuration keeps the compiler from
    compiling, or puts another backend in its place.
    """
    import torch._dynamo

    stance = torch._dynamo.eval_frame._stance.stance
    return bool(torch._dynamo.config.disable) or stance != "default" or _runs_otherwise()


def _runs_otherwise() -> bool:
    """Whether `torch.compiler.set_stance` has something else run than the compiled code."""
    stance = torch._dynamo.eval_frame._stance
    return stance.stance == "force_eager" or stance.backend is not None


def _is_compiled(code: CodeType) -> bool:
    return bool(torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code))


def _not_compiled(*_: Tensor | None) -> tuple[Tensor, ...]:
    raise NotCompiled


def _copied(function: Compiled, options: dict[str, Hashable]) -> Compiled:
    """Copy the function, with these options as defaults, and with a code object of its own, because
    the compiler keeps only a few compilations for each code object.
    """
    code = function.__code__.replace()
    copy = FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
    copy.__kwdefaults__ = {**(function.__kwdefaults__ or {}), **options}
    return copy


def _kind(x: Tensor) -> _Kind:
    return _Kind(x.dtype, x.device, x.ndim == 2 and x.stride(0) != x.shape[1])


def _example(dimensions: str, kind: _Kind | None) -> Tensor | None:
    """Make a tensor of that kind, of ones, which are valid as numbers of rows and columns too."""
    if kind is None:
        return None
    if dimensions == ".":
        return torch.ones((), dtype=kind.dtype, device=kind.device)
    sizes = [_EXAMPLE_SIZES[letter] for letter in dimensions.lower()]
    if kind.gaps:
        wider = torch.ones(sizes[0], sizes[1] + 17, dtype=kind.dtype, device=kind.device)
        return wider[:, : sizes[1]]
    return torch.ones(sizes, dtype=kind.dtype, device=kind.device)


def _probe(dimensions: str, kind: _Kind | None) -> Tensor | None:
    """Make an example whose numbers differ from each other, all between 1 and 2, and in which each
    row is asked for once.
    """
    x = _example(dimensions, kind)
    if x is None:
        return None
    if not x.is_floating_point():
        return torch.arange(x.numel(), dtype=x.dtype, device=x.device)
    values = torch.arange(x.numel(), dtype=torch.float32, device=x.device)
    return x.copy_(1.5 + 0.5 * values.view(x.shape).cos())


def _at_least_two(x: Tensor | None, dimensions: str) -> Tensor | None:
    """Repeat a lone row, so that no size is 1, which the compiler takes for a constant."""
    if x is None or dimensions[0] not in "mnMN" or len(x) != 1:
        return x
    return torch.cat((x, x))


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Compile in the same state (of grad mode, autocast, ...) whatever the caller's is; without the
    assumption that sizes which are equal by chance always are; and with a cache on disk that is
    separate for each width of vectors, since the code for one is of no use to a CPU with another.
    """
    import torch.compiler.config as of_compiler
    import torch.fx.experimental._config as of_sizes

    tag = f"{of_compiler.cache_key_tag} {torch.backends.cpu.get_cpu_capability()}"
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        of_sizes.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        of_compiler.patch(cache_key_tag=tag),  # type: ignore[attr-defined]
    ):
        yield
