"""Check and time TRL's trainers on this library's kernels and on TRL's own."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import nn

from .machine import Machine
from .sections import Record, Reporter

_TRAINERS = ("DPO", "GRPO")


def time_trainers(report: Reporter, machine: Machine) -> None:
    """Time steps of a random bf16 model, with all parameters trained and with LoRA on attention."""
    warnings.simplefilter("ignore")  # of TRL
    for trained in (True, False):
        kind = "full" if trained else "LoRA"

        def hold_contests(trained: bool = trained, kind: str = kind) -> None:
            model = _model(machine, trained=trained)
            for name in _TRAINERS:
                title = f"{name}Trainer, {kind}"
                report.attempt(title, partial(_hold, report, machine, model, name, title))

        report.attempt(f"trainers, {kind}", hold_contests)


def _model(machine: Machine, *, trained: bool) -> nn.Module:
    # Imported here, because TRL and transformers take seconds to import and only this section
    # needs them.
    from model_step import for_training, random_model

    model = random_model(machine.device, dtype=torch.bfloat16, **machine.sizes.model)
    return for_training(model, trained=trained)


def _hold(report: Reporter, machine: Machine, model: nn.Module, name: str, title: str) -> None:
    from bench_trainer import contest

    sizes = machine.sizes
    sequences, tokens = sizes.trainer_batch
    records = contest(name, model, sequences, tokens, machine.device, sizes.trainer_rounds)
    gradients = sum(x.nbytes for x in model.parameters() if x.requires_grad)
    for record in records:
        _report(report, f"{title}: {record['provider']}", record, gradients)


def _report(report: Reporter, title: str, record: Record, gradients: int) -> None:
    status = record["status"]
    if record["provider"].startswith("TRL"):
        if status != "ok":
            report.note(title, status)
    else:
        report.holds(title if status == "ok" else f"{title}: {status}", status == "ok")
    if status == "ok":
        rate = report.rates.get("matmul_flops_per_second")
        report.timing(
            title, record["median_ms"] / 1e3, record["matmul_operations"] / rate if rate else None,
            peak_gib=round(record["peak_mib"] / 2**10 - gradients / 2**30, 2),
            head_matmuls=record["head_matmuls"],
        )  # fmt: skip
