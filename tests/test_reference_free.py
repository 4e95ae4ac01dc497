"""simpo_loss, cpo_loss and orpo_loss against the oracle, and against TRL."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.preference_formulas import (
    Expectation,
    expected_cpo,
    expected_orpo,
    expected_rewards,
    expected_simpo,
)
from torch import Tensor

from fastrlhf import cpo_loss, orpo_loss, simpo_loss

# Some sequences in several pairs, one pair twice, sequence 5 in none.
YW, YL = torch.tensor([0, 1, 2, 0, 0]), torch.tensor([3, 0, 4, 3, 4])
LENGTHS = torch.tensor([3, 7, 1, 12, 30, 5])
FINE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


def sums(dtype: torch.dtype) -> Tensor:
    """Log-probs of 6 sequences of LENGTHS tokens."""
    means = -3 * torch.rand(6, dtype=torch.float64)
    return (means * LENGTHS).to(dtype).requires_grad_()


def assert_right(
    found: tuple[Tensor, Tensor],
    expected: Expectation,
    inputs: tuple[Tensor, ...],
    rewarded: Tensor,
    beta: float,
    *,
    smoothed: bool = False,
    ulps: float = 4,
) -> None:
    """Compare losses, rewards and gradients with the oracle; rewards are beta times `rewarded`."""
    losses, rewards = found
    assert losses.dtype == rewards.dtype == torch.promote_types(inputs[0].dtype, torch.float32)
    expected.assert_losses(losses, ulps)
    expected_rewards(rewarded, torch.zeros_like(rewarded), beta).assert_losses(rewards)
    assert not rewards.requires_grad
    upstream = torch.randn(len(losses), dtype=torch.float64).to(losses.dtype)
    gradients = torch.autograd.grad(losses, inputs, upstream)
    floor = beta if smoothed else 0.0
    expected.assert_gradients(*gradients, weights=upstream.tolist(), floor=floor)


@FINE
@pytest.mark.parametrize("beta", [0.5, 2.0, 10.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.6])
def test_simpo_is_that_of_the_paper(gamma: float, beta: float, dtype: torch.dtype) -> None:
    logps = sums(dtype)
    found = simpo_loss(logps, LENGTHS, YW, YL, beta, gamma)
    expected = expected_simpo(logps, LENGTHS, YW, YL, beta, gamma)
    assert_right(found, expected, (logps,), logps.double() / LENGTHS, beta)


@FINE
@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("nll", ["own", "each"])
def test_cpo_is_that_of_the_paper(
    nll: str, alpha: float, label_smoothing: float, beta: float, dtype: torch.dtype
) -> None:
    logps = sums(dtype)
    each = torch.rand(5, dtype=torch.float64).to(dtype).requires_grad_() if nll == "each" else None
    options: dict[str, Any] = {"nll": each, "alpha": alpha, "label_smoothing": label_smoothing}
    found = cpo_loss(logps, YW, YL, beta, **options)
    expected = expected_cpo(logps, YW, YL, beta, **options)
    inputs = (logps,) if each is None else (logps, each)
    assert_right(found, expected, inputs, logps, beta, smoothed=label_smoothing > 0)


@FINE
@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("nll", ["own", "each"])
def test_orpo_is_that_of_the_paper(nll: str, beta: float, dtype: torch.dtype) -> None:
    logps = sums(dtype)
    each = torch.rand(5, dtype=torch.float64).to(dtype).requires_grad_() if nll == "each" else None
    found = orpo_loss(logps, LENGTHS, YW, YL, beta, nll=each)
    expected = expected_orpo(logps, LENGTHS, YW, YL, beta, nll=each)
    inputs = (logps,) if each is None else (logps, each)
    assert_right(found, expected, inputs, logps.double() / LENGTHS, beta)


@pytest.mark.parametrize("loss", [cpo_loss, orpo_loss])
def test_a_single_likelihood_is_shared_by_all_pairs(loss: Callable[..., Any]) -> None:
    logps = sums(torch.float64)
    sequences = (logps,) if loss is cpo_loss else (logps, LENGTHS)
    shared = torch.tensor(0.7, requires_grad=True)
    losses, _ = loss(*sequences, YW, YL, nll=shared)
    assert losses.dtype == torch.float64
    each, _ = loss(*sequences, YW, YL, nll=torch.full((5,), 0.7))
    assert torch.equal(losses, each)
    (d_shared,) = torch.autograd.grad(losses.sum(), shared)
    assert d_shared.item() == 5.0


@FINE
@pytest.mark.parametrize("rejected", [-1e-3, -1.0, -50.0])
@pytest.mark.parametrize("chosen", [-1e-30, -1e-10, -1e-4, -0.69, -0.7, -5.0, -200.0])
def test_odds_are_right_from_nearly_certain_to_nearly_impossible(
    chosen: float, rejected: float, dtype: torch.dtype
) -> None:
    logps = torch.tensor([chosen, rejected], dtype=dtype, requires_grad=True)
    first, second = torch.tensor([0, 1]), torch.tensor([1, 0])
    # No likelihood term: next to it, an error of the odds would not show.
    nothing = torch.zeros(2, dtype=dtype, requires_grad=True)
    found = orpo_loss(logps, torch.ones(2), first, second, 0.1, nll=nothing)
    expected = expected_orpo(logps, torch.ones(2), first, second, 0.1, nll=nothing)
    # Log-odds are up to 70, and e^-x turns the rounding of x into a relative error.
    assert_right(found, expected, (logps, nothing), logps, 0.1, ulps=16)


@FINE
def test_certainty_has_finite_odds_and_gradients(dtype: torch.dtype) -> None:
    logps = torch.tensor([0.0, -3.0, 0.0, -0.0], dtype=dtype, requires_grad=True)
    # Certain against possible, possible against certain, certain against certain.
    yw, yl = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 3])
    losses, rewards = orpo_loss(logps, torch.tensor([4, 3, 1, 9]), yw, yl, 1.0)
    (d_logps,) = torch.autograd.grad(losses.sum(), logps)
    assert losses.isfinite().all() and d_logps.isfinite().all()
    assert rewards.tolist() == [0.0, -1.0, 0.0, 0.0]
    # The largest odds that the dtype can express stand in for the infinite ones.
    log_odds = -math.log(torch.finfo(dtype).tiny)
    other = math.log(math.expm1(1.0))  # -ln odds of e^-1
    assert losses[0].item() == pytest.approx(0, abs=1e-6)
    assert losses[1].item() == pytest.approx(1 + log_odds + other, rel=1e-6)
    assert losses[2].item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    logps = sums(dtype)
    wide = logps.float()
    for half, full in (
        (simpo_loss(logps, LENGTHS, YW, YL), simpo_loss(wide, LENGTHS, YW, YL)),
        (cpo_loss(logps, YW, YL), cpo_loss(wide, YW, YL)),
        (orpo_loss(logps, LENGTHS, YW, YL), orpo_loss(wide, LENGTHS, YW, YL)),
    ):
        assert half[0].dtype == torch.float32
        assert all(map(torch.equal, half, full))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32], ids=str)
def test_lengths_and_indices_of_any_type_mean_the_same(dtype: torch.dtype) -> None:
    logps, lengths = sums(torch.float64), LENGTHS.to(dtype)
    index = dtype if dtype != torch.float32 else torch.int16
    yw, yl = YW.to(index), YL.to(index)
    for mine, plain in (
        (simpo_loss(logps, lengths, yw, yl), simpo_loss(logps, LENGTHS, YW, YL)),
        (cpo_loss(logps, yw, yl), cpo_loss(logps, YW, YL)),
        (orpo_loss(logps, lengths, yw, yl), orpo_loss(logps, LENGTHS, YW, YL)),
    ):
        assert all(map(torch.equal, mine, plain))


@pytest.mark.parametrize("loss", [simpo_loss, orpo_loss])
def test_a_length_of_zero_counts_as_one(loss: Callable[..., Any]) -> None:
    logps = torch.tensor([-0.5, -2.0])
    pair = (torch.tensor([0]), torch.tensor([1]))
    empty = loss(logps, torch.tensor([0, 2]), *pair)
    assert all(map(torch.equal, empty, loss(logps, torch.tensor([1, 2]), *pair)))


@pytest.mark.parametrize("loss", [simpo_loss, cpo_loss, orpo_loss])
def test_no_pairs_give_no_losses_and_zero_gradients(loss: Callable[..., Any]) -> None:
    logps = sums(torch.float32)
    sequences = (logps,) if loss is cpo_loss else (logps, LENGTHS)
    losses, rewards = loss(*sequences, YW[:0], YL[:0])
    (d_logps,) = torch.autograd.grad(losses.sum(), logps)
    assert losses.shape == (0,) and rewards.shape == (6,)
    assert (d_logps == 0).all()


@pytest.mark.parametrize("loss", [simpo_loss, cpo_loss, orpo_loss])
def test_derivatives_of_both_orders_are_right(loss: Callable[..., Any]) -> None:
    logps = sums(torch.float64)

    def losses_of(logps: Tensor) -> Tensor:
        return loss(*((logps,) if loss is cpo_loss else (logps, LENGTHS)), YW, YL)[0]

    assert torch.autograd.gradcheck(losses_of, (logps,))
    assert torch.autograd.gradgradcheck(losses_of, (logps,))


@FINE
@pytest.mark.parametrize("margin", [-1e4, -50.0, -1e-4, 1e-4, 50.0, 1e4])
def test_extreme_margins_stay_finite_and_right(margin: float, dtype: torch.dtype) -> None:
    logps = torch.tensor([min(margin, 0.0) - 1, min(-margin, 0.0) - 1], dtype=dtype)
    logps.requires_grad_()
    yw, yl, ones = torch.tensor([0]), torch.tensor([1]), torch.ones(2)
    nothing = torch.zeros(1, dtype=dtype, requires_grad=True)
    assert_right(
        simpo_loss(logps, ones, yw, yl, 1.0, 0.5),
        expected_simpo(logps, ones, yw, yl, 1.0, 0.5),
        (logps,),
        logps,
        1.0,
    )
    assert_right(
        cpo_loss(logps, yw, yl, 1.0, nll=nothing),
        expected_cpo(logps, yw, yl, 1.0, nll=nothing),
        (logps, nothing),
        logps,
        1.0,
    )
    assert_right(
        orpo_loss(logps, ones, yw, yl, 1.0, nll=nothing),
        expected_orpo(logps, ones, yw, yl, 1.0, nll=nothing),
        (logps, nothing),
        logps,
        1.0,
    )


PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
EIGHTHS = st.lists(st.integers(-400, -1), min_size=3, max_size=3)


@PROPERTY
@given(eighths=EIGHTHS, shift=st.integers(-80, 0), beta=st.floats(0.01, 2))
def test_only_the_difference_counts_for_cpo_without_likelihood(
    eighths: list[int], shift: int, beta: float
) -> None:
    logps = torch.tensor(eighths, dtype=torch.float64) / 8
    yw, yl = torch.tensor([0, 1]), torch.tensor([1, 2])
    one, _ = cpo_loss(logps, yw, yl, beta, alpha=0.0)
    other, _ = cpo_loss(logps + shift / 8, yw, yl, beta, alpha=0.0)
    assert torch.equal(one, other)


@PROPERTY
@given(eighths=EIGHTHS, beta=st.floats(0.01, 2), gamma=st.floats(0, 3))
def test_the_target_margin_of_simpo_is_a_shift_of_the_reward(
    eighths: list[int], beta: float, gamma: float
) -> None:
    logps = torch.tensor(eighths, dtype=torch.float64) / 8
    lengths, pair = torch.tensor([2, 3, 5]), (torch.tensor([0]), torch.tensor([1]))
    moved = logps.clone()
    moved[0] -= 2 * gamma / beta
    with_margin = simpo_loss(logps, lengths, *pair, beta, gamma)[0]
    without = simpo_loss(moved, lengths, *pair, beta, 0.0)[0]
    torch.testing.assert_close(with_margin, without, rtol=1e-11, atol=1e-13)


@PROPERTY
@given(eighths=EIGHTHS, beta=st.floats(0.01, 2))
def test_both_orders_of_a_pair_of_orpo_differ_by_the_log_odds_ratio(
    eighths: list[int], beta: float
) -> None:
    # ℓ(-x) - ℓ(x) = x.
    logps = torch.tensor(eighths, dtype=torch.float64) / 8
    yw, yl, zero = torch.tensor([0, 1]), torch.tensor([1, 0]), torch.zeros(2)
    losses, _ = orpo_loss(logps, torch.ones(3), yw, yl, beta, nll=zero)
    log_odds = [x / 8 - math.log(-math.expm1(x / 8)) for x in eighths]
    found = (losses[1] - losses[0]).item()
    assert found == pytest.approx(beta * (log_odds[0] - log_odds[1]), rel=1e-10, abs=1e-10)


# The comparison can fail: what it must not accept.


@pytest.mark.parametrize(
    "mutant",
    [
        lambda x: simpo_loss(x, LENGTHS, YW, YL, 2.0, 0.0),
        lambda x: simpo_loss(x, LENGTHS, YW, YL, 2.0, -0.5),
        lambda x: simpo_loss(x, LENGTHS, YW, YL, 2.0, 0.5 * 2.0),
        lambda x: simpo_loss(x, LENGTHS, YL, YW, 2.0, 0.5),
        lambda x: simpo_loss(x, LENGTHS + 1, YW, YL, 2.0, 0.5),
        lambda x: simpo_loss(x, torch.ones(6), YW, YL, 2.0, 0.5),
        lambda x: simpo_loss(x, LENGTHS, YW, YL, 2.0002, 0.5),
    ],
    ids=["no gamma", "gamma sign", "gamma scaled", "swapped", "lengths", "sums", "beta off"],
)
def test_the_comparison_rejects_for_simpo(mutant: Callable[[Tensor], Any]) -> None:
    logps = sums(torch.float32)
    expected = expected_simpo(logps, LENGTHS, YW, YL, 2.0, 0.5)
    expected.assert_losses(simpo_loss(logps, LENGTHS, YW, YL, 2.0, 0.5)[0])
    with pytest.raises(AssertionError, match="x bound"):
        expected.assert_losses(mutant(logps)[0])


@pytest.mark.parametrize(
    "mutant",
    [
        lambda x: cpo_loss(x, YW, YL, 0.1, alpha=0.3),
        lambda x: cpo_loss(x, YW, YL, 0.1, alpha=0.0, label_smoothing=0.1),
        lambda x: cpo_loss(x, YL, YW, 0.1, alpha=0.3, label_smoothing=0.1),
        lambda x: cpo_loss(x, YW, YL, 0.1001, alpha=0.3, label_smoothing=0.1),
        lambda x: cpo_loss(x, YW, YL, 0.1, nll=-x[YL], alpha=0.3, label_smoothing=0.1),
        lambda x: cpo_loss(x, YW, YL, 0.1, nll=x[YW], alpha=0.3, label_smoothing=0.1),
    ],
    ids=["unsmoothed", "no nll", "swapped", "beta off", "nll of rejected", "nll sign"],
)
def test_the_comparison_rejects_for_cpo(mutant: Callable[[Tensor], Any]) -> None:
    logps = sums(torch.float32)
    expected = expected_cpo(logps, YW, YL, 0.1, alpha=0.3, label_smoothing=0.1)
    expected.assert_losses(cpo_loss(logps, YW, YL, 0.1, alpha=0.3, label_smoothing=0.1)[0])
    with pytest.raises(AssertionError, match="x bound"):
        expected.assert_losses(mutant(logps)[0])


def _naive_odds(logps: Tensor) -> tuple[Tensor, Tensor]:
    """ORPO with 1 - e^m as it stands, which has no digits left for m = -1e-7."""
    log_odds = logps - torch.log(1 - torch.exp(logps))
    losses = -0.1 * torch.nn.functional.logsigmoid(log_odds[:1] - log_odds[1:])
    return losses, losses


def _log_ratio(logps: Tensor) -> tuple[Tensor, Tensor]:
    """ORPO with probabilities for odds."""
    losses = -0.1 * torch.nn.functional.logsigmoid(logps[:1] - logps[1:])
    return losses, losses


@pytest.mark.parametrize("mutant", [_naive_odds, _log_ratio])
def test_the_comparison_rejects_for_orpo(mutant: Callable[[Tensor], Any]) -> None:
    logps = torch.tensor([-1e-7, -1e-5])
    arguments = (logps, torch.ones(2), torch.tensor([0]), torch.tensor([1]), 0.1)
    expected = expected_orpo(*arguments, nll=torch.zeros(1))
    expected.assert_losses(orpo_loss(*arguments, nll=torch.zeros(1))[0])
    with pytest.raises(AssertionError, match="x bound"):
        expected.assert_losses(mutant(logps)[0])


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.0001, math.nan])
@pytest.mark.parametrize("loss", [simpo_loss, cpo_loss, orpo_loss])
def test_the_comparison_of_fp32_gradients_rejects(loss: Callable[..., Any], factor: float) -> None:
    logps = sums(torch.float32)
    if loss is simpo_loss:
        expected = expected_simpo(logps, LENGTHS, YW, YL, 2.0, 0.5)
        losses = simpo_loss(logps, LENGTHS, YW, YL)[0]
    elif loss is cpo_loss:
        expected = expected_cpo(logps, YW, YL, 0.1)
        losses = cpo_loss(logps, YW, YL)[0]
    else:
        expected = expected_orpo(logps, LENGTHS, YW, YL, 0.1)
        losses = orpo_loss(logps, LENGTHS, YW, YL)[0]
    (d_logps,) = torch.autograd.grad(losses.sum(), logps)
    expected.assert_gradients(d_logps)
    with pytest.raises(AssertionError, match="gradient"):
        expected.assert_gradients(factor * d_logps)


# TRL's own code.


@pytest.fixture(scope="module")
def trl_experimental() -> Any:
    """TRL's trainers of CPO (with SimPO) and ORPO, which announce themselves as experimental."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
        orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    return SimpleNamespace(cpo=cpo.CPOTrainer, orpo=orpo.ORPOTrainer)


def _trl_trainer(loss_type: str, beta: float, **options: float) -> SimpleNamespace:
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    return SimpleNamespace(
        alpha=0.0, accelerator=accelerator, loss_type=loss_type, beta=beta, **options
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cpo_without_likelihood_is_that_of_trl(
    label_smoothing: float, trl_experimental: Any
) -> None:
    # TRL adds the likelihood, its mean over the tokens of the batch, outside.
    logps = sums(torch.float64)
    trainer = _trl_trainer("sigmoid", 0.3, label_smoothing=label_smoothing)
    theirs, chosen, rejected = trl_experimental.cpo.cpo_loss(trainer, logps[YW], logps[YL])
    losses, rewards = cpo_loss(logps, YW, YL, 0.3, alpha=0.0, label_smoothing=label_smoothing)
    torch.testing.assert_close(losses, theirs, rtol=1e-13, atol=0)
    torch.testing.assert_close(rewards[YW], chosen)
    torch.testing.assert_close(rewards[YL], rejected)


def test_simpo_is_that_of_trl(trl_experimental: Any) -> None:
    # TRL gets averages for SimPO, and divides the target margin by beta before it multiplies.
    logps = sums(torch.float64)
    mean = logps / LENGTHS
    trainer = _trl_trainer("simpo", 2.0, label_smoothing=0.0, simpo_gamma=0.5)
    theirs, chosen, rejected = trl_experimental.cpo.cpo_loss(trainer, mean[YW], mean[YL])
    losses, rewards = simpo_loss(logps, LENGTHS, YW, YL, 2.0, 0.5)
    torch.testing.assert_close(losses, theirs, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(rewards[YW], chosen)
    torch.testing.assert_close(rewards[YL], rejected)


def test_the_odds_ratio_of_orpo_is_that_of_trl(trl_experimental: Any) -> None:
    # TRL takes it in fp32, of averages, and subtracts it from the likelihood.
    logps = sums(torch.float32)
    mean = logps / LENGTHS
    found = trl_experimental.orpo.odds_ratio_loss(_trl_trainer("", 0.3), mean[YW], mean[YL])
    losses, rewards = orpo_loss(logps, LENGTHS, YW, YL, 0.3, nll=torch.zeros(5))
    torch.testing.assert_close(losses, -found[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(rewards[YW], found[1])
    torch.testing.assert_close(rewards[YL], found[2])


# Errors name the argument.

_FOUR = torch.zeros(4)
_PAIRS = {"yw_idxs": torch.tensor([0, 1]), "yl_idxs": torch.tensor([2, 3])}


@pytest.mark.parametrize("loss", [simpo_loss, cpo_loss, orpo_loss])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logps": [0.0]}, TypeError, "logps: expected a tensor, got list"),
        ({"logps": _FOUR.long()}, TypeError, "logps: .*floating.*int64"),
        ({"logps": torch.zeros(4, 2)}, ValueError, r"logps: .*\(B,\), got \(4, 2\)"),
        ({"yw_idxs": torch.zeros(2)}, TypeError, "yw_idxs: .*integer"),
        ({"yl_idxs": torch.zeros(1).long()}, ValueError, r"yl_idxs: .*\(2,\).*got \(1,\)"),
        ({"yw_idxs": torch.tensor([0, 4])}, ValueError, r"yw_idxs: .*\[0, 4\).*got 4"),
        ({"yl_idxs": torch.tensor([0, -1])}, ValueError, r"yl_idxs: .*\[0, 4\).*got -1"),
        ({"beta": 0.0}, ValueError, "beta: .*positive.*got 0.0"),
        ({"beta": -1.0}, ValueError, "beta: .*positive.*got -1.0"),
        ({"beta": "1"}, TypeError, "beta: expected a number, got str"),
    ],
)
def test_errors_name_the_argument(
    loss: Callable[..., Any], changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"logps": _FOUR, **_PAIRS}
    if loss is not cpo_loss:
        arguments["lengths"] = torch.ones(4)
    with pytest.raises(error, match=message):
        loss(**{**arguments, **changed})


@pytest.mark.parametrize("loss", [simpo_loss, orpo_loss])
@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (None, ValueError, "lengths: .*averages over tokens"),
        ([1, 1, 1, 1], TypeError, "lengths: expected a tensor, got list"),
        (torch.ones(3), ValueError, r"lengths: .*\(4,\).*got \(3,\)"),
        (torch.ones(4, 1), ValueError, r"lengths: .*\(4,\).*got \(4, 1\)"),
        (torch.ones(4, device="meta"), ValueError, "lengths: expected on cpu"),
    ],
)
def test_errors_name_the_lengths(
    loss: Callable[..., Any], lengths: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        loss(_FOUR, lengths, **_PAIRS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nll": 0.5}, TypeError, "nll: expected a tensor, got float"),
        ({"nll": torch.zeros(2).long()}, TypeError, "nll: .*floating"),
        ({"nll": torch.zeros(4)}, ValueError, r"nll: .*\(2,\).*got \(4,\)"),
        ({"nll": torch.zeros(2, 1)}, ValueError, r"nll: .*\(2,\).*got \(2, 1\)"),
        ({"label_smoothing": 0.6}, ValueError, r"label_smoothing: .*\[0, 0.5\].*0.6"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing: .*\[0, 0.5\].*-0.1"),
    ],
)
def test_errors_name_the_options(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cpo_loss(_FOUR, **_PAIRS, **options)
    if "nll" in options:
        with pytest.raises(error, match=message):
            orpo_loss(_FOUR, torch.ones(4), **_PAIRS, **options)
