"""whiten, shaped_rewards and group_advantages, against their formulas in 150 digits."""

import math
import statistics
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.preference_formulas import Expectation, decimals
from torch import Tensor

from fastrlhf import group_advantages, shaped_rewards, whiten

FINE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
MASKS = pytest.mark.parametrize(
    "mask_dtype", [torch.bool, torch.int64, torch.uint8, torch.float32], ids=str
)
GARBAGE = pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e9])
SHIFT = pytest.mark.parametrize("shift_mean", [True, False], ids=["shifted", "mean kept"])
KINDS = ["grpo", "dr_grpo", "rloo", "reinforce++"]
ESTIMATORS = ["k1", "k2", "k3", "abs"]


# whiten


def expected_whiten(kept: Tensor, shift_mean: bool = True) -> Expectation:
    """What `whiten` must make of the entries of the mask, (n,)."""

    def whitened(x: list[Decimal]) -> list[Decimal]:
        mean = sum(x) / len(x)
        variance = sum((v - mean) ** 2 for v in x) / max(len(x) - 1, 1)
        scale = (variance + Decimal("1e-8")).sqrt()
        return [(v - mean) / scale + (0 if shift_mean else mean) for v in x]

    return Expectation(whitened, decimals(kept))


def to_whiten(dtype: torch.dtype, shape: tuple[int, ...] = (4, 7)) -> tuple[Tensor, Tensor]:
    """Entries, garbage among them, and which of them count: no entry of the first row."""
    mask = torch.rand(shape) < 0.6
    mask[0] = False
    x = (3 + 2 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    return torch.where(mask, x, math.nan).requires_grad_(), mask


@FINE
@SHIFT
@pytest.mark.parametrize("shape", [(4, 7), (30,), (3, 2, 5)])
@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["usual", "of the size of the floor"])
def test_whitened_entries_and_their_gradients_are_those_of_the_formula(
    scale: float, shape: tuple[int, ...], shift_mean: bool, dtype: torch.dtype
) -> None:
    x, mask = to_whiten(dtype, shape)
    x = ((x.detach() - 3) * scale).requires_grad_()
    found = whiten(x, mask, shift_mean=shift_mean)
    assert found.shape == x.shape and found.dtype == dtype
    expected = expected_whiten(x[mask], shift_mean)
    expected.assert_losses(found[mask])
    assert (found[~mask] == 0).all()
    upstream = torch.randn(shape, dtype=dtype)
    (gradient,) = torch.autograd.grad(found, x, upstream)
    expected.assert_gradients(gradient[mask], weights=upstream[mask].tolist())
    assert (gradient[~mask] == 0).all()


def test_an_example_of_whitening_by_hand() -> None:
    # Mean 2; squares 1, 0, 1 over 3 - 1 make variance 1.
    x = torch.tensor([[1.0, 9.0], [2.0, 3.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 0], [1, 1]])
    near = pytest.approx  # but for the 1e-8 that keeps it from dividing by 0
    assert whiten(x, mask).flatten().tolist() == near([-1, 0, 0, 1], rel=1e-8, abs=0)
    shifted = whiten(x, mask, shift_mean=False).flatten().tolist()
    assert shifted == near([1, 0, 2, 3], rel=1e-8, abs=0)


@FINE
def test_the_mean_becomes_zero_and_the_variance_one(dtype: torch.dtype) -> None:
    x, mask = to_whiten(dtype, (40, 50))
    kept = x[mask].tolist()
    found = whiten(x, mask)[mask].tolist()
    eps = torch.finfo(dtype).eps
    assert abs(statistics.fmean(found)) <= 2 * eps
    variance = statistics.variance(kept)
    whitened = variance / (variance + 1e-8)
    assert statistics.variance(found) == pytest.approx(whitened, rel=8 * eps)
    unshifted = whiten(x, mask, shift_mean=False)[mask].tolist()
    assert statistics.fmean(unshifted) == pytest.approx(statistics.fmean(kept), rel=2 * eps)
    assert statistics.variance(unshifted) == pytest.approx(whitened, rel=8 * eps)


@SHIFT
def test_it_is_the_formula_of_trl(shift_mean: bool) -> None:
    # TRL's trainers: moments by masked means, and Bessel's correction afterwards.
    x, mask = to_whiten(torch.float64)
    clean = torch.where(mask, x, 0.0)
    mean = (clean * mask).sum() / mask.sum()
    variance = ((clean - mean) ** 2 * mask).sum() / mask.sum()
    variance = variance * mask.sum() / (mask.sum() - 1)
    trl = (clean - mean) * torch.rsqrt(variance + 1e-8)
    trl = (trl if shift_mean else trl + mean) * mask
    torch.testing.assert_close(whiten(x, mask, shift_mean=shift_mean), trl, rtol=1e-13, atol=1e-15)


@GARBAGE
@SHIFT
@MASKS
def test_garbage_outside_of_the_mask_changes_no_bit_of_what_is_whitened(
    mask_dtype: torch.dtype, shift_mean: bool, garbage: float
) -> None:
    x, mask = to_whiten(torch.float32)
    clean = torch.where(mask, x, 0.0).detach().requires_grad_()
    dirty = torch.where(mask, x, garbage).detach().requires_grad_()
    found = whiten(dirty, mask.to(mask_dtype), shift_mean=shift_mean)
    expected = whiten(clean, mask, shift_mean=shift_mean)
    assert torch.equal(found, expected)
    upstream = torch.randn(mask.shape)
    gradients = [
        torch.autograd.grad(*pair, upstream)[0] for pair in ((found, dirty), (expected, clean))
    ]
    assert torch.equal(*gradients) and (gradients[0][~mask] == 0).all()


@pytest.mark.parametrize("entries", [0, 1])
@pytest.mark.parametrize("shape", [(2, 3), (1, 1)])
@SHIFT
def test_fewer_than_two_entries_have_variance_zero_and_finite_gradients(
    shift_mean: bool, shape: tuple[int, int], entries: int
) -> None:
    x = torch.full(shape, 0.3, requires_grad=True)
    mask = torch.arange(x.numel()).reshape(shape) >= x.numel() - entries
    found = whiten(x, mask, shift_mean=shift_mean)
    assert torch.equal(found, torch.where(mask, 0.0 if shift_mean else 0.3, 0.0))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient, torch.where(mask, 0.0 if shift_mean else 1.0, 0.0))


@pytest.mark.parametrize("entry", [0.1, -0.7, 1000.1])
def test_equal_entries_have_no_deviation_to_scale_up(entry: float) -> None:
    # Their mean is rounded, and what that leaves would be divided by 1e-4.
    found = whiten(torch.full((2, 3), entry), torch.ones(2, 3))
    assert found.flatten().tolist() == pytest.approx([0] * 6, abs=1e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_nothing_to_whiten_is_fine(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    found = whiten(x, torch.ones(shape))
    assert found.shape == shape
    assert torch.autograd.grad(found.sum(), x)[0].shape == shape


@SHIFT
def test_derivatives_of_both_orders_of_whitening_are_right(shift_mean: bool) -> None:
    x, mask = to_whiten(torch.float64, (3, 4))
    x = torch.where(mask, x, 0.0).detach().requires_grad_()

    def whitened(x: Tensor) -> Tensor:
        return whiten(x, mask, shift_mean=shift_mean)

    assert torch.autograd.gradcheck(whitened, (x,))
    assert torch.autograd.gradgradcheck(whitened, (x,))


@HALF
def test_half_precision_is_whitened_in_fp32(dtype: torch.dtype) -> None:
    x, mask = to_whiten(dtype)
    found = whiten(x, mask)
    assert found.dtype == torch.float32
    assert torch.equal(found, whiten(x.float(), mask))
    assert torch.autograd.grad(found.sum(), x)[0].dtype == dtype


def _variance_of_all(x: Tensor, mask: Tensor) -> Tensor:
    kept = x[mask]
    return torch.where(mask, (x - kept.mean()) * (kept.var(correction=0) + 1e-8).rsqrt(), 0.0)


WHITEN_MUTANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean kept": lambda x, mask: whiten(x, mask, shift_mean=False),
    "mask ignored": lambda x, mask: whiten(torch.where(mask, x, 0.0), torch.ones_like(mask)),
    "divided by n": _variance_of_all,
    "only scaled": lambda x, mask: x * (x[mask].var() + 1e-8).rsqrt(),
    "only shifted": lambda x, mask: x - x[mask].mean(),
    "no floor": lambda x, mask: (x - x[mask].mean()) / x[mask].std(),
    "floor of the deviation": lambda x, mask: (x - x[mask].mean()) / (x[mask].std() + 1e-8),
    "rounded": lambda x, mask: whiten(x, mask).bfloat16().float(),
    "off by 1e-5": lambda x, mask: whiten(x, mask) * (1 + 1e-5),
}


@pytest.mark.parametrize("mutant", WHITEN_MUTANTS)
def test_the_comparison_of_whitened_fp32_entries_rejects(mutant: str) -> None:
    x, mask = to_whiten(torch.float32)
    # So small that the floor under the variance counts.
    x = (x.detach() - 3) * 1e-3
    expected = expected_whiten(x[mask])
    expected.assert_losses(whiten(x, mask)[mask])
    with pytest.raises(AssertionError, match="x bound"):
        expected.assert_losses(WHITEN_MUTANTS[mutant](x, mask)[mask])


def test_the_comparison_of_fp32_gradients_of_whitening_rejects_constants() -> None:
    # Were the mean, or the variance, taken for a constant, values would be right all the same.
    x, mask = to_whiten(torch.float32)
    kept = x[mask].detach().requires_grad_()
    expected = expected_whiten(kept)
    weights = torch.randn(kept.shape)
    mean, scale = kept.mean(), (kept.var() + 1e-8).rsqrt()
    for mutant in ((kept - mean.detach()) * scale, (kept - mean) * scale.detach(), 0 * kept):
        (gradient,) = torch.autograd.grad(mutant, kept, weights, retain_graph=True)
        with pytest.raises(AssertionError, match="gradient"):
            expected.assert_gradients(gradient, weights=weights.tolist())


# shaped_rewards

# Holes, trailing padding, both, a single token, no token, every token.
SHAPED_MASK = torch.tensor(
    [
        [1, 0, 1, 0, 1],
        [1, 1, 1, 0, 0],
        [0, 1, 0, 1, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1],
    ],
    dtype=torch.bool,
)
LAST = [4, 2, 3, 1, None, 4]
PENALTIES: dict[str, Callable[[Decimal], Decimal]] = {
    "k1": lambda x: -x,
    "k2": lambda x: x * x / 2,
    "k3": lambda x: x.exp() - 1 - x,
    "abs": abs,
}


def to_shape(
    dtype: torch.dtype, garbage: float = math.nan, gap: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, and log-probs under the policy and the reference; garbage where nothing counts."""
    logprobs = -4 * torch.rand(SHAPED_MASK.shape, dtype=torch.float64)
    ref = logprobs + gap * torch.randn(SHAPED_MASK.shape, dtype=torch.float64)
    logprobs, ref = (torch.where(SHAPED_MASK, x, garbage).to(dtype) for x in (logprobs, ref))
    scores = torch.where(SHAPED_MASK.any(1), torch.randn(6), garbage).to(dtype)
    return scores, logprobs, ref


def expected_rewards(
    scores: Tensor, logprobs: Tensor, ref: Tensor, kl_coef: float, estimator: str
) -> Expectation:
    """What `shaped_rewards` must give the tokens of SHAPED_MASK, in order."""
    places = SHAPED_MASK.nonzero().tolist()
    count = len(places)

    def rewards_of(inputs: list[Decimal]) -> list[Decimal]:
        rewards = []
        for i, (sequence, token) in enumerate(places):
            x = inputs[count + i] - inputs[i]
            last = token == LAST[sequence]
            score = inputs[2 * count + sequence] if last else 0
            rewards.append(-Decimal(kl_coef) * PENALTIES[estimator](x) + score)
        return rewards

    scored = torch.where(SHAPED_MASK.any(1), scores, 0.0)
    inputs = [*logprobs[SHAPED_MASK].tolist(), *ref[SHAPED_MASK].tolist(), *scored.tolist()]
    return Expectation(rewards_of, [Decimal(x) for x in inputs])


@FINE
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kl_coef", [0.05, 0, 2.0])
@pytest.mark.parametrize("gap", [1.0, 1e-3], ids=["far from the reference", "close to it"])
def test_rewards_are_the_penalty_and_at_the_last_token_the_score(
    gap: float, kl_coef: float, estimator: str, dtype: torch.dtype
) -> None:
    inputs = to_shape(dtype, gap=gap)
    found = shaped_rewards(*inputs, SHAPED_MASK, kl_coef=kl_coef, kl_estimator=estimator)
    assert found.dtype == dtype and found.shape == SHAPED_MASK.shape
    expected_rewards(*inputs, kl_coef, estimator).assert_losses(found[SHAPED_MASK])
    assert (found[~SHAPED_MASK] == 0).all()


def test_an_example_of_shaping_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-1.0, -1.0, -1.0, -1.0]])
    ref = torch.tensor([[-1.5, 7.0, -2.0, 7.0], [-2.0, 7.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]])
    found = shaped_rewards(torch.tensor([10.0, 20.0]), logprobs, ref, mask, kl_coef=0.5)
    # The penalty k1 is ln π - ln ref: 0.5 and -1; and 1.
    assert found.tolist() == [[-0.25, 0, 10.5, 0], [19.5, 0, 0, 0]]


@GARBAGE
@MASKS
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_garbage_changes_no_bit_of_the_rewards(
    estimator: str, mask_dtype: torch.dtype, garbage: float
) -> None:
    dirty = to_shape(torch.float32, garbage)
    clean = [torch.where(SHAPED_MASK, x, 0.0) for x in dirty[1:]]
    scores = torch.where(SHAPED_MASK.any(1), dirty[0], 0.0)
    options = {"kl_coef": 0.1, "kl_estimator": estimator}
    found = shaped_rewards(*dirty, SHAPED_MASK.to(mask_dtype), **options)
    assert torch.equal(found, shaped_rewards(scores, *clean, SHAPED_MASK, **options))


def test_a_nan_that_counts_is_not_hidden() -> None:
    scores, logprobs, ref = to_shape(torch.float32)
    clean = shaped_rewards(scores, logprobs, ref, SHAPED_MASK, kl_coef=0.1)
    scores[0] = logprobs[1, 1] = ref[5, 0] = math.nan
    found = shaped_rewards(scores, logprobs, ref, SHAPED_MASK, kl_coef=0.1)
    assert found.isnan().nonzero().tolist() == [[0, 4], [1, 1], [5, 0]]
    assert torch.equal(torch.where(found.isnan(), clean, found), clean)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4))
def test_each_sequence_with_tokens_gets_its_score_once_and_at_its_last(
    rows: list[list[bool]],
) -> None:
    zeros, scores = torch.zeros(len(rows), 9), 1 + torch.arange(len(rows))
    found = shaped_rewards(scores.float(), zeros, zeros, torch.tensor(rows), kl_coef=1.0)
    for score, row, rewards in zip(scores.tolist(), rows, found.tolist(), strict=True):
        last = max((t for t, keep in enumerate(row) if keep), default=None)
        assert rewards == [score if t == last else 0 for t in range(9)]


def test_k1_is_what_is_meant_unless_another_is_named() -> None:
    inputs = to_shape(torch.float32)
    found = shaped_rewards(*inputs, SHAPED_MASK, kl_coef=0.1)
    k1 = shaped_rewards(*inputs, SHAPED_MASK, kl_coef=0.1, kl_estimator="k1")
    assert torch.equal(found, k1)


def test_rewards_are_constants_of_the_training_step() -> None:
    inputs = [x.requires_grad_() for x in to_shape(torch.float32)]
    assert not shaped_rewards(*inputs, SHAPED_MASK, kl_coef=0.1).requires_grad


@HALF
def test_half_precision_is_shaped_in_fp32(dtype: torch.dtype) -> None:
    inputs = to_shape(dtype)
    found = shaped_rewards(*inputs, SHAPED_MASK, kl_coef=0.1, kl_estimator="k3")
    assert found.dtype == torch.float32
    wide = [x.float() for x in inputs]
    assert torch.equal(found, shaped_rewards(*wide, SHAPED_MASK, kl_coef=0.1, kl_estimator="k3"))


@pytest.mark.parametrize("scores_dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_dtype_is_that_of_the_log_probs(scores_dtype: torch.dtype) -> None:
    scores, logprobs, ref = to_shape(torch.float32)
    scores = scores.bfloat16()
    expected = shaped_rewards(scores.float(), logprobs, ref, SHAPED_MASK, kl_coef=0.1)
    found = shaped_rewards(scores.to(scores_dtype), logprobs, ref, SHAPED_MASK, kl_coef=0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_without_tokens_there_are_no_rewards(shape: tuple[int, int]) -> None:
    empty = torch.zeros(shape)
    assert shaped_rewards(torch.ones(shape[0]), empty, empty, empty, kl_coef=0.1).shape == shape


def _score_at(mask: Tensor) -> Callable[..., Tensor]:
    """Put the score where the mask ends that somebody else took for that of the completion."""

    def mutant(scores: Tensor, logprobs: Tensor, ref: Tensor) -> Tensor:
        nothing = torch.zeros_like(scores)
        penalty = shaped_rewards(nothing, logprobs, ref, SHAPED_MASK, kl_coef=0.1)
        zeros = torch.zeros_like(logprobs)
        return penalty + shaped_rewards(scores, zeros, zeros, mask, kl_coef=0.0)

    return mutant


SHAPING_MUTANTS: dict[str, Callable[..., Tensor]] = {
    "score at the last column": _score_at(torch.ones_like(SHAPED_MASK)),
    "score at the number of tokens": _score_at(torch.arange(5) < SHAPED_MASK.sum(1, keepdim=True)),
    "score at the first token": _score_at(SHAPED_MASK & (SHAPED_MASK.cumsum(1) == 1)),
    "score everywhere": lambda s, lp, ref: (
        shaped_rewards(0 * s, lp, ref, SHAPED_MASK, kl_coef=0.1) + s[:, None]
    ),
    "no score": lambda s, lp, ref: shaped_rewards(0 * s, lp, ref, SHAPED_MASK, kl_coef=0.1),
    "sign": lambda s, lp, ref: shaped_rewards(s, lp, ref, SHAPED_MASK, kl_coef=-0.1),
    "policies swapped": lambda s, lp, ref: shaped_rewards(s, ref, lp, SHAPED_MASK, kl_coef=0.1),
    "k3": lambda s, lp, ref: shaped_rewards(
        s, lp, ref, SHAPED_MASK, kl_coef=0.1, kl_estimator="k3"
    ),
    "coefficient off": lambda s, lp, ref: shaped_rewards(
        s, lp, ref, SHAPED_MASK, kl_coef=0.1 * (1 + 1e-4)
    ),
    "rounded": lambda s, lp, ref: shaped_rewards(
        s, lp.bfloat16(), ref.bfloat16(), SHAPED_MASK, kl_coef=0.1
    ),
}


@pytest.mark.parametrize("mutant", SHAPING_MUTANTS)
def test_the_comparison_of_fp32_rewards_rejects(mutant: str) -> None:
    inputs = to_shape(torch.float32, garbage=0.0)
    expected = expected_rewards(*inputs, 0.1, "k1")
    expected.assert_losses(shaped_rewards(*inputs, SHAPED_MASK, kl_coef=0.1)[SHAPED_MASK])
    with pytest.raises(AssertionError, match="x bound"):
        expected.assert_losses(SHAPING_MUTANTS[mutant](*inputs)[SHAPED_MASK])


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
