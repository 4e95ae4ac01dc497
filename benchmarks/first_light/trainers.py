"""Check and time TRL's trainers on this library's kernels and on TRL's own."""

from __future__ import annotations

import warnings
from functools import partial

from torch import nn

from .machine import Machine
from .model_steps import make_model, report_step
from .sections import Reporter

_TRAINERS = ("DPO", "GRPO")


def time_trainers(report: Reporter, machine: Machine) -> None:
    """Time steps of a random bf16 model, with all parameters trained and with LoRA on attention."""
    warnings.simplefilter("ignore")  # of TRL
    for trained in (True, False):
        kind = "full" if trained else "LoRA"

        def hold_contests(trained: bool = trained, kind: str = kind) -> None:
            model = make_model(machine, trained=trained)
            for name in _TRAINERS:
                title = f"{name}Trainer, {kind}"
                report.attempt(title, partial(_hold, report, machine, model, name, title))

        report.attempt(f"trainers, {kind}", hold_contests)


def _hold(report: Reporter, machine: Machine, model: nn.Module, name: str, title: str) -> None:
    from bench_trainer import contest

    sizes = machine.sizes
    sequences, tokens = sizes.trainer_batch
    records = contest(name, model, sequences, tokens, machine.device, sizes.trainer_rounds)
    for record in records:
        is_ours = not record["provider"].startswith("TRL")
        report_step(report, f"{title}: {record['provider']}", record, model, is_ours=is_ours)
