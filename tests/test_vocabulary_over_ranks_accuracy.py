"""A vocabulary that ranks share: hostile numbers, accuracy in the dtypes that people use,
and bits.

The ranks are processes that talk by gloo. Dims: W ranks, B sequences, T tokens, N = B·T, n of them
with a target, H width, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import vocabulary_over_ranks as over
from support.compare import assert_as_accurate, assert_gradient_as_accurate, relative_error
from support.kept import everything
from support.vocabulary_checks import (
    BACKENDS,
    CUTS,
    EVERYTHING,
    IMPLS,
    LINEAR_BACKENDS,
    TIGHT,
    B,
    T,
    check,
    joined,
    of_ranks,
    own_targets,
)
from support.vocabulary_over_ranks import Outcome, Problem, outcome

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="needs torch.distributed with gloo",
    ),
    pytest.mark.xdist_group("vocabulary"),
]

HOSTILE = [
    ("minus_inf_on_first",), ("minus_inf_on_last",), ("minus_inf_scattered",),
    ("rows_of_nothing",), ("nan_on_last",), ("plus_inf",), ("large",), ("garbage",),
    ("all_ignored",), ("all_ignored", "garbage"), ("rows_of_nothing", "minus_inf_on_first"),
]  # fmt: skip


def assert_alike(found: list[Outcome], whole: Outcome, problem: Problem) -> None:
    """The same numbers, of which some are not finite."""
    for name, got in joined(found, problem).items():
        expected = whole[name]
        size = float(expected.double().nan_to_num(0, 0, 0).abs().max()) if got.numel() else 0.0
        torch.testing.assert_close(
            got, expected, rtol=1e-10, atol=1e-12 * size, equal_nan=True, msg=f"{name}: {got}"
        )


@IMPLS
@pytest.mark.parametrize("spoils", HOSTILE, ids=" ".join)
@pytest.mark.parametrize("operation", ["token_stats", "logits_policy_loss", "kl_divergence"])
def test_hostile_logits_give_what_one_process_gives(pool, operation, spoils, impl) -> None:
    options: dict[str, Any] = {"impl": impl}
    if operation == "token_stats":
        options |= {"entropy": True, "with_stats": EVERYTHING}
    if operation == "kl_divergence":
        options["direction"] = "jsd" if len(spoils) == 2 else "reverse"
    cuts = ["3, none in the middle"] + ["4, one column"] * (impl == "eager")
    for cut in cuts:
        problem = Problem(operation, CUTS[cut], options, spoils=spoils)
        # One process, by the same backend: what +inf gives is not promised.
        whole = outcome(None, problem)
        assert_alike(of_ranks(pool, problem), whole, problem)
        if "garbage" in spoils or "all_ignored" in spoils:
            assert all(x.isfinite().all() for x in whole.values())


@pytest.mark.parametrize("spoils", [("large",), ("garbage",), ("all_ignored",)], ids=" ".join)
@LINEAR_BACKENDS
def test_hostile_hidden_states_give_what_one_process_gives(pool, operation, spoils, impl) -> None:
    problem = Problem(operation, CUTS["3 uneven"], {"impl": impl}, spoils=spoils)
    assert_alike(of_ranks(pool, problem), outcome(None, problem), problem)


@IMPLS
def test_no_tokens_at_all(pool, impl) -> None:
    for operation in ("token_stats", "linear_token_stats", "kl_divergence", "linear_kl_divergence"):
        for batch in ((0, 3), (3, 0)):
            problem = Problem(operation, (4, 0, 5), {"impl": impl}, batch=batch)
            check(pool, problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@BACKENDS
def test_they_are_as_accurate_as_one_process(pool, operation, dtype, impl) -> None:
    entropy = {"entropy": True} if "stats" in operation else {}
    problem = Problem(
        operation, CUTS["3 uneven"], {"impl": impl, **entropy}, dtype, bias=True, spread=3.0
    )
    plain = outcome(None, replace(problem, options={"impl": "eager", **entropy}))
    exact = outcome(None, problem, wide=True)
    together = joined(of_ranks(pool, problem), problem)
    for name, got in together.items():
        assert got.dtype == (dtype if name.startswith("d_") else plain[name].dtype)
        numbers = got, plain[name], exact[name]
        if name == "d_logits" and "kl" not in operation:
            rows = (x.view(B * T, -1) for x in numbers)
            assert_gradient_as_accurate(*rows, own_targets(problem))
        else:
            # Values are differences of logits, and gradients sums of terms that may cancel.
            size = max(10.0, float(exact[name].abs().max())) if not name.startswith("d_") else None
            assert_as_accurate(*numbers, size=size, of=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "operation, kept",
    [
        ("linear_token_stats", False), ("linear_kl_divergence", False), ("linear_loss", False),
        ("linear_token_stats", True),
    ],
)  # fmt: skip
def test_gradients_that_cancel_are_rounded_after_they_are_added(
    pool, operation, dtype, kept
) -> None:
    problem = Problem(
        operation, CUTS["3 uneven"], {"impl": "eager"}, dtype, trained=("hidden",),
        spoils=("alike_but_for_little",),
    )  # fmt: skip
    if kept:
        problem.options["support"] = everything(B * T, 29)
    plain, exact = outcome(None, problem), outcome(None, problem, wide=True)
    for found in of_ranks(pool, problem):
        assert_as_accurate(found["d_hidden"], plain["d_hidden"], exact["d_hidden"])


@BACKENDS
def test_the_same_bits_from_run_to_run(pool, operation, impl) -> None:
    problem = Problem(
        operation, CUTS["4, one column"], {"impl": impl}, torch.float32, bias=True
    )  # fmt: skip
    first, again = of_ranks(pool, problem), of_ranks(pool, problem)
    for one, other in zip(first, again, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(x, other[name]) for name, x in one.items())


@IMPLS
def test_whatever_the_cut_values_differ_by_a_few_roundings(pool, impl) -> None:
    # Of V terms of a sum in another order, and of the largest logit: 8 roundings of what is added.
    options = {"impl": impl, "entropy": True, "with_stats": EVERYTHING}
    cuts = [(24, 0), (0, 24), (12, 12), (1, 22, 1), (6, 6, 6, 6), (0, 23, 1, 0)]
    found = []
    for cut in cuts:
        problem = Problem("token_stats", cut, options, torch.float32, spread=5.0)
        found.append(joined(of_ranks(pool, problem), problem))
    size = float(problem.tensors()["logits"].abs().max())
    for other in found[1:]:
        for name in ("logprob", "entropy", "lse", "mean_logit", "log_sum_sq_probs"):
            apart = float((other[name] - found[0][name]).abs().max())
            assert apart <= 8 * torch.finfo(torch.float32).eps * max(size, 1.0), name
        assert torch.equal(other["is_top1"], found[0]["is_top1"])
    # Of columns of one rank alone, nothing is added to anything.
    for name in found[0]:
        if not name.startswith("d_"):
            assert torch.equal(found[0][name], found[1][name]), name


@IMPLS
def test_inplace_backward_spends_the_logits_of_this_rank(pool, impl) -> None:
    problem = Problem("token_stats", CUTS["3 uneven"], {"impl": impl})
    found = pool.run(over.spent_logits, problem, ranks=3)
    for _, overwritten, said in found:
        assert overwritten
        assert "modified by an inplace operation" in said
    whole = outcome(None, replace(problem, options={"impl": "eager"}, weights="uneven"))
    gradients = torch.cat([one["d_logits"] for one, _, _ in found], -1)
    assert relative_error(gradients, whole["d_logits"]) < TIGHT
