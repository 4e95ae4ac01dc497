"""A whole training step of SmolLM2-135M through this library, plain PyTorch and the peers.

    python benchmarks/bench_model_step.py [--losses SFT DPO GRPO] [--rounds N] [--output DIR]

A step is forward, loss and backward, once with all parameters trained (the head is tied to the
embeddings) and once with LoRA on attention. The optimizer's step is left out, since it is the same
for all. `model_step.py` defines the batch and the providers, and `step_contest.py` checks and times
them. With --output, model-step.json and model-step.md are written; `--tiny` takes a tiny random
model.
"""

from __future__ import annotations

import argparse
import functools
import sys
from itertools import groupby
from typing import Any

import report
import step_contest
import torch
from contest import Unavailable
from model_step import LOSSES, Step, make_step
from providers import Provider
from step_contest import Command, Entrant, Record, Work, with_backward
from torch import nn


def contest(
    loss: str, step: Step, device: torch.device, rounds: int, *, compiling: bool = True
) -> list[Record]:
    """Check the providers of a loss and measure memory and time; return one record for each."""
    plain, providers = LOSSES[loss]

    def load(provider: Provider) -> Work:
        if provider.gpu_only and device.type != "cuda":
            raise Unavailable("needs a GPU")
        if provider.compiles and not compiling:
            raise Unavailable("compiles")
        return functools.partial(with_backward, provider.load(), step)

    entrants = {
        name: Entrant(functools.partial(load, provider), compiles=provider.compiles)
        for name, provider in providers.items()
    }
    return step_contest.hold(loss, plain, entrants, step, device, rounds)


def tables(machine: dict[str, Any], records: list[Record]) -> str:
    """Make the table of the measurements, one row for each provider."""
    rows = []
    for (loss, trained), group in groupby(records, key=lambda r: (r["loss"], r["trained"])):
        members = list(group)
        cells = step_contest.times_and_ratios(members, ("eager", report.OURS))
        for record in members:
            name = record["provider"]
            timed = [*cells[name], f"{record['peak_mib']:.0f}"] if name in cells else None
            rows.append([loss, trained, name, *(timed or [record["status"], "", "", "", ""])])
    columns = ["loss", "trained", "provider", "ms", "processor, ms", "times eager",
               f"times {report.OURS}", "MiB"]  # fmt: skip
    return "\n".join(
        [
            f"# A training step of a model: {machine['device']}\n",
            *step_contest.circumstances(machine, records),
            _READING.format(rounds=step_contest.fewest_rounds(records)),
            report.markdown(columns, rows),
        ]
    )


_READING = """\
Forward, loss and backward. Medians, with the 20th and the 80th percentile, of {rounds} rounds in
which the providers take turns. MiB: the peak of live tensors beyond model and batch, gradients
included. Each was checked against fp64 on this batch. "Packed" rows hold the same tokens without
padding. "Processor" is the median of the time that the processor's cores spent on it, all together:
on a CPU, whose cores may be shared, the multiples are of this; on a GPU they are of the time.
"""


def _of_model(
    loss: str, model: nn.Module, arguments: argparse.Namespace, device: torch.device
) -> list[Record]:
    step = make_step(model, arguments.sequences, arguments.tokens)
    return contest(loss, step, device, arguments.rounds, compiling=not arguments.tiny)


def main() -> int:
    """Run the command: measure the chosen losses and print the table."""
    return step_contest.run_command(
        Command(
            __doc__.splitlines()[0], "model-step", "--losses", list(LOSSES), ["SFT", "DPO"],
            _of_model, tables,
        )
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
