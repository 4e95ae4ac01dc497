"""Time each kernel, and compare it with a copy of the same bytes on the same card."""

from __future__ import annotations

import torch

import fastrlhf

from .kernel_work import Logits
from .machine import Machine
from .sections import Reporter


def measure_rates(report: Reporter, machine: Machine) -> None:
    """Measure the rates of this card, to which all other timings are compared.

    The rates are bytes per second of a copy, with reads and writes counted, and operations per
    second of a bf16 matmul.
    """
    sizes = machine.sizes
    source = torch.ones(sizes.copied_bytes, dtype=torch.int8, device=machine.device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / machine.seconds(lambda: target.copy_(source))
    side = sizes.matmul_side
    a, b = (torch.randn(side, side, device=machine.device).bfloat16() for _ in range(2))
    flops = 2 * side**3 / machine.seconds(lambda: a @ b)
    report.record("rates", copy_bytes_per_second=copied, matmul_flops_per_second=flops)


def copy_seconds(report: Reporter, moved: float) -> float | None:
    """Return the time of a copy that moves so many bytes; None if the rate is not known."""
    rate = report.rates.get("copy_bytes_per_second")
    return moved / rate if rate else None


def compile_kernels(report: Reporter, machine: Machine, vocab: int) -> None:
    """Launch each kernel once, so that it is in Triton's cache when it is timed.

    The launches have few rows. Their number is a multiple of 16, as in the timings, because the
    compiler makes separate code for multiples of 16.
    """
    for name, work in Logits(machine, machine.sizes.few_rows, vocab).works().items():
        report.attempt(name, work.run)


def time_kernels(report: Reporter, machine: Machine, rows: int, vocab: int) -> None:
    """Time each kernel on rows of logits."""
    logits = Logits(machine, rows, vocab)
    for name, work in logits.works().items():

        def time(name: str = name, work=work) -> None:
            floor = copy_seconds(report, work.passes * logits.pass_bytes)
            seconds = machine.seconds(work.run)
            report.timing(name, seconds, floor, column=f"{rows} × {vocab}")

        report.attempt(f"{name} {rows} × {vocab}", time)


def time_small_kernels(report: Reporter, machine: Machine) -> None:
    """Time the kernels without a vocabulary: advantages, and pairs of sequences."""
    b, t = machine.sizes.scan
    rewards = torch.randn(b, t, device=machine.device)
    mask = torch.ones(b, t, dtype=torch.bool, device=machine.device)
    size = f"{b} × {t}"

    def scan() -> None:
        seconds = machine.seconds(lambda: fastrlhf.gae(rewards, rewards, mask, impl="triton"))
        report.timing(f"GAE {size}", seconds, copy_seconds(report, 4 * rewards.nbytes))

    chosen, rejected = torch.arange(b, device=machine.device).chunk(2)
    logps = (-rewards.abs()).requires_grad_()

    def losses() -> torch.Tensor:
        return fastrlhf.dpo_loss(logps, rewards, chosen, rejected, mask=mask, impl="triton")[0]

    def pairs() -> None:
        kept = losses()
        ones = torch.ones_like(kept)
        floor = copy_seconds(report, 2 * logps.nbytes)
        report.timing(f"DPO tail forward {size}", machine.seconds(losses), floor)

        def backward() -> None:
            torch.autograd.grad(kept, logps, ones, retain_graph=True)

        floor = copy_seconds(report, logps.nbytes)
        report.timing(f"DPO tail backward {size}", machine.seconds(backward), floor)

    report.attempt("GAE", scan)
    report.attempt("DPO tail", pairs)
