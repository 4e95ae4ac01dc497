"""Compare a kernel that is not in the library yet with the kernel that it would replace."""

from __future__ import annotations

import torch

from .accuracy import IN_ANOTHER_ORDER, distance
from .kernel_times import copy_seconds
from .kernel_work import Logits
from .machine import Machine
from .row_order import policy_loss_in_row_order
from .sections import Reporter


def time_row_order(report: Reporter, machine: Machine) -> None:
    """Check that K3 (the kernel of the policy loss) in row order gives K3's results, and time it.

    The programs of this kernel wait for each other. If one waits for ever, the section ends at its
    time limit, and no other work is lost because its process does nothing else.
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
