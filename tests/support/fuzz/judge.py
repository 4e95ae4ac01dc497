"""One case: a call of the library, its formula in fp64, and the same formula as plain PyTorch.

A number may be off by `SLACK` times as much as the plain formula's worst in its row, or by a few
roundings of what it is made of: its own size, and the size of what entered it, which the case
states (logits of 1e4 in fp32 know their log-probs to 1e-3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .formulas import FragileError

SLACK, ROUNDINGS = 4, 32

Outputs = Sequence[Tensor | None]


@dataclass
class Case:
    """What is called, with what, and what should come out."""

    name: str
    tensors: dict[str, Tensor]  # floating ones, which the formula gets in another dtype
    call: Callable[[dict[str, Tensor]], Outputs]
    formula: Callable[[dict[str, Tensor]], Outputs]
    wants: tuple[str, ...] = ()  # whose gradient is looked at
    size: float = 1.0  # of what enters the results
    exact: bool = False  # no rounding at all
    grad_size: float = 1.0  # by how much roundings of what enters weigh more in gradients
    twice: bool = False  # accumulate the gradient of two calls
    terms: float = 0.0  # the size of what a gradient adds up, where that is more than the gradient


@dataclass
class Verdict:
    """Whether a case held, and why not."""

    failure: str | None = None
    fragile: bool = False


def computing_dtype(case: Case) -> torch.dtype:
    found = torch.float32
    for x in case.tensors.values():
        found = torch.promote_types(found, x.dtype)
    return found


def in_fp64(case: Case) -> dict[str, Tensor]:
    return {name: x.detach().double().contiguous() for name, x in case.tensors.items()}


def leaves_of(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same memory, as leaves of which some want a gradient."""
    return {name: x.detach().requires_grad_(name in case.wants) for name, x in tensors.items()}


def outputs_and_gradients(
    case: Case, tensors: dict[str, Tensor], upstream: list[Tensor], dtype: torch.dtype | None
) -> tuple[Outputs, Outputs]:
    """What comes out of the formula in a dtype, or without one of the library, and the gradients of
    the leaves.
    """
    leaves = leaves_of(case, tensors)
    if dtype is None:
        outputs = case.call(leaves)
    else:
        outputs = case.formula({name: x.to(dtype) for name, x in leaves.items()})
    wanted = [leaves[name] for name in case.wants]
    ys, gs = differentiable(outputs, upstream)
    if not wanted or not ys:
        return outputs, [torch.zeros_like(x) for x in wanted]
    found = torch.autograd.grad(ys, wanted, gs, allow_unused=True)
    pairs = zip(wanted, found, strict=True)
    return outputs, [torch.zeros_like(x) if g is None else g for x, g in pairs]


def differentiable(outputs: Outputs, upstream: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs with a gradient, and what comes upstream."""
    pairs = zip(outputs, upstream, strict=True)
    found = [(y, g.to(y.dtype)) for y, g in pairs if y is not None and y.requires_grad]
    return [y for y, _ in found], [g for _, g in found]


def judge(case: Case, generator: torch.Generator) -> Verdict:
    try:
        shapes = [() if y is None else y.shape for y in case.formula(in_fp64(case))]
        upstream = [torch.randn(shape, generator=generator) for shape in shapes]
        truth = outputs_and_gradients(case, in_fp64(case), upstream, torch.float64)
        tensors = {name: x.detach().contiguous() for name, x in case.tensors.items()}
        plain = outputs_and_gradients(case, tensors, upstream, computing_dtype(case))
    except FragileError:
        return Verdict(fragile=True)
    ours = outputs_and_gradients(case, case.tensors, upstream, None)
    failure = wrong_output(case, ours[0], truth[0], plain[0])
    failure = failure or wrong_gradient(case, ours[1], truth[1], plain[1])
    if not failure and case.twice and case.wants:
        failure = wrong_sum(case, upstream, ours[1])
    return Verdict(failure)


def wrong_output(case: Case, ours: Outputs, truth: Outputs, plain: Outputs) -> str | None:
    relative = 0.0 if case.exact else ROUNDINGS * torch.finfo(computing_dtype(case)).eps
    for i, (got, want, ordinary) in enumerate(zip(ours, truth, plain, strict=True)):
        if want is not None:
            error = wrong(got, want, ordinary, relative, case.size)
            if error:
                return f"output {i}: {error}"
    return None


def wrong_gradient(case: Case, ours: Outputs, truth: Outputs, plain: Outputs) -> str | None:
    roundings = ROUNDINGS * case.grad_size * (1 + case.size)
    relative = roundings * torch.finfo(computing_dtype(case)).eps
    for name, got, want, ordinary in zip(case.wants, ours, truth, plain, strict=True):
        leaf = case.tensors[name]
        if got.dtype != leaf.dtype or got.shape != leaf.shape:
            return f"gradient of {name}: {got.dtype} {tuple(got.shape)}"
        largest = float(finite(want).abs().max()) if want.numel() else 0.0
        error = wrong(got, want, ordinary, relative, max(largest, case.terms))
        if error:
            return f"gradient of {name}: {error}"
    return None


def wrong_sum(case: Case, upstream: list[Tensor], once: Outputs) -> str | None:
    """Two calls, whose gradients add up."""
    leaves = leaves_of(case, case.tensors)
    for _ in range(2):
        ys, gs = differentiable(case.call(leaves), upstream)
        if not ys:
            return None
        torch.autograd.backward(ys, gs)
    for name, g in zip(case.wants, once, strict=True):
        total = leaves[name].grad
        if total is not None:
            rounding = 4 * torch.finfo(g.dtype).eps * finite(g).double().abs()
            off = (finite(total).double() - 2 * finite(g).double()).abs()
            if (g.isfinite() & total.isfinite() & (off > rounding)).any():
                return f"gradient of {name}: two calls do not add up"
    return None


def smallest(dtype: torch.dtype) -> float:
    """Below this, a dtype has no relative accuracy."""
    limits = torch.finfo(dtype)
    return max(4 * limits.smallest_normal * limits.eps, 1e-37)


def finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, torch.zeros((), dtype=x.dtype))


def wrong(
    got: Tensor | None, want: Tensor, ordinary: Tensor, relative: float, size: float
) -> str | None:
    """Say what is wrong with a tensor, if anything is."""
    if got is None or got.shape != want.shape:
        return f"{None if got is None else tuple(got.shape)}, not {tuple(want.shape)}"
    rounding = absolute = 0.0
    if got.is_floating_point():
        rounding, absolute = 4 * torch.finfo(got.dtype).eps, smallest(got.dtype)
    # What the dtype cannot hold is what the plain formula makes of it.
    ordinary = ordinary.detach().to(got.dtype).double()
    got, want = got.detach().double(), want.detach().double()
    held = ordinary.isfinite() & want.isfinite()
    ends = ~held & (got != want) & (got != ordinary) & ~(got.isnan() & want.isnan())
    if ends.any():
        return f"{got[ends][0].item()} for {want[ends][0].item()}"
    error = (finite(ordinary) - finite(want)).abs() * held
    if error.ndim > 1 and error.numel():
        error = error.amax(-1, keepdim=True).expand(want.shape)
    budget = SLACK * error + (relative + rounding) * finite(want).abs() + relative * size + absolute
    off = (finite(got) - finite(want)).abs() * held
    bad = held & ((off > budget) | ~got.isfinite())
    if not bad.any():
        return None
    at = (off / budget).masked_fill(~bad, -1).argmax()
    values = (x.reshape(-1)[at].item() for x in (got, want, ordinary, budget))
    return "{} for {} (plain {}, budget {:.1e})".format(*values)
