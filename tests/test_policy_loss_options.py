"""Options of policy_loss and the losses that are named by them: metrics, recipes of GRPO's family,
masks of sequences that have drifted, DPPO and CISPO.
"""

import math
from functools import partial
from itertools import product

import pytest
import torch
from support.policy_batches import assert_right, batch, evaluate
from support.policy_formulas import FORMS, PolicyCase

from fastrlhf import grpo_loss, grpo_options, policy_loss, ppo_loss


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


def test_options_have_one_set_of_defaults() -> None:
    from inspect import signature

    from fastrlhf.losses.policy_arguments import PolicyOptions

    parameters = signature(policy_loss).parameters
    for name, default in PolicyOptions()._asdict().items():
        assert parameters[name].default == default
