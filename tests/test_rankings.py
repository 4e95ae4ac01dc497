"""Plackett–Luce DPO, and pairs of rankings."""

import math
from typing import Any

import pytest
import torch
from support.compare import assert_as_accurate
from torch import Tensor

from fastrlhf import dpo_loss, plackett_luce_dpo_loss, ranked_pairs

GROUPS, RANKS = torch.tensor([2, 0, 2, 0, 2, 7, 2]), torch.tensor([3, 1, 0, 0, 1, 5, 2])
ORDERS = [[3, 1], [2, 4, 6, 0], [5]]  # best first, in ascending order of the groups


def logps(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    ref = -60 * torch.rand(7, dtype=torch.float64)
    pi = ref + 6 * torch.randn(7, dtype=torch.float64)
    return pi.to(dtype).requires_grad_(), ref.to(dtype).requires_grad_()


def formula(pi: Tensor, ref: Tensor, beta: float) -> Tensor:
    """-ln Π_k e^r_k / Σ_{j ≥ k} e^r_j: the paper's Eq. 20, one ranking at a time."""
    r = beta * (pi - ref)
    losses = []
    for order in ORDERS:
        chances = [r[order[k]].exp() / r[order[k:]].exp().sum() for k in range(len(order))]
        losses.append(-torch.stack(chances).log().sum())
    return torch.stack(losses)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_rankings_have_the_loss_of_the_paper(dtype: torch.dtype) -> None:
    pi, ref = logps(dtype)
    losses, rewards = plackett_luce_dpo_loss(pi, ref, GROUPS, RANKS, 0.3)
    assert losses.dtype == rewards.dtype == dtype and not rewards.requires_grad
    wide = [x.detach().double().requires_grad_() for x in (pi, ref)]
    plain, exact = formula(pi, ref, 0.3), formula(*wide, 0.3)
    assert_as_accurate(losses, plain, exact, size=60.0)
    torch.testing.assert_close(rewards, (0.3 * (pi - ref)).detach())
    found, of_plain, of_exact = (
        torch.autograd.grad((x * torch.tensor([1.0, -2.0, 3.0], dtype=x.dtype)).sum(), of)
        for x, of in ((losses, (pi, ref)), (plain, (pi, ref)), (exact, wide))
    )
    for a, b, c in zip(found, of_plain, of_exact, strict=True):
        assert_as_accurate(a, b, c, size=60.0)


def test_a_ranking_of_two_is_a_pair() -> None:
    pi, ref = logps(torch.float64)
    expected, of_pairs = dpo_loss(pi, ref, torch.tensor([3]), torch.tensor([1]), 0.3)
    losses, rewards = plackett_luce_dpo_loss(pi, ref, GROUPS, RANKS, 0.3)
    torch.testing.assert_close(losses[0], expected[0])
    assert torch.equal(rewards, of_pairs) and losses[2] == 0


def test_derivatives_of_both_orders_are_right() -> None:
    def losses_of(pi: Tensor, ref: Tensor) -> Tensor:
        return plackett_luce_dpo_loss(pi, ref, GROUPS, RANKS, 0.3)[0]

    assert torch.autograd.gradcheck(losses_of, logps(torch.float64))
    assert torch.autograd.gradgradcheck(losses_of, logps(torch.float64))


def test_half_precision_is_computed_in_fp32() -> None:
    pi, ref = logps(torch.bfloat16)
    losses, _ = plackett_luce_dpo_loss(pi, ref, GROUPS, RANKS)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, plackett_luce_dpo_loss(pi.float(), ref.float(), GROUPS, RANKS)[0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_a_ranking_has_all_its_pairs(dtype: torch.dtype) -> None:
    chosen, rejected = ranked_pairs(GROUPS.to(dtype), RANKS.to(dtype))
    assert chosen.dtype == rejected.dtype == torch.int64
    expected = [(a, b) for order in ORDERS for i, a in enumerate(order) for b in order[i + 1 :]]
    assert list(zip(chosen.tolist(), rejected.tolist(), strict=True)) == sorted(expected)


def test_ties_make_no_pair_and_nothing_makes_none() -> None:
    chosen, rejected = ranked_pairs(torch.tensor([0, 0, 0]), torch.tensor([1, 0, 0]))
    assert chosen.tolist() == [1, 2] and rejected.tolist() == [0, 0]
    none = torch.zeros(0, dtype=torch.long)
    assert [x.shape for x in ranked_pairs(none, none)] == [(0,), (0,)]


_GOOD: dict[str, Any] = {
    "pi_logps": torch.zeros(3), "ref_logps": torch.zeros(3), "groups": torch.zeros(3).long(),
    "ranks": torch.arange(3), "beta": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"pi_logps": torch.zeros(3, 1)}, ValueError, r"pi_logps: .*\(B,\)"),
        ({"ref_logps": torch.zeros(2)}, ValueError, r"ref_logps: .*\(3,\)"),
        ({"ref_logps": None}, TypeError, "ref_logps: expected a tensor"),
        ({"groups": torch.zeros(3)}, TypeError, "groups: .*integer"),
        ({"groups": torch.zeros(2).long()}, ValueError, r"groups: .*\(3,\)"),
        ({"ranks": torch.zeros(3).long()}, ValueError, "ranks: expected different ranks"),
        ({"beta": math.nan}, ValueError, "beta: "),
    ],
)
def test_errors_name_the_argument(changed: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        plackett_luce_dpo_loss(**{**_GOOD, **changed})


@pytest.mark.parametrize(
    ("groups", "ranks", "error", "message"),
    [
        ([0], torch.zeros(1).long(), TypeError, "groups: expected a tensor"),
        (torch.zeros(1), torch.zeros(1).long(), TypeError, "groups: .*integer"),
        (torch.zeros(1).long(), torch.zeros(1), TypeError, "ranks: .*integer"),
        (torch.zeros(1, 1).long(), torch.zeros(1).long(), ValueError, r"groups: .*\(B,\)"),
        (torch.zeros(2).long(), torch.zeros(1).long(), ValueError, r"ranks: .*\(2,\)"),
    ],
)
def test_errors_of_pairs_name_the_argument(
    groups: Any, ranks: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        ranked_pairs(groups, ranks)
