"""Check and time loops in plain PyTorch, as they are and within `fastrlhf.lazy_logits`."""

from __future__ import annotations

from functools import partial

from torch import nn

from .machine import Machine
from .model_steps import make_model, report_step
from .sections import Reporter


def time_lazy_logits(report: Reporter, machine: Machine) -> None:
    """Time a step of each loop of `benchmarks/lazy_loops.py`, of a model that is trained as a
    whole.
    """
    from lazy_loops import LOOPS

    model = make_model(machine, trained=True)
    for name in LOOPS:
        report.attempt(name, partial(_hold, report, machine, model, name))


def _hold(report: Reporter, machine: Machine, model: nn.Module, name: str) -> None:
    # Imported here, because transformers takes seconds to import and few sections need it.
    from bench_lazy_logits import LAZY, contest
    from lazy_loops import with_teacher
    from model_step import make_step

    sizes = machine.sizes
    step = with_teacher(make_step(model, *sizes.trainer_batch, whole=True))
    for record in contest(name, step, machine.device, sizes.trainer_rounds):
        provider, lazy = record["provider"], record["provider"] == LAZY
        # The table has no room for the times of the plain loops: the file has them.
        title = f"{name}: {provider}"
        report_step(report, title, record, model, is_ours=lazy, variant=not lazy)
