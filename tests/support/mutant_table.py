"""The changes that `mutants.py` makes: a table for each part of the library."""

from mutant_tables import (
    heads,
    hf,
    kernels,
    kernels_of_losses,
    lazy,
    losses,
    ops,
    policy_losses,
    ranks,
    reference,
    trainers,
)

TABLES = (
    kernels, kernels_of_losses, reference, ops, heads, ranks, losses, policy_losses, hf, lazy,
    trainers,
)  # fmt: skip
MUTANTS = [mutant for table in TABLES for mutant in table.MUTANTS]
