"""policy_loss of hostile input: what a mask hides, batches without tokens, an old policy far away,
NaN, forbidden tokens, and ratios on their bounds.
"""

import math
from itertools import product

import pytest
import torch
from support.policy_batches import FINE, REDUCTIONS, SURROGATES, assert_right, batch, evaluate
from support.policy_formulas import ESTIMATORS, FORMS, PolicyCase, expected_policy
from torch import Tensor

from fastrlhf import policy_loss

LEVELS = ["token", "sequence", "sequence-token", "product"]
GARBAGE = [math.nan, math.inf, -math.inf, -1e9, 1e30]


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    arguments = batch(dtype) | {"kl_coef": 0.1, "entropy_coef": 0.1}
    wide = {name: x.float() if isinstance(x, Tensor) and x.dtype == dtype else x
            for name, x in arguments.items()}  # fmt: skip
    found, expected = evaluate(arguments), evaluate(wide)
    assert found[0].dtype == torch.float32 and torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1].to(dtype))


def test_a_ratio_on_its_bound_is_not_clipped() -> None:
    logprobs = torch.zeros(1, 2, dtype=torch.float64)
    mask, advantages = torch.ones(1, 2), torch.tensor([[1.0, -1.0]])
    # 1 - 0.25 and 1 + 0.5 are exact, and so is a ratio that is 1.
    options = {"clip_low": 0.0, "clip_high": 0.0}
    arguments = {"logprobs": logprobs, "old_logprobs": logprobs, "advantages": advantages}
    loss, gradient, metrics = evaluate(arguments | {"mask": mask} | options)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0.5]], dtype=torch.float64))
    assert loss == 0 and metrics["clip_ratio/region_mean"] == 0


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
