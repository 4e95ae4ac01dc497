"""policy_loss, its recipes and kl_penalty, against formulas written a second time."""

import math
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import assert_as_accurate
from support.plain import plain_policy_loss
from support.policy_formulas import ESTIMATORS, FORMS, PolicyCase, expected_policy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastrlhf
from fastrlhf import grpo_loss, grpo_options, kl_penalty, policy_loss, ppo_loss

SURROGATES = ["clip", "cispo", "sapo", "plain"]
LEVELS = ["token", "sequence", "sequence-token", "product"]
REDUCTIONS = ["token-mean", "sequence-mean", "sequence-sum", "constant"]
GARBAGE = [math.nan, math.inf, -math.inf, -1e9, 1e30]
FINE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


def batch(dtype: torch.dtype = torch.float64, spread: float = 0.4) -> dict[str, Tensor]:
    """Four sequences of up to five tokens, one of them empty; ratios beyond both bounds."""
    logprobs = -5 * torch.rand(4, 5, dtype=torch.float64)
    # No log-prob is above 0, which DPPO's probabilities depend on.
    old, ref = ((logprobs + spread * torch.randn(4, 5)).clamp(max=-1e-3) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    tensors = {
        "logprobs": logprobs, "old_logprobs": old, "advantages": torch.randn(4, 5),
        "ref_logprobs": ref, "entropy": 3 * torch.rand(4, 5), "rollout_weights": torch.rand(4, 5),
    }  # fmt: skip
    return {name: x.to(dtype) for name, x in tensors.items()} | {"mask": mask.bool()}


def evaluate(arguments: dict[str, Any], loss_fn: Any = policy_loss) -> tuple[Tensor, Tensor, dict]:
    """Loss, gradient with respect to the log-probs, and metrics."""
    logprobs = arguments["logprobs"].detach().clone().requires_grad_()
    loss, metrics = loss_fn(**{**arguments, "logprobs": logprobs})
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient, metrics


def assert_right(found: tuple[Tensor, Tensor], case: PolicyCase) -> None:
    """Assert that loss and gradient err as little as the plain formula does in the same dtype.

    A rounding of the loss is one of the tokens' losses, which may cancel; of a gradient, one of the
    largest of a token.
    """
    expected, arguments = expected_policy(case), vars(case)
    logprobs = arguments["logprobs"].detach().clone().requires_grad_()
    loss = plain_policy_loss(**arguments | {"logprobs": logprobs})
    (gradient,) = torch.autograd.grad(loss, logprobs)
    size = float(expected.d_logprobs.abs().max())
    assert_as_accurate(found[1], gradient, expected.d_logprobs, size=size, of="gradient")
    size = max(size, expected.size)
    assert_as_accurate(found[0], loss, expected.loss, size=size, of="loss")


@FINE
@pytest.mark.parametrize(("surrogate", "level"), FORMS)
def test_loss_and_gradient_are_those_of_the_papers(
    surrogate: str, level: str, dtype: torch.dtype
) -> None:
    choices = zip(cycle(REDUCTIONS), product(ESTIMATORS, [False, True]), strict=False)
    for reduction, (estimator, corrected) in choices:
        arguments = batch(dtype) | {
            "surrogate": surrogate, "ratio_level": level, "clip_low": 0.15, "clip_high": 0.28,
            "kl_coef": 0.3, "kl_estimator": estimator, "entropy_coef": 0.1, "reduction": reduction,
            "normalizer": 7.0 if reduction == "constant" else None,
            "sapo_temperatures": (0.8, 1.3), "kl_bias_correction": corrected,
            "ratio_floor": 0.9, "vespo_shape": (1.5, 2.5, 2.0, 1.5),
        }  # fmt: skip
        loss, gradient, _ = evaluate(arguments)
        assert loss.dtype == gradient.dtype == dtype
        assert_right((loss, gradient), PolicyCase(**arguments))
        assert not gradient[~arguments["mask"]].any()


@pytest.mark.parametrize(
    "change",
    [
        {"clip_low": 0.151}, {"clip_high": 0.281}, {"dual_clip": 1.601}, {"kl_coef": 0.3001},
        {"kl_estimator": "k2"}, {"entropy_coef": 0.1001}, {"reduction": "sequence-mean"},
        {"ratio_level": "sequence"}, {"surrogate": "plain"}, {"normalizer": 11.001},
        {"rollout_weights": None},
    ],
    ids=str,
)  # fmt: skip
def test_the_comparison_notices_a_change_of(change: dict[str, Any]) -> None:
    arguments = batch(torch.float32, spread=1.0) | {
        "clip_low": 0.15, "clip_high": 0.28, "dual_clip": 1.6, "kl_coef": 0.3, "entropy_coef": 0.1,
    }  # fmt: skip
    case = PolicyCase(**arguments)
    right = evaluate(arguments)
    assert_right(right[:2], case)
    wrong = evaluate(arguments | change)
    with pytest.raises(AssertionError, match=r"^(loss|gradient): error"):
        assert_right(wrong[:2], case)


@FINE
def test_the_dual_clip_bounds_only_negative_advantages(dtype: torch.dtype) -> None:
    arguments = batch(dtype, spread=1.0) | {"dual_clip": 1.5}
    found = evaluate(arguments)
    assert_right(found[:2], PolicyCase(**arguments))
    # Ratios beyond the bound, of either sign, are there, and so the tests above can fail.
    ratio = (arguments["logprobs"] - arguments["old_logprobs"]).exp()
    beyond = arguments["mask"] & (ratio > 1.5)
    assert (beyond & (arguments["advantages"] < 0)).any()
    assert (beyond & (arguments["advantages"] > 0)).any()


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_rollout_weights_weigh_the_surrogate_and_not_the_penalty(surrogate: str) -> None:
    arguments = batch() | {"surrogate": surrogate, "kl_coef": 0.5, "entropy_coef": 0.2}
    found = evaluate(arguments)
    assert_right(found[:2], PolicyCase(**arguments))


@pytest.mark.parametrize("shape", ["(B,)", "(B, 1)"])
def test_advantages_and_weights_can_be_one_for_each_sequence(shape: str) -> None:
    arguments = batch()
    for name in ("advantages", "rollout_weights"):
        column = arguments[name][:, :1]
        arguments[name] = column.expand(4, 5)
    expected = evaluate(arguments)
    for name in ("advantages", "rollout_weights"):
        column = arguments[name][:, :1]
        arguments[name] = column[:, 0] if shape == "(B,)" else column
    assert all(torch.equal(a, b) for a, b in zip(evaluate(arguments)[:2], expected, strict=False))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_normalizer_replaces_the_denominator(reduction: str, as_tensor: bool) -> None:
    arguments = batch() | {"reduction": reduction, "normalizer": 13.0}
    case = PolicyCase(**arguments)
    if as_tensor:
        arguments["normalizer"] = torch.tensor(13)
    assert_right(evaluate(arguments)[:2], case)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize(("surrogate", "level"), FORMS)
def test_what_the_mask_hides_changes_no_bit(level: str, surrogate: str, garbage: float) -> None:
    options = {
        "surrogate": surrogate, "ratio_level": level, "kl_coef": 0.3, "entropy_coef": 0.1,
        "reduction": "sequence-mean",
    }  # fmt: skip
    clean = batch(torch.float32)
    dirty = {
        name: x if name == "mask" else torch.where(clean["mask"], x, garbage)
        for name, x in clean.items()
    }
    loss, gradient, metrics = evaluate(clean | options)
    dirty_loss, dirty_gradient, dirty_metrics = evaluate(dirty | options)
    assert torch.equal(loss, dirty_loss) and torch.equal(gradient, dirty_gradient)
    assert loss.isfinite() and gradient.isfinite().all()
    assert metrics.keys() == dirty_metrics.keys()
    assert all(torch.equal(metrics[name], dirty_metrics[name]) for name in metrics)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_batch_without_tokens_has_loss_and_gradient_zero(level: str, reduction: str) -> None:
    for rows, normalizer in product((4, 0), (5.0, torch.tensor(0))):
        arguments = {name: torch.full_like(x, math.nan)[:rows] for name, x in batch().items()}
        arguments["mask"] = torch.zeros(rows, 5)
        entropy = arguments["entropy"].requires_grad_()
        loss, gradient, metrics = evaluate(
            arguments | {"ratio_level": level, "reduction": reduction, "normalizer": normalizer,
                         "kl_coef": 0.1, "entropy_coef": 0.1}
        )  # fmt: skip
        assert loss == 0 and not gradient.any()
        assert entropy.grad is None
        assert all(value == 0 for value in metrics.values())


@FINE
@pytest.mark.parametrize(("surrogate", "level"), FORMS)
def test_an_old_policy_a_hundred_nats_away_gives_the_clipped_answer(
    level: str, surrogate: str, dtype: torch.dtype
) -> None:
    for offset, sign in product((-100.0, 100.0, -1e4, 1e4), (1.0, -1.0, 0.0)):
        logprobs = torch.full((2, 3), -2.0 - max(offset, 0.0), dtype=dtype)
        arguments = {
            "logprobs": logprobs, "old_logprobs": logprobs + offset,
            "advantages": torch.full((2,), sign, dtype=dtype), "mask": torch.ones(2, 3),
            "surrogate": surrogate, "ratio_level": level, "dual_clip": 3.0,
        }  # fmt: skip
        loss, gradient, metrics = evaluate(arguments)
        assert loss.isfinite() and gradient.isfinite().all(), (offset, sign)
        assert all(value.isfinite() for value in metrics.values())
        case = PolicyCase(**arguments)
        if abs(offset) == 100.0 and abs(expected_policy(case).loss) < torch.finfo(dtype).max:
            assert_right((loss, gradient), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("level", LEVELS)
def test_without_a_dual_clip_even_that_stays_finite(level: str, dtype: torch.dtype) -> None:
    # The true loss, e^1000, is no number of either dtype. It ends where its square still nearly is.
    arguments = {
        "logprobs": torch.zeros(1, 2, dtype=dtype), "advantages": -torch.ones(1, dtype=dtype),
        "old_logprobs": torch.full((1, 2), -1000.0, dtype=dtype), "mask": torch.ones(1, 2),
        "ratio_level": level, "ref_logprobs": torch.full((1, 2), 1000.0, dtype=dtype),
        "kl_coef": 0.1,
    }  # fmt: skip
    loss, gradient, _ = evaluate(arguments)
    assert 1e30 < loss < torch.inf and gradient.isfinite().all()


def test_nan_where_the_mask_is_set_is_not_hidden() -> None:
    for name in ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "entropy"):
        arguments = batch() | {"kl_coef": 0.1, "entropy_coef": 0.1}
        arguments[name][0, 1] = math.nan
        assert evaluate(arguments)[0].isnan(), name


@pytest.mark.parametrize("surrogate", ["clip", "cispo", "sapo"])
def test_a_nan_that_counts_reaches_the_gradient_of_its_token_alone(surrogate: str) -> None:
    arguments = batch() | {"surrogate": surrogate}
    clean = evaluate(arguments)[1]
    arguments["logprobs"][0, 1] = math.nan
    gradient = evaluate(arguments)[1]
    assert gradient[0, 1].isnan()
    clean[0, 1] = gradient[0, 1] = 0.0
    assert torch.equal(gradient, clean)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_token_that_the_policy_forbids_makes_no_nan_without_an_advantage(surrogate: str) -> None:
    arguments = batch() | {"surrogate": surrogate}
    del arguments["ref_logprobs"], arguments["entropy"]
    arguments["logprobs"][0, 1], arguments["advantages"][0, 1] = -math.inf, 0.0
    loss, gradient, metrics = evaluate(arguments)
    assert loss.isfinite() and gradient.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize(("surrogate", "level"), FORMS)
def test_without_old_log_probs_the_ratio_is_one_and_has_a_gradient(
    level: str, surrogate: str
) -> None:
    arguments = batch() | {"surrogate": surrogate, "ratio_level": level}
    same = evaluate(arguments | {"old_logprobs": arguments["logprobs"].clone()})
    none = evaluate(arguments | {"old_logprobs": None})
    assert torch.equal(same[0], none[0]) and torch.equal(same[1], none[1])
    assert none[1].any()


def test_constants_get_no_gradient_even_if_they_are_the_log_probs_themselves() -> None:
    arguments = batch()
    logprobs = arguments["logprobs"].requires_grad_()
    for x in arguments.values():
        if x.dtype != torch.bool:
            x.requires_grad_()
    loss, _ = policy_loss(**arguments | {"old_logprobs": logprobs, "kl_coef": 0.1})
    loss.backward()
    expected = evaluate(arguments | {"old_logprobs": logprobs.detach(), "kl_coef": 0.1})[1]
    assert torch.equal(logprobs.grad, expected)
    assert arguments["ref_logprobs"].grad is None and arguments["advantages"].grad is None


def test_the_entropy_gets_its_gradient() -> None:
    arguments = batch() | {"entropy_coef": 0.7, "reduction": "sequence-mean"}
    expected = expected_policy(PolicyCase(**arguments)).d_entropy
    entropy = arguments["entropy"].requires_grad_()
    policy_loss(**arguments)[0].backward()
    torch.testing.assert_close(entropy.grad, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    arguments = batch(dtype) | {"kl_coef": 0.1, "entropy_coef": 0.1}
    wide = {name: x.float() if isinstance(x, Tensor) and x.dtype == dtype else x
            for name, x in arguments.items()}  # fmt: skip
    found, expected = evaluate(arguments), evaluate(wide)
    assert found[0].dtype == torch.float32 and torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1].to(dtype))


def test_metrics_are_those_of_their_names() -> None:
    arguments = batch(spread=0.5)
    _, _, metrics = evaluate(arguments)
    mask, advantage = arguments["mask"], arguments["advantages"]
    difference = arguments["logprobs"] - arguments["old_logprobs"]
    low = ((difference.exp() < 0.8) & (advantage < 0))[mask].double().mean()
    high = ((difference.exp() > 1.2) & (advantage > 0))[mask].double().mean()
    assert low > 0 and high > 0
    x = arguments["ref_logprobs"] - arguments["logprobs"]
    expected = {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
        "policy/approxkl_avg": difference[mask].square().mean() / 2,
        "kl": (x.exp() - 1 - x)[mask].mean(),
        "entropy": arguments["entropy"][mask].mean(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].ndim == 0 and not metrics[name].requires_grad
        torch.testing.assert_close(metrics[name], value, rtol=1e-12, atol=0)


def test_of_a_sequence_ratio_it_is_sequences_that_are_clipped() -> None:
    arguments = batch() | {"ratio_level": "sequence", "advantages": torch.tensor([1.0, -1, 1, 1])}
    arguments["old_logprobs"] = arguments["logprobs"] + torch.tensor([[-0.5], [0.5], [0.0], [0.1]])
    metrics = evaluate(arguments)[2]
    # The third sequence has no token, and counts neither here nor there.
    third = torch.tensor(1 / 3, dtype=torch.float64)
    torch.testing.assert_close(metrics["clip_ratio/high_mean"], third)
    torch.testing.assert_close(metrics["clip_ratio/low_mean"], third)


@pytest.mark.parametrize(
    ("surrogate", "clipped"),
    [("clip", (True, True)), ("cispo", (False, True)), ("sapo", (False, False)),
     ("plain", (False, False))],
)  # fmt: skip
def test_only_ends_that_a_surrogate_clips_are_counted(surrogate: str, clipped: tuple) -> None:
    metrics = evaluate(batch(spread=1.0) | {"surrogate": surrogate})[2]
    found = metrics["clip_ratio/low_mean"] > 0, metrics["clip_ratio/high_mean"] > 0
    assert found == clipped


def test_a_ratio_on_its_bound_is_not_clipped() -> None:
    logprobs = torch.zeros(1, 2, dtype=torch.float64)
    mask, advantages = torch.ones(1, 2), torch.tensor([[1.0, -1.0]])
    # 1 - 0.25 and 1 + 0.5 are exact, and so is a ratio that is 1.
    options = {"clip_low": 0.0, "clip_high": 0.0}
    arguments = {"logprobs": logprobs, "old_logprobs": logprobs, "advantages": advantages}
    loss, gradient, metrics = evaluate(arguments | {"mask": mask} | options)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0.5]], dtype=torch.float64))
    assert loss == 0 and metrics["clip_ratio/region_mean"] == 0


RECIPES = {
    "grpo": {"reduction": "sequence-mean"},
    "bnpo": {"reduction": "token-mean"},
    "dr_grpo": {"reduction": "constant", "normalizer": 20.0},
    "dapo": {"reduction": "token-mean", "clip_high": 0.28},
    "gspo": {"ratio_level": "sequence", "reduction": "sequence-mean",
             "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"surrogate": "cispo", "clip_high": 4.0},
    "sapo": {"surrogate": "sapo", "reduction": "sequence-mean"},
}  # fmt: skip


@pytest.mark.parametrize("loss_type", RECIPES)
def test_grpo_recipes_are_what_their_papers_say(loss_type: str) -> None:
    arguments = batch()
    case = PolicyCase(**arguments | {"kl_coef": 0.04} | RECIPES[loss_type])
    given = {"normalizer": 20.0} if loss_type == "dr_grpo" else {}
    found = evaluate(
        arguments | {"loss_type": loss_type, "kl_coef": 0.04} | given, loss_fn=grpo_loss
    )
    assert_right(found[:2], case)
    others = [name for name in RECIPES if name not in (loss_type, "bnpo")]
    for other in others:
        wrong = PolicyCase(**arguments | {"kl_coef": 0.04} | RECIPES[other])
        with pytest.raises(AssertionError, match=r"^(loss|gradient): error"):
            assert_right(found[:2], wrong)
            pytest.fail(f"passed: {other}", pytrace=False)


def test_options_of_a_recipe_can_be_replaced_and_serve_policy_loss() -> None:
    arguments = batch()
    found = evaluate(arguments | {"loss_type": "gspo", "clip_low": 0.1}, loss_fn=grpo_loss)
    options = grpo_options("gspo", clip_low=0.1)
    assert torch.equal(found[1], evaluate(arguments | options)[1])
    grpo_options("dapo")["clip_high"] = 9  # a copy
    assert grpo_options("dapo")["clip_high"] == 0.28


def test_ppo_is_the_clipped_surrogate() -> None:
    arguments = batch() | {"clip_low": 0.1, "kl_coef": 0.2}
    assert torch.equal(evaluate(arguments)[1], evaluate(arguments, loss_fn=ppo_loss)[1])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    lp=st.floats(-30, 0), old=st.floats(-30, 0), ref=st.floats(-30, 0),
    advantage=st.floats(-5, 5), surrogate=st.sampled_from(SURROGATES),
    estimator=st.sampled_from(ESTIMATORS), low=st.floats(0, 0.9), high=st.floats(0, 3),
)  # fmt: skip
def test_any_token_agrees_with_the_formula(
    lp: float, old: float, ref: float, advantage: float, surrogate: str, estimator: str,
    low: float, high: float,
) -> None:  # fmt: skip
    one = {"logprobs": lp, "old_logprobs": old, "advantages": advantage, "ref_logprobs": ref}
    arguments = {name: torch.tensor([[x]], dtype=torch.float64) for name, x in one.items()}
    arguments |= {
        "mask": torch.ones(1, 1), "surrogate": surrogate, "kl_coef": 0.5, "clip_low": low,
        "clip_high": high, "kl_estimator": estimator,
    }  # fmt: skip
    case = PolicyCase(**arguments)
    found = evaluate(arguments)
    expected = expected_policy(case)
    # Penalty and surrogate may cancel: errors are relative to the larger of them.
    alone = expected_policy(replace(case, kl_coef=0.0))
    scale = max(abs(alone.loss), abs(expected.loss), 1e-3)
    assert abs(float(found[0]) - expected.loss) <= 1e-12 * scale
    slopes = [float(x.d_logprobs.abs().max()) for x in (alone, expected)]
    error = float((found[1] - expected.d_logprobs).abs().max())
    kink = estimator == "abs" and abs(ref - lp) < 1e-20
    assert kink or error <= 1e-12 * max(*slopes, 1e-3)


# kl_penalty


@FINE
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-3, 0.1, 0.13, 1.0, 20.0, 79.0])
def test_penalties_keep_their_relative_accuracy(
    size: float, estimator: str, dtype: torch.dtype
) -> None:
    mpmath = pytest.importorskip("mpmath", reason="needs mpmath")
    ref = torch.tensor([size, -size], dtype=dtype)
    logprobs = torch.zeros(2, dtype=dtype)
    found = kl_penalty(logprobs, ref, estimator)
    for value, given_ref in zip(found.tolist(), ref.tolist(), strict=True):
        x = mpmath.mpf(given_ref)
        kinds = {"k1": -x, "k2": x**2 / 2, "k3": mpmath.exp(x) - 1 - x, "abs": abs(x)}
        exact = kinds[estimator.rstrip("+")]
        bound = {torch.float32: 2e-6, torch.float64: 3e-13}[dtype]
        assert abs(value - exact) <= bound * abs(exact)


def test_the_naive_k3_would_fail_that() -> None:
    x = torch.tensor(1e-4)
    naive = x.exp() - 1 - x
    assert abs(naive / kl_penalty(torch.tensor(0.0), x, "k3") - 1) > 1


def divergences(policy: Tensor, ref: Tensor) -> dict[str, Tensor]:
    log_p, log_q = policy.log_softmax(-1), ref.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    return {
        "none": 0 * p.sum(),
        "reverse": (p * (log_p - log_q)).sum(),
        "forward": (q * (log_q - log_p)).sum(),
        "variation": (p - q).abs().sum(),
    }


@pytest.mark.parametrize(
    ("estimator", "of"),
    [("k1", "none"), ("k2", "reverse"), ("k3", "forward"), ("abs", "variation"),
     ("k1+", "reverse"), ("k3+", "reverse")],
)  # fmt: skip
def test_the_expected_gradient_is_that_of_the_divergence_in_the_docstring(
    estimator: str, of: str
) -> None:
    # The expectation is a sum over all of a small vocabulary, not a sample.
    policy = torch.randn(7, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(7, dtype=torch.float64)
    log_p = policy.log_softmax(-1)
    expected_penalty = (
        log_p.detach().exp() * kl_penalty(log_p, ref.log_softmax(-1), estimator)
    ).sum()
    (found,) = torch.autograd.grad(expected_penalty, policy, retain_graph=True)
    for name, divergence in divergences(policy, ref).items():
        (gradient,) = torch.autograd.grad(divergence, policy, retain_graph=True)
        close = torch.allclose(found, gradient, rtol=1e-10, atol=1e-12)
        assert close == (name == of), name


@pytest.mark.parametrize(
    ("estimator", "exact"),
    [("k1", True), ("k3", True), ("k2", False), ("k1+", True), ("k3+", True)],
)
def test_the_expected_value_is_the_divergence(estimator: str, exact: bool) -> None:
    for distance in (1.0, 0.01):
        policy = torch.randn(7, dtype=torch.float64)
        ref = policy + distance * torch.randn(7, dtype=torch.float64)
        log_p, log_q = policy.log_softmax(-1), ref.log_softmax(-1)
        found = (log_p.exp() * kl_penalty(log_p, log_q, estimator)).sum()
        error = abs(float(found / divergences(policy, ref)["reverse"]) - 1)
        assert error <= (1e-9 if exact else 2 * distance)


def of_one_token(estimator: str, policy: Tensor, old: Tensor, ref: Tensor) -> Tensor:
    """The corrected penalty, in expectation over the old policy."""
    log_p, log_old, log_q = (x.log_softmax(-1) for x in (policy, old, ref))
    losses = policy_loss(
        log_p[:, None], log_old[:, None], torch.zeros(len(policy)), torch.ones(len(policy), 1),
        ref_logprobs=log_q[:, None], kl_coef=1.0, kl_estimator=estimator, kl_bias_correction=True,
        reduction="none",
    )[0]  # fmt: skip
    return (log_old.exp() * losses[:, 0]).sum()


def test_the_corrected_k3_and_its_gradient_are_those_of_the_divergence() -> None:
    policy, old, ref = torch.randn(3, 7, dtype=torch.float64)
    policy.requires_grad_()
    found, exact = of_one_token("k3", policy, old, ref), divergences(policy, ref)["reverse"]
    torch.testing.assert_close(found, exact)
    found_slope, slope = (
        torch.autograd.grad(x, policy, retain_graph=True)[0] for x in (found, exact)
    )
    torch.testing.assert_close(found_slope, slope)
    # k1 has the value and, corrected, the gradient too; k2 has neither.
    assert not torch.isclose(of_one_token("k2", policy, old, ref), exact, rtol=1e-3)


@FINE
@pytest.mark.parametrize("x", [1e-4, -1e-4, 0.9, 1.1, -3.0, 30.0])
def test_the_slope_of_the_corrected_k3_keeps_its_relative_accuracy(
    x: float, dtype: torch.dtype
) -> None:
    # -r·x, in which r·e^x, far larger or nearly the same, must leave no rounding.
    lp = torch.tensor([[-30.5]], dtype=dtype)
    old, ref = lp + 0.25, lp + x
    arguments = {
        "logprobs": lp, "old_logprobs": old, "advantages": torch.zeros(1), "mask": torch.ones(1, 1),
        "ref_logprobs": ref, "kl_coef": 1.0, "kl_bias_correction": True,
    }  # fmt: skip
    found = evaluate(arguments)[1].double()
    exact = -math.exp(float((lp - old).double())) * (ref - lp).double()
    assert abs(float(found / exact) - 1) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_token_that_the_policy_forbids_has_no_corrected_penalty(estimator: str) -> None:
    arguments = batch(torch.float32) | {"kl_coef": 0.1, "kl_bias_correction": True}
    arguments["kl_estimator"] = estimator
    arguments["logprobs"][0, 1] = -math.inf
    loss, gradient, _ = evaluate(arguments)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("shape", ["(B, T)", "(B,)", "(B, 1)"])
def test_kl_weights_weigh_the_penalty_alone(shape: str) -> None:
    arguments = batch() | {"kl_coef": 0.7, "kl_estimator": "abs", "entropy_coef": 0.1}
    weights = torch.tensor([[1.0, 0.0, 2.0, 0.5, 0.0]], dtype=torch.float64).expand(4, 5).clone()
    if shape != "(B, T)":
        weights = torch.tensor([0.0, 2.0, 1.0, 0.5], dtype=torch.float64)[:, None].expand(4, 5)
    case = PolicyCase(**arguments, kl_weights=weights)
    given = {"(B, T)": weights, "(B,)": weights[:, 0], "(B, 1)": weights[:, :1]}[shape]
    assert_right(evaluate(arguments | {"kl_weights": given})[:2], case)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_penalty_of_weight_zero_can_be_infinite(estimator: str, corrected: bool) -> None:
    arguments = batch() | {
        "kl_coef": 0.7, "kl_estimator": estimator, "kl_bias_correction": corrected,
        "kl_weights": torch.ones(4, 5),
    }  # fmt: skip
    arguments["kl_weights"][0, 1] = 0.0
    expected = evaluate(arguments)
    arguments["ref_logprobs"][0, 1] = -math.inf
    found = evaluate(arguments)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_a_token_without_weight_is_bounded_on_the_side_of_its_advantage() -> None:
    # GMPO bounds each ratio before they are averaged: a weight of 0 must not turn the side.
    arguments = {
        "logprobs": torch.full((1, 2), -1.0), "old_logprobs": torch.tensor([[-1.0, -2.0]]),
        "advantages": torch.tensor([-1.0]), "mask": torch.ones(1, 2), "surrogate": "gmpo",
        "ratio_level": "sequence", "clip_low": 0.33, "clip_high": 0.49, "reduction": "none",
    }  # fmt: skip
    for weight in (1.0, 1e-6, 0.0):
        losses, _ = policy_loss(**arguments, rollout_weights=torch.tensor([[1.0, weight]]))
        assert float(losses[0, 0]) == pytest.approx(math.exp(0.5))


@pytest.mark.parametrize(("surrogate", "level"), FORMS)
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_what_the_old_policy_forbade_makes_no_nan(
    surrogate: str, level: str, dual_clip: float | None
) -> None:
    arguments = batch(torch.float32) | {
        "surrogate": surrogate, "ratio_level": level, "dual_clip": dual_clip,
    }  # fmt: skip
    arguments["old_logprobs"][0, 1] = -math.inf
    for sign in (1.0, -1.0):
        loss, gradient, _ = evaluate(arguments | {"advantages": sign * torch.ones(4)})
        assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("corrected", [False, True])
def test_the_penalty_can_be_measured_against_the_old_policy(corrected: bool) -> None:
    arguments = batch() | {
        "kl_coef": 0.2, "kl_estimator": "k2", "kl_reference": "old", "ref_logprobs": None,
        "kl_bias_correction": corrected,
    }  # fmt: skip
    found = evaluate(arguments)
    assert_right(found[:2], PolicyCase(**arguments))
    mask, log_ratio = arguments["mask"], arguments["logprobs"] - arguments["old_logprobs"]
    kl = log_ratio.square() / 2 * (log_ratio.exp() if corrected else 1.0)
    torch.testing.assert_close(found[2]["kl"], kl[mask].mean())


@pytest.mark.parametrize(("surrogate", "level"), FORMS)
def test_the_off_policy_mask_leaves_out_sequences_that_have_drifted(
    surrogate: str, level: str
) -> None:
    arguments = batch() | {"surrogate": surrogate, "ratio_level": level, "kl_coef": 0.1}
    arguments |= {"off_policy_mask_threshold": 0.05, "advantages": -torch.ones(4)}
    shift = torch.tensor([[0.1], [-0.1], [0.0], [0.2]], dtype=torch.float64)
    arguments["old_logprobs"] = (arguments["logprobs"] + shift).clamp(max=-1e-9)
    loss, gradient, metrics = evaluate(arguments)
    assert_right((loss, gradient), PolicyCase(**arguments))
    # 5 and 2 of the 10 tokens that count.
    assert float(metrics["off_policy_mask/masked_mean"]) == pytest.approx(0.7)
    good = evaluate(arguments | {"advantages": torch.ones(4)})
    assert good[2]["off_policy_mask/masked_mean"] == 0


def test_gspo_token_has_the_value_of_gspo_and_with_one_advantage_its_gradient() -> None:
    arguments = batch() | {"advantages": torch.tensor([1.0, -1.0, 1.0, 0.5])}
    arguments |= {"rollout_weights": None, "clip_low": 0.5, "clip_high": 0.5}
    whole = evaluate(arguments, partial(grpo_loss, loss_type="gspo"))
    tokens = evaluate(arguments, partial(grpo_loss, loss_type="gspo_token"))
    torch.testing.assert_close(tokens[:2], whole[:2])
    own = arguments | {"advantages": torch.randn(4, 5, dtype=torch.float64)}
    whole = evaluate(own, partial(grpo_loss, loss_type="gspo"))
    tokens = evaluate(own, partial(grpo_loss, loss_type="gspo_token"))
    assert not torch.allclose(tokens[1], whole[1])


@pytest.mark.parametrize("floor", [0.0, 0.8])
@pytest.mark.parametrize("high", [-0.1, 0.5])
def test_the_bounds_of_cispo_can_be_below_1(floor: float, high: float) -> None:
    arguments = batch(spread=1.0) | {
        "surrogate": "cispo", "clip_high": high, "ratio_floor": floor,
    }  # fmt: skip
    loss, gradient, metrics = evaluate(arguments)
    assert_right((loss, gradient), PolicyCase(**arguments))
    assert (metrics["clip_ratio/low_mean"] > 0) == (floor > 0)


@pytest.mark.parametrize("surrogate", ["dppo_tv", "dppo_kl"])
def test_dppo_counts_the_tokens_that_it_leaves_out(surrogate: str) -> None:
    arguments = batch(spread=1.0) | {"surrogate": surrogate, "clip_low": 0.01, "clip_high": 0.01}
    losses, _ = policy_loss(**arguments | {"reduction": "none"})
    metrics = evaluate(arguments)[2]
    mask, counts = arguments["mask"], arguments["advantages"] != 0
    gone = (losses == 0)[mask & counts].double().mean()
    assert gone > 0
    torch.testing.assert_close(metrics["clip_ratio/region_mean"], gone)


def test_dppo_takes_certain_tokens() -> None:
    # Both policies certain, one of them, and the other.
    logprobs = torch.tensor([[0.0, 0.0, -3.0]], dtype=torch.float32)
    old = torch.tensor([[0.0, -3.0, 0.0]], dtype=torch.float32)
    for surrogate, sign in product(("dppo_tv", "dppo_kl"), (1.0, -1.0)):
        arguments = {"logprobs": logprobs, "old_logprobs": old, "mask": torch.ones(1, 3)}
        arguments |= {"advantages": torch.tensor([sign]), "surrogate": surrogate}
        gradient = evaluate(arguments)[1][0].tolist()
        ratio = [1.0, math.exp(3), math.exp(-3)]
        gone = [False, sign > 0, sign < 0]
        expected = [0.0 if g else -sign * r / 3 for g, r in zip(gone, ratio, strict=True)]
        assert gradient == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("surrogate", "level"), FORMS)
def test_losses_that_are_not_reduced_add_up_to_the_sum(surrogate: str, level: str) -> None:
    arguments = batch() | {"surrogate": surrogate, "ratio_level": level, "kl_coef": 0.1}
    losses, metrics = policy_loss(**arguments | {"reduction": "none"})
    total, of_total = policy_loss(**arguments | {"reduction": "constant", "normalizer": 1.0})
    assert losses.shape == (4, 5) and not losses[~arguments["mask"]].any()
    torch.testing.assert_close(losses.sum(), total)
    assert metrics == of_total


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"surrogate": "gmpo"}, ValueError, "ratio_level: expected 'sequence' for surrogate"),
        ({"surrogate": "dppo_tv", "ratio_level": "product"}, ValueError, "ratio_level: .*'token'"),
        ({"vespo_shape": (1.0, 2.0)}, ValueError, "vespo_shape: expected four"),
        ({"kl_reference": "both"}, ValueError, "kl_reference: expected one of ref, old"),
        ({"kl_reference": "old"}, ValueError, "ref_logprobs: expected None for kl_reference"),
        (
            {"kl_reference": "old", "old_logprobs": None, "ref_logprobs": None},
            ValueError,
            "old_logprobs: expected a tensor for kl_reference",
        ),
        ({"kl_weights": torch.ones(4), "ref_logprobs": None}, ValueError, "kl_weights: .*None"),
        ({"kl_weights": torch.ones(3)}, ValueError, "kl_weights: expected shape"),
        ({"kl_bias_correction": 1}, TypeError, "kl_bias_correction: "),
        ({"surrogate": "cispo", "clip_high": -0.5, "ratio_floor": 0.6}, ValueError, "clip_high: "),
        ({"clip_high": -0.5}, ValueError, "clip_high: expected .*at least 0"),
        ({"ratio_floor": -1.0}, ValueError, "ratio_floor: expected"),
        ({"off_policy_mask_threshold": math.nan}, ValueError, "off_policy_mask_threshold: "),
        ({"reduction": "none", "normalizer": 3.0}, ValueError, "normalizer: .*'none'"),
        ({"surrogat": "clip"}, TypeError, "policy_loss: unexpected option 'surrogat'"),
        ({"surrogate": "ppo"}, ValueError, "surrogate: expected one of clip, .*'ppo'"),
        ({"ratio_level": "batch"}, ValueError, "ratio_level: .*'batch'"),
        ({"clip_low": -0.1}, ValueError, "clip_low: expected .*at least 0"),
        ({"clip_high": math.nan}, ValueError, "clip_high: expected"),
        ({"clip_high": "0.2"}, TypeError, "clip_high: expected a number, got str"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip: expected more than 1"),
        ({"kl_coef": math.inf}, ValueError, "kl_coef: expected a finite"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator: expected one of k1"),
        ({"kl_coef": 0.1, "ref_logprobs": None}, ValueError, "ref_logprobs: .*kl_coef"),
        ({"entropy_coef": 0.1, "entropy": None}, ValueError, "entropy: .*entropy_coef"),
        ({"reduction": "mean"}, ValueError, "reduction: expected one of token-mean"),
        ({"reduction": "constant"}, ValueError, "normalizer: .*'constant'"),
        ({"normalizer": 0}, ValueError, "normalizer: expected a positive"),
        ({"normalizer": torch.ones(4)}, ValueError, r"normalizer: .*0-d tensor, got \(4,\)"),
        ({"sapo_temperatures": (1.0,)}, ValueError, "sapo_temperatures: expected two"),
        ({"sapo_temperatures": (1.0, 0.0)}, ValueError, "sapo_temperatures: expected a positive"),
        ({"logprobs": [0.0]}, TypeError, "logprobs: expected a tensor"),
        ({"logprobs": torch.zeros(4, 5).long()}, TypeError, "logprobs: .*floating"),
        ({"logprobs": torch.zeros(4, 6)}, ValueError, r"mask: .*\(4, 6\).*got \(4, 5\)"),
        ({"logprobs": torch.zeros(5)}, ValueError, r"logprobs: .*\(B, T\).*got \(5,\)"),
        ({"old_logprobs": torch.zeros(4, 6)}, ValueError, "old_logprobs: expected shape"),
        ({"ref_logprobs": torch.zeros(4)}, ValueError, "ref_logprobs: expected shape"),
        ({"entropy": torch.zeros(5)}, ValueError, "entropy: expected shape"),
        ({"advantages": torch.zeros(5)}, ValueError, r"advantages: .*\(B,\)"),
        ({"advantages": 1.0}, TypeError, "advantages: expected a tensor, got float"),
        ({"rollout_weights": torch.zeros(2, 5)}, ValueError, "rollout_weights: expected shape"),
        ({"mask": None}, TypeError, "mask: expected a tensor"),
        ({"mask": torch.ones(5)}, ValueError, r"mask: .*\(4, 5\).*got \(5,\)"),
        ({"advantages": torch.zeros(4, 5, device="meta")}, ValueError, "advantages: expected on"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_name_the_argument(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        policy_loss(**batch() | change)


def test_recipes_refuse_what_they_do_not_know() -> None:
    tensors = [batch()[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")]
    with pytest.raises(ValueError, match=r"loss_type: expected one of grpo, .*'gpro'"):
        grpo_loss(*tensors, loss_type="gpro")
    with pytest.raises(ValueError, match="normalizer: expected a number"):
        grpo_loss(*tensors, loss_type="dr_grpo")
    with pytest.raises(TypeError, match="surrogate"):
        ppo_loss(*tensors, surrogate="plain")
    with pytest.raises(ValueError, match="estimator: expected one of"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k0")


class _NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: looking at a value, and sizes that depend on
    one.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("surrogate", "level"), FORMS)
def test_nothing_waits_for_the_device(surrogate: str, level: str) -> None:
    arguments = batch(torch.float32) | {
        "surrogate": surrogate, "ratio_level": level, "kl_coef": 0.1, "entropy_coef": 0.1,
        "dual_clip": 2.0, "normalizer": torch.tensor(9),
    }  # fmt: skip
    with _NoWaiting():
        evaluate(arguments)
        fastrlhf.group_advantages(torch.randn(6), torch.randint(3, (6,)))
        fastrlhf.whiten(arguments["advantages"], arguments["mask"])
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            bool(arguments["mask"].any())


def test_coefficients_that_change_do_not_break_the_compiler() -> None:
    arguments = batch()
    del arguments["rollout_weights"]

    def loss(kl_coef: float, normalizer: int) -> Tensor:
        return policy_loss(**arguments, kl_coef=kl_coef, normalizer=normalizer)[0]

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for kl_coef, normalizer in ((0.1, 7), (0.2, 8), (0.3, 9)):
        torch.testing.assert_close(compiled(kl_coef, normalizer), loss(kl_coef, normalizer))


def test_ppo_learns_the_best_arm_of_a_bandit() -> None:
    """Three contexts, four arms, known rewards: several clipped steps on each batch of samples."""
    rewards = torch.tensor([[0.0, 1.0, 0.2, 0.1], [0.3, 0.0, 0.1, 0.9], [0.5, 0.4, 0.8, 0.0]])
    policy = torch.zeros(3, 4, requires_grad=True)
    optimizer = torch.optim.Adam([policy], lr=0.1)
    for _ in range(60):
        context = torch.arange(3).repeat_interleave(16)
        with torch.no_grad():
            old_policy = policy.log_softmax(-1)
            arm = torch.multinomial(old_policy.exp()[context], 1)
            old = old_policy[context].gather(1, arm)
            advantages = fastrlhf.group_advantages(rewards[context, arm[:, 0]], context)
        for _ in range(4):
            logprobs = policy.log_softmax(-1)[context].gather(1, arm)
            loss, metrics = ppo_loss(logprobs, old, advantages, torch.ones_like(arm))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert metrics["policy/approxkl_avg"] < 0.5
    probability = policy.softmax(-1)
    assert (probability.argmax(-1) == rewards.argmax(-1)).all()
    mean_reward = (probability * rewards).sum(-1)
    assert (mean_reward > 0.95 * rewards.amax(-1)).all()


def test_options_have_one_set_of_defaults() -> None:
    from inspect import signature

    from fastrlhf.losses.policy_arguments import PolicyOptions

    parameters = signature(policy_loss).parameters
    for name, default in PolicyOptions()._asdict().items():
        assert parameters[name].default == default
