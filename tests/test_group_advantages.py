"""The kinds of group_advantages beyond the first four, and gdpo_advantages, against the formulas of
their papers in 150 digits.
"""

import math
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch
from support.preference_formulas import Expectation, decimals
from torch import Tensor

from fastrlhf import gdpo_advantages, group_advantages

FINE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])

# Six groups of 4, 2, 1, 3, 1 and 2 samples, in no order.
GROUPS = torch.tensor([7, -3, 7, 2**40, 0, -3, 7, 0, 2**40 + 1, 7, 0, -(2**62), -(2**62)])
LENGTHS = torch.tensor([3, 8, 1, 4, 0, 5, 7, 2, 9, 12, 6, 0, 0])  # the last group has no tokens
BASELINES = torch.linspace(-1, 2, 13, dtype=torch.float64)

CASES: dict[str, dict[str, Any]] = {
    "batch": {"scale_rewards": "batch"},
    "group": {"scale_rewards": "group", "eps": 1e-6},
    "none": {"scale_rewards": "none"},
    "reinforce++-baseline": {"kind": "reinforce++-baseline"},
    "eps": {"kind": "reinforce++-baseline", "eps": 0.5},
    "remax": {"kind": "remax", "baselines": BASELINES},
    "opo": {"kind": "opo", "lengths": LENGTHS},
    "gpg": {"kind": "gpg"},
    "grpo_passk": {"kind": "grpo_passk"},
}
CASE = pytest.mark.parametrize("case", CASES)


def deviation(x: list[Decimal]) -> Decimal:
    """The sample standard deviation."""
    mean = sum(x) / len(x)
    return (sum((v - mean) ** 2 for v in x) / max(len(x) - 1, 1)).sqrt()


def advantage_of(i: int, x: list[Decimal], members: list[list[int]], options: dict) -> Decimal:
    """The advantage of a sample by its paper, from the rewards of all and who is in its group."""
    kind, eps = options.get("kind", "grpo"), Decimal(options.get("eps", 1e-4))
    own = [x[j] for j in members[i]]
    centred = x[i] - sum(own) / len(own)
    if kind == "grpo":
        scale = options["scale_rewards"]
        by = {"batch": lambda: deviation(x) + eps, "group": lambda: deviation(own) + eps}
        return centred / by[scale]() if scale in by else centred
    if kind == "reinforce++-baseline":
        all_centred = [y - sum(x[j] for j in m) / len(m) for y, m in zip(x, members, strict=True)]
        mean = sum(all_centred) / len(x)
        return (centred - mean) / (deviation(all_centred) + eps)
    if kind == "remax":
        return x[i] - Decimal(options["baselines"][i].item())
    if kind == "opo":
        weights = [Decimal(options["lengths"][j].item()) for j in members[i]]
        weights = weights if sum(weights) else [Decimal(1) for _ in own]
        return x[i] - sum(w * y for w, y in zip(weights, own, strict=True)) / sum(weights)
    if kind == "gpg":
        with_gradient = sum(len({x[j] for j in m}) > 1 for m in members)
        return centred * len(x) / max(with_gradient, 1)
    others = [x[j] for j in members[i] if j != i]
    best = bool(others) and x[i] > max(others)
    return (x[i] - max(others)) / (deviation(own) + eps) if best else Decimal(0)


def expected(rewards: Tensor, groups: Tensor, options: dict) -> Expectation:
    ids = groups.tolist()
    members = [[j for j, other in enumerate(ids) if other == g] for g in ids]

    def advantages_of(x: list[Decimal]) -> list[Decimal]:
        return [advantage_of(i, x, members, options) for i in range(len(x))]

    return Expectation(advantages_of, decimals(rewards))


@FINE
@CASE
@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["usual", "of the size of the floor"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_advantages_are_those_of_the_papers(
    offset: float, scale: float, case: str, dtype: torch.dtype
) -> None:
    rewards = (offset + scale * torch.randn(13, dtype=torch.float64)).to(dtype)
    found = group_advantages(rewards, GROUPS, **CASES[case])
    assert found.dtype == dtype and found.shape == (13,)
    # Where a deviation of the batch is of terms as large as the offset, these terms cancel.
    expected(rewards, GROUPS, CASES[case]).assert_losses(found)


def test_examples_by_hand() -> None:
    rewards = torch.tensor([1.0, 5.0, 4.0, 3.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    groups = torch.tensor([2, 1, 2, 1, 2, 0, 0])
    # Group 2 holds 1, 4, 1: mean 2. Group 1 holds 5, 3: mean 4. Group 0 holds 2, 2.
    centred = [-1, 1, 2, -1, -1, 0, 0]
    # The batch: mean 18/7, squares 60 - 18²/7 = 96/7, over 6. The centred: squares 8, over 6.
    by_batch, by_centred = math.sqrt(16 / 7) + 1e-4, math.sqrt(8 / 6) + 1e-4
    cases = [
        ({"scale_rewards": "batch"}, [x / by_batch for x in centred]),
        ({"kind": "reinforce++-baseline"}, [x / by_centred for x in centred]),
        ({"kind": "gpg"}, [x * 7 / 5 for x in centred]),
        ({"kind": "remax", "baselines": rewards.flip(0)}, [-1, 3, 3, 0, -3, -3, 1]),
        # (1·1 + 2·4 + 3·1) / 6 = 2; (1·5 + 3·3) / 4 = 3.5.
        (
            {"kind": "opo", "lengths": torch.tensor([1, 1, 2, 3, 3, 8, 9])},
            [-1, 1.5, 2, -0.5, -1, 0, 0],
        ),
        ({"kind": "grpo_passk", "eps": 1e-9}, [0, math.sqrt(2), math.sqrt(3), 0, 0, 0, 0]),
    ]
    for options, wanted in cases:
        found = group_advantages(rewards, groups, **options)
        assert found.tolist() == pytest.approx(wanted, rel=1e-8, abs=0), options


@CASE
@pytest.mark.parametrize("reward", [0.1, 1000.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_group_of_equal_rewards_is_exactly_zero_amid_others(
    dtype: torch.dtype, reward: float, case: str
) -> None:
    rewards, groups = torch.randn(60).to(dtype), torch.arange(10).repeat(6)[torch.randperm(60)]
    rewards[groups == 4] = reward
    options = {**CASES[case]}
    if "lengths" in options:
        options["lengths"] = torch.randint(1, 50, (60,))
    if "baselines" in options:
        options["baselines"] = torch.where(groups == 4, rewards, torch.zeros_like(rewards))
    found = group_advantages(rewards, groups, **options)
    if case == "grpo_passk":
        assert (found[groups == 4] == 0).all() and (found != 0).sum() <= 9
    else:
        assert torch.equal(found == 0, groups == 4)
    one_each = group_advantages(rewards[:13], torch.arange(13), **CASES[case])
    assert case == "remax" or (one_each == 0).all()


@CASE
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_what_is_not_valid_counts_nowhere(garbage: float, case: str) -> None:
    rewards = torch.randn(13)
    valid = torch.arange(13) % 3 != 1
    options = dict(CASES[case])
    alone = {k: v[valid] if isinstance(v, Tensor) else v for k, v in options.items()}
    want = torch.zeros(13)
    want[valid] = group_advantages(rewards[valid], GROUPS[valid], **alone)
    for mask in (valid, valid.long(), valid.float()):
        got = group_advantages(torch.where(valid, rewards, garbage), GROUPS, valid=mask, **options)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        assert (got[~valid] == 0).all()
    nothing = group_advantages(rewards, GROUPS, valid=torch.zeros(13), **options)
    assert (nothing == 0).all()


def test_what_is_not_valid_is_not_the_second_best() -> None:
    # Relative to the first, the others are -2 and, if it counted, 0.
    rewards, valid = torch.tensor([3.0, 1.0, math.nan]), torch.tensor([1, 1, 0])
    found = group_advantages(rewards, torch.zeros(3).long(), kind="grpo_passk", valid=valid)
    assert found.tolist() == pytest.approx([2 / (math.sqrt(2) + 1e-4), 0, 0])


@pytest.mark.parametrize("case", ["group", "none", "opo", "gpg", "grpo_passk", "remax"])
def test_a_broken_reward_taints_its_own_group_only(case: str) -> None:
    rewards = torch.randn(13)
    clean = group_advantages(rewards, GROUPS, **CASES[case])
    rewards[4] = math.nan
    found = group_advantages(rewards, GROUPS, **CASES[case])
    own = torch.arange(13) == 4 if case == "remax" else GROUPS == 0
    assert found[own].isnan().all()
    torch.testing.assert_close(found[~own], clean[~own], rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ["batch", "reinforce++-baseline"])
def test_a_batch_that_a_reward_would_break_is_an_error(case: str) -> None:
    rewards = torch.randn(13)
    rewards[4] = -math.inf
    with pytest.raises(ValueError, match=rf"^rewards: .*'{re.escape(case)}', got -inf.*valid"):
        group_advantages(rewards, GROUPS, **CASES[case])


@CASE
@HALF
def test_half_precision_rewards_are_compared_in_fp32(dtype: torch.dtype, case: str) -> None:
    rewards = torch.randn(13).to(dtype)
    found = group_advantages(rewards, GROUPS, **CASES[case])
    assert found.dtype == torch.float32
    assert torch.equal(found, group_advantages(rewards.float(), GROUPS, **CASES[case]))
    assert not group_advantages(rewards.requires_grad_(), GROUPS, **CASES[case]).requires_grad


@CASE
def test_no_samples_have_no_advantages(case: str) -> None:
    empty = torch.zeros(0)
    options = {k: empty if isinstance(v, Tensor) else v for k, v in CASES[case].items()}
    assert group_advantages(empty, empty.long(), **options).shape == (0,)


def test_what_is_compiled_and_what_is_batched_is_the_same() -> None:
    rewards = torch.randn(3, 13, dtype=torch.float64)

    def call(x: Tensor) -> Tensor:
        binary = group_advantages((x > 0).double(), GROUPS, kind="pass@k", k=2)
        others = [group_advantages(x, GROUPS, **options) for options in CASES.values()]
        return torch.stack([binary, *others])

    want = torch.stack([*map(call, rewards)])
    torch.testing.assert_close(torch.func.vmap(call)(rewards), want)
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(rewards[0]), want[0])


def test_the_floor_is_what_was_and_what_is_asked_for() -> None:
    rewards = 1e-4 * torch.randn(13, dtype=torch.float64)
    for kind in ("grpo", "reinforce++"):
        found = group_advantages(rewards, GROUPS, kind=kind)
        assert torch.equal(found, group_advantages(rewards, GROUPS, kind=kind, eps=1e-4))
        assert not torch.equal(found, group_advantages(rewards, GROUPS, kind=kind, eps=1e-6))
    as_verl = group_advantages(rewards[:4], torch.zeros(4).long(), eps=1e-6)
    theirs = (rewards[:4] - rewards[:4].mean()) / (rewards[:4].std() + 1e-6)
    torch.testing.assert_close(as_verl, theirs, rtol=1e-12, atol=1e-14)


# pass@k


def pass_at_k(rewards: list[int], k: int) -> list[float]:
    """The paper's Eq. of the analytical derivation, in exact fractions but for the root."""
    n, wrong = len(rewards), rewards.count(0)
    mean = 1 - Fraction(math.comb(wrong, k), math.comb(n, k)) if n >= k else Fraction(0)
    variance = mean * (1 - mean)
    if variance == 0:
        return [0.0] * n
    advantage_of_wrong = Fraction(0)
    if wrong:
        advantage_of_wrong = (
            1 - mean - Fraction(math.comb(wrong - 1, k - 1), math.comb(n - 1, k - 1))
        )

    def scaled(x: Fraction) -> float:
        # The root in integers: of x²/variance to 40 digits.
        square = x * x / variance * Fraction(10) ** 80
        root = Fraction(math.isqrt(int(square)), 10**40)
        return float(-root if x < 0 else root)

    return [scaled(1 - mean) if r else scaled(advantage_of_wrong) for r in rewards]


@FINE
@pytest.mark.parametrize("k", [1, 2, 3, 8, 40])
def test_pass_at_k_is_that_of_the_paper(k: int, dtype: torch.dtype) -> None:
    groups, rewards, wanted = [], [], []
    for i, (n, right) in enumerate(
        [(8, 0), (8, 8), (8, 1), (8, 7), (8, 3), (2, 1), (1, 1), (60, 9)]
    ):
        own = [int(j < right) for j in range(n)]
        groups += [i] * n
        rewards += own
        wanted += pass_at_k(own, k)
    order = torch.randperm(len(rewards))
    given = torch.tensor(rewards)[order].to(dtype), torch.tensor(groups)[order]
    found = group_advantages(*given, kind="pass@k", k=k)
    assert found.dtype == dtype
    want = torch.tensor(wanted, dtype=torch.float64)[order]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), want, rtol=16 * eps, atol=0)
    for name in (torch.bool, torch.int64):
        same = group_advantages(given[0].to(name), given[1], kind="pass@k", k=k)
        torch.testing.assert_close(
            same.double(), want, rtol=16 * torch.finfo(torch.float32).eps, atol=0
        )


@pytest.mark.parametrize(("n", "right", "k"), [(5000, 1, 1), (5000, 1, 4999), (5000, 4000, 64),
                                               (4096, 2000, 16), (3000, 5, 2000)])  # fmt: skip
def test_pass_at_k_of_thousands_of_samples_keeps_its_digits(n: int, right: int, k: int) -> None:
    rewards = (torch.arange(n) < right).double()
    found = group_advantages(rewards, torch.zeros(n).long(), kind="pass@k", k=k)
    first, last = pass_at_k([1] * right + [0] * (n - right), k)[0 :: n - 1]
    assert [found[0].item(), found[-1].item()] == pytest.approx([first, last], rel=1e-11, abs=0)


def test_one_of_one_is_grpo_by_the_deviation_of_all() -> None:
    rewards = torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64)
    found = group_advantages(rewards, torch.zeros(5).long(), kind="pass@k", k=1)
    whole = (rewards - rewards.mean()) / rewards.std(correction=0)
    torch.testing.assert_close(found, whole, rtol=1e-14, atol=0)


def test_pass_at_k_is_of_zeros_and_ones() -> None:
    rewards, groups = torch.tensor([1.0, -1.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"^rewards: expected 0 and 1 for kind 'pass@k', got -1"):
        group_advantages(rewards, groups, kind="pass@k", k=1)
    # Where the host is not to look, as on a GPU, nothing is made of it.
    found = torch.func.vmap(lambda x: group_advantages(x, groups, kind="pass@k", k=1))(
        rewards[None]
    )
    assert found[0, :2].isnan().all() and found[0, 2:].tolist() == [-1, 1]
    kept = group_advantages(rewards, groups, kind="pass@k", k=1, valid=rewards >= 0)
    assert kept.tolist() == [0, 0, -1, 1]


# gdpo_advantages


def expected_gdpo(rewards: Tensor, weights: list[float], eps: float = 1e-4) -> Expectation:
    ids, columns = GROUPS.tolist(), rewards.shape[1]

    def advantages_of(x: list[Decimal]) -> list[Decimal]:
        sums = []
        for i, g in enumerate(ids):
            total = Decimal(0)
            for r in range(columns):
                own = [x[j * columns + r] for j, other in enumerate(ids) if other == g]
                centred = x[i * columns + r] - sum(own) / len(own)
                total += Decimal(weights[r]) * centred / (deviation(own) + Decimal(eps))
            sums.append(total)
        mean = sum(sums) / len(sums)
        return [(s - mean) / (deviation(sums) + Decimal(eps)) for s in sums]

    return Expectation(advantages_of, decimals(rewards.reshape(-1)))


@FINE
@pytest.mark.parametrize("weights", [None, [1.0, 0.25, -2.0]])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_gdpo_is_that_of_the_paper(
    scale: float, weights: list[float] | None, dtype: torch.dtype
) -> None:
    rewards = torch.randn(13, 3, dtype=torch.float64) * torch.tensor([1, 100, scale])
    rewards = rewards.to(dtype)
    want = expected_gdpo(rewards, weights or [1.0] * 3)
    given = weights if weights is None else torch.tensor(weights)
    for x in (weights, given):
        found = gdpo_advantages(rewards, GROUPS, weights=x)
        assert found.dtype == dtype and found.shape == (13,)
        want.assert_losses(found, ulps=8)


def test_a_reward_is_not_drowned_by_another() -> None:
    # The sums 2 and 1 + 1 are the same to GRPO, and so are their advantages.
    rewards, groups = torch.tensor([[0.0, 0], [2, 0], [1, 1], [0, 0]]), torch.zeros(4).long()
    summed = group_advantages(rewards.sum(1), groups)
    assert summed[1] == summed[2]
    found = gdpo_advantages(rewards, groups)
    assert found[2] > found[1] > 0
    scaled = gdpo_advantages(rewards * torch.tensor([1000.0, 1]), groups, eps=1e-12)
    torch.testing.assert_close(scaled, gdpo_advantages(rewards, groups, eps=1e-12))


def test_gdpo_of_one_reward_is_grpo_but_for_its_scale() -> None:
    rewards = torch.randn(13, dtype=torch.float64)
    grpo = group_advantages(rewards, GROUPS)
    found = gdpo_advantages(rewards[:, None], GROUPS)
    torch.testing.assert_close(found, grpo / (grpo.std() + 1e-4), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e9])
def test_rewards_that_are_missing_count_nowhere(garbage: float) -> None:
    rewards = torch.randn(12, 2, dtype=torch.float64)
    groups, valid = torch.arange(12) // 4, torch.ones(12, 2, dtype=torch.bool)
    valid[0, 0] = valid[5, 1] = valid[9] = False
    found = gdpo_advantages(torch.where(valid, rewards, garbage), groups, valid=valid)
    sums = torch.zeros(12, dtype=torch.float64)
    for r in range(2):
        keep = valid[:, r]
        sums[keep] += group_advantages(rewards[keep, r], groups[keep])
    some = valid.any(1)
    want = torch.where(some, sums / (sums[some].std() + 1e-4), 0.0)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-15)
    of_samples = gdpo_advantages(rewards, groups, valid=some)
    both = gdpo_advantages(rewards, groups, valid=some[:, None].expand(12, 2))
    assert torch.equal(of_samples, both) and of_samples[9] == 0
    assert (gdpo_advantages(rewards, groups, valid=torch.zeros(12)) == 0).all()


def test_gdpo_of_equal_rewards_of_nothing_and_of_half_precision() -> None:
    rewards = torch.randn(12, 2)
    rewards[:4] = torch.tensor([0.1, 1000.1])
    groups = torch.arange(12) // 4
    found = gdpo_advantages(rewards, groups)
    assert torch.equal(found == 0, groups == 0)
    half = rewards.bfloat16().requires_grad_()
    got = gdpo_advantages(half, groups)
    assert not got.requires_grad and got.dtype == torch.float32
    assert torch.equal(got, gdpo_advantages(half.float(), groups))
    assert gdpo_advantages(torch.zeros(0, 2), groups[:0]).shape == (0,)
    assert gdpo_advantages(torch.zeros(3, 0), groups[:3]).tolist() == [0, 0, 0]
    integers = torch.tensor([[1, 0], [0, 1], [1, 1]])
    as_floats = gdpo_advantages(integers.float(), groups[:3])
    assert torch.equal(gdpo_advantages(integers, groups[:3]), as_floats)
    compiled = torch.compile(gdpo_advantages, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(rewards, groups), found)
    batched = torch.func.vmap(lambda x: gdpo_advantages(x, groups))(rewards[None])[0]
    torch.testing.assert_close(batched, found)


MUTANTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "of the group": ("batch", lambda r: group_advantages(r, GROUPS)),
    "of the centred": ("batch", lambda r: group_advantages(r, GROUPS, kind="reinforce++-baseline")),
    "of the rewards": (
        "reinforce++-baseline",
        lambda r: group_advantages(r, GROUPS, scale_rewards="batch"),
    ),
    "floor": ("batch", lambda r: group_advantages(r, GROUPS, scale_rewards="batch", eps=1e-3)),
    "verl's alpha": (
        "gpg",
        lambda r: group_advantages(r, GROUPS, kind="dr_grpo") * 13 / torch.count_nonzero(r),
    ),
    "plain mean": ("opo", lambda r: group_advantages(r, GROUPS, kind="dr_grpo")),
    "lengths moved": (
        "opo",
        lambda r: group_advantages(r, GROUPS, kind="opo", lengths=LENGTHS.roll(1)),
    ),
    "best over mean": ("grpo_passk", lambda r: group_advantages(r, GROUPS)),
    "off by 1e-5": ("gpg", lambda r: group_advantages(r, GROUPS, kind="gpg") * (1 + 1e-5)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_of_fp32_advantages_rejects(mutant: str) -> None:
    rewards = torch.randn(13)
    case, wrong = MUTANTS[mutant]
    want = expected(rewards, GROUPS, CASES[case])
    want.assert_losses(group_advantages(rewards, GROUPS, **CASES[case]))
    with pytest.raises(AssertionError, match="x bound"):
        want.assert_losses(wrong(rewards))


# Errors

_FOUR, _IDS = torch.zeros(4), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"scale_rewards": True}, TypeError, "scale_rewards: expected a string, got bool"),
        ({"scale_rewards": "all"}, ValueError, "scale_rewards: .*group, batch, none, got 'all'"),
        (
            {"scale_rewards": "batch", "kind": "rloo"},
            ValueError,
            "scale_rewards: expected None for kind 'rloo'",
        ),
        ({"eps": 0.0}, ValueError, "eps: .*positive.*got 0"),
        ({"eps": "1e-4"}, TypeError, "eps: expected a number, got str"),
        ({"kind": "opo"}, ValueError, r"lengths: .*shape \(B,\) for kind 'opo', got None"),
        ({"lengths": _FOUR}, ValueError, "lengths: expected None for kind 'grpo'"),
        ({"kind": "opo", "lengths": 3}, TypeError, "lengths: expected a tensor, got int"),
        ({"kind": "opo", "lengths": _FOUR - 1}, ValueError, "lengths: .*at least 0, got -1"),
        ({"kind": "opo", "lengths": _FOUR[:3]}, ValueError, r"lengths: .*\(4,\).*got \(3,\)"),
        ({"kind": "opo", "lengths": _FOUR.to("meta")}, ValueError, "lengths: expected on cpu"),
        ({"kind": "remax"}, ValueError, r"baselines: .*shape \(B,\) for kind 'remax', got None"),
        ({"baselines": _FOUR}, ValueError, "baselines: expected None for kind 'grpo'"),
        ({"kind": "remax", "baselines": _FOUR[:1]}, ValueError, r"baselines: .*got \(1,\)"),
        ({"kind": "remax", "baselines": _FOUR.cfloat()}, TypeError, "baselines: .*complex"),
        ({"kind": "pass@k"}, TypeError, "k: expected an integer, got NoneType"),
        ({"kind": "pass@k", "k": 0}, ValueError, "k: expected at least 1, got 0"),
        ({"kind": "pass@k", "k": 2.0}, TypeError, "k: expected an integer, got float"),
        ({"k": 2}, ValueError, "k: expected None for kind 'grpo'"),
        ({"valid": _FOUR[:3]}, ValueError, r"valid: .*\(4,\).*got \(3,\)"),
        ({"valid": _FOUR + 2}, ValueError, "valid: expected a mask of 0 and 1, got 2"),
    ],
)
def test_errors_of_group_advantages_name_the_argument(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="^" + message):
        group_advantages(**{"rewards": _FOUR, "groups": _IDS, **changed})


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rewards": _FOUR}, ValueError, r"rewards: expected shape \(B, R\), got \(4,\)"),
        ({"rewards": [[0.0]]}, TypeError, "rewards: expected a tensor, got list"),
        ({"rewards": torch.full((4, 2), torch.nan)}, ValueError, "rewards: .*finite.*nan.*valid"),
        ({"groups": _IDS[:2]}, ValueError, r"groups: .*\(4,\).*got \(2,\)"),
        ({"groups": _FOUR}, TypeError, "groups: .*integer.*float32"),
        ({"weights": [1.0]}, ValueError, "weights: expected 2, one for each reward, got 1"),
        ({"weights": [1.0, torch.nan]}, ValueError, "weights: .*finite.*nan"),
        ({"weights": "12"}, TypeError, "weights: expected a tensor, numbers or None, got str"),
        ({"weights": torch.ones(3)}, ValueError, r"weights: .*\(2,\).*got \(3,\)"),
        ({"weights": torch.ones(2).to("meta")}, ValueError, "weights: expected on cpu"),
        ({"eps": -1}, ValueError, "eps: .*positive.*got -1"),
        ({"valid": torch.ones(4, 3)}, ValueError, r"valid: .*\(4, 2\).*got \(4, 3\)"),
        ({"valid": torch.ones(3)}, ValueError, r"valid: .*\(4,\).*got \(3,\)"),
    ],
)
def test_errors_of_gdpo_name_the_argument(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="^" + message):
        gdpo_advantages(**{"rewards": torch.zeros(4, 2), "groups": _IDS, **changed})
