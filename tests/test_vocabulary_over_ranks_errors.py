"""A vocabulary that ranks share: what is refused, on every rank, so that none of them is left
waiting.

The ranks are processes that talk by gloo. Dims: W ranks, B sequences, T tokens, N = B·T, n of them
with a target, H width, V vocabulary.
"""

import pytest
import torch
from support import vocabulary_over_ranks as over
from support.vocabulary_checks import IMPLS, LINEAR, PER_TOKEN, check
from support.vocabulary_over_ranks import OPERATIONS, Problem

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="needs torch.distributed with gloo",
    ),
    pytest.mark.xdist_group("vocabulary"),
]


def test_what_ranks_do_not_agree_on_is_named(pool) -> None:
    both = [Problem("token_stats", (4, 5)), Problem("kl_divergence", (4, 5))]
    both += [Problem(operation, (4, 5)) for operation in LINEAR]
    for said in pool.run(over.raises, both, {1: {"batch": (4, 2)}}, ranks=2):
        for one in said:
            assert one.startswith("ValueError: group: expected the same number of tokens on every")
            assert one.endswith("got [12, 8]")
    chunked = {1: {"options": {"chunk_size": 7}}}
    for said in pool.run(over.raises, both[2:], chunked, ranks=2):
        for one in said:
            assert one.startswith("ValueError: group: expected the same chunk_size on every rank")
    # On what is asked it depends what is sent, and so whether a rank would wait for ever.
    for changed in ({"trained": ("weight",)}, {"options": {"entropy": True}}):
        some = Problem("linear_token_stats", (4, 5))
        for said in pool.run(over.raises, [some], {1: changed}, ranks=2):
            assert said[0].startswith("ValueError: group: expected the same question")
    for said in pool.run(over.raises, both, {1: {"spoils": ("none_ignored",)}}, ranks=2):
        for one in said:
            assert one.startswith("ValueError: group: expected the same ")
            assert "tokens to score" in one or "number of tokens" in one


def test_an_empty_vocabulary_is_refused(pool) -> None:
    for said in pool.run(over.raises_without_columns, list(OPERATIONS), ranks=2):
        for one in said:
            assert one == "ValueError: group: expected a vocabulary, got 0 columns on every rank"


@IMPLS
def test_targets_outside_of_the_whole_vocabulary_are_refused_on_every_rank(pool, impl) -> None:
    names = [name for name in OPERATIONS if "kl" not in name]
    made = [
        Problem(name, (4, 5, 0), {"impl": impl}, spoils=("none_ignored", "out_of_vocabulary"))
        for name in names
    ]
    for said in pool.run(over.raises, made, {}, ranks=3):
        for name, one in zip(names, said, strict=True):
            assert one.startswith("ValueError: targets: expected"), (name, one)
            assert "[0, 9)" in one and one.endswith("got 9"), (name, one)


@IMPLS
def test_temperatures_that_are_not_positive_are_refused_on_every_rank(pool, impl) -> None:
    wrong = PER_TOKEN.clone()
    wrong[0, 0] = 0.0
    made = [
        Problem(name, (4, 0, 5), {"impl": impl, "temperature": temperature})
        for name in OPERATIONS
        for temperature in (0.0, -1.0, wrong)
    ]
    for said in pool.run(over.raises, made, {}, ranks=3):
        for problem, one in zip(made, said, strict=True):
            assert one.startswith("ValueError: temperature"), (problem.operation, one)


def test_groups_that_are_none_are_refused(pool) -> None:
    made = [Problem(name, (9,)) for name in OPERATIONS]
    said = pool.run(over.raises_for_wrong_groups, made, ranks=1)[0]
    assert len(said) == 3 * len(made)
    for i, one in enumerate(said):
        kind = "ValueError" if i % 3 == 2 else "TypeError"
        assert one.startswith(f"{kind}: group: expected"), one


def test_second_derivatives_are_refused(pool) -> None:
    made = [Problem(name, (4, 5)) for name in OPERATIONS]
    # A loss of the statistics is differentiated by autograd, down to these.
    for said in pool.run(over.second_derivative_errors, made, ranks=2):
        for problem, one in zip(made, said, strict=True):
            assert one.startswith("RuntimeError: "), (problem.operation, one)
            assert "differentiate" in one, (problem.operation, one)


def test_transforms_are_refused(pool) -> None:
    made = [Problem(name, (4, 5)) for name in OPERATIONS]
    for said in pool.run(over.transform_errors, made, ranks=2):
        for problem, one in zip(made, said, strict=True):
            assert one.startswith("RuntimeError: "), (problem.operation, one)
            assert "torch.func" in one, (problem.operation, one)


def test_a_rank_that_fails_leaves_nobody_waiting(pool) -> None:
    problem = Problem("linear_token_stats", (4, 5, 3, 2))
    found = pool.outcomes(over.with_a_rank_that_fails, problem, 2.0, ranks=4)
    for rank, (value, error) in enumerate(found):
        assert value is None and error is not None
        assert ("this rank has no data" in error) == (rank == 1)
        assert "RuntimeError" in error or rank == 1
    check(pool, problem)
