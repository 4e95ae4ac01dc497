"""A training step of TRL's trainers on SmolLM2-135M, on TRL's own kernels and on this library's.

    python benchmarks/bench_trainer.py [--trainers SFT DPO GRPO] [--rounds N] [--output DIR]

The model is trained once with all parameters (the head is tied to the embeddings) and once with
LoRA on attention. `trainer_step.py` defines the step and the contestants, and `step_contest.py`
checks and times them. With --output, trainer.json and trainer.md are written; `--tiny` takes a tiny
random model.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import report
import step_contest
import torch
from model_step import make_step
from step_contest import Command, Entrant, Record, Work
from torch import nn
from trainer_step import (
    KINDS,
    TrainerStep,
    body,
    contestants,
    make_trainer_step,
    make_work,
    with_prompts_on_the_left,
)

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from support.matmuls import MatmulAudit

_COMPARED = ("TRL", "TRL, prompts skipped", "patched")


def contest(
    name: str, model: nn.Module, sequences: int, tokens: int, device: torch.device, rounds: int
) -> list[Record]:
    """Check a trainer's contestants and measure memory, matmuls and time; one record for each."""
    step = make_trainer_step(make_step(model, sequences, tokens))
    if name == "GRPO":
        step = with_prompts_on_the_left(step)
    entrants = {
        contestant: Entrant(functools.partial(make_work, name, of.load, step), of.around)
        for contestant, of in contestants(name, device).items()
    }
    without_head = operations(functools.partial(body, name, step), step)
    vocab, width = step.base.lm_head.weight.shape
    unit = 2 * int(step.mask.sum()) * vocab * width

    def matmuls(work: Work) -> Record:
        count = operations(work, step)
        return {"matmul_operations": count, "head_matmuls": (count - without_head) / unit}

    plain = KINDS[name].plain
    return step_contest.hold(name, plain, entrants, step, device, rounds, matmuls)


def operations(work: Callable[[], object], step: TrainerStep) -> int:
    """Count the operations of the matmuls of some work, and drop its gradients."""
    with MatmulAudit() as audit:
        work()
    step.forget()
    return audit.operations


def tables(machine: dict[str, Any], records: list[Record]) -> str:
    """Make the table of the measurements, one row for each contestant."""
    compared = [x for x in _COMPARED if any(record["provider"] == x for record in records)]
    rows = []
    for (name, trained), group in groupby(records, key=lambda r: (r["loss"], r["trained"])):
        members = list(group)
        cells = step_contest.times_and_ratios(members, compared)
        for record in members:
            row = [f"{name}Trainer", trained, record["provider"]]
            if record["provider"] in cells:
                row += cells[record["provider"]]
                row += [f"{record['head_matmuls']:.2f}", f"{record['peak_mib']:.0f}"]
            else:
                row += [record["status"], *("" for _ in compared), "", "", ""]
            rows.append(row)
    columns = ["trainer", "trained", "contestant", "ms", "processor, ms",
               *(f"times {x}" for x in compared), "head, G", "MiB"]  # fmt: skip
    return "\n".join(
        [
            f"# A training step of TRL's trainers: {machine['device']}\n",
            *step_contest.circumstances(machine, records),
            _READING.format(rounds=step_contest.fewest_rounds(records)),
            report.markdown(columns, rows),
        ]
    )


_READING = """\
`trainer.training_step` on a batch that is given: forward, loss, metrics and backward, without
rollouts and without the optimizer's step; DPO asks its reference, GRPO is in the first update after
a rollout. Medians, with the 20th and the 80th percentile, of {rounds} rounds in which the
contestants take turns. "Head": its matmuls, in multiples of G, one matmul of the scored tokens with
it, the reference's G included. MiB: the peak of live tensors beyond models and batch, gradients
included. Each was checked against fp64 on this batch. "Processor" is the median of the time that
the processor's cores spent on it, all together: on a CPU, whose cores may be shared, the multiples
are of this; on a GPU they are of the time.
"""


def _of_model(
    name: str, model: nn.Module, arguments: argparse.Namespace, device: torch.device
) -> list[Record]:
    return contest(name, model, arguments.sequences, arguments.tokens, device, arguments.rounds)


def main() -> int:
    """Run the command: measure the chosen trainers and print the table."""
    return step_contest.run_command(
        Command(
            __doc__.splitlines()[0], "trainer", "--trainers", list(KINDS), list(KINDS), _of_model,
            tables,
        )
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
