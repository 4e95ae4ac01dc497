"""A vocabulary that ranks share: what they send each other, and what each of them computes.

The ranks are processes that talk by gloo. Dims: W ranks, B sequences, T tokens, N = B·T, n of them
with a target, H width, V vocabulary.
"""

import pytest
import torch
from support import vocabulary_over_ranks as over
from support.rank_pool import RankPool
from support.vocabulary_checks import BACKENDS, CUTS, EVERYTHING, IMPLS, B, T, name_of
from support.vocabulary_over_ranks import Problem

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="needs torch.distributed with gloo",
    ),
    pytest.mark.xdist_group("vocabulary"),
]

GATHER, REDUCE = "allgather_base", "allreduce"
# Before anything else: how many columns a rank has, of what, and what is asked of which tokens.
SIZE, AGREED, AGREED_OF_HEADS = 8, 6 * 8, 7 * 8


def sent(pool: RankPool, problem: Problem) -> tuple[list, list]:
    """What each rank gives to collectives, which is the same on all."""
    found = pool.run(over.with_sent_bytes, problem, ranks=len(problem.sizes))
    assert all(one == found[0] for one in found)
    return found[0]


@IMPLS
@pytest.mark.parametrize(
    "options, numbers",
    [
        ({}, 3), ({"entropy": True}, 4), ({"with_stats": ("mean_logit",)}, 4),
        ({"with_stats": ("log_sum_sq_probs",)}, 4), ({"with_stats": EVERYTHING}, None),
        ({"with_stats": ("is_top1",), "entropy": True}, None),
    ],
    ids=name_of,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_send_a_few_numbers_a_token_and_nothing_backward(
    pool, options, numbers, dtype, impl
) -> None:
    problem = Problem(
        "token_stats", (9, 40, 0), {"impl": impl, **options}, dtype, spoils=("none_ignored",)
    )
    if numbers is None:  # is_top1 takes the kernels two, and the eager backend one
        is_top1 = 2 if impl == "triton" else 1
        numbers = 3 + is_top1 + (2 if "mean_logit" in options["with_stats"] else 1)
    number = 8 if dtype == torch.float64 else 4
    forward, backward = sent(pool, problem)
    assert forward == [(GATHER, AGREED), (GATHER, numbers * number * B * T)]
    assert backward == []


@IMPLS
def test_ignored_tokens_of_logits_send_no_more_than_others(pool, impl) -> None:
    problem = Problem("token_stats", (9, 40, 0), {"impl": impl}, torch.float32)
    forward, _ = sent(pool, problem)
    live = int(problem.tensors()["mask"].sum())
    assert forward[1:] == [(GATHER, 12 * (B * T if impl == "triton" else live))]


@IMPLS
@pytest.mark.parametrize("direction, numbers", [("reverse", 7), ("forward", 7), ("jsd", 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergences_send_seven_or_eight_numbers_a_token(
    pool, direction, numbers, dtype, impl
) -> None:
    options = {"impl": impl, "direction": direction}
    forward, backward = sent(pool, Problem("kl_divergence", (9, 0, 40), options, dtype))
    number = dtype.itemsize * B * T
    parts = [(GATHER, 4 * number), (GATHER, (numbers - 4) * number)]
    assert forward == [(GATHER, AGREED), *parts]
    assert backward == []


# P0 to P4, here and below, are the plans of `fastrlhf/ops/linear_plans.py`: READ_ONLY, KEEP_SLOPES,
# WITH_LOSS of single tokens, WITH_LOSS of groups of tokens, and RECOMPUTE.
@IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", ["P0", "P1", "P2", "P4", "weight alone"])
def test_hidden_states_send_what_live_tokens_have_and_one_gradient(pool, plan, dtype, impl) -> None:
    operation = "linear_loss" if plan == "P2" else "linear_token_stats"
    trained = {"P0": (), "P1": ("hidden",), "weight alone": ("weight",)}.get(plan)
    problem = Problem(
        operation, (9, 0, 40), {"impl": impl, "chunk_size": 3}, dtype, trained=trained
    )
    live = int(problem.tensors()["mask"].sum())
    forward, backward = sent(pool, problem)
    assert forward[:2] == [(GATHER, SIZE), (GATHER, AGREED_OF_HEADS)]
    assert sum(size for kind, size in forward[2:] if kind == GATHER) == 12 * live
    assert not any(kind == GATHER for kind, _ in backward)
    reduced = [size for kind, size in forward + backward if kind == REDUCE]
    rows = {"P0": 0, "weight alone": 0}.get(plan, live)
    assert sum(reduced) == 4 * rows * problem.width
    assert {kind for kind, _ in forward + backward} <= {GATHER, REDUCE}


@IMPLS
@pytest.mark.parametrize("direction, numbers", [("reverse", 7), ("jsd", 8)])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "ref_weight"), ("hidden", "weight")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergences_of_hidden_states_send_the_same_of_live_tokens(
    pool, trained, direction, numbers, dtype, impl
) -> None:
    options = {"impl": impl, "direction": direction, "chunk_size": 4}
    problem = Problem("linear_kl_divergence", (9, 0, 40), options, dtype, trained=trained)
    forward, backward = sent(pool, problem)
    live = int(problem.tensors()["mask"].sum())
    number = 4 * live
    assert forward[:2] == [(GATHER, SIZE), (GATHER, AGREED_OF_HEADS)]
    assert sum(size for kind, size in forward[2:] if kind == GATHER) == numbers * number
    assert not any(kind == GATHER for kind, _ in backward)
    reduced = [size for kind, size in forward + backward if kind == REDUCE]
    assert sum(reduced) == 4 * live * problem.width


@BACKENDS
def test_nothing_of_the_size_of_the_logits_is_ever_sent(pool, operation, impl) -> None:
    problem = Problem(operation, (40, 50), {"impl": impl}, torch.float32, bias=True)
    forward, backward = sent(pool, problem)
    assert forward
    # Of 90 columns nobody sends as many as 10.
    assert max(size for _, size in forward + backward) < 10 * B * T * 4


@pytest.mark.parametrize("cut", ["3 uneven", "3, none in the middle"])
@pytest.mark.parametrize(
    "plan, operation, trained, matmuls",
    [
        ("P0", "linear_token_stats", (), 1), ("P1", "linear_token_stats", ("hidden",), 2),
        ("P2", "linear_loss", ("hidden", "weight"), 3), ("P2", "linear_loss", ("hidden",), 2),
        ("P2", "linear_cross_entropy", ("hidden", "weight"), 3),
        ("P3", "linear_dpo_loss", ("hidden", "weight"), 3),
        ("P4", "linear_token_stats", ("hidden", "weight"), 4),
        ("P4", "linear_token_stats", ("weight",), 3),
        ("KL", "linear_kl_divergence", (), 2), ("KL", "linear_kl_divergence", ("hidden",), 3),
        ("KL", "linear_kl_divergence", ("hidden", "weight"), 4),
    ],
)  # fmt: skip
def test_each_rank_does_its_share_of_the_matmuls(
    pool, plan, operation, trained, matmuls, cut
) -> None:
    problem = Problem(operation, CUTS[cut], {"impl": "eager"}, trained=trained, weights="alike")
    found = pool.run(over.matmul_operations, problem, ranks=3)
    live = int(problem.tensors()["mask"].sum())
    assert found == [matmuls * 2 * live * size * problem.width for size in problem.sizes]
