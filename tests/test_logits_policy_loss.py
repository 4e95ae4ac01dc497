"""logits_policy_loss, by the fused kernel and by the eager backend, against two oracles in a row.

Log-probs and entropies come from the oracle of the token statistics, losses and slopes from that of
the policy losses, and the gradient with respect to the logits from the first one again.
"""

import math
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import pytest
import torch
from support.compare import (
    assert_as_accurate,
    assert_gradient_as_accurate,
    assert_gradient_close,
    gradient_errors,
    relative_error,
)
from support.oracle import token_stats_oracle
from support.plain import plain_policy_loss, plain_token_stats
from support.policy_formulas import ESTIMATORS, FORMS, PolicyCase, expected_policy
from torch import Tensor

import fastrlhf
from fastrlhf import grpo_options, logits_policy_loss, policy_loss, token_stats

IMPLS = ["eager", "triton"]
BACKENDS = pytest.mark.parametrize("impl", IMPLS)
SURROGATES = ["clip", "cispo", "sapo", "plain", "dppo_tv", "dppo_kl"]

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# A log-prob rounds by several eps of a nat, and so does a ratio, relatively.
ROUNDINGS = 32.0


@dataclass
class Problem:
    """Logits with garbage where the mask is 0, and all that belongs to them."""

    logits: Tensor  # (B, T, V)
    targets: Tensor
    mask: Tensor
    tensors: dict[str, Tensor]  # old_logprobs, advantages and ref_logprobs, (B, T) each

    def arguments(self) -> dict[str, Any]:
        return {"targets": self.targets, "mask": self.mask} | self.tensors


def problem(
    vocab: int = 50, dtype: torch.dtype = torch.float32, device: Any = "cpu", **transform: Any
) -> Problem:
    """Two sequences, of three and two tokens that count, some with ratios beyond the bounds."""
    logits = (torch.randn(2, 4, vocab) * 3).to(dtype)
    targets = torch.randint(vocab, (2, 4))
    targets[0, 0] = logits[0, 0].argmax()
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 2] = mask[1, 2] = mask[1, 3] = False
    stats = token_stats_oracle(
        logits.view(8, -1), targets.view(8), **{k: flat(v) for k, v in transform.items()}
    )
    logprob = stats.logprob.view(2, 4)
    shift = torch.tensor([[0.5, -0.5, 0.0, 0.1], [-0.4, 0.4, -0.02, 0.0]])
    acc = torch.promote_types(dtype, torch.float32)
    tensors = {
        "old_logprobs": (logprob - shift).clamp(max=-1e-3),  # of probabilities
        "advantages": torch.tensor([[1.0, -2.0, 1.0, 0.5], [0.7, -0.3, 1.1, -1.0]]),
        "ref_logprobs": logprob + torch.randn(2, 4) * 0.3,
    }
    for x in tensors.values():
        x[~mask] = math.nan
    logits[~mask], targets[~mask] = math.nan, 10**9
    tensors = {name: x.to(acc).to(device) for name, x in tensors.items()}
    return Problem(logits.to(device), targets.to(device), mask.to(device), tensors)


def flat(value: Any) -> Any:
    return value.reshape(-1) if isinstance(value, Tensor) else value


def expected(given: Problem, options: dict, transform: dict) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient (N, V) and the targets that it is of (-100 where the mask is 0)."""
    mask = given.mask.cpu()
    targets = torch.where(mask, given.targets.cpu(), -100).view(-1)
    logits = given.logits.cpu().reshape(targets.numel(), -1)
    transform = {name: flat(value) for name, value in transform.items()}
    stats = token_stats_oracle(logits, targets, **transform)
    case = PolicyCase(
        logprobs=stats.logprob.view(mask.shape), entropy=stats.entropy.view(mask.shape), mask=mask,
        **{name: x.cpu().double() for name, x in given.tensors.items()}, **options,
    )  # fmt: skip
    loss = expected_policy(case)
    gradient = token_stats_oracle(
        logits, targets, g=loss.d_logprobs.view(-1), h=loss.d_entropy.view(-1), **transform
    ).gradient
    return loss.loss, gradient, targets


def plain(given: Problem, options: dict, transform: dict) -> tuple[Tensor, Tensor]:
    """Loss and gradient (N, V) by the plain formula in the dtype of the logits."""
    logits = given.logits.detach().clone().requires_grad_()
    targets = torch.where(given.mask, given.targets, -100)
    logprobs, entropy, _ = plain_token_stats(logits, targets, **transform)
    loss = plain_policy_loss(logprobs, mask=given.mask, entropy=entropy, **given.tensors, **options)
    return loss.detach(), torch.autograd.grad(loss, logits)[0].flatten(0, -2)


def evaluate(given: Problem, **options: Any) -> tuple[Tensor, Tensor, dict]:
    """Loss, gradient (N, V) and metrics."""
    logits = given.logits.detach().clone().requires_grad_()
    loss, metrics = logits_policy_loss(logits, **given.arguments(), **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient.reshape(-1, gradient.shape[-1]), metrics


def assert_right(given: Problem, impl: str, options: dict, transform: dict | None = None) -> None:
    transform = transform or {}
    loss, gradient, targets = expected(given, options, transform)
    found, found_gradient, _ = evaluate(given, impl=impl, **options, **transform)
    dtype = given.logits.dtype
    by_plain, plain_gradient = plain(given, options, transform)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    size = max(abs(loss), 1.0)  # of the tokens' losses, which may cancel
    assert_as_accurate(found, by_plain, loss, size=size, ulps=ROUNDINGS, of="loss")
    assert found_gradient.dtype == dtype
    assert_gradient_as_accurate(
        found_gradient, plain_gradient, gradient, targets,
        ROUNDINGS if dtype in (torch.float32, torch.float64) else None,
    )  # fmt: skip


FULL = {
    "kl_coef": 0.3, "entropy_coef": 0.05, "clip_low": 0.15, "clip_high": 0.28, "dual_clip": 1.5,
    "sapo_temperatures": (0.8, 1.3),
}  # fmt: skip


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_whatever_surrounds_it(dtype, device) -> None:
    logits = torch.randn(1, 40, 300, device=device).to(dtype)
    targets = torch.randint(300, (1, 40), device=device)
    tensors = {
        "old_logprobs": torch.full((1, 40), -5.0, device=device),
        "advantages": torch.randn(1, 40, device=device),
    }
    ones = torch.ones(1, 40, device=device)
    options = {"impl": "triton", "entropy_coef": 0.1, "reduction": "constant", "normalizer": 3.0}
    whole = evaluate(Problem(logits, targets, ones, tensors), **options)[1]
    assert torch.equal(whole, evaluate(Problem(logits, targets, ones, tensors), **options)[1])
    for t in (0, 17, 39):
        cut = slice(t, t + 1)
        alone = Problem(
            logits[:, cut], targets[:, cut], ones[:, cut],
            {name: x[:, cut] for name, x in tensors.items()},
        )  # fmt: skip
        assert torch.equal(evaluate(alone, **options)[1][0], whole[t])


def views(logits: Tensor) -> dict[str, Tensor]:
    """The same numbers in other places of memory."""
    batch, tokens, vocab = logits.shape
    room = logits.new_full((batch, tokens + 2, 2 * vocab + 1), math.nan)
    return {
        "a slice of positions": torch.cat((logits, room[:, :1, :vocab]), 1)[:, :-1],
        "padded rows": room[:, 1:-1, :vocab].copy_(logits),
        "every other logit": room.clone()[:, 1:-1, 1::2].copy_(logits),
        "tokens first": logits.transpose(0, 1).contiguous().transpose(0, 1),
        "vocabulary first": logits.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }


@BACKENDS
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("view", list(views(torch.zeros(1, 1, 1))))
def test_strides_do_not_matter(view, inplace, impl, device) -> None:
    given = problem(48, torch.float32, device)
    _, gradient, targets = expected(given, FULL, {})
    leaf = views(given.logits)[view].detach().requires_grad_()
    loss, _ = logits_policy_loss(
        leaf.view_as(leaf), **given.arguments(), **FULL, impl=impl, inplace_backward=inplace
    )
    loss.backward()
    found = leaf.grad.reshape(8, -1)
    assert_gradient_as_accurate(found, plain(given, FULL, {})[1], gradient, targets, ROUNDINGS)


@BACKENDS
def test_an_expanded_row_shares_its_memory_and_is_not_overwritten(impl, device) -> None:
    row = torch.randn(1, 1, 30, device=device, requires_grad=True)
    before = row.detach().clone()
    arguments = {
        "targets": torch.randint(30, (1, 5), device=device),
        "old_logprobs": None, "advantages": torch.randn(1, 5, device=device),
        "mask": torch.ones(1, 5, device=device),
    }  # fmt: skip
    results = []
    for inplace in (True, False):
        row.grad = None
        loss, _ = logits_policy_loss(
            row.expand(1, 5, 30), **arguments, impl=impl, inplace_backward=inplace
        )
        loss.backward()
        results.append(row.grad)
    assert torch.equal(row, before) and torch.equal(*results)


def test_in_place_the_logits_become_their_gradient(device) -> None:
    given = problem(64, torch.float32, device)
    expected_gradient = evaluate(given, impl="triton", **FULL)[1]
    leaf = given.logits.clone().requires_grad_()
    logits = leaf * 1.0
    saved = logits.square()  # keeps the logits for its backward
    loss, _ = logits_policy_loss(
        logits, **given.arguments(), impl="triton", inplace_backward=True, **FULL
    )
    assert torch.equal(logits.detach().view(8, -1), expected_gradient)
    loss.backward()
    assert torch.equal(leaf.grad.view(8, -1), expected_gradient)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_a_differentiable_use_of_spent_logits_is_refused(device) -> None:
    given = problem(64, torch.float32, device)
    for later in (lambda x: x.softmax(-1).square().sum(), lambda x: x.sum()):
        leaf = given.logits.nan_to_num().requires_grad_()
        logits = leaf * 1.0
        loss, _ = logits_policy_loss(
            logits, **given.arguments(), impl="triton", inplace_backward=True
        )
        with pytest.raises(RuntimeError, match=r"^logits_policy_loss: .*used after their gradient"):
            (loss + later(logits)).backward()


def test_fp16_gradients_are_scaled_before_they_are_rounded(device) -> None:
    logits = torch.randn(1, 8, 64, device=device).half().requires_grad_()
    arguments = {
        "targets": torch.randint(64, (1, 8), device=device), "old_logprobs": None,
        "advantages": torch.full((1,), 0.01, device=device),
        "mask": torch.ones(1, 8, device=device), "normalizer": 16384.0,
    }  # fmt: skip
    # A thousandth of the smallest number of fp16, but for the factor of a gradient scaler.
    loss, _ = logits_policy_loss(logits, **arguments, impl="triton")
    (gradient,) = torch.autograd.grad(loss * 2.0**16, logits)
    wide = logits.detach().double().requires_grad_()
    exact, _ = logits_policy_loss(wide, **arguments, impl="eager")
    (expected_gradient,) = torch.autograd.grad(exact * 2.0**16, wide)
    assert relative_error(gradient, expected_gradient) <= torch.finfo(torch.float16).eps


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
            (gradient,) = torch.autograd.grad(loss, head, retain_graph=True)
            assert gradient.isfinite().all()
            torch.testing.assert_close(
                metrics["clip_ratio/low_mean"], losses[0][1]["clip_ratio/low_mean"]
            )


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
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.125, 0.0])
def test_an_upstream_gradient_scales_it(factor, inplace, impl, device) -> None:
    given = problem(64, torch.float32, device)
    plain = evaluate(given, impl=impl)[1]
    leaf = given.logits.clone().requires_grad_()
    loss, _ = logits_policy_loss(
        leaf * 1.0, **given.arguments(), impl=impl, inplace_backward=inplace
    )
    (loss * factor).backward()
    assert torch.equal(leaf.grad.view(8, -1), plain * factor)


@BACKENDS
def test_a_kept_graph_gives_the_same_gradient_again(impl, device) -> None:
    given = problem(64, torch.float32, device)
    leaf = given.logits.clone().requires_grad_()
    loss, _ = logits_policy_loss(leaf, **given.arguments(), impl=impl)
    half, whole, again = (
        torch.autograd.grad(loss, leaf, torch.tensor(x, device=device), retain_graph=True)[0]
        for x in (0.5, 1.0, 1.0)
    )
    assert torch.equal(whole, again) and torch.equal(half, whole * 0.5)
    # Not even the last backward, which may scale in place, touches what was given out before.
    before = whole.clone()
    torch.autograd.grad(loss * 3, leaf)
    assert torch.equal(whole, before)
    assert torch.equal(before.view(8, -1), evaluate(given, impl=impl)[1])


def test_a_second_derivative_is_refused_by_the_kernel(device) -> None:
    given = problem(20, torch.float64, device)
    logits = given.logits.nan_to_num().requires_grad_()
    loss, _ = logits_policy_loss(logits, **given.arguments(), impl="triton")
    with pytest.raises(RuntimeError, match=r"^logits_policy_loss: .*cannot be differentiated"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_without_gradients_the_logits_are_read_and_left_alone(device) -> None:
    given = problem(64, torch.float32, device)
    before = given.logits.clone()
    loss, metrics = logits_policy_loss(
        given.logits, **given.arguments(), impl="triton", inplace_backward=True
    )
    assert not loss.requires_grad
    assert torch.equal(before.nan_to_num(), given.logits.nan_to_num())
    expected_loss, _, expected_metrics = evaluate(given, impl="triton")
    torch.testing.assert_close(loss, expected_loss)
    for name, value in expected_metrics.items():
        torch.testing.assert_close(metrics[name], value)
    with torch.no_grad():
        leaf = given.logits.clone().requires_grad_()
        assert not logits_policy_loss(leaf, **given.arguments(), impl="triton")[0].requires_grad


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


@BACKENDS
def test_recipes_serve_the_fused_form(impl, device) -> None:
    for loss_type in ("dapo", "gspo", "cispo", "sapo"):
        assert_right(problem(40, torch.float64, device), impl, grpo_options(loss_type))


@BACKENDS
def test_it_compiles_without_a_graph_break(impl, device) -> None:
    given = problem(32, torch.float32, device)
    head = torch.nn.Linear(16, 32, device=device)
    hidden = torch.randn(2, 4, 16, device=device)

    def step(hidden: Tensor) -> Tensor:
        return logits_policy_loss(head(hidden), **given.arguments(), **FULL, impl=impl)[0]

    step(hidden).backward()
    eager = [parameter.grad.clone() for parameter in head.parameters()]
    head.zero_grad()
    torch.compile(step, backend="aot_eager", fullgraph=True)(hidden).mul(1.0).backward()
    for parameter, gradient in zip(head.parameters(), eager, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_operators_pass_opcheck(device) -> None:
    given = problem(20, torch.float32, device)
    targets = torch.where(given.mask, given.targets, -100)
    rows = torch.where(given.mask, given.tensors["advantages"], 0.0)
    settings = [0.8, 1.2, math.inf, 1.0, 1.05, 0.1, 0.0]
    arguments = (
        torch.empty_like(given.logits), given.logits, targets, rows, None, rows, rows, None, 1.0,
        None, 1.0, "clip", "k3", settings, -100, True,
    )  # fmt: skip
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.fastrlhf.policy_loss.default, arguments, test_utils=checks)
    tokens = rows, rows, given.mask
    torch.library.opcheck(torch.ops.fastrlhf.gae.default, (*tokens, 1.0, 0.95), test_utils=checks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offsets_pass_2_to_the_31() -> None:
    vocab = 2**18
    rows = 2**31 // vocab + 2
    logits = torch.zeros(1, rows, vocab, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    targets = torch.zeros(1, rows, dtype=torch.int64, device="cuda")
    ones = torch.ones(1, rows, device="cuda")
    loss, _ = logits_policy_loss(logits, targets, None, ones, ones, reduction="sequence-sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    for row in (0, rows - 1):
        expected = torch.full((vocab,), 1 / vocab, device="cuda")
        expected[0] -= 1
        torch.testing.assert_close(gradient[0, row].float(), expected, rtol=1e-2, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_host_sync_and_no_more_memory_than_a_gradient() -> None:
    logits = torch.randn(2, 64, 32000, device="cuda").bfloat16().requires_grad_()
    targets = torch.randint(32000, (2, 64), device="cuda")
    old, ones = torch.full((2, 64), -10.0, device="cuda"), torch.ones(2, 64, device="cuda")

    def step(**options: Any) -> None:
        logits_policy_loss(logits * 1.0, targets, old, ones, ones, **options)[0].backward()
        logits.grad = None

    step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(clip_low=0.1, temperature=0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BACKENDS
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"clip": 0.1}, TypeError, "logits_policy_loss: unexpected option 'clip'; expected one of"),
        ({"entropy": torch.ones(2, 4)}, TypeError, "entropy: expected a bool"),
        ({"entropy_coef": "x"}, TypeError, "entropy_coef: expected a number"),
        ({"targets": torch.zeros(2, 4)}, TypeError, "targets: .*integer"),
        ({"targets": torch.zeros(2, 3).long()}, ValueError, r"targets: expected shape \(2, 4\)"),
        ({"mask": torch.ones(2, 3)}, ValueError, r"mask: expected shape \(2, 4\)"),
        ({"mask": torch.ones(8)}, ValueError, r"mask: expected shape \(2, 4\)"),
        ({"mask": None}, TypeError, "mask: expected a tensor"),
        ({"advantages": None}, TypeError, "advantages: expected a tensor"),
        ({"advantages": torch.zeros(4)}, ValueError, "advantages: expected shape"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a positive"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs: .*kl_coef"),
        ({"reduction": "constant"}, ValueError, "normalizer: expected"),
        ({"surrogate": "ppo"}, ValueError, "surrogate: expected one of"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_name_the_argument(change, error, message, impl) -> None:
    given = problem(20)
    arguments = given.arguments() | {"ref_logprobs": None} | change
    with pytest.raises(error, match=message):
        logits_policy_loss(given.logits.requires_grad_(), impl=impl, **arguments)


@BACKENDS
@pytest.mark.parametrize("target", [-100, -1, 20])
@pytest.mark.skipif(torch.cuda.is_available(), reason="an assertion would end the process")
def test_a_wanted_target_outside_of_the_vocabulary_is_an_error(impl, target) -> None:
    given = problem(20)
    given.targets[0, 0] = target
    with pytest.raises(ValueError, match=rf"targets: expected indices in \[0, 20\).*got {target}"):
        evaluate(given, impl=impl)
