"""The inputs of the checks, and the comparison of an operation with plain PyTorch and with fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, autograd

from .accuracy import judge, judge_values, split_logits, split_weight
from .machine import Machine
from .sections import Reporter, describe

IGNORED = -100
_MASKED = slice(3, 11)  # columns whose logits are -inf
_CERTAIN = 17

Leaves = dict[str, Tensor]


class Tokens(NamedTuple):
    """What is known of each token besides its logits: (B, T), of a sequence (B,)."""

    targets: Tensor
    g: Tensor  # gradients from outside, 0 where a token is ignored
    h: Tensor
    temperature: Tensor
    advantages: Tensor
    old: Tensor  # log-probs when the tokens were sampled
    ref: Tensor

    @property
    def live(self) -> Tensor:
        """The tokens with a target."""
        return self.targets != IGNORED

    @property
    def picked(self) -> Tensor:
        """Indices of the targets, (B, T, 1), whatever is ignored."""
        return self.targets.clamp(min=0)[..., None]

    def double(self) -> Tokens:
        """The same in fp64."""
        return Tokens(*(x.double() if x.is_floating_point() else x for x in self))


# Of leaves and tokens: differentiable values, (B, T) or 0-d, by name.
Function = Callable[[Leaves, Tokens], dict[str, Tensor]]


class Case(NamedTuple):
    """Inputs of an operation; its leaves may hold NaN where a token is ignored."""

    leaves: Leaves  # what needs a gradient
    constants: Leaves
    tokens: Tokens

    def clean(self) -> Case:
        """For formulas that read every row: ignored rows of logits are zeros."""
        ignored = ~self.tokens.live[..., None]
        leaves, constants = (
            {k: x.masked_fill(ignored, 0.0) if "logits" in k else x for k, x in tensors.items()}
            for tensors in (self.leaves, self.constants)
        )
        return Case(leaves, constants, self.tokens)

    def double(self) -> Case:
        """The same in fp64."""
        leaves, constants = (
            {k: x.double() for k, x in tensors.items()} for tensors in (self.leaves, self.constants)
        )
        return Case(leaves, constants, self.tokens.double())


def normal(machine: Machine, *size: int, scale: float = 1.0) -> Tensor:
    """Normal numbers in fp32."""
    return scale * torch.randn(size, device=machine.device)


def make_tokens(machine: Machine, targets: Tensor, logprobs: Tensor) -> Tokens:
    """Draw the rest for targets (B, T) whose log-probs are known."""
    b, t = targets.shape
    g, h = (normal(machine, b, t) * (targets != IGNORED) for _ in range(2))
    temperature = torch.rand(b, t, device=machine.device) + 0.5
    # Log-ratios of 0.1 and 0.3 either way: with bounds of 0.2 half of them are clipped, and none is
    # so close to a bound that rounding could bring it to the other side.
    ratios = torch.tensor([-0.3, -0.1, 0.1, 0.3, 0.1], device=machine.device).repeat(b * t)
    old = logprobs.float() + ratios[: b * t].view(b, t)
    ref = logprobs.float() + normal(machine, b, t, scale=0.3)
    return Tokens(targets, g, h, temperature, normal(machine, b), old, ref)


def logits_case(machine: Machine, vocab: int, dtype: torch.dtype, *, pair: bool = False) -> Case:
    """Two sequences of tokens: one token is ignored and holds NaN, one is certain, and most have
    columns of -inf. A `pair` has the logits of a second model.
    """
    b, t = 2, machine.sizes.tokens
    logits = normal(machine, b, t, vocab, scale=3.0).to(dtype)
    targets = torch.randint(vocab, (b, t), device=machine.device)
    logits[:, 1:, _MASKED] = -torch.inf
    impossible = (targets >= _MASKED.start) & (targets < _MASKED.stop)
    targets[impossible] = _MASKED.stop
    logits[-1, 1], logits[-1, 1, _CERTAIN] = -9e3, 1e4
    targets[-1, 1] = _CERTAIN
    targets[0, 0], logits[0, 0] = IGNORED, torch.nan
    exact = logits.double().nan_to_num(0.0, neginf=-torch.inf).log_softmax(-1)
    logprobs = exact.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    case = Case({"logits": logits}, {}, make_tokens(machine, targets, logprobs))
    if pair:
        other = normal(machine, b, t, vocab, scale=3.0).to(dtype)
        other[0, 0] = torch.nan
        case.leaves["other_logits"] = other
    return case


def hidden_case(machine: Machine, vocab: int, dtype: torch.dtype) -> Case:
    """Four sequences of hidden states, their first token ignored, and the heads of two models."""
    rows, width = machine.sizes.linear_rows, machine.sizes.linear_width
    leaves, constants = (
        {
            prefix + "hidden": normal(machine, 4, rows // 4, width).to(dtype),
            prefix + "weight": normal(machine, vocab, width, scale=2 * width**-0.5).to(dtype),
        }
        for prefix in ("", "other_")
    )
    targets = torch.randint(vocab, (4, rows // 4), device=machine.device)
    targets[:, 0] = IGNORED
    logits = leaves["hidden"].double() @ leaves["weight"].double().T
    logprobs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return Case(leaves, constants, make_tokens(machine, targets, logprobs))


def evaluate(
    function: Function, case: Case, wanted: tuple[str, ...], factor: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values of a function, and gradients of the wanted leaves; losses count `factor` times."""
    leaves = {
        name: x.detach().clone().requires_grad_(name in wanted) for name, x in case.leaves.items()
    }
    tokens = case.tokens
    # Views, so that the backward may overwrite a leaf in place.
    inputs = {name: x.view_as(x) for name, x in leaves.items()}
    values = function(inputs | case.constants, tokens)
    upstream = {"entropy": tokens.h, "loss": factor}
    objective = sum((value * upstream.get(k, tokens.g)).sum() for k, value in values.items())
    found = autograd.grad(objective, [leaves[name] for name in wanted])
    return {k: x.detach() for k, x in values.items()}, dict(zip(wanted, found, strict=True))


def compare(
    report: Reporter,
    machine: Machine,
    name: str,
    formulas: tuple[Function, Function],
    case: Case,
    wanted: tuple[str, ...],
    factor: float = 1.0,
) -> dict[str, Tensor]:
    """Report how far values and gradients are from fp64, by the error of the plain formula, and
    whether they have the same bits a second time; return the gradients.
    """
    ours, plain = formulas
    try:
        values, gradients = evaluate(ours, case, wanted, factor)
        again = evaluate(ours, case, wanted, factor)
    except Exception as error:
        report.holds(f"{name}: {describe(error)}", False)
        return {}
    same_bits(report, f"{name}, again", _flat(values, gradients), _flat(*again))
    clean, live = case.clean(), case.tokens.live
    exact, exact_gradients = evaluate(plain, clean.double(), wanted, factor)
    usual, usual_gradients = evaluate(plain, clean, wanted, factor)
    for key, found in values.items():
        three = [x if x.ndim == 0 else x[live] for x in (found, usual[key], exact[key])]
        report.check(f"{name}: {key}", judge_values(*three, machine.slack(found.dtype)))
    for key, found in gradients.items():
        three = (found, usual_gradients[key], exact_gradients[key])
        title = f"{name}: gradient of {key}"
        compare_gradients(report, machine, title, key, three, case.tokens.targets)
    return gradients


def _flat(*parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten().double() for part in parts for x in part.values()])


def compare_gradients(
    report: Reporter,
    machine: Machine,
    name: str,
    leaf: str,
    three: tuple[Tensor, Tensor, Tensor],
    targets: Tensor,
) -> None:
    """Report how far a leaf's gradient is, of (found, plain, exact), in each of its parts."""
    slack, found, live = machine.slack(three[0].dtype), three[0], targets != IGNORED
    if leaf == "hidden":
        report.check(f"{name}", judge(*(x[live] for x in three), slack))
    else:
        split = split_weight if leaf == "weight" else split_logits
        of_targets, of_rest = zip(*(split(x, targets) for x in three), strict=True)
        report.check(f"{name}, targets", judge(*of_targets, slack))
        report.check(f"{name}, the rest", judge(*of_rest, slack))
    if leaf != "weight":
        report.holds(f"{name}, 0 where ignored", not bool(found[~live].any()))


def same_bits(report: Reporter, name: str, first: Tensor, second: Tensor) -> None:
    """Report whether two results agree in every bit, and are not just empty or zero."""
    same = torch.equal(first, second) and bool(first.any())
    report.holds(f"{name}: same bits", same)
