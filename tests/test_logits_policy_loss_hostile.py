"""logits_policy_loss of hostile input: words that a policy forbids, ratios at their ends, an old
policy far away, NaN, and batches without tokens.
"""

import math
from itertools import product

import pytest
import torch
from support.compare import assert_gradient_close
from support.logits_policy_problems import (
    BACKENDS,
    IMPLS,
    SURROGATES,
    Problem,
    assert_right,
    evaluate,
    expected,
    problem,
)
from support.policy_formulas import ESTIMATORS

import fastrlhf
from fastrlhf import logits_policy_loss


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_backends_agree_on_tokens_that_a_policy_forbids(estimator, corrected, device) -> None:
    for weight, side in ((1.0, "ref"), (0.0, "ref"), (1.0, "policy"), (0.0, "policy")):
        given = problem(30, torch.float64, device)
        if side == "ref":
            given.tensors["ref_logprobs"][0, 0] = -torch.inf
        else:
            given.logits[0, 0, given.targets[0, 0]] = -torch.inf
        weights = torch.full((2, 4), weight, device=device)
        options = {"kl_coef": 0.1, "kl_estimator": estimator, "kl_bias_correction": corrected}
        ours, eager = (
            evaluate(given, impl=impl, kl_weights=weights, **options)
            for impl in ("triton", "eager")
        )
        for x, y in zip(ours[:2], eager[:2], strict=True):
            torch.testing.assert_close(x.isfinite(), y.isfinite())
            torch.testing.assert_close(x.nan_to_num(), y.nan_to_num())
        assert weight or ours[1].isfinite().all()


@BACKENDS
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("surrogate", ["dppo_tv", "dppo_kl"])
def test_dppo_of_tokens_that_one_policy_forbids_or_is_sure_of(
    surrogate, dual_clip, impl, device
) -> None:
    given = problem(30, torch.float32, device)
    logits = given.logits.nan_to_num()
    logits[0, 0], logits[0, 0, given.targets[0, 0]] = -torch.inf, 1.0  # sure of it
    logits[0, 1, given.targets[0, 1]] = -torch.inf
    given.tensors["old_logprobs"][1, 0] = -torch.inf
    given.tensors["old_logprobs"][0, 3] = 0.0
    given = Problem(logits, given.targets, given.mask, given.tensors)
    for sign in (1.0, -1.0):
        given.tensors["advantages"] = torch.full((2, 4), sign, device=device)
        options = {"surrogate": surrogate, "dual_clip": dual_clip}
        loss, gradient, metrics = evaluate(given, impl=impl, **options)
        other = evaluate(given, impl="eager", **options)
        assert loss.isfinite() and gradient.isfinite().all()
        torch.testing.assert_close(gradient, other[1])
        torch.testing.assert_close(metrics, other[2])


@BACKENDS
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("offset", [-100.0, 100.0, -1e4, 1e4])
def test_an_old_policy_far_away_makes_no_nan(impl, surrogate, offset, device) -> None:
    given = problem(40, torch.float32, device)
    given.tensors["old_logprobs"] += offset
    for options in ({}, {"dual_clip": 3.0}, {"kl_coef": 0.1}):
        if "kl_coef" in options:
            given.tensors["ref_logprobs"] -= offset
        loss, gradient, metrics = evaluate(given, impl=impl, surrogate=surrogate, **options)
        assert loss.isfinite() and gradient.isfinite().all()
        assert all(value.isfinite() for value in metrics.values())
    if surrogate == "clip":
        if offset > 0:
            given.tensors["old_logprobs"] -= 1e4
        else:
            assert_right(given, impl, {"dual_clip": 3.0})


@BACKENDS
@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
def test_a_ratio_in_fp64_reaches_beyond_that_of_fp32(surrogate, impl, device) -> None:
    given = problem(40, torch.float64, device)
    given.tensors["old_logprobs"] -= 300
    given.tensors["advantages"] = -given.tensors["advantages"].abs()
    options = {"surrogate": surrogate, "clip_high": 1e200}
    loss, gradient, targets = expected(given, options, {})
    found, found_gradient, _ = evaluate(given, impl=impl, **options)
    assert abs(loss) > 1e129
    assert float(found) == pytest.approx(loss, rel=1e-10)
    assert_gradient_close(found_gradient, gradient, targets, 1e-10)


@BACKENDS
def test_a_ratio_on_its_bound_is_not_clipped(impl, device) -> None:
    given = problem(40, torch.float64, device)
    tensors = given.tensors | {"old_logprobs": None}  # every ratio is 1
    given = Problem(given.logits, given.targets, given.mask, tensors)
    free = evaluate(given, impl=impl)
    bounded = evaluate(given, impl=impl, clip_low=0.0, clip_high=0.0)
    assert free[1].any()
    assert torch.equal(bounded[1], free[1])
    assert not any(bounded[2][f"clip_ratio/{end}_mean"] for end in ("low", "high", "region"))


@BACKENDS
def test_masked_vocabulary_makes_no_nan(impl, device) -> None:
    given = problem(5000, torch.float32, device)
    given.logits[0, 0, :4500] = -torch.inf
    given.targets[0, 0] = 4700
    given.logits[0, 1, ::2] = -torch.inf
    given.targets[0, 1] = 4701
    given.logits[0, 3] = -torch.inf  # nothing at all
    given.logits[1, 0, given.targets[1, 0]] = -torch.inf  # the sampled token itself
    loss, gradient, _ = evaluate(given, impl=impl, entropy_coef=0.1)
    assert loss.isfinite() and gradient.isfinite().all()
    assert not gradient[3].any()
    assert (gradient[0, :4500] == 0).all() and gradient[0, 4500:].any()


@BACKENDS
def test_a_row_with_nan_says_nan_and_leaves_the_others_alone(impl, device) -> None:
    given = problem(100, torch.float32, device)
    clean = evaluate(given, impl=impl)
    given.logits[0, 1, 50] = math.nan
    loss, gradient, _ = evaluate(given, impl=impl)
    assert loss.isnan() and gradient[1].isnan().any()
    others = [0, 2, 3, 4, 5, 6, 7]
    assert torch.equal(gradient[others], clean[1][others])


def test_forbidden_tokens_and_huge_advantages_agree_in_all_forms(device) -> None:
    hidden = torch.randn(2, 3, 5, dtype=torch.float64, device=device)
    weight, bias = torch.randn(9, 5, dtype=torch.float64, device=device), torch.zeros(9).double()
    bias[0] = -torch.inf
    targets = torch.tensor([[0, 1, 2], [3, 4, 5]], device=device)
    mask, bias = torch.ones(2, 3, device=device), bias.to(device)
    old = torch.full((2, 3), -2.0, dtype=torch.float64, device=device)
    for sign, given_old, level in product((1.0, 0.0, -1.0), (old, None), ("token", "sequence")):
        advantages = torch.tensor([sign, 0.5], dtype=torch.float64, device=device)
        options = {"ratio_level": level}
        head, arguments = weight.clone().requires_grad_(), (targets, given_old, advantages, mask)
        logits = hidden @ head.T + bias
        losses = [
            logits_policy_loss(logits, *arguments, impl=impl, **options) for impl in IMPLS
        ] + [fastrlhf.linear_policy_loss(hidden, head, *arguments, bias=bias, **options)]
        for loss, metrics in losses:
            assert loss.isfinite(), (sign, given_old, level)
            torch.testing.assert_close(loss, losses[0][0])
            torch.testing.assert_close(
                metrics["clip_ratio/low_mean"], losses[0][1]["clip_ratio/low_mean"]
            )
        gradients = [torch.autograd.grad(x, head, retain_graph=True)[0] for x, _ in losses]
        for gradient in gradients:
            assert gradient.isfinite().all()
            torch.testing.assert_close(gradient, gradients[0])


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"surrogate": name} for name in ("clip", "sapo", "dppo_tv", "dppo_kl")]
    + [{"dual_clip": 3.0}, {"surrogate": "dppo_tv", "dual_clip": 3.0}]
    + [
        {"kl_estimator": name, "kl_coef": 0.5, "kl_bias_correction": True}
        for name in ("k1", "k2", "k3", "abs", "k1+", "k3+")
    ],
    ids=str,
)
def test_no_gradient_comes_from_a_token_that_the_policy_forbids(options, on_policy, device) -> None:
    given = problem(40, torch.float64, device)
    tensors = given.tensors
    given.logits[0, 0, given.targets[0, 0]] = -torch.inf
    if on_policy:
        tensors["old_logprobs"] = None
    for sign in (1.0, -1.0):
        tensors["advantages"] = sign * tensors["advantages"].abs() + sign
        expected, *others = (evaluate(given, impl=impl, **options) for impl in IMPLS)
        assert expected[0].isfinite() and expected[1].any()
        assert not expected[1][0, 0].any()
        for found in others:
            torch.testing.assert_close(found[0], expected[0])
            torch.testing.assert_close(found[1], expected[1])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_beyond_its_end_a_penalty_has_slope_zero(dtype, impl, device) -> None:
    given = problem(40, dtype, device)
    given.tensors["ref_logprobs"] += 1e4
    gradient = evaluate(given, impl=impl)[1]
    penalised = evaluate(given, impl=impl, kl_coef=0.1, kl_estimator="k3")
    assert penalised[0] > 1e30
    assert gradient.any() and torch.equal(penalised[1], gradient)


@BACKENDS
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_forbidden_token_without_an_advantage_has_an_entropy(surrogate, impl, device) -> None:
    given = problem(40, torch.float32, device)
    given.logits[0, 0, given.targets[0, 0]] = -torch.inf
    given.tensors["advantages"][0, 0] = 0.0
    options = {"impl": impl, "surrogate": surrogate, "entropy_coef": 0.1}
    loss, gradient, _ = evaluate(given, **options)
    assert loss.isfinite() and gradient.isfinite().all()
    assert gradient[0].any()


@BACKENDS
def test_a_ratio_at_its_end_times_a_huge_advantage_makes_no_nan(impl, device) -> None:
    given = problem(30, torch.float32, device)
    given.tensors["old_logprobs"] -= 100
    given.tensors["advantages"] = torch.full((2,), -6500.0, device=device)
    assert not evaluate(given, impl=impl)[1].any()


@BACKENDS
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_empty_mask_or_batch_gives_zero(impl, level, device) -> None:
    for batch, tokens, keep in ((2, 4, False), (0, 4, True), (2, 0, True)):
        logits = torch.full((batch, tokens, 9), math.nan, device=device, requires_grad=True)
        rows = torch.full((batch, tokens), math.nan, device=device)
        targets = torch.full((batch, tokens), -7, device=device)
        loss, metrics = logits_policy_loss(
            logits, targets, rows, rows, torch.full_like(targets, int(keep)), ref_logprobs=rows,
            kl_coef=0.1, entropy_coef=0.1, ratio_level=level, impl=impl,
        )  # fmt: skip
        loss.backward()
        assert loss == 0 and not logits.grad.any()
        assert all(value == 0 for value in metrics.values())
