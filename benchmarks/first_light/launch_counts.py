"""Count the kernels that a training step launches, and how long the GPU waits between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, autograd

import fastrlhf

from .machine import Launch, Machine
from .sections import Reporter


def count_launches(report: Reporter, machine: Machine) -> None:
    """Report the launches of a DPO step and of a PPO step, from logits to their gradient."""
    (b, t), vocab = machine.sizes.step, machine.sizes.vocabs[0]
    device = machine.device
    logits = torch.randn(b, t, vocab, device=device).bfloat16().requires_grad_()
    targets = torch.randint(vocab, (b, t), device=device)
    mask = torch.ones(b, t, dtype=torch.bool, device=device)
    chosen, rejected = torch.arange(b, device=device).chunk(2)
    zeros, advantages = torch.zeros(b, device=device), torch.randn(b, device=device)
    old = torch.full((b, t), -11.0, device=device)

    def dpo() -> Tensor:
        logprobs = fastrlhf.token_logprobs(logits, targets, impl="triton")
        losses, _ = fastrlhf.dpo_loss(logprobs, zeros, chosen, rejected, mask=mask, impl="triton")
        return losses.mean()

    def ppo() -> Tensor:
        rest = (targets, old, advantages, mask)
        return fastrlhf.logits_policy_loss(logits, *rest, impl="triton")[0]

    for name, loss in (("DPO step", dpo), ("PPO step", ppo)):

        def step(loss: Callable[[], Tensor] = loss) -> None:
            autograd.grad(loss(), logits)

        def count(name: str = name, step: Callable[[], None] = step) -> None:
            step()  # compiles; not counted
            _report(report, name, machine.launches(step))

        report.attempt(name, count)


def _report(report: Reporter, name: str, launches: list[Launch]) -> None:
    busy = [launch.end - launch.start for launch in launches]
    gaps = [max(0.0, after.start - before.end) for before, after in itertools.pairwise(launches)]
    report.record(
        "launches", name=name, count=len(launches), busy_us=sum(busy), gaps_us=sum(gaps),
        kernels=[
            {"name": launch.name, "us": us, "gap_before_us": gap}
            for launch, us, gap in zip(launches, busy, [0.0, *gaps], strict=False)
        ],
    )  # fmt: skip
