"""logits_policy_loss, by the fused kernel and by the eager backend, against two oracles in a row.

Log-probs and entropies come from the oracle of the token statistics, losses and slopes from that of
the policy losses, and the gradient with respect to the logits from the first one again.
"""

import math
from itertools import cycle

import pytest
import torch
from support.compare import assert_gradient_as_accurate, gradient_errors
from support.logits_policy_problems import (
    BACKENDS,
    FULL,
    ROUNDINGS,
    SURROGATES,
    Problem,
    assert_right,
    evaluate,
    expected,
    plain,
    problem,
)
from support.policy_formulas import ESTIMATORS, FORMS
from torch import Tensor

import fastrlhf
from fastrlhf import grpo_options, logits_policy_loss, policy_loss, token_stats

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_loss_and_gradient_match_the_oracles(impl, surrogate, dtype, device) -> None:
    levels = cycle(level for level in ("token", "sequence") if (surrogate, level) in FORMS)
    for i, (estimator, level) in enumerate(zip(ESTIMATORS, levels, strict=False)):
        options = FULL | {
            "surrogate": surrogate, "kl_estimator": estimator, "ratio_level": level,
            "ratio_floor": 0.9, "kl_bias_correction": i in (1, 2, 5),
        }  # fmt: skip
        if surrogate.startswith("dppo"):
            options |= {"clip_low": 0.01, "clip_high": 0.02}
        assert_right(problem(50, dtype, device), impl, options)
        # Without penalties other branches are taken.
        assert_right(problem(33, dtype, device), impl, {"surrogate": surrogate})


@BACKENDS
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_penalties_times_the_ratio(level, estimator, impl, device) -> None:
    options = FULL | {"kl_estimator": estimator, "kl_bias_correction": True, "ratio_level": level}
    given = problem(50, torch.float32, device)
    assert_right(given, impl, options)
    # The reference far from the policy, on either side.
    given.tensors["ref_logprobs"] += torch.tensor([[9.0], [-5.0]], device=device)
    assert_right(given, impl, options)


@BACKENDS
def test_penalties_that_are_weighed(impl, device) -> None:
    given = problem(50, torch.float64, device)
    weights = torch.tensor([[0.0, 1.0, 2.0, 0.5], [1.0, 0.0, 1.0, 1.0]], device=device).double()
    options = FULL | {"kl_weights": weights}
    assert_right(given, impl, options)
    # One that does not count can be infinite.
    given.tensors["ref_logprobs"][0, 0] = -math.inf
    loss, gradient, _ = evaluate(given, impl=impl, **options, kl_estimator="k1")
    assert loss.isfinite() and gradient.isfinite().all()


@BACKENDS
@pytest.mark.parametrize("surrogate", ["dppo_tv", "dppo_kl"])
@pytest.mark.parametrize("dual_clip", [None, 1.1])
def test_dppo_leaves_tokens_out(dual_clip, surrogate, impl, device) -> None:
    given = problem(50, torch.float64, device)
    options = {"surrogate": surrogate, "clip_low": 1e-6, "clip_high": 1e-6, "dual_clip": dual_clip}
    assert_right(given, impl, options)
    _, gradient, metrics = evaluate(given, impl=impl, **options)
    assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0
    assert 0 < gradient.any(-1).sum() < given.mask.sum()


@BACKENDS
@pytest.mark.parametrize(("surrogate", "level"), [("gmpo", "sequence"), ("vespo", "product"),
                                                   ("clip", "sequence-token")])  # fmt: skip
def test_losses_of_sequences(surrogate, level, impl, device) -> None:
    options = FULL | {"surrogate": surrogate, "ratio_level": level, "reduction": "sequence-mean"}
    for more in ({}, {"off_policy_mask_threshold": -0.01, "kl_bias_correction": True}):
        assert_right(problem(50, torch.float32, device), impl, options | more)


@BACKENDS
def test_losses_that_are_not_reduced_have_gradients_of_their_own(impl, device) -> None:
    given = problem(40, torch.float64, device)
    logits = given.logits.detach().clone().requires_grad_()
    losses, metrics = logits_policy_loss(logits, **given.arguments(), impl=impl, reduction="none")
    assert losses.shape == (2, 4) and not losses[~given.mask].any()
    weights = torch.rand(2, 4, device=device).double()
    (found,) = torch.autograd.grad((losses * weights).sum(), logits)
    stats = token_stats(logits.nan_to_num(), torch.where(given.mask, given.targets, 0))
    by_hand, expected = policy_loss(
        stats.logprob, **given.tensors, mask=given.mask, reduction="none"
    )
    torch.testing.assert_close(losses, by_hand)
    (right,) = torch.autograd.grad((by_hand * weights).sum(), logits)
    torch.testing.assert_close(found, torch.where(given.mask[..., None], right, 0.0))
    torch.testing.assert_close(metrics, expected)


@BACKENDS
@pytest.mark.parametrize("vocab", [1, 2, 4096, 5003])
def test_rows_of_any_length(impl, vocab, device) -> None:
    given = problem(vocab, torch.float32, device)
    if vocab == 1:  # one token has probability 1: nothing to be done about it
        loss, gradient, _ = evaluate(given, impl=impl)
        assert loss.isfinite() and not gradient.any()
        return
    assert_right(given, impl, FULL)


@BACKENDS
@pytest.mark.parametrize("kind", ["scaled", "capped", "all"])
def test_transforms_of_the_logits(impl, kind, device) -> None:
    own = torch.linspace(0.5, 2.0, 8, dtype=torch.float64).view(2, 4)
    transform = {
        "scaled": {"scale": 0.3, "temperature": 0.7},
        "capped": {"softcap": 12.0, "scale": 1.5},
        "all": {"softcap": 8.0, "scale": 0.5, "temperature": own.to(device)},
    }[kind]
    on_cpu = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in transform.items()}
    given = problem(200, torch.float32, device, **on_cpu)
    assert_right(given, impl, FULL, transform)


@BACKENDS
@pytest.mark.parametrize(
    "mutant", ["zero", "target only", "no clip", "no kl", "no entropy", "old reduction"]
)
def test_the_comparison_rejects(mutant, impl, device) -> None:
    given = problem(300, torch.float32, device)
    _, gradient, targets = expected(given, FULL, {})
    changed = {
        "no clip": {"clip_low": 0.9, "clip_high": 9.0}, "no kl": {"kl_coef": 0.0},
        "no entropy": {"entropy_coef": 0.0}, "old reduction": {"reduction": "sequence-mean"},
    }  # fmt: skip
    if mutant in changed:
        wrong = evaluate(given, impl=impl, **FULL | changed[mutant])[1]
    else:
        index = targets.clamp(min=0).unsqueeze(1)
        wrong = torch.zeros_like(gradient)
        if mutant == "target only":
            wrong.scatter_(1, index, gradient.gather(1, index))
    with pytest.raises(AssertionError, match="error of"):
        by_plain = plain(given, FULL, {})[1]
        assert_gradient_as_accurate(wrong.float(), by_plain, gradient, targets, ROUNDINGS)


@BACKENDS
@pytest.mark.parametrize("spread", [1.0, 10.0, 1e4])
def test_errors_are_at_most_twice_those_of_the_eager_formula(impl, spread, device) -> None:
    logits = (torch.randn(4, 8, 1500) * spread).to(device)
    targets = torch.randint(1500, (4, 8), device=device)
    mask = torch.ones(4, 8, device=device)

    def eager(x: Tensor) -> Tensor:
        logprob = x.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        ratio = (logprob - old.to(x.dtype)).exp()
        advantage = advantages.to(x.dtype)
        return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()

    old = logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    old = (old - 0.1 * torch.randn(4, 8, device=device)).float()
    advantages = torch.randn(4, 8, device=device)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        x = logits.to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad(eager(x), x)[0].view(32, -1))
    given = Problem(logits, targets, mask, {"old_logprobs": old, "advantages": advantages})
    found = evaluate(given, impl=impl)[1]
    assert not found[~gradients[0].any(-1)].any()  # clipped, or a log-prob too far from the old one
    live = gradients[0].any(-1)
    of_live = targets.view(-1)[live]
    ours, theirs = (
        gradient_errors(x[live], gradients[0][live], of_live) for x in (found, gradients[1])
    )
    rounding = torch.finfo(torch.float32).eps
    assert all(a <= 2 * b + rounding for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@BACKENDS
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_metrics_are_those_of_policy_loss(impl, surrogate, device) -> None:
    given = problem(60, torch.float64, device)
    clean = given.logits.nan_to_num()
    targets = torch.where(given.mask, given.targets, 0)
    stats = token_stats(clean, targets, entropy=True)
    for entropy, with_ref in ((True, True), (False, False)):
        given.tensors["advantages"][1, 0] = 0.0
        tensors = dict(given.tensors)
        if not with_ref:
            del tensors["ref_logprobs"]
        options = {"surrogate": surrogate} | ({"kl_coef": 0.1} if with_ref else {})
        found = evaluate(
            Problem(given.logits, given.targets, given.mask, tensors), impl=impl, entropy=entropy,
            **options,
        )  # fmt: skip
        loss, metrics = policy_loss(
            stats.logprob, **tensors, mask=given.mask, entropy=stats.entropy if entropy else None,
            **options,
        )  # fmt: skip
        torch.testing.assert_close(found[0], loss)
        assert found[2].keys() == metrics.keys()
        for name, value in metrics.items():
            torch.testing.assert_close(found[2][name], value)
            assert not found[2][name].requires_grad


@BACKENDS
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_without_old_log_probs_the_ratio_is_one(impl, surrogate, device) -> None:
    given = problem(60, torch.float64, device)
    logits = given.logits.nan_to_num()
    targets = torch.where(given.mask, given.targets, 0)
    own = fastrlhf.token_logprobs(logits, targets)
    expected = evaluate(
        Problem(logits, targets, given.mask, given.tensors | {"old_logprobs": own}), impl=impl,
        surrogate=surrogate,
    )  # fmt: skip
    tensors = given.tensors | {"old_logprobs": None}
    found = evaluate(Problem(logits, targets, given.mask, tensors), impl=impl, surrogate=surrogate)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    assert found[1].any() and found[2]["policy/approxkl_avg"] == 0


def own_logprobs(given: Problem, impl: str) -> Tensor:
    """Log-probs of the targets (B, T), in the bits that `logits_policy_loss` has."""
    targets = torch.where(given.mask, given.targets, -100)
    if impl == "eager":
        return fastrlhf.token_logprobs(given.logits, targets, impl="eager")
    zeros = torch.zeros_like(given.tensors["advantages"])
    settings = [0.8, 1.2, math.inf, 1.0, 1.05, 0.0, 0.0]
    _, logprobs, _ = torch.ops.fastrlhf.policy_loss(
        torch.empty_like(given.logits), given.logits, targets, None, None, zeros, zeros, None, 1.0,
        None, 1.0, "plain", "k1", settings, -100, False,
    )  # fmt: skip
    return logprobs.view(targets.shape)


@BACKENDS
@pytest.mark.parametrize("estimator", ["k2", "k3", "abs"])
def test_at_the_reference_itself_a_penalty_has_slope_zero(estimator, impl, device) -> None:
    given = problem(40, torch.float32, device)
    given.tensors["ref_logprobs"] = own_logprobs(given, impl)
    loss, gradient, _ = evaluate(given, impl=impl)
    options = {"kl_coef": 10.0, "kl_estimator": estimator}
    penalised, same, metrics = evaluate(given, impl=impl, **options)
    assert metrics["kl"] == 0
    assert torch.equal(penalised, loss) and torch.equal(same, gradient)


@BACKENDS
def test_a_clipped_token_keeps_the_gradient_of_its_entropy(impl, device) -> None:
    given = problem(40, torch.float64, device)
    options = {"entropy_coef": 0.05}
    assert_right(given, impl, options)
    clipped = evaluate(given, impl=impl)[1].view(given.logits.shape)[0, 0]
    assert not clipped.any()
    assert evaluate(given, impl=impl, **options)[1].view(given.logits.shape)[0, 0].any()


@BACKENDS
def test_recipes_serve_the_fused_form(impl, device) -> None:
    for loss_type in ("dapo", "gspo", "cispo", "sapo"):
        assert_right(problem(40, torch.float64, device), impl, grpo_options(loss_type))
