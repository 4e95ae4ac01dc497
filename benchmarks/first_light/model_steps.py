"""The model whose training steps are timed, and the report of a step that was checked and timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .machine import Machine
from .sections import Record, Reporter


def make_model(machine: Machine, *, trained: bool) -> nn.Module:
    """Make a random bf16 model. All of it is trained, or else LoRA on attention."""
    # Imported here, because transformers takes seconds to import and few sections need it.
    from model_step import for_training, random_model

    model = random_model(machine.device, dtype=torch.bfloat16, **machine.sizes.model)
    return for_training(model, trained=trained)


def report_step(
    report: Reporter,
    title: str,
    record: Record,
    model: nn.Module,
    *,
    is_ours: bool,
    **more: Any,
) -> None:
    """Report the record of a contest: as a check if this library is responsible for it.

    `more` is added to the record of its time.
    """
    status = record["status"]
    if is_ours:
        report.holds(title if status == "ok" else f"{title}: {status}", status == "ok")
    elif status != "ok":
        report.note(title, status)
    if status != "ok":
        return
    rate = report.rates.get("matmul_flops_per_second")
    operations = record.get("matmul_operations")
    if operations is not None:
        more["head_matmuls"] = record["head_matmuls"]
    gradients = sum(x.nbytes for x in model.parameters() if x.requires_grad)
    report.timing(
        title, record["median_ms"] / 1e3, operations / rate if operations and rate else None,
        peak_gib=round(record["peak_mib"] / 2**10 - gradients / 2**30, 2), **more,
    )  # fmt: skip
