"""An operation, the check that each of its providers must pass, and the contest of those that do.

All providers get the same batch in the same dtype, and compute the same gradients. The kind
"forward" is without gradients, as a reference model runs; "forward + backward" also computes the
gradient of every leaf. The outcome is one record for each provider, whether it was timed or not.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import measure
import torch
from batch import TILE, Batch, Shape, Source, make_batch
from measure import Turn
from providers import Function, Provider
from shapes import shapes
from torch import Tensor

from fastrlhf.recipes.memory import peak_memory

FORWARD, BOTH = "forward", "forward + backward"

# Correct sums and gradients have smaller relative errors than this: in fp32 because of the order of
# sums, in bf16 because logits are rounded. The tolerance is multiplied by _PER_TOKEN for a result
# with one number for each token, which is more exact, and by _TAIL for a part of a gradient that
# few entries add up to, which is less exact.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_PER_TOKEN, _TAIL = 0.2, 3.0

Record = dict[str, Any]


class Wrong(Exception):
    """A provider's result differs from the operation's definition."""


class Unavailable(Exception):
    """A provider cannot run here."""


@dataclass(frozen=True)
class Operation:
    """What the providers of one benchmark file compute, and the least work that it takes."""

    name: str
    source: Source
    providers: Mapping[str, Provider]
    exact: Function  # plain PyTorch, which the check evaluates in fp64
    # For operations from logits or log-probs: how often the rows that count cross the memory, and
    # how often all rows do, by kind.
    passes: Mapping[str, tuple[int, int]] | None = None
    # For operations from hidden states: how many matmuls of the rows that count are needed in the
    # forward, in forward and backward with a frozen head, and in both with a trained head.
    matmuls: tuple[int, int, int] = (0, 0, 0)

    @property
    def from_hidden(self) -> bool:
        """Whether the cost of the operation is in matmuls, and not in bytes."""
        return self.passes is None

    def limit(
        self, shape: Shape, kind: str, device: torch.device, plan: Provider | None = None
    ) -> float:
        """Return the seconds that this device needs for the least work of the operation.

        With a provider as `plan`, return those for the work that the provider's own plan requires.
        """
        if self.passes is None:
            matmuls = self.matmuls[0 if kind == FORWARD else 1 + shape.trained]
            if kind == BOTH and shape.trained and plan and plan.matmuls:
                matmuls = plan.matmuls
            flops = 2 * shape.live * shape.vocab * shape.width * matmuls
            return flops / measure.matmul_rate(device, shape.dtype)
        live, rows = self.passes[kind]
        if kind == BOTH and plan and plan.passes:
            live, rows = plan.passes
        row_bytes = max(shape.vocab, 1) * torch.finfo(shape.dtype).bits // 8
        moved = (live * shape.live + rows * shape.rows) * row_bytes
        return moved / measure.copy_bandwidth(device)

    @property
    def differentiable(self) -> bool:
        """Whether there is a backward to time."""
        return self.passes is None or BOTH in self.passes

    def kinds(self, shape: Shape) -> tuple[str, ...]:
        """Kinds to time. Forward alone is timed once: it does not depend on a trained head."""
        if not self.differentiable:
            return (FORWARD,)
        return (BOTH,) if shape.trained else (FORWARD, BOTH)

    def entrants(self, kind: str) -> list[str]:
        """Names of the providers to time."""
        return [n for n, p in self.providers.items() if kind == BOTH or not p.backward_only]


def run(function: Function, batch: Batch, kind: str) -> Tensor:
    """Compute the function; with backward, the gradients are left in the leaves."""
    if kind == FORWARD:
        with torch.no_grad():
            return function(batch)
    result = function(batch)
    result.backward(batch.upstream.to(result.dtype) if result.ndim else None)
    return result


@functools.cache
def passes_check(
    provider: Provider,
    exact: Function,
    source: Source,
    shape: Shape,
    kind: str,
    device: torch.device,
) -> bool:
    """Check a provider on a batch. The result is cached, so that each check runs once."""
    batch = make_batch(source, shape, device, gradients=kind == BOTH)
    check(exact, provider.load(), batch, kind, spends_logits=provider.spends_logits)
    return True


def check(
    exact: Function, function: Function, batch: Batch, kind: str, *, spends_logits: bool = False
) -> None:
    """Raise `Wrong` unless result and gradients are those of the plain formula in fp64.

    Some parts are compared separately, because larger parts would hide their errors: in a gradient
    of logits, the targets' entries and the other entries; in gradients along the vocabulary, the
    entries beyond a kernel's first tile.
    """
    reference = batch.exact()
    expected = run(exact, reference, kind).detach()
    found = run(function, batch, kind).detach()
    parts = {"result": (found, expected, _PER_TOKEN if expected.ndim else 1.0)}
    for name, leaf in batch.leaves.items():
        if leaf.grad is None:
            raise Wrong(f"no gradient of {name}")
        gradients = leaf.grad.double(), reference.leaves[name].grad
        if name == "logits":
            chosen = batch.targets.clamp(min=0)[..., None]
            parts["gradient of the targets"] = (*(x.gather(-1, chosen) for x in gradients), 1.0)
            gradients = tuple(x.scatter(-1, chosen, 0.0) for x in gradients)
        parts[f"gradient of {name}"] = (*gradients, 1.0)
        if name in ("logits", "weight"):
            tail = (x[..., TILE:] if name == "logits" else x[TILE:] for x in gradients)
            parts[f"gradient of {name} beyond {TILE} tokens"] = (*tail, _TAIL)
    for part, (found, expected, slack) in parts.items():
        # Written with "not <=", because ">" would let NaN pass.
        if not (error := _relative_error(found, expected)) <= slack * TOLERANCE[batch.shape.dtype]:
            raise Wrong(f"{part} off by {error:.1e}")
    for name, value in batch.tensors().items():
        kept = torch.equal(value.double(), reference.tensors()[name].double())
        if not kept and not (spends_logits and name == "logits"):
            raise Wrong(f"{name} overwritten")


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """Compute a relative error. The error of a single number near 0 is relative to 0.1."""
    floor = 0.1 if expected.ndim == 0 else torch.finfo(torch.float64).tiny
    return float((found.double() - expected).norm() / expected.norm().clamp(min=floor))


def contest(
    operation: Operation,
    shape: Shape,
    kind: str,
    device: torch.device,
    names: Iterable[str] | None = None,
    seconds: float = 2.0,
    rounds: tuple[int, int] = (5, 20),
) -> list[Record]:
    """Check, warm up and time providers, which take turns for about `seconds`.

    Returns:
        A record for each provider: what was run, its times in ms and its peak memory in MiB beyond
        the batch. If it has no times, "status" says why.
    """
    names = operation.entrants(kind) if names is None else list(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peers and of the compiler
        outcomes = _hold(operation, shape, kind, device, names, seconds, rounds)
    return [_described(operation, shape, kind, device, name) | outcomes[name] for name in names]


def _hold(
    operation: Operation,
    shape: Shape,
    kind: str,
    device: torch.device,
    names: list[str],
    seconds: float,
    rounds: tuple[int, int],
) -> dict[str, Record]:
    batch = make_batch(operation.source, shape, device, gradients=kind == BOTH)
    turns: dict[str, Turn] = {}
    outcomes: dict[str, Record] = {}
    for name in names:
        provider = operation.providers[name]
        try:
            if provider.gpu_only and device.type != "cuda":
                raise Unavailable("needs a GPU")
            # A single number shows few errors and its gradient shows more, so the gradient is
            # checked even if only the forward is timed.
            for checked in {kind, BOTH} if operation.differentiable else {kind}:
                passes_check(
                    provider, operation.exact, operation.source, shape.small(), checked, device
                )
            turn = _turn(provider, batch, kind)
            outcomes[name] = {"peak_mib": _warm_up(turn, device)}
            turns[name] = turn
        except Exception as error:  # any exception becomes the provider's result
            outcomes[name] = {"status": reason(error)}
        batch.restore(logits=kind == BOTH and provider.spends_logits)
        _release(device)
    times, errors = measure.take_turns(turns, device, seconds, rounds) if turns else ({}, {})
    outcomes |= {name: {"status": reason(error)} for name, error in errors.items()}
    for name, measured in times.items():
        outcomes[name] |= _figures(
            measured,
            operation.limit(shape, kind, device),
            operation.limit(shape, kind, device, operation.providers[name]),
        )
    return outcomes


def failed(
    operation: Operation,
    shape: Shape,
    kind: str,
    device: torch.device,
    names: Iterable[str],
    error: Exception,
) -> list[Record]:
    """Return the records of a contest that could not be held."""
    outcome = {"status": reason(error)}
    return [_described(operation, shape, kind, device, name) | outcome for name in names]


def _turn(provider: Provider, batch: Batch, kind: str) -> Turn:
    # The provider is loaded again, so that code compiled for the small batch is not used here.
    work = functools.partial(run, provider.load(), batch, kind)
    spent = kind == BOTH and provider.spends_logits
    return Turn(work, functools.partial(batch.restore, logits=spent))


def _warm_up(turn: Turn, device: torch.device) -> float:
    """Run the work twice, and return the peak memory of the second run in MiB."""
    turn.work()
    turn.after()
    _, peak = peak_memory(turn.work, device)
    return peak / 2**20


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """Describe in one line why a provider has no time."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, Unavailable):
        return text
    if isinstance(error, ImportError):
        return f"not installed: {text}"
    return f"{type(error).__name__}: {text}"


def _figures(times: list[float], limit: float, plan_limit: float) -> Record:
    low, median, high = measure.percentiles(times)
    return {
        "status": "ok",
        "median_ms": 1e3 * median,
        "p20_ms": 1e3 * low,
        "p80_ms": 1e3 * high,
        "rounds": len(times),
        "times_ms": [1e3 * x for x in times],
        "limit_ms": 1e3 * limit,
        "fraction_of_limit": limit / median,
        "times_plan_limit": median / plan_limit,
    }


def _described(
    operation: Operation, shape: Shape, kind: str, device: torch.device, name: str
) -> Record:
    return {
        "operation": operation.name,
        "kind": kind,
        "provider": name,
        "device": device.type,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "sequences": shape.sequences,
        "tokens": shape.tokens,
        "rows": shape.rows,
        "vocab": shape.vocab,
        "width": shape.width,
        "prompt": shape.prompt,
        "central": shape in shapes(operation.source, device, stage=0),
        "head": ("trained" if shape.trained else "frozen") if operation.from_hidden else "",
    }
