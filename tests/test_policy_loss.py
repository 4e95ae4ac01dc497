"""policy_loss and its recipes against formulas written a second time."""

from dataclasses import replace
from itertools import cycle, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.policy_batches import FINE, REDUCTIONS, SURROGATES, assert_right, batch, evaluate
from support.policy_formulas import ESTIMATORS, FORMS, PolicyCase, expected_policy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastrlhf
from fastrlhf import policy_loss, ppo_loss


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
