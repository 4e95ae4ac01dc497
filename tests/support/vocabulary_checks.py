"""The cuts of a vocabulary and the operations that are tested, and the comparison of what ranks
found with what one process finds.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.compare import assert_gradient_close, relative_error
from support.rank_pool import RankPool
from support.vocabulary_over_ranks import CUT, OF_LOGITS, OPERATIONS, Outcome, Problem, outcome

TIGHT = 1e-12  # fp64: what is left out or counted twice is wrong by percents
IMPLS = pytest.mark.parametrize("impl", ["eager", "triton"])
CUTS = {
    "2 uneven": (17, 12),
    "2, one column": (28, 1),
    "2, none first": (0, 21),
    "3 uneven": (3, 20, 6),
    "3, none in the middle": (9, 0, 12),
    "3, none last": (11, 10, 0),
    "4, one column": (1, 14, 1, 7),
    "4, two without": (0, 8, 0, 9),
}
B, T = 4, 3
PER_TOKEN = torch.linspace(0.5, 2.0, B * T, dtype=torch.float64).view(B, T)
PER_SEQUENCE = torch.tensor([0.6, 1.0, 1.7, 0.9])
EVERYTHING = ("is_top1", "mean_logit", "log_sum_sq_probs")
LINEAR = [name for name in OPERATIONS if name not in OF_LOGITS]
# The others are these, and what knows no backend.
WITH_KERNELS = ["token_stats", "linear_token_stats", "kl_divergence", "linear_kl_divergence"]
BOTH = [(name, "eager") for name in OPERATIONS] + [(name, "triton") for name in WITH_KERNELS]
BACKENDS = pytest.mark.parametrize("operation, impl", BOTH)
LINEAR_BACKENDS = pytest.mark.parametrize(
    "operation, impl", [(name, impl) for name, impl in BOTH if name in LINEAR]
)


def of_ranks(pool: RankPool, problem: Problem) -> list[Outcome]:
    return pool.run(outcome, problem, ranks=len(problem.sizes))


def joined(found: list[Outcome], problem: Problem) -> Outcome:
    """What the ranks found, as one: the same bits of values and of d_hidden, parts of the others,
    whose padding has no gradient.
    """
    whole = dict(found[0])
    for name in whole:
        dim = CUT.get(name.removeprefix("d_")) if name.startswith("d_") else None
        parts = [one[name] for one in found]
        if dim is None:
            for part in parts[1:]:
                assert torch.equal(part.nan_to_num(7.0), parts[0].nan_to_num(7.0)), name
            continue
        for rank, size in enumerate(problem.sizes):
            padding = parts[rank].narrow(dim, size, parts[rank].shape[dim] - size)
            assert not padding.any(), f"{name}: gradient of the padding"
            parts[rank] = parts[rank].narrow(dim, 0, size)
        whole[name] = torch.cat(parts, dim)
    return whole


def own_targets(problem: Problem) -> Tensor:
    """Targets (N,), below 0 where nothing counts."""
    x = problem.tensors()
    return torch.where(x["mask"], x["targets"], -1).flatten()


def assert_same(found: list[Outcome], whole: Outcome, problem: Problem) -> None:
    """Assert that values and gradients are those of the whole, in fp64, to a few roundings."""
    together = joined(found, problem)
    assert together.keys() == whole.keys()
    for name, expected in whole.items():
        got = together[name]
        assert got.dtype == expected.dtype and got.shape == expected.shape, name
        if not name.startswith("d_"):
            size = float(expected.double().nan_to_num(0, 0, 0).abs().max()) if got.numel() else 0.0
            torch.testing.assert_close(got, expected, rtol=TIGHT, atol=TIGHT * size, msg=name)
        elif name == "d_logits" and "kl" not in problem.operation:
            vocab = got.shape[-1]
            assert_gradient_close(
                got.view(-1, vocab), expected.view(-1, vocab), own_targets(problem), TIGHT
            )
        else:
            assert_parts_same(name, got, expected, problem)


def assert_parts_same(name: str, got: Tensor, expected: Tensor, problem: Problem) -> None:
    """Each rank's part has its own norm, beside which it is right."""
    dim = CUT.get(name.removeprefix("d_"))
    sizes = problem.sizes
    pairs = [(got, expected)]
    if dim is not None:
        pairs = list(zip(got.split(sizes, dim), expected.split(sizes, dim), strict=True))
    for rank, (part, wanted) in enumerate(pairs):
        assert relative_error(part, wanted) < TIGHT, (name, rank)


def check(pool: RankPool, problem: Problem) -> Outcome:
    """Compare with one process; return what that finds."""
    eager = {name: x for name, x in problem.options.items() if name != "impl"}
    whole = outcome(None, replace(problem, options={**eager, "impl": "eager"}))
    assert_same(of_ranks(pool, problem), whole, problem)
    return whole


KL = [
    {"direction": "forward", "temperature": PER_TOKEN},
    {"direction": "jsd", "beta": 0.3, "softcap": 1.5, "scale": 0.8},
    {"direction": "reverse", "softcap": 2.0, "temperature": PER_SEQUENCE},
]


def name_of(x: Any) -> str:
    """Options as the name of a test."""
    if isinstance(x, tuple) and isinstance(x[-1], dict):
        return f"{x[0]} {name_of(x[-1])}"
    if not isinstance(x, dict):
        return str(x)
    return ",".join(
        f"{name}={'tensor' if isinstance(value, Tensor) else value}" for name, value in x.items()
    )
