"""Time a step of loops in plain PyTorch, unchanged and within `fastrlhf.lazy_logits`.

    python benchmarks/bench_lazy_logits.py [--loops NAME ...] [--rounds N] [--output DIR]

The model is a Llama of two layers with the head and vocabulary of SmolLM2-135M. It is trained in
three ways: all parameters (the head is tied to the embeddings) in fp32 and in bf16, and LoRA on
attention in fp32. `lazy_loops.py` defines the loops, and `step_contest.py` checks and times them.
With --output, lazy-logits.json and lazy-logits.md are written; `--tiny` takes a tiny model.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import report
import step_contest
import torch
from lazy_loops import LOOPS, with_teacher
from model_step import TINY, for_training, make_step, random_model
from step_contest import Command, Entrant, Record, Work, with_backward
from torch import nn
from trainer_step import TrainerStep

import fastrlhf

PLAIN, LAZY = "plain", "lazy_logits"
_SIZES = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2,
    "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip


def models(arguments: argparse.Namespace, device: torch.device) -> Iterator[nn.Module]:
    """Yield the models: trained in two ways, and in two dtypes."""
    sizes = TINY if arguments.tiny else _SIZES
    for dtype, trained in (
        (torch.float32, True), (torch.float32, False), (torch.bfloat16, True)
    ):  # fmt: skip
        yield for_training(random_model(device, dtype=dtype, **sizes), trained=trained)


def contest(name: str, step: TrainerStep, device: torch.device, rounds: int) -> list[Record]:
    """Check a loop with and without lazy logits, and measure its memory and time."""
    loop = LOOPS[name]
    step = loop.step(step)

    def load() -> Work:
        return functools.partial(with_backward, loop.compute, step)

    entrants = {PLAIN: Entrant(load), LAZY: Entrant(load, functools.partial(_lazy, step))}
    return step_contest.hold(name, loop.compute, entrants, step, device, rounds, _reported)


@contextlib.contextmanager
def _lazy(step: TrainerStep) -> Iterator[None]:
    with contextlib.ExitStack() as modes:
        for model in (step.model, step.reference):
            if model is not None:
                modes.enter_context(fastrlhf.lazy_logits(model))
        yield


def _reported(work: Work) -> Record:
    """Return which uses of lazy logits a step fused, and for which it built the logits."""
    fastrlhf.lazy_report(clear=True)
    work()
    found = fastrlhf.lazy_report(clear=True)
    return {
        "fused": [[use.what, use.plan, use.calls] for use in found.fused],
        "built": [[use.what, use.plan, use.calls] for use in found.built],
    }


def tables(machine: dict[str, Any], records: list[Record]) -> str:
    """Make the table of the measurements, one row for each loop."""
    rows = []
    for key, group in groupby(records, key=lambda r: [r[x] for x in ("loss", "trained", "dtype")]):
        members = {record["provider"]: record for record in group}
        cells = step_contest.times_and_ratios(list(members.values()), (PLAIN,))
        times = [cells[x][0] if x in cells else members[x]["status"] for x in (PLAIN, LAZY)]
        if all(x in cells for x in (PLAIN, LAZY)):
            times.append(cells[LAZY][-1])
            times += [f"{members[x]['peak_mib']:.0f}" for x in (PLAIN, LAZY)]
        else:
            times += [""] * 3
        rows.append([*key, *times, *(_said(members[LAZY].get(x, [])) for x in ("fused", "built"))])
    columns = ["loop", "trained", "dtype", "plain, ms", "lazy, ms", "lazy / plain",
               "plain, MiB", "lazy, MiB", "fused", "built"]  # fmt: skip
    return "\n".join(
        [
            f"# A step of loops that nobody edits: {machine['device']}\n",
            *step_contest.circumstances(machine, records),
            _READING.format(rounds=step_contest.fewest_rounds(records)),
            report.markdown(columns, rows),
        ]
    )


def _said(uses: Iterable[tuple[str, str, int]]) -> str:
    return ", ".join(f"{what} {plan}".strip() for what, plan, _ in uses)


_READING = """\
Forward, loss and backward (none in an evaluation), of the same loop as it is and within
`fastrlhf.lazy_logits`. Medians, with the 20th and the 80th percentile, of {rounds} rounds in which
the two take turns. MiB: the peak of live tensors beyond model and batch, gradients included. Each
was checked against fp64 on this batch. "lazy / plain" is of the time: on a CPU, whose cores may be
shared, of the time that the cores spent on it, all together. "Fused" and "built": what
`lazy_report` says of a step, with the matmuls of the vocabulary, forward and backward.
"""


def _of_model(
    name: str, model: nn.Module, arguments: argparse.Namespace, device: torch.device
) -> list[Record]:
    step = make_step(model, arguments.sequences, arguments.tokens, whole=True)
    return contest(name, with_teacher(step), device, arguments.rounds)


def main() -> int:
    """Run the command: measure the chosen loops and print the table."""
    return step_contest.run_command(
        Command(
            __doc__.splitlines()[0], "lazy-logits", "--loops", list(LOOPS), list(LOOPS), _of_model,
            tables, models,
        )
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
