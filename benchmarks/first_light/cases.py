"""Make the inputs of the checks, and compare operations with plain PyTorch and with fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, autograd

from .accuracy import judge, judge_values, split_logits, split_weight
from .machine import Machine
from .plain import SOFTCAP, log_softmax, logprobs
from .sections import Reporter
from .tokens import IGNORED, Tokens

_MASKED = slice(3, 11)  # columns whose logits are -inf
_CERTAIN = 17

Leaves = dict[str, Tensor]


# A function of leaves and tokens that returns differentiable values, (B, T) or 0-d, by name.
Function = Callable[[Leaves, Tokens], dict[str, Tensor]]


class Case(NamedTuple):
    """Inputs of an operation. Leaves may hold NaN at ignored tokens."""

    leaves: Leaves  # inputs that need a gradient
    constants: Leaves
    tokens: Tokens

    def clean(self) -> Case:
        """Return a copy with zeros in ignored rows of logits, for formulas that read every row."""
        ignored = ~self.tokens.live[..., None]
        leaves, constants = (
            {k: x.masked_fill(ignored, 0.0) if "logits" in k else x for k, x in tensors.items()}
            for tensors in (self.leaves, self.constants)
        )
        return Case(leaves, constants, self.tokens)

    def double(self) -> Case:
        """Return a copy in fp64."""
        leaves, constants = (
            {k: x.double() for k, x in tensors.items()} for tensors in (self.leaves, self.constants)
        )
        return Case(leaves, constants, self.tokens.double())


def normal(machine: Machine, *size: int, scale: float = 1.0) -> Tensor:
    """Draw normal numbers in fp32."""
    return scale * torch.randn(size, device=machine.device)


def make_tokens(machine: Machine, targets: Tensor) -> Tokens:
    """Draw the properties of tokens that do not depend on log-probs."""
    b, t = targets.shape
    g, h = (normal(machine, b, t) * (targets != IGNORED) for _ in range(2))
    temperature = torch.rand(b, t, device=machine.device) + 0.5
    old = ref = torch.zeros_like(g)
    return Tokens(targets, g, h, temperature, normal(machine, b), old, ref)


def sampled(machine: Machine, tokens: Tokens, log_p: Tensor) -> Tokens:
    """Add log-probs of an older policy that sampled the tokens, which are near the present ones.

    Log-ratios are ±0.1 and ±0.3. With bounds of 0.2 half of them are clipped, and none is so close
    to a bound that rounding could move it across.
    """
    present = logprobs(log_p, tokens).float()
    ratios = torch.tensor([-0.3, -0.1, 0.1, 0.3, 0.1], device=machine.device)
    old = present + ratios.repeat(present.numel())[: present.numel()].view(present.shape)
    ref = present + normal(machine, *present.shape, scale=0.3)
    return tokens._replace(old=old, ref=ref)


def logits_case(
    machine: Machine,
    vocab: int,
    dtype: torch.dtype,
    *,
    pair: bool = False,
    transformed: bool = False,
) -> Case:
    """Make two sequences of logits with hostile values.

    One token is ignored and its logits are NaN, one token is certain, and most rows have columns of
    -inf. With `pair` there are also logits of a second model. With `transformed`, the tokens are
    sampled from logits with temperature and softcap, as the operation applies them.
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
    tokens = make_tokens(machine, targets)
    transform = (tokens.temperature, SOFTCAP) if transformed else ()
    exact = logits.double().masked_fill(~tokens.live[..., None], 0.0)
    tokens = sampled(machine, tokens, log_softmax(exact, *transform))
    case = Case({"logits": logits}, {}, tokens)
    if pair:
        other = normal(machine, b, t, vocab, scale=3.0).to(dtype)
        other[0, 0] = torch.nan
        case.leaves["other_logits"] = other
    return case


def hidden_case(machine: Machine, vocab: int, dtype: torch.dtype) -> Case:
    """Make 4 sequences of hidden states of two models, and both heads; first tokens are ignored."""
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
    tokens = make_tokens(machine, targets)
    exact = leaves["hidden"].double() @ leaves["weight"].double().T
    return Case(leaves, constants, sampled(machine, tokens, log_softmax(exact)))


def evaluate(
    function: Function, case: Case, wanted: tuple[str, ...], factor: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return values of a function and gradients of the wanted leaves; losses are times `factor`."""
    leaves = {
        name: x.detach().clone().requires_grad_(name in wanted) for name, x in case.leaves.items()
    }
    tokens = case.tokens
    # The function gets views, so that its backward may overwrite a leaf in place.
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
    """Compare an operation with its plain formula in fp64, and return its gradients.

    Reported are the errors of values and gradients against a budget from the plain formula's error,
    and whether a second run gives the same bits.
    """
    ours, plain = formulas
    twice = report.demand(name, lambda: [evaluate(ours, case, wanted, factor) for _ in range(2)])
    if twice is None:
        return {}
    (values, gradients), again = twice
    same_bits(report, f"{name}, again", _flat(values, gradients), _flat(*again))
    clean, live = case.clean(), case.tokens.live
    # The coefficient of a token depends on its log-prob, so it has a similar absolute error.
    terms = max(1.0, float(case.tokens.old.abs().max())) if "policy" in name else 1.0
    exact, exact_gradients = evaluate(plain, clean.double(), wanted, factor)
    usual, usual_gradients = evaluate(plain, clean, wanted, factor)
    for key, found in values.items():
        three = [x if x.ndim == 0 else x[live] for x in (found, usual[key], exact[key])]
        report.check(f"{name}: {key}", judge_values(*three, terms * machine.slack(found.dtype)))
    for key, found in gradients.items():
        three = (found, usual_gradients[key], exact_gradients[key])
        title = f"{name}: gradient of {key}"
        slack = machine.slack(found.dtype) * (terms if found.dtype == torch.float32 else 1.0)
        compare_gradients(report, title, key, three, case.tokens.targets, slack)
    return gradients


def _flat(*parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten().double() for part in parts for x in part.values()])


def compare_gradients(
    report: Reporter,
    name: str,
    leaf: str,
    three: tuple[Tensor, Tensor, Tensor],
    targets: Tensor,
    slack: float,
) -> None:
    """Report the error of each part of a leaf's gradient; `three` is (found, plain, exact)."""
    found, live = three[0], targets != IGNORED
    if leaf == "hidden":
        report.check(name, judge(*(x[live] for x in three), slack))
    else:
        split = split_weight if leaf == "weight" else split_logits
        of_targets, of_rest = zip(*(split(x, targets) for x in three), strict=True)
        report.check(f"{name}, targets", judge(*of_targets, slack))
        report.check(f"{name}, the rest", judge(*of_rest, slack))
    if leaf != "weight":
        report.holds(f"{name}, 0 where ignored", not bool(found[~live].any()))


def same_bits(report: Reporter, name: str, first: Tensor, second: Tensor) -> None:
    """Report whether two results agree in every bit, and are neither empty nor all zero."""
    same = torch.equal(first, second) and bool(first.any())
    report.holds(f"{name}: same bits", same)
