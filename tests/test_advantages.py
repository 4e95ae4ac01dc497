"""group_advantages against its formulas in 150 digits, and errors of all three functions."""

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.advantage_cases import FINE, HALF, SHAPED_MASK, expected_rewards, to_shape
from support.preference_formulas import Expectation, decimals
from torch import Tensor

from fastrlhf import group_advantages, shaped_rewards, whiten

KINDS = ["grpo", "dr_grpo", "rloo", "reinforce++"]


def test_the_comparison_of_fp32_rewards_rejects_a_k3_that_cancels() -> None:
    scores, logprobs, ref = to_shape(torch.float32, gap=1e-3)
    expected = expected_rewards(0 * scores, logprobs, ref, 1.0, "k3")
    naive = (ref - logprobs).exp() - 1 - (ref - logprobs)
    with pytest.raises(AssertionError, match="x bound"):
        expected.assert_losses(-naive[SHAPED_MASK])


# group_advantages

# Six groups of 4, 2, 1, 3, 1 and 2 samples, in no order.
GROUPS = torch.tensor([7, -3, 7, 2**40, 0, -3, 7, 0, 2**40 + 1, 7, 0, -(2**62), -(2**62)])


def expected_advantages(rewards: Tensor, groups: Tensor, kind: str) -> Expectation:
    """What `group_advantages` must give, by the formulas of the papers, one sample at a time."""
    ids = groups.tolist()

    def advantages_of(x: list[Decimal]) -> list[Decimal]:
        advantages = []
        for i, g in enumerate(ids):
            members = [j for j, other in enumerate(ids) if other == g or kind == "reinforce++"]
            others = [x[j] for j in members if j != i]
            mean = sum(x[j] for j in members) / len(members)
            deviation = (sum((x[j] - mean) ** 2 for j in members) / max(len(members) - 1, 1)).sqrt()
            if kind == "dr_grpo":
                advantages.append(x[i] - mean)
            elif kind == "rloo":
                advantages.append(x[i] - sum(others) / len(others) if others else Decimal(0))
            else:
                advantages.append((x[i] - mean) / (deviation + Decimal("1e-4")))
        return advantages

    return Expectation(advantages_of, decimals(rewards))


@FINE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["usual", "of the size of the floor"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_advantages_are_those_of_the_papers(
    offset: float, scale: float, kind: str, dtype: torch.dtype
) -> None:
    rewards = (offset + scale * torch.randn(13, dtype=torch.float64)).to(dtype)
    found = group_advantages(rewards, GROUPS, kind=kind)
    assert found.dtype == dtype and found.shape == (13,)
    expected_advantages(rewards, GROUPS, kind).assert_losses(found)


def test_an_example_of_each_kind_by_hand() -> None:
    rewards = torch.tensor([1.0, 5.0, 4.0, 3.0, 1.0], dtype=torch.float64)
    groups = torch.tensor([2, 1, 2, 1, 2])
    # Group 2 holds 1, 4, 1: mean 2, variance (1 + 4 + 1) / 2. Group 1 holds 5, 3: mean 4,
    # variance 2. The batch: mean 2.8, variance (3.24 + 4.84 + 1.44 + 0.04 + 3.24) / 4 = 3.2.
    three, two = math.sqrt(3) + 1e-4, math.sqrt(2) + 1e-4
    all_five = math.sqrt(3.2) + 1e-4
    expected = {
        "grpo": [-1 / three, 1 / two, 2 / three, -1 / two, -1 / three],
        "dr_grpo": [-1, 1, 2, -1, -1],
        # The others' means: 2.5, 3, 1, 5, 2.5.
        "rloo": [-1.5, 2, 3, -2, -1.5],
        "reinforce++": [x / all_five for x in (-1.8, 2.2, 1.2, 0.2, -1.8)],
    }
    for kind in KINDS:
        found = group_advantages(rewards, groups, kind=kind).tolist()
        assert found == pytest.approx(expected[kind], rel=1e-14)
    default = group_advantages(rewards, groups)
    assert torch.equal(default, group_advantages(rewards, groups, kind="grpo"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("samples", [2, 3, 6, 7, 64])
@pytest.mark.parametrize("reward", [0.1, -0.7, 1e-3, 1000.1])
def test_equal_rewards_have_advantage_exactly_zero(
    reward: float, samples: int, dtype: torch.dtype, kind: str
) -> None:
    # Their mean is rounded: six times 0.1, divided by six, need not be 0.1.
    rewards = torch.full((samples,), reward, dtype=dtype)
    advantages = group_advantages(rewards, torch.full((samples,), 5), kind=kind)
    assert (advantages == 0).all()


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_a_group_of_equal_rewards_is_zero_amid_others(kind: str) -> None:
    rewards = torch.randn(60)
    groups = torch.arange(10).repeat(6)[torch.randperm(60)]
    rewards[groups == 4] = 0.1
    advantages = group_advantages(rewards, groups, kind=kind)
    assert torch.equal(advantages == 0, groups == 4)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    reward=st.floats(allow_nan=False, allow_infinity=False, width=32),
    samples=st.integers(1, 20),
    kind=st.sampled_from(KINDS),
)
def test_any_equal_rewards_have_advantage_exactly_zero(
    reward: float, samples: int, kind: str
) -> None:
    rewards = torch.full((samples,), reward)
    assert (group_advantages(rewards, torch.zeros(samples).long(), kind=kind) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_one_have_advantage_exactly_zero(kind: str) -> None:
    if kind == "reinforce++":
        rewards, groups = torch.tensor([0.3]), torch.tensor([9])
    else:
        rewards, groups = torch.randn(5), torch.tensor([4, -1, 3, 0, 9])
    assert (group_advantages(rewards, groups, kind=kind) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_groups_can_be_small_integers(dtype: torch.dtype, kind: str) -> None:
    rewards, groups = torch.randn(13), torch.unique(GROUPS, return_inverse=True)[1]
    found = group_advantages(rewards, groups.to(dtype), kind=kind)
    assert torch.equal(found, group_advantages(rewards, groups, kind=kind))


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_what_groups_are_called_and_where_they_lie_does_not_matter(kind: str) -> None:
    rewards = torch.randn(13)
    found = group_advantages(rewards, GROUPS, kind=kind)
    for i, group in enumerate(GROUPS.unique().tolist()):
        members = GROUPS.eq(group)
        alone = rewards[members]
        renamed = torch.full(alone.shape, 100 - i)
        assert torch.equal(group_advantages(alone, renamed, kind=kind), found[members])


@pytest.mark.parametrize("kind", KINDS)
def test_strides_of_rewards_and_groups_do_not_matter(kind: str) -> None:
    rewards, groups = torch.randn(13, 3), torch.stack((GROUPS, GROUPS + 1), 1)
    found = group_advantages(rewards[:, 1], groups[:, 0], kind=kind)
    assert torch.equal(found, group_advantages(rewards[:, 1].clone(), GROUPS, kind=kind))
    expanded = torch.zeros(1, dtype=torch.long).expand(13)
    dense = group_advantages(rewards[:, 1], expanded.clone(), kind=kind)
    assert torch.equal(group_advantages(rewards[:, 1], expanded, kind=kind), dense)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_a_broken_reward_taints_its_own_group_only(kind: str, garbage: float) -> None:
    rewards = torch.randn(13)
    clean = group_advantages(rewards, GROUPS, kind=kind)
    rewards[4] = garbage
    found = group_advantages(rewards, GROUPS, kind=kind)
    assert not found[GROUPS == 0].isfinite().any()
    assert torch.equal(found[GROUPS != 0], clean[GROUPS != 0])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_the_order_of_the_samples_does_not_matter(data: st.DataObject, kind: str) -> None:
    # Of eighths, so that a group is either of equal rewards, or far from it.
    samples = st.tuples(st.integers(-40, 40), st.sampled_from([-5, 0, 3, 2**50]))
    drawn = data.draw(st.lists(samples, max_size=12))
    order = torch.tensor(data.draw(st.permutations(range(len(drawn)))), dtype=torch.long)
    rewards = torch.tensor([r / 8 for r, _ in drawn], dtype=torch.float64)
    groups = torch.tensor([g for _, g in drawn], dtype=torch.long)
    found = group_advantages(rewards, groups, kind=kind)
    permuted = group_advantages(rewards[order], groups[order], kind=kind)
    torch.testing.assert_close(permuted, found[order], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@HALF
def test_half_precision_rewards_are_compared_in_fp32(dtype: torch.dtype, kind: str) -> None:
    rewards = torch.randn(13).to(dtype)
    found = group_advantages(rewards, GROUPS, kind=kind)
    assert found.dtype == torch.float32
    assert torch.equal(found, group_advantages(rewards.float(), GROUPS, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_are_constants_of_the_training_step(kind: str) -> None:
    rewards = torch.randn(13, requires_grad=True)
    assert not group_advantages(rewards, GROUPS, kind=kind).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_no_samples_have_no_advantages(kind: str) -> None:
    nothing = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long), kind=kind)
    assert nothing.shape == (0,) and nothing.dtype == torch.float32


def _one_off(rewards: Tensor) -> Tensor:
    """One sample counted to another group."""
    groups = GROUPS.clone()
    groups[0] = 0
    return group_advantages(rewards, groups)


GROUP_MUTANTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "no deviation": ("grpo", lambda r: group_advantages(r, GROUPS, kind="dr_grpo")),
    "of the batch": ("grpo", lambda r: group_advantages(r, GROUPS, kind="reinforce++")),
    "of a group": ("reinforce++", lambda r: group_advantages(r, GROUPS, kind="grpo")),
    "mean of all": ("rloo", lambda r: group_advantages(r, GROUPS, kind="dr_grpo")),
    "mean of the others": ("dr_grpo", lambda r: group_advantages(r, GROUPS, kind="rloo")),
    "wrong group": ("grpo", _one_off),
    "moved by one": ("grpo", lambda r: group_advantages(r, GROUPS).roll(1)),
    "rounded": ("grpo", lambda r: group_advantages(r.bfloat16(), GROUPS)),
    "off by 1e-5": ("grpo", lambda r: group_advantages(r, GROUPS) * (1 + 1e-5)),
    "no floor": ("reinforce++", lambda r: (r - r.mean()) / r.std()),
    "floor of the variance": ("reinforce++", lambda r: (r - r.mean()) / (r.var() + 1e-8).sqrt()),
    "divided by n": ("reinforce++", lambda r: (r - r.mean()) / (r.std(correction=0) + 1e-4)),
    "unordered": (
        "grpo",
        lambda r: group_advantages(r[GROUPS.argsort()], GROUPS.sort().values),
    ),
}


@pytest.mark.parametrize("mutant", GROUP_MUTANTS)
def test_the_comparison_of_fp32_advantages_rejects(mutant: str) -> None:
    rewards = torch.randn(13)
    kind, wrong = GROUP_MUTANTS[mutant]
    expected = expected_advantages(rewards, GROUPS, kind)
    expected.assert_losses(group_advantages(rewards, GROUPS, kind=kind))
    with pytest.raises(AssertionError, match="x bound"):
        expected.assert_losses(wrong(rewards))


# Errors

_ZEROS, _IDS = torch.zeros(2, 3), torch.zeros(4, dtype=torch.long)
_ARGUMENTS: dict[Callable[..., Tensor], dict[str, Any]] = {
    whiten: {"x": _ZEROS, "mask": _ZEROS},
    shaped_rewards: {
        "scores": torch.zeros(2),
        "logprobs": _ZEROS,
        "ref_logprobs": _ZEROS,
        "mask": _ZEROS,
        "kl_coef": 0.1,
    },
    group_advantages: {"rewards": torch.zeros(4), "groups": _IDS},
}


@pytest.mark.parametrize(
    ("function", "changed", "error", "message"),
    [
        (whiten, {"x": [0.0]}, TypeError, "x: expected a tensor, got list"),
        (whiten, {"x": _ZEROS.long()}, TypeError, "x: .*floating.*int64"),
        (whiten, {"mask": None}, TypeError, "mask: expected a tensor, got NoneType"),
        (whiten, {"mask": _ZEROS * 1j}, TypeError, "mask: .*boolean or 0/1"),
        (whiten, {"mask": torch.ones(2, 1)}, ValueError, r"mask: .*\(2, 3\).*got \(2, 1\)"),
        (whiten, {"mask": _ZEROS.to("meta")}, ValueError, "mask: expected on cpu"),
        (shaped_rewards, {"scores": 1.0}, TypeError, "scores: expected a tensor, got float"),
        (shaped_rewards, {"scores": _IDS[:2].cfloat()}, TypeError, "scores: .*real.*complex"),
        (shaped_rewards, {"scores": torch.zeros(3)}, ValueError, r"scores: .*\(2,\).*got \(3,\)"),
        (shaped_rewards, {"scores": _ZEROS[:, :1]}, ValueError, r"scores: .*\(2,\).*got \(2, 1\)"),
        (shaped_rewards, {"scores": torch.zeros(2, device="meta")}, ValueError, "scores: .*cpu"),
        (shaped_rewards, {"logprobs": _ZEROS.long()}, TypeError, "^logprobs: .*floating.*int64"),
        (shaped_rewards, {"logprobs": torch.zeros(2)}, ValueError, r"^logprobs: .*\(B, T\)"),
        (shaped_rewards, {"ref_logprobs": None}, TypeError, "ref_logprobs: .*tensor, got NoneType"),
        (shaped_rewards, {"ref_logprobs": _ZEROS.long()}, TypeError, "ref_logprobs: .*floating"),
        (shaped_rewards, {"ref_logprobs": torch.zeros(2)}, ValueError, r"ref_logprobs: .*\(2, 3\)"),
        (shaped_rewards, {"ref_logprobs": _ZEROS.to("meta")}, ValueError, "ref_logprobs: .*cpu"),
        (shaped_rewards, {"mask": None}, TypeError, "mask: expected a tensor, got NoneType"),
        (shaped_rewards, {"mask": torch.ones(2, 1)}, ValueError, r"mask: .*\(2, 3\).*got \(2, 1\)"),
        (shaped_rewards, {"mask": _ZEROS.to("meta")}, ValueError, "mask: expected on cpu"),
        (shaped_rewards, {"kl_coef": None}, TypeError, "kl_coef: expected a number, got NoneType"),
        (shaped_rewards, {"kl_coef": math.nan}, ValueError, "kl_coef: .*finite.*got nan"),
        (shaped_rewards, {"kl_estimator": "k4"}, ValueError, "^kl_estimator: .*k3, abs, got 'k4'"),
        (group_advantages, {"rewards": [0.0]}, TypeError, "rewards: expected a tensor, got list"),
        (group_advantages, {"rewards": _IDS.cfloat()}, TypeError, "rewards: .*real.*complex"),
        (group_advantages, {"rewards": _ZEROS}, ValueError, r"rewards: .*\(B,\), got \(2, 3\)"),
        (group_advantages, {"groups": [0]}, TypeError, "groups: expected a tensor, got list"),
        (group_advantages, {"groups": torch.zeros(4)}, TypeError, "groups: .*integer.*float32"),
        (group_advantages, {"groups": _IDS > 0}, TypeError, "groups: .*integer.*bool"),
        (group_advantages, {"groups": _IDS[:3]}, ValueError, r"groups: .*\(4,\).*got \(3,\)"),
        (group_advantages, {"groups": _IDS.to("meta")}, ValueError, "groups: expected on cpu"),
        (group_advantages, {"kind": "ppo"}, ValueError, "kind: .*grpo, .*got 'ppo'"),
    ],
)
def test_errors_name_the_argument(
    function: Callable[..., Tensor], changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(**{**_ARGUMENTS[function], **changed})
