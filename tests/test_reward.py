"""reward_loss and plackett_luce_loss, against their formulas in 150 digits."""

import math
from collections.abc import Callable
from decimal import Decimal
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.preference_formulas import Expectation, decimals, ell
from torch import Tensor

from fastrlhf import plackett_luce_loss, reward_loss

FINE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


# reward_loss


def expected_pairs(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center_coef: float = 0.0
) -> Expectation:
    """What `reward_loss` must give; the inputs are the chosen scores, the rejected, the margins."""
    count = len(chosen)

    def losses_of(x: list[Decimal]) -> list[Decimal]:
        losses = []
        for i in range(count):
            w, l = x[i], x[count + i]
            m = Decimal(0) if margin is None else x[2 * count + i]
            losses.append(ell(w - l - m) + Decimal(center_coef) * (w + l) ** 2)
        return losses

    given_margin = [] if margin is None else decimals(margin)
    return Expectation(losses_of, [*decimals(chosen), *decimals(rejected), *given_margin])


def pairs(dtype: torch.dtype, count: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of chosen and rejected, and margins."""
    chosen, rejected, margin = (
        (scale * torch.randn(count, dtype=torch.float64)).to(dtype).requires_grad_()
        for scale in (3, 3, 1)
    )
    return chosen, rejected, margin


@FINE
@pytest.mark.parametrize("center_coef", [0.0, 0.01, 1])
@pytest.mark.parametrize("with_margin", [False, True], ids=["no margin", "margin"])
def test_losses_of_pairs_and_their_gradients_are_those_of_the_papers(
    with_margin: bool, center_coef: float, dtype: torch.dtype
) -> None:
    inputs = pairs(dtype)[: 3 if with_margin else 2]
    margin = inputs[2] if with_margin else None
    losses, _ = reward_loss(*inputs[:2], margin=margin, center_coef=center_coef)
    assert losses.dtype == dtype
    expected = expected_pairs(*inputs[:2], margin, center_coef)
    expected.assert_losses(losses)
    upstream = torch.randn(9, dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad(losses, inputs, upstream)
    expected.assert_gradients(*gradients, weights=upstream.tolist())


def test_an_example_of_pairs_by_hand() -> None:
    # σ(ln 3) = 3/4, and a margin of 2 ln 3 turns that into 1/4; (ln 3)²/10 keeps scores at 0.
    chosen = torch.tensor([math.log(3), math.log(3)], dtype=torch.float64)
    margin = torch.tensor([0.0, 2 * math.log(3)], dtype=torch.float64)
    losses, _ = reward_loss(chosen, torch.zeros_like(chosen), margin=margin, center_coef=0.1)
    centring = 0.1 * math.log(3) ** 2
    expected = [math.log(4 / 3) + centring, math.log(4) + centring]
    assert losses.tolist() == pytest.approx(expected, rel=1e-14)


@FINE
@pytest.mark.parametrize("difference", [1e4, -1e4, 60.0, -60.0, 1e-6, 0.0])
def test_extreme_differences_stay_finite_and_right(difference: float, dtype: torch.dtype) -> None:
    chosen = torch.full((3,), difference, dtype=dtype).requires_grad_()
    rejected = torch.zeros(3, dtype=dtype).requires_grad_()
    losses, metrics = reward_loss(chosen, rejected)
    assert losses.isfinite().all() and all(x.isfinite() for x in metrics.values())
    expected = expected_pairs(chosen, rejected)
    expected.assert_losses(losses)
    expected.assert_gradients(*torch.autograd.grad(losses.sum(), (chosen, rejected)))


@FINE
def test_metrics_are_means_over_pairs(dtype: torch.dtype) -> None:
    # The third pair is a tie, which counts as wrong; the margin and the centring do not matter.
    chosen = torch.tensor([1.0, -2.0, 0.5, 4.0, 2.5], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([0.0, -1.0, 0.5, 1.0, 7.0], dtype=dtype, requires_grad=True)
    _, metrics = reward_loss(chosen, rejected, margin=10 * chosen, center_coef=0.1)
    tolerance = 2 * torch.finfo(dtype).eps
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(
        {
            "rewards/chosen": 1.2,
            "rewards/rejected": 1.5,
            "rewards/margins": -0.3,
            "rewards/accuracies": 0.4,
        },
        rel=tolerance,
    )
    for x in metrics.values():
        assert x.ndim == 0 and x.dtype == dtype and not x.requires_grad


def test_derivatives_of_both_orders_of_pairs_are_right() -> None:
    def losses_of(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        return reward_loss(chosen, rejected, margin=margin, center_coef=0.1)[0]

    inputs = pairs(torch.float64, 4)
    assert torch.autograd.gradcheck(losses_of, inputs)
    assert torch.autograd.gradgradcheck(losses_of, inputs)


@HALF
def test_pairs_in_half_precision_are_computed_in_fp32(dtype: torch.dtype) -> None:
    chosen, rejected, margin = pairs(dtype)
    losses, metrics = reward_loss(chosen, rejected, margin=margin, center_coef=0.01)
    assert losses.dtype == torch.float32
    wide = (x.float() for x in (chosen, rejected))
    expected, same = reward_loss(*wide, margin=margin.float(), center_coef=0.01)
    assert torch.equal(losses, expected)
    assert metrics == same and all(x.dtype == torch.float32 for x in metrics.values())


def test_the_wider_dtype_of_the_scores_counts() -> None:
    chosen, rejected, margin = pairs(torch.float64)
    chosen, margin = chosen.bfloat16(), margin.float()
    losses, _ = reward_loss(chosen, rejected, margin=margin)
    assert losses.dtype == torch.float64
    assert torch.equal(losses, reward_loss(chosen.double(), rejected, margin=margin.double())[0])
    # A margin does not widen it.
    losses, _ = reward_loss(chosen, rejected.float(), margin=margin.double())
    assert losses.dtype == torch.float32


def test_no_pairs_have_no_losses_and_metrics_of_zero() -> None:
    nothing = torch.zeros(0, requires_grad=True)
    losses, metrics = reward_loss(nothing, nothing, margin=nothing, center_coef=0.1)
    assert losses.shape == (0,)
    assert [x.item() for x in metrics.values()] == [0, 0, 0, 0]
    (gradient,) = torch.autograd.grad(losses.sum(), nothing)
    assert gradient.shape == (0,)


PAIR_MUTANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "swapped": lambda w, l, m: reward_loss(l, w, margin=m, center_coef=0.01)[0],
    "no margin": lambda w, l, m: reward_loss(w, l, center_coef=0.01)[0],
    "margin added": lambda w, l, m: reward_loss(w, l, margin=-m, center_coef=0.01)[0],
    "no centring": lambda w, l, m: reward_loss(w, l, margin=m)[0],
    "difference centred": lambda w, l, m: reward_loss(w, l, margin=m)[0] + 0.01 * (w - l) ** 2,
    "centring off": lambda w, l, m: reward_loss(w, l, margin=m, center_coef=0.01001)[0],
    "margin off": lambda w, l, m: reward_loss(w, l, margin=m * (1 + 1e-4), center_coef=0.01)[0],
    "averaged": lambda w, l, m: reward_loss(w, l, margin=m, center_coef=0.01)[0].mean().expand(9),
    "rounded": lambda w, l, m: reward_loss(w.bfloat16(), l, margin=m, center_coef=0.01)[0],
    "off by 1e-5": lambda w, l, m: reward_loss(w, l, margin=m, center_coef=0.01)[0] * (1 + 1e-5),
}


@pytest.mark.parametrize("mutant", PAIR_MUTANTS)
def test_the_comparison_of_fp32_losses_of_pairs_rejects(mutant: str) -> None:
    chosen, rejected, margin = pairs(torch.float32)
    expected = expected_pairs(chosen, rejected, margin, 0.01)
    expected.assert_losses(reward_loss(chosen, rejected, margin=margin, center_coef=0.01)[0])
    with pytest.raises(AssertionError, match="x bound"):
        expected.assert_losses(PAIR_MUTANTS[mutant](chosen, rejected, margin))


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.001, math.nan])
def test_the_comparison_of_fp32_gradients_of_pairs_rejects(factor: float) -> None:
    inputs = pairs(torch.float32)
    expected = expected_pairs(*inputs)
    losses, _ = reward_loss(*inputs[:2], margin=inputs[2])
    gradients = torch.autograd.grad(losses.sum(), inputs)
    expected.assert_gradients(*gradients)
    for i in range(3):
        wrong = [factor * g if j == i else g for j, g in enumerate(gradients)]
        with pytest.raises(AssertionError, match="gradient"):
            expected.assert_gradients(*wrong)


# plackett_luce_loss

# Rankings of 4, 1, 3 and 2 items, shuffled; ids and ranks need not start at 0, nor be dense.
GROUPS = torch.tensor([8, -5, 2**40, 8, 2**40, -7, 8, -7, 2**40, 8])
RANKS = torch.tensor([3, 0, 2, 1, -4, 9, 20, 7, 5, -1])


def expected_rankings(scores: Tensor, groups: Tensor, ranks: Tensor) -> Expectation:
    """What `plackett_luce_loss` must give, by choosing the best of those that are left, again and
    again.
    """
    ids, places = groups.tolist(), ranks.tolist()

    def losses_of(x: list[Decimal]) -> list[Decimal]:
        losses = []
        for group in sorted(set(ids)):
            left = sorted((places[i], x[i]) for i in range(len(x)) if ids[i] == group)
            loss = Decimal(0)
            while left:
                best = left[0][1]
                loss += sum((s - best).exp() for _, s in left).ln()
                left = left[1:]
            losses.append(loss)
        return losses

    return Expectation(losses_of, decimals(scores))


def items(dtype: torch.dtype, spread: float = 2.0) -> Tensor:
    """Scores of the items of all rankings."""
    return (spread * torch.randn(10, dtype=torch.float64)).to(dtype).requires_grad_()


@FINE
@pytest.mark.parametrize("spread", [1e-3, 2.0, 30.0])
def test_losses_of_rankings_and_their_gradients_are_those_of_the_formula(
    spread: float, dtype: torch.dtype
) -> None:
    scores = items(dtype, spread)
    losses = plackett_luce_loss(scores, GROUPS, RANKS)
    assert losses.dtype == dtype and losses.shape == (4,)
    expected = expected_rankings(scores, GROUPS, RANKS)
    expected.assert_losses(losses)
    upstream = torch.randn(4, dtype=torch.float64).to(dtype)
    (gradient,) = torch.autograd.grad(losses, scores, upstream)
    expected.assert_gradients(gradient, weights=upstream.tolist())


def test_an_example_of_rankings_by_hand() -> None:
    # The weights e^s of ranking 4 are 2, 3 and 1, the best first: 2/6 · 3/4. Those of ranking 1
    # are 1 and 4, and its only choice has 1/5. In the order of ids, 1 comes first.
    weights = torch.tensor([1.0, 4.0, 3.0, 1.0, 2.0], dtype=torch.float64)
    groups, ranks = torch.tensor([4, 1, 4, 1, 4]), torch.tensor([2, 1, 1, 0, 0])
    losses = plackett_luce_loss(weights.log(), groups, ranks)
    assert losses.tolist() == pytest.approx([math.log(5), math.log(4)], rel=1e-14)


@pytest.mark.parametrize("count", [5, 17, 64])
def test_long_rankings_agree_with_the_formula(count: int) -> None:
    scores = 3 * torch.randn(count, dtype=torch.float64)
    groups, ranks = torch.zeros(count, dtype=torch.long), torch.randperm(count)
    losses = plackett_luce_loss(scores, groups, ranks)
    ranked = [s for _, s in sorted(zip(ranks.tolist(), scores.tolist(), strict=True))]
    terms = [math.log(math.fsum(map(math.exp, ranked[k:]))) - s for k, s in enumerate(ranked)]
    assert losses.tolist() == pytest.approx([math.fsum(terms)], rel=1e-13)


@FINE
def test_a_ranking_of_one_has_loss_and_gradient_zero(dtype: torch.dtype) -> None:
    scores = torch.tensor([3.0, -1e4, 0.0], dtype=dtype, requires_grad=True)
    losses = plackett_luce_loss(scores, torch.tensor([1, 2, 0]), torch.tensor([0, 0, 5]))
    assert losses.tolist() == [0, 0, 0]
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    assert gradient.tolist() == [0, 0, 0]


@FINE
@pytest.mark.parametrize("count", [1, 7, 300])
def test_a_ranking_of_two_has_the_bits_of_the_loss_of_a_pair(
    count: int, dtype: torch.dtype
) -> None:
    chosen, rejected, _ = pairs(dtype, count)
    order = torch.randperm(2 * count)
    groups, ranks = torch.arange(count).repeat(2), torch.arange(2).repeat_interleave(count)
    scores = torch.cat((chosen, rejected))[order]
    found = plackett_luce_loss(scores, groups[order], ranks[order])
    expected, _ = reward_loss(chosen, rejected)
    assert torch.equal(found, expected)
    upstream = torch.randn(count, dtype=dtype)
    both = (torch.autograd.grad(x, (chosen, rejected), upstream) for x in (found, expected))
    for of_ranking, of_pair in zip(*both, strict=True):
        torch.testing.assert_close(of_ranking, of_pair, rtol=8 * torch.finfo(dtype).eps, atol=0)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_losses_come_in_ascending_order_of_ids_in_whatever_order_items_lie(
    data: st.DataObject,
) -> None:
    ids = data.draw(st.lists(st.integers(-(2**62), 2**62), unique=True, min_size=1, max_size=4))
    sizes = [data.draw(st.integers(1, 4)) for _ in ids]
    drawn = [(g, rank) for g, size in zip(ids, sizes, strict=True) for rank in range(size)]
    groups, ranks = (torch.tensor(x) for x in zip(*data.draw(st.permutations(drawn)), strict=True))
    # The better by one each, so that a loss depends on the length of its ranking alone.
    losses = plackett_luce_loss(-ranks.double(), groups, ranks)
    sizes_in_order = [size for _, size in sorted(zip(ids, sizes, strict=True))]
    weights = [[math.exp(-k) for k in range(size)] for size in sizes_in_order]
    expected = [sum(math.log(sum(w[k:]) / w[k]) for k in range(len(w))) for w in weights]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-300)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=4))
def test_the_probabilities_of_all_rankings_of_some_items_add_up_to_one(
    scores: list[float],
) -> None:
    orders = torch.tensor(list(permutations(range(len(scores)))))
    groups = torch.arange(len(orders)).unsqueeze(1).expand_as(orders)
    repeated = torch.tensor(scores, dtype=torch.float64).repeat(len(orders))
    losses = plackett_luce_loss(repeated, groups.reshape(-1), orders.reshape(-1))
    assert len(losses) == math.factorial(len(scores))
    assert (-losses).exp().sum().item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("shift", [1.0, -50.0, 1e4])
def test_a_shift_of_all_scores_changes_no_loss(shift: float) -> None:
    scores = items(torch.float64)
    losses = plackett_luce_loss(scores, GROUPS, RANKS)
    shifted = plackett_luce_loss(scores + shift, GROUPS, RANKS)
    # A shifted score is rounded to the spacing of numbers of its size.
    rounding = 8 * abs(shift) * torch.finfo(torch.float64).eps
    torch.testing.assert_close(shifted, losses, rtol=1e-14, atol=rounding)
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    assert abs(gradient.sum().item()) <= 1e-15


@FINE
@pytest.mark.parametrize("spread", [1e2, 1e4])
def test_extreme_scores_of_rankings_stay_finite_and_right(
    spread: float, dtype: torch.dtype
) -> None:
    scores = (spread * torch.linspace(-1, 1, 10)[torch.randperm(10)]).to(dtype).requires_grad_()
    losses = plackett_luce_loss(scores, GROUPS, RANKS)
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    assert losses.isfinite().all() and gradient.isfinite().all()
    expected = expected_rankings(scores, GROUPS, RANKS)
    expected.assert_losses(losses)
    expected.assert_gradients(gradient)


@FINE
def test_equal_scores_of_any_size_make_all_orders_equally_likely(dtype: torch.dtype) -> None:
    for score in (0.0, 1e4, -1e4):
        scores = torch.full((10,), score, dtype=dtype)
        found = plackett_luce_loss(scores, GROUPS, RANKS).tolist()
        expected = [math.log(math.factorial(n)) for n in (2, 1, 4, 3)]
        # Five roundings of log-sum-exps of the size of the scores.
        rounding = 5 * torch.finfo(dtype).eps * max(1, abs(score))
        assert found == pytest.approx(expected, abs=rounding, rel=0)


@FINE
def test_a_best_that_is_far_ahead_keeps_relative_accuracy(dtype: torch.dtype) -> None:
    # The loss is about e^-30, of which a difference of numbers of size 80 would leave nothing.
    scores = torch.tensor([50.0, 80.0, 0.0], dtype=dtype, requires_grad=True)
    groups, ranks = torch.tensor([0, 0, 0]), torch.tensor([1, 0, 2])
    losses = plackett_luce_loss(scores, groups, ranks)
    expected = expected_rankings(scores, groups, ranks)
    expected.assert_losses(losses)
    expected.assert_gradients(*torch.autograd.grad(losses.sum(), scores))
    naive = scores.logsumexp(0) - scores[1] + scores[[0, 2]].logsumexp(0) - scores[0]
    with pytest.raises(AssertionError, match="x bound"):
        expected.assert_losses(naive.reshape(1))


def test_derivatives_of_both_orders_of_rankings_are_right() -> None:
    scores = items(torch.float64)

    def losses_of(scores: Tensor) -> Tensor:
        return plackett_luce_loss(scores, GROUPS, RANKS)

    assert torch.autograd.gradcheck(losses_of, (scores,))
    assert torch.autograd.gradgradcheck(losses_of, (scores,))


@HALF
def test_rankings_in_half_precision_are_computed_in_fp32(dtype: torch.dtype) -> None:
    scores = items(dtype)
    losses = plackett_luce_loss(scores, GROUPS, RANKS)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, plackett_luce_loss(scores.float(), GROUPS, RANKS))
    assert torch.autograd.grad(losses.sum(), scores)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_groups_and_ranks_can_be_small_integers(dtype: torch.dtype) -> None:
    scores, groups = items(torch.float32), torch.unique(GROUPS, return_inverse=True)[1]
    ranks = RANKS - RANKS.min()
    expected = plackett_luce_loss(scores, GROUPS, RANKS)
    assert torch.equal(plackett_luce_loss(scores, groups.to(dtype), ranks.to(dtype)), expected)
    assert torch.equal(plackett_luce_loss(scores, groups.to(dtype), ranks), expected)


def test_a_ranking_has_the_same_bits_alone_and_among_others() -> None:
    scores = items(torch.float32)
    losses = plackett_luce_loss(scores, GROUPS, RANKS)
    for i, group in enumerate(GROUPS.unique().tolist()):
        members = GROUPS.eq(group)
        alone = plackett_luce_loss(scores[members], GROUPS[members], RANKS[members])
        assert torch.equal(alone, losses[i : i + 1])


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_a_broken_score_taints_its_own_ranking_only(garbage: float) -> None:
    scores = items(torch.float32)
    clean = plackett_luce_loss(scores, GROUPS, RANKS)
    (clean_gradient,) = torch.autograd.grad(clean.sum(), scores)
    # The last of the ranking with the highest id.
    broken = torch.where(GROUPS.eq(2**40) & RANKS.eq(5), garbage, scores.detach())
    broken.requires_grad_()
    losses = plackett_luce_loss(broken, GROUPS, RANKS)
    (gradient,) = torch.autograd.grad(losses.sum(), broken)
    others = GROUPS.ne(2**40)
    assert not losses[3].isfinite()
    assert torch.equal(losses[:3], clean[:3])
    assert torch.equal(gradient[others], clean_gradient[others])


def test_no_items_have_no_losses() -> None:
    nothing, empty = torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.long)
    losses = plackett_luce_loss(nothing, empty, empty)
    assert losses.shape == (0,) and losses.dtype == torch.float32
    assert torch.autograd.grad(losses.sum(), nothing)[0].shape == (0,)


def _of_the_first_choice(scores: Tensor) -> Tensor:
    """-ln softmax at the best of each ranking, as if nothing came after it."""
    return torch.stack(
        [
            scores[members].logsumexp(0) - scores[members][RANKS[members].argmin()]
            for members in (GROUPS.eq(g) for g in GROUPS.unique())
        ]
    )


def _against_all(scores: Tensor) -> Tensor:
    """Each choice among all items of its ranking, those that are placed already included."""
    return torch.stack(
        [
            -scores[members].log_softmax(0).sum()
            for members in (GROUPS.eq(g) for g in GROUPS.unique())
        ]
    )


RANKING_MUTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "worst first": lambda s: plackett_luce_loss(s, GROUPS, -RANKS),
    "ranks ignored": lambda s: plackett_luce_loss(s, GROUPS, torch.arange(10)),
    "order of appearance": lambda s: plackett_luce_loss(s, GROUPS, RANKS)[[2, 1, 3, 0]],
    "first choice only": _of_the_first_choice,
    "all are left": _against_all,
    "mean over items": lambda s: plackett_luce_loss(s, GROUPS, RANKS) / torch.tensor([2, 1, 4, 3]),
    "rounded": lambda s: plackett_luce_loss(s.bfloat16(), GROUPS, RANKS),
    "off by 1e-5": lambda s: plackett_luce_loss(s, GROUPS, RANKS) * (1 + 1e-5),
}


@pytest.mark.parametrize("mutant", RANKING_MUTANTS)
def test_the_comparison_of_fp32_losses_of_rankings_rejects(mutant: str) -> None:
    scores = items(torch.float32)
    expected = expected_rankings(scores, GROUPS, RANKS)
    expected.assert_losses(plackett_luce_loss(scores, GROUPS, RANKS))
    with pytest.raises(AssertionError, match="x bound"):
        expected.assert_losses(RANKING_MUTANTS[mutant](scores))


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.001, math.nan])
def test_the_comparison_of_fp32_gradients_of_rankings_rejects(factor: float) -> None:
    scores = items(torch.float32)
    expected = expected_rankings(scores, GROUPS, RANKS)
    (gradient,) = torch.autograd.grad(plackett_luce_loss(scores, GROUPS, RANKS).sum(), scores)
    expected.assert_gradients(gradient)
    with pytest.raises(AssertionError, match="gradient"):
        expected.assert_gradients(factor * gradient)


# Errors


def test_two_items_of_one_ranking_cannot_have_one_rank() -> None:
    ranks = RANKS.clone()
    ranks[0] = ranks[3]
    with pytest.raises(ValueError, match=r"ranks: .*different ranks within a group"):
        plackett_luce_loss(items(torch.float32), GROUPS, ranks)
    # Those of different rankings can.
    plackett_luce_loss(torch.zeros(2), torch.tensor([0, 1]), torch.tensor([3, 3]))


_ZEROS, _IDS = torch.zeros(4), torch.arange(4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"chosen_scores": [0.0]}, TypeError, "chosen_scores: expected a tensor, got list"),
        ({"chosen_scores": _IDS}, TypeError, "chosen_scores: .*floating.*int64"),
        (
            {"chosen_scores": torch.zeros(4, 1)},
            ValueError,
            r"chosen_scores: .*\(P,\), got \(4, 1\)",
        ),
        ({"rejected_scores": 0.0}, TypeError, "rejected_scores: expected a tensor, got float"),
        ({"rejected_scores": _IDS}, TypeError, "rejected_scores: .*floating.*int64"),
        ({"rejected_scores": torch.zeros(3)}, ValueError, r"rejected_scores: .*\(4,\).*got \(3,\)"),
        ({"rejected_scores": _ZEROS.to("meta")}, ValueError, "rejected_scores: expected on cpu"),
        ({"margin": "1"}, TypeError, "margin: expected a number, got str"),
        ({"margin": _IDS}, TypeError, "margin: .*floating.*int64"),
        ({"margin": torch.tensor(1.0)}, ValueError, r"margin: .*\(4,\).*got \(\)"),
        ({"margin": _ZEROS.to("meta")}, ValueError, "margin: expected on cpu"),
        ({"center_coef": None}, TypeError, "center_coef: expected a number, got NoneType"),
        ({"center_coef": math.nan}, ValueError, "center_coef: .*finite.*got nan"),
    ],
)
def test_errors_of_pairs_name_the_argument(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"chosen_scores": _ZEROS, "rejected_scores": _ZEROS}
    with pytest.raises(error, match=message):
        reward_loss(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"scores": [0.0]}, TypeError, "scores: expected a tensor, got list"),
        ({"scores": _IDS}, TypeError, "scores: .*floating.*int64"),
        ({"scores": torch.zeros(4, 1)}, ValueError, r"scores: .*\(M,\), got \(4, 1\)"),
        ({"groups": [0]}, TypeError, "groups: expected a tensor, got list"),
        ({"groups": _ZEROS}, TypeError, "groups: .*integer.*float32"),
        ({"groups": _IDS[:3]}, ValueError, r"groups: .*\(4,\).*got \(3,\)"),
        ({"groups": _IDS.to("meta")}, ValueError, "groups: expected on cpu"),
        ({"ranks": [0]}, TypeError, "ranks: expected a tensor, got list"),
        ({"ranks": _ZEROS}, TypeError, "ranks: .*integer.*float32"),
        ({"ranks": _IDS > 0}, TypeError, "ranks: .*integer.*bool"),
        ({"ranks": _IDS[:3]}, ValueError, r"ranks: .*\(4,\).*got \(3,\)"),
        ({"ranks": _IDS.to("meta")}, ValueError, "ranks: expected on cpu"),
        ({"groups": _IDS * 0, "ranks": _IDS * 0}, ValueError, "ranks: .*two items of one rank"),
    ],
)
def test_errors_of_rankings_name_the_argument(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"scores": _ZEROS, "groups": _IDS, "ranks": _IDS}
    with pytest.raises(error, match=message):
        plackett_luce_loss(**{**arguments, **changed})
