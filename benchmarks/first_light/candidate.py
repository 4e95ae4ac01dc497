"""A kernel that is not in the library yet, beside the one whose place it would take."""

from __future__ import annotations

import torch

from .accuracy import IN_ANOTHER_ORDER, distance
from .kernel_times import copy_seconds
from .kernel_work import Logits
from .machine import Machine
from .row_order import policy_loss_in_row_order
from .sections import Reporter


def time_row_order(report: Reporter, machine: Machine) -> None:
    """K3 in row order: that it gives what K3 gives, and how long both take.

    Its programs wait for each other. If one waits for ever, this section ends by its time limit,
    and nothing else comes after it in the same process.
    """
    rows, vocab = machine.sizes.timed[0]
    logits = Logits(machine, rows, vocab)
    k3 = logits.works()["K3 policy loss"]
    losses, logprobs, _, gradient = k3.run()

    def row_order(d_logits: torch.Tensor) -> torch.Tensor:
        return policy_loss_in_row_order(
            d_logits, logits.x, logits.targets, logprobs, logits.g, logits.ones
        )

    d_logits = torch.empty_like(logits.x)
    found = row_order(d_logits)
    for name, pair in {"losses": (found, losses), "gradient": (d_logits, gradient)}.items():
        report.holds(f"K3 in row order: {name}", distance(*pair) <= IN_ANOTHER_ORDER)
    del gradient, d_logits
    floor = copy_seconds(report, k3.passes * logits.pass_bytes)
    column = f"{rows} × {vocab}"
    report.timing(
        "K3 in row order", machine.seconds(lambda: row_order(torch.empty_like(logits.x))), floor,
        column=column,
    )  # fmt: skip
    report.timing(
        "K3 in row order, in place", machine.seconds(lambda: row_order(logits.x)), floor,
        column=column,
    )  # fmt: skip
