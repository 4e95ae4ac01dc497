"""Checks of Fisher products, advantages, pairs of sequences and packed sequences."""

from __future__ import annotations

import itertools

import torch

import fastrlhf
from fastrlhf import reference

from .accuracy import judge, judge_values
from .cases import compare_gradients, logits_case, normal
from .machine import Machine
from .sections import Reporter

_LOSSES = ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm")  # the losses that have a kernel
_BETA, _SMOOTHING = 0.1, 0.1


def check_fisher(report: Reporter, machine: Machine) -> None:
    """Check the Fisher product row by row, and its quadratic form."""
    for vocab, dtypes in zip(machine.sizes.vocabs, machine.sizes.dtypes, strict=True):
        for dtype in dtypes:
            case = logits_case(machine, vocab, dtype)
            logits, live = case.leaves["logits"], case.tokens.live
            tangent, temperature = normal(machine, *logits.shape).to(dtype), case.tokens.temperature
            found = fastrlhf.softmax_fisher_product(
                logits, tangent, temperature=temperature, mask=live, impl="triton"
            )

            def formula(x: torch.Tensor, u: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
                p = (x / t[..., None]).softmax(-1)
                product = p * (u - (p * u).sum(-1, keepdim=True)) / t[..., None] ** 2
                return [product, (product * u).sum(-1)]

            clean = case.clean().leaves["logits"]
            usual = formula(clean.float(), tangent.float(), temperature)
            usual[0] = usual[0].to(dtype)
            exact = formula(clean.double(), tangent.double(), temperature.double())
            title = f"softmax_fisher_product V={vocab} {dtype}".replace("torch.", "")
            slack = machine.slack(dtype)
            # The product of a certain token is 0 apart from rounding errors, so it is left out.
            live[-1, 1] = False
            three = [x[0][live] for x in (found, usual, exact)]
            report.check(f"{title}: product", judge(*three, slack))
            three = [x[1][live] for x in (found, usual, exact)]
            report.check(f"{title}: form", judge_values(*three, machine.slack(torch.float32)))
            report.holds(f"{title}: 0 where ignored", not bool(found[0][0, 0].any()))


def check_advantages(report: Reporter, machine: Machine) -> None:
    """Check GAE for lengths below a block and of many blocks, with masked entries of NaN."""
    for length in machine.sizes.scan_lengths:
        rewards, values = normal(machine, 5, length), normal(machine, 5, length)
        mask = torch.rand(5, length, device=machine.device) > 0.3
        mask[1] = False
        rewards[~mask] = torch.nan
        found = fastrlhf.gae(rewards, values, mask, gamma=0.99, lam=0.95, impl="triton")
        clean = rewards.nan_to_num(0.0).cpu(), values.cpu()
        usual, exact = (
            reference.gae(*inputs, mask.cpu(), gamma=0.99, lam=0.95)
            for inputs in (clean, [x.double() for x in clean])
        )
        for i, name in enumerate(("advantages", "returns")):
            three = (found[i].cpu(), usual[i], exact[i])
            verdict = judge_values(*three, machine.slack(torch.float32))
            report.check(f"gae T={length}: {name}", verdict)


def check_pairs(report: Reporter, machine: Machine) -> None:
    """Check DPO's losses, rewards and gradient from log-probs against their definition."""
    logps, ref = -normal(machine, 6, 40).abs(), -normal(machine, 6, 40).abs()
    mask = torch.rand(6, 40, device=machine.device) > 0.2
    chosen, rejected = (torch.tensor(x, device=machine.device) for x in ([0, 1, 2], [3, 4, 0]))
    for loss_type, smoothing in itertools.product(_LOSSES, (0.0, _SMOOTHING)):
        if smoothing and loss_type not in ("sigmoid", "robust"):
            continue
        found = _ours(logps, ref, mask, chosen, rejected, loss_type, smoothing)
        usual, exact = (
            _definition(x, y, mask, chosen, rejected, loss_type, smoothing)
            for x, y in ((logps, ref), (logps.double(), ref.double()))
        )
        title, slack = f"dpo_loss {loss_type} {smoothing}", machine.slack(torch.float32)
        for i, name in enumerate(("losses", "rewards")):
            report.check(f"{title}: {name}", judge_values(found[i], usual[i], exact[i], slack))
        gradients = (found[2], usual[2], exact[2])
        targets = torch.where(mask, 0, -100)
        compare_gradients(report, f"{title}: gradient", "hidden", gradients, targets, slack)


def check_packed(report: Reporter, machine: Machine) -> None:
    """Check that kernels on sequences give the same bits for packed sequences as for rows."""
    lengths = torch.tensor([0, 1, 40, 1500, 33])
    there = (torch.arange(1500) < lengths[:, None]).to(machine.device)
    borders = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(machine.device)
    logps, ref, rewards = (-normal(machine, *there.shape).abs() for _ in range(3))
    mask = there & (torch.rand(there.shape, device=machine.device) > 0.2)
    chosen, rejected = (torch.tensor(x, device=machine.device) for x in ([1, 2, 3], [2, 4, 0]))
    pairs = chosen, rejected, "ipo", 0.0
    rows = _ours(logps, ref, mask, *pairs)
    packed = _ours(logps[there], ref[there], mask[there], *pairs, cu_seqlens=borders)
    for i, name in enumerate(("losses", "rewards", "gradient")):
        expected = rows[i][there] if name == "gradient" else rows[i]
        report.holds(f"dpo_loss packed: {name}", torch.equal(packed[i], expected))
    by_row = fastrlhf.gae(rewards, logps, mask, impl="triton")
    by_run = fastrlhf.gae(
        rewards[there], logps[there], mask[there], cu_seqlens=borders, impl="triton"
    )
    for name, found, expected in zip(("advantages", "returns"), by_run, by_row, strict=True):
        report.holds(f"gae packed: {name}", torch.equal(found, expected[there]))


def _with_gradient(logps: torch.Tensor, losses: torch.Tensor, rewards: torch.Tensor) -> tuple:
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    return losses.detach(), rewards, gradient[..., None]


def _ours(logps, ref, mask, chosen, rejected, loss_type, smoothing, cu_seqlens=None) -> tuple:
    logps = logps.clone().requires_grad_()
    found = fastrlhf.dpo_loss(
        logps, ref, chosen, rejected, _BETA, loss_type=loss_type, label_smoothing=smoothing,
        mask=mask, cu_seqlens=cu_seqlens, impl="triton",
    )  # fmt: skip
    return _with_gradient(logps, *found)


def _definition(logps, ref, mask, chosen, rejected, loss_type, smoothing) -> tuple:
    logps = logps.clone().requires_grad_()
    found = reference.preference_loss(
        logps, ref, chosen, rejected, mask, None, loss_type=loss_type, beta=_BETA,
        label_smoothing=smoothing,
    )  # fmt: skip
    return _with_gradient(logps, *found)
