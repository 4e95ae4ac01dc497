"""A vocabulary that ranks share as DTensors, which bring their group along.

The ranks are processes that talk by gloo.
"""

import pytest
import torch
from support import dtensors_over_ranks as dtensors
from support.compare import relative_error
from support.rank_pool import RankPool
from support.vocabulary_checks import TIGHT
from support.vocabulary_over_ranks import OPERATIONS, Problem, outcome
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

import fastrlhf

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="needs torch.distributed with gloo",
    ),
    pytest.mark.xdist_group("vocabulary"),
]


def check_dtensors(pool: RankPool, problem: Problem, ranks: int, mesh: str = "") -> None:
    whole = outcome(None, problem)
    for found, wrong in pool.run(dtensors.as_outcome, problem, mesh, ranks=ranks):
        assert wrong == []
        assert found.keys() == whole.keys()
        for name, expected in whole.items():
            assert relative_error(found[name], expected) < TIGHT, name


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_dtensors_need_no_group(pool, operation, ranks) -> None:
    entropy = {"entropy": True} if "stats" in operation else {}
    problem = Problem(operation, (12,), {"impl": "eager", **entropy}, bias=True)
    check_dtensors(pool, problem, ranks)


@pytest.mark.parametrize("vocab", [13, 3, 5])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_dtensors_that_do_not_divide(pool, operation, vocab) -> None:
    # Of 4 ranks, three have 4, the last one 1; three have 1, the last none; two have 2, then 1, 0.
    problem = Problem(operation, (vocab,), {"impl": "eager"}, bias=True)
    check_dtensors(pool, problem, 4)


@pytest.mark.parametrize("operation", ["token_stats", "linear_token_stats", "linear_kl_divergence"])
def test_dtensors_run_the_kernels(pool, operation) -> None:
    check_dtensors(pool, Problem(operation, (13,), {"impl": "triton"}), 3)


@pytest.mark.parametrize("mesh", ["copies first", "copies last"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_another_dimension_of_the_mesh_may_have_copies(pool, operation, mesh) -> None:
    check_dtensors(pool, Problem(operation, (9,), {"impl": "eager"}, bias=True), 4, mesh)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_placements_that_are_not_served_are_named(pool, operation) -> None:
    for said in pool.run(dtensors.refusals, operation, {}, ranks=2):
        for kind, error in said.items():
            name = "group" if kind == "group beside" else kind.split(":")[0]
            assert error.startswith(f"ValueError: {name}: expected"), (kind, error)
            if kind != "group beside" and "plain" not in kind:
                placements = ("Shard", "Partial", "Replicate")
                got = error.split(" got ")[-1]
                assert any(x in got for x in placements), (kind, error)


def test_placements_on_a_grid_that_are_not_served_are_named(pool) -> None:
    for said in pool.run(dtensors.refusals_of_a_grid, ranks=4):
        for kind, error in said.items():
            assert error.startswith(f"ValueError: {kind.split(':')[0]}: expected"), (kind, error)
            assert "Shard" in error, (kind, error)


def test_a_bias_of_another_mesh_is_refused(pool) -> None:
    for error in pool.run(dtensors.of_another_mesh, ranks=4)[:2]:
        assert error.startswith("ValueError: bias: expected a DTensor cut as the weight is"), error


def test_a_group_of_one_process_is_no_group_and_warns_of_nothing(tmp_path) -> None:
    """Here, where every warning is an error."""
    weight, hidden, targets = torch.randn(11, 4), torch.randn(5, 4), torch.arange(5)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        found = [
            _with_gradient(hidden, weight, targets, group)
            for group in (None, torch.distributed.group.WORLD)
        ]
    finally:
        torch.distributed.destroy_process_group()
    for whole, shared in zip(*found, strict=True):
        assert torch.equal(whole, shared)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("support", [False, True])
def test_a_copied_dtensor_is_never_overwritten(support, impl, tmp_path) -> None:
    """Its version does not count what is written into the memory of this rank."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        leaf = distribute_tensor(torch.randn(5, 11), mesh, [Replicate()]).requires_grad_()
        logits, targets = leaf * 1.0, torch.arange(5)
        squares = logits.square().sum()  # whose backward needs the logits
        before = logits.to_local().clone()
        kept = torch.arange(11).repeat(5), torch.arange(0, 56, 11)
        logprobs = fastrlhf.token_logprobs(
            logits, targets, inplace_backward=True, support=kept if support else None, impl=impl
        )
        logprobs.sum().backward(retain_graph=True)
        assert torch.equal(logits.to_local(), before)
        leaf.grad = None
        squares.backward()
        assert torch.equal(leaf.grad.to_local(), 2 * before)
    finally:
        torch.distributed.destroy_process_group()


def _with_gradient(hidden, weight, targets, group) -> list[torch.Tensor]:
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    loss = fastrlhf.linear_cross_entropy(hidden, weight, targets, group=group)
    loss.backward()
    return [loss.detach(), hidden.grad, weight.grad]
