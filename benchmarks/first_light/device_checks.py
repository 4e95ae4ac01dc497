"""Checks of errors that only a device can make: offsets, streams, graphs, waits, other devices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, autograd

import fastrlhf

from .cases import evaluate, same_bits
from .from_logits import DIVERGENCES, POLICIES, STATISTICS, Operation, make_case
from .machine import Machine
from .sections import Reporter

_OPERATIONS = {
    "token_stats": STATISTICS["token_stats"],
    "logits_policy_loss": POLICIES["logits_policy_loss"],
    "kl_divergence": DIVERGENCES["kl_divergence reverse"],
}


def check_past_int32(report: Reporter, machine: Machine) -> None:
    """Check logits of more than 2^31 entries.

    The first and the last row are the same, so their results must be the same too.
    """
    rows, vocab = machine.sizes.past_int32
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=machine.device)
    logits[0] = logits[-1] = torch.randn(vocab, device=machine.device).bfloat16()
    logits.requires_grad_()
    targets = torch.full((rows,), 7, device=machine.device)
    logprobs = fastrlhf.token_logprobs(logits, targets, impl="triton")
    same_bits(report, "past 2^31: statistics", logprobs[0], logprobs[-1])
    (gradient,) = autograd.grad(logprobs.sum(), logits)
    _first_is_last(report, "past 2^31: gradient", gradient)
    del gradient
    _policy_past_int32(report, logits, targets, logprobs.detach())


def _policy_past_int32(report: Reporter, logits: Tensor, targets: Tensor, old: Tensor) -> None:
    ones = torch.ones_like(old)[None]
    loss, _ = fastrlhf.logits_policy_loss(
        logits[None], targets[None], old[None], ones, ones, inplace_backward=True, impl="triton"
    )
    (gradient,) = autograd.grad(loss, logits)
    _first_is_last(report, "past 2^31: policy loss in place", gradient)


def _first_is_last(report: Reporter, name: str, gradient: Tensor) -> None:
    same_bits(report, name, gradient[0], gradient[-1])
    report.holds(f"{name}: of its own row", not torch.equal(gradient[0], gradient[1]))


def check_execution(report: Reporter, machine: Machine) -> None:
    """Check that forward and backward give the same bits in three unusual ways to run.

    These are: with waiting for the GPU forbidden, on a side stream, and in a CUDA graph.
    """
    for name, operation in _OPERATIONS.items():
        step = _step(machine, operation)
        expected = step()
        ways = {
            "without waiting": lambda step=step: _unwaited(machine, step),
            "on a side stream": lambda step=step: machine.on_a_side_stream(step),
            "in a graph": lambda step=step: machine.replayed(step),
        }
        for way, run in ways.items():
            title = f"{name} {way}"
            found = report.demand(title, run)
            if found is not None:
                same_bits(report, title, found, expected)


def _unwaited(machine: Machine, step: Callable[[], Tensor]) -> Tensor:
    with machine.forbid_waiting():
        return step()


def _step(machine: Machine, operation: Operation) -> Callable[[], Tensor]:
    """Return a forward and backward on tensors at fixed addresses, which returns the gradient."""
    vocab, dtypes = machine.sizes.vocabs[0], machine.sizes.dtypes[0]
    case = make_case(machine, operation, vocab, dtypes[0])
    leaf = case.leaves["logits"].requires_grad_()
    inputs = case.leaves | {"logits": leaf}

    def step() -> Tensor:
        values = operation.ours(inputs, case.tokens)
        return autograd.grad(sum(value.sum() for value in values.values()), leaf)[0]

    return step


def check_another_device(report: Reporter, machine: Machine) -> None:
    """Check tensors that are not on the current device: kernels must run on the tensors' device."""
    device = machine.another_device()
    if device is None:
        report.note("another device", "there is only one")
        return
    for name, operation in _OPERATIONS.items():
        case = make_case(machine, operation, machine.sizes.vocabs[0], torch.float32)
        there = case._replace(
            leaves={key: x.to(device) for key, x in case.leaves.items()},
            tokens=type(case.tokens)(*(x.to(device) for x in case.tokens)),
        )
        here, found = (
            evaluate(operation.ours, given, ("logits",))[1]["logits"].cpu()
            for given in (case, there)
        )
        same_bits(report, f"{name}: on another device", found, here)
