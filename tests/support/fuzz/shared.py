"""What the cases of several functions draw, and how far rounding reaches in them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import formulas as f
from .draw import Draw
from .judge import Case

Maker = Callable[[Draw], Case]


def vocabulary(d: Draw) -> int:
    return d.of(1, 2, 3, 7, 8, 16, 17, 33, 64)


def subset(d: Draw, *names: str) -> tuple[str, ...]:
    """Leaves whose gradient is wanted; none in some cases."""
    return tuple(name for name in names if d.chance(0.8)) if d.chance(0.85) else ()


def reach(x: Tensor, o: dict[str, Any]) -> float:
    """The size of the largest effective logit, which rounding is relative to."""
    z = x.double()
    z = z[z.isfinite()]
    if not z.numel():
        return 1.0
    size = float(z.abs().max()) * float(o.get("scale", 1.0))
    if o.get("softcap") is not None:
        size = min(size, o["softcap"])
    return size / coldest(o)


def steepness(o: dict[str, Any], weight: Tensor | None = None) -> float:
    """The size of d log p / d input: terms of a gradient are as large, even if their sum is not."""
    largest = 1.0 if weight is None or not weight.numel() else float(weight.double().abs().max())
    return largest * float(o.get("scale", 1.0)) / coldest(o)


def coldest(o: dict[str, Any]) -> float:
    t = o.get("temperature", 1.0)
    if isinstance(t, Tensor):
        return float(t.min()) if t.numel() else 1.0
    return float(t)


def tokens(d: Draw) -> tuple[int, ...]:
    return d.of((d.size(5),), (d.size(3), d.size(4)), (d.size(3), d.size(4)))


def targets_of(d: Draw, shape: tuple[int, ...], vocab: int, ignore: int) -> tuple[Tensor, Tensor]:
    """Targets of which some are ignored, and which are not."""
    live = d.bits(*shape) != 0
    targets = torch.where(live, d.integers(vocab, shape).long(), ignore)
    return d.laid_out(targets.to(d.of(torch.int64, torch.int32))), live


def no_infinities(values: Tensor, wants: tuple[str, ...]) -> Tensor:
    """An infinite divergence has no gradient to speak of."""
    if wants and values.detach().isinf().any():
        raise f.FragileError
    return values


def largest(x: Tensor, mask: Tensor | None) -> float:
    """The sum of the sizes of what is added up, in the worst row."""
    y = x.detach().double() if mask is None else f.where_kept(x.detach().double(), mask)
    if not y.numel():
        return 1.0
    return float(y.abs().sum(-1).max() if y.ndim > 1 else y.abs().max()) + 1.0


def head(
    d: Draw, shape: tuple[int, ...], vocab: int, live: Tensor, dtype: torch.dtype, prefix: str = ""
) -> dict[str, Tensor]:
    width = d.of(1, 3, 8)
    hidden = d.hidden(d.normal(*shape, width) * d.of(1e-3, 1.0, 3.0), live).to(dtype)
    weight = d.laid_out((d.normal(vocab, width) * d.of(0.1, 1.0, 3.0)).to(dtype))
    found = {f"{prefix}hidden": d.laid_out(hidden, repeated=False), f"{prefix}weight": weight}
    if d.chance(0.3):
        found[f"{prefix}bias"] = d.normal(vocab).to(dtype)
    return found


def head_reach(x: dict[str, Tensor], live: Tensor, o: dict[str, Any], prefix: str = "") -> float:
    h, w = f.where_kept(x[f"{prefix}hidden"].double(), live), x[f"{prefix}weight"].double()
    terms = h.abs() @ w.abs().T
    return reach(terms + (x[f"{prefix}bias"].double().abs() if f"{prefix}bias" in x else 0), o) + 1


def head_terms(x: dict[str, Tensor], live: Tensor, o: dict[str, Any], prefix: str = "") -> float:
    """The size of what the gradients of hidden states, weight and bias add up."""
    hidden = f.where_kept(x[f"{prefix}hidden"].double(), live).abs()
    rows = float(hidden.reshape(-1, hidden.shape[-1]).sum(0).max()) if hidden.numel() else 0.0
    return steepness(o, x[f"{prefix}weight"]) + (rows + live.numel()) * steepness(o)


def finite_max(x: Tensor, mask: Tensor) -> Tensor:
    x = f.where_kept(x.detach().double(), mask)
    return x.max() if x.numel() else torch.zeros(())
