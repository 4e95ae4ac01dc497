"""Whatever memory held before: every buffer that kernels are given is written wholly before it is
read.

PyTorch fills new memory with NaN on request; results must not show it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, autograd
from torch.utils._pytree import tree_leaves

import fastrlhf

pytest.importorskip("triton", reason="needs triton")

KERNELS: dict[str, Any] = {"impl": "triton"}
B, T, V, H = 3, 5, 37, 8


@pytest.fixture
def filled_memory() -> Iterator[Callable[[bool], None]]:
    """Switches between memory that is filled with NaN and memory as it is."""
    torch.manual_seed(0)
    yield lambda on: torch.use_deterministic_algorithms(on, warn_only=True)
    torch.use_deterministic_algorithms(False)


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and mask: some rows are ignored, some hold nothing but -inf."""
    logits = torch.randn(B, T, V)
    targets = torch.randint(V, (B, T))
    mask = torch.rand(B, T) > 0.4
    targets[~mask] = -100
    logits[0, 0], targets[0, 0], mask[0, 0] = -torch.inf, 1, True
    logits[1, 1], targets[1, 1], mask[1, 1] = torch.nan, -100, False
    return logits.requires_grad_(), targets, mask


def statistics() -> tuple:
    logits, targets, _ = tokens()
    names = fastrlhf.reference.FURTHER_STATS
    stats = fastrlhf.token_stats(logits, targets, entropy=True, with_stats=names, **KERNELS)
    live = targets != -100
    total = torch.where(live, stats.logprob.clamp(min=-9) + stats.entropy, 0.0).sum()
    return *stats, autograd.grad(total, logits)


def policy() -> tuple:
    logits, targets, mask = tokens()
    old, advantages = torch.randn(B, T), torch.randn(B, T)
    loss, metrics = fastrlhf.logits_policy_loss(
        logits, targets, old, advantages, mask, entropy_coef=0.1, **KERNELS
    )
    return loss, metrics, autograd.grad(loss, logits)


def divergence() -> tuple:
    logits, _, mask = tokens()
    others = torch.randn(B, T, V, requires_grad=True)
    values = fastrlhf.kl_divergence(logits, others, mask=mask, **KERNELS)
    finite = torch.where(values.isfinite(), values, 0.0)
    return values, autograd.grad(finite.sum(), (logits, others))


def fisher() -> tuple:
    logits, _, mask = tokens()
    tangent = torch.randn(B, T, V)
    return fastrlhf.softmax_fisher_product(logits, tangent, mask=mask, **KERNELS)


def advantages() -> tuple:
    rewards, values, mask = torch.randn(B, T), torch.randn(B, T), torch.rand(B, T) > 0.4
    mask[1] = False
    return fastrlhf.gae(rewards, values, mask, **KERNELS)


def preference() -> tuple:
    logps, mask = torch.randn(6, T, requires_grad=True), torch.rand(6, T) > 0.4
    loss, metrics = fastrlhf.dpo_loss(
        logps, torch.randn(6, T), torch.tensor([0, 1]), torch.tensor([2, 3]), mask=mask, **KERNELS
    )
    return loss, metrics, autograd.grad(loss.sum(), logps)


def linear() -> tuple:
    _, targets, mask = tokens()
    hidden = torch.randn(B, T, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    options = {"chunk_size": 4} | KERNELS
    stats = fastrlhf.linear_token_stats(
        hidden, weight, targets, entropy=True, with_stats=fastrlhf.reference.FURTHER_STATS,
        **options,
    )  # fmt: skip
    loss, metrics = fastrlhf.linear_policy_loss(
        hidden, weight, targets, torch.randn(B, T), torch.randn(B, T), mask, **options
    )
    values = fastrlhf.linear_kl_divergence(
        hidden, weight, hidden.detach().roll(1, -1), weight.detach(), mask=mask, **options
    )
    total = loss + (stats.logprob + stats.entropy + values).sum()
    return *stats, loss, metrics, values, autograd.grad(total, (hidden, weight))


OPERATIONS = [statistics, policy, divergence, fisher, advantages, preference, linear]


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_memory_is_written_before_it_is_read(operation, filled_memory) -> None:
    results = []
    for filled in (False, True):
        filled_memory(filled)
        torch.manual_seed(1)
        assert torch.empty(3).isnan().all() or not filled
        results.append(tree_leaves(operation()))
    for usual, found in zip(*results, strict=True):
        if isinstance(usual, Tensor):
            torch.testing.assert_close(found, usual, rtol=0, atol=0, equal_nan=True)
        else:
            assert found == usual
