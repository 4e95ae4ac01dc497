"""What users of other libraries met as wrong numbers, as inputs of ours with the right value."""

import mpmath
import numpy as np
import pytest
import torch
import transformers
from mpmath import mp, mpf
from torch import Tensor

import fastrlhf
from fastrlhf.reference import log_add_exp, log_sigmoid, sigmoid

mp.dps = 120  # 1 - σ(80) has 35 zeros, and a second derivative is a difference of such numbers


def _s(x: mpf) -> mpf:
    return 1 / (1 + mpmath.exp(-x))


def _l(x: mpf) -> mpf:
    return -mpmath.log(_s(x))


EPSILON, TAU = mpf("0.125"), mpf("0.5")

# Terms of each loss as functions of a = β·s_w and b = β·s_l.
SIGMOIDAL = {
    "sigmoid": [lambda a, b: _l(a - b)],
    "nca_pair": [lambda a, b: _l(a), lambda a, b: _l(-a) / 2, lambda a, b: _l(-b) / 2],
    "bco_pair": [lambda a, b: _l(a), lambda a, b: _l(-b)],
    "apo_zero": [lambda a, b: 1 - _s(a), lambda a, b: _s(b)],
    "apo_down": [lambda a, b: _s(a), lambda a, b: 1 - _s(a - b)],
    "exo_pair": [
        lambda a, b: -_s(a - b) * (_l(a - b) + mpmath.log(1 - EPSILON)),
        lambda a, b: -_s(b - a) * (_l(b - a) + mpmath.log(EPSILON)),
    ],
    "discopop": [
        lambda a, b: _l(a - b) * (1 - _s((a - b) / TAU)),
        lambda a, b: mpmath.exp(b - a) * _s((a - b) / TAU),
    ],
}
SCORES = [(-40, 40), (-20, 20), (40, -40), (20, -20), (80, 3), (-80, 3), (3, 80), (3, -80), (1, 0)]


def _of_terms(terms, order: tuple[int, int], a: int, b: int) -> tuple[float, float]:
    """The derivative of a sum of terms, and the sum of the sizes of theirs."""
    found = [mpmath.diff(term, (mpf(a), mpf(b)), order, h=mpf("1e-30")) for term in terms]
    return float(sum(found)), float(sum(abs(x) for x in found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("loss_type", SIGMOIDAL)
def test_saturated_preferences_keep_their_gradient(loss_type, dtype) -> None:
    # A derivative σ(1 - σ) is 0 as soon as σ rounds to 1: apo_zero at ±40 gave 0 for 1e-9.
    terms, budget = SIGMOIDAL[loss_type], 64 * torch.finfo(dtype).eps
    for a, b in SCORES:
        scores = torch.tensor([2.0 * a, 2.0 * b], dtype=dtype, requires_grad=True)
        losses, _ = fastrlhf.dpo_loss(
            scores, torch.zeros(2, dtype=dtype), torch.tensor([0]), torch.tensor([1]), 0.5,
            loss_type=loss_type, label_smoothing=0.125 if loss_type == "exo_pair" else 0.0,
            discopop_tau=0.5,
        )  # fmt: skip
        first = torch.autograd.grad(losses.sum(), scores, create_graph=True)[0]
        second = [torch.autograd.grad(x, scores, retain_graph=True)[0] for x in first]
        for i in range(2):
            order = (1 - i, i)
            want, size = _of_terms(terms, order, a, b)
            got = float(first[i].detach()) * 2
            assert abs(got - want) <= budget * size + _denormal(dtype), (a, b, order, got, want)
            for j in range(2):
                both = tuple(x + (j == k) for k, x in enumerate(order))
                want, size = _of_terms(terms, both, a, b)
                got = float(second[i][j]) * 4
                # A second derivative has a sum of σ' and σ'·(1 - 2σ), which may cancel.
                slack = 4 * budget * (size + _of_terms(terms, order, a, b)[1])
                assert abs(got - want) <= slack + _denormal(dtype), (a, b, both, got, want)


def _denormal(dtype: torch.dtype) -> float:
    return 4 * torch.finfo(dtype).tiny


def test_the_budget_of_saturated_preferences_rejects_the_plain_sigmoid() -> None:
    x = torch.tensor([20.0, 40.0], requires_grad=True)
    (plain,) = torch.autograd.grad(torch.sigmoid(x).sum(), x)
    (ours,) = torch.autograd.grad(sigmoid(x).sum(), x)
    want = torch.tensor([float(_s(mpf(20)) * _s(mpf(-20))), float(_s(mpf(40)) * _s(mpf(-40)))])
    budget = 64 * torch.finfo(torch.float32).eps
    assert (((ours - want) / want).abs() <= budget).all()
    assert (((plain - want) / want).abs() > budget).all()


@pytest.mark.parametrize("function", [sigmoid, log_sigmoid], ids=["sigmoid", "log_sigmoid"])
def test_sigmoids_are_finite_or_nan_at_the_ends(function) -> None:
    x = torch.tensor([-torch.inf, torch.inf, torch.nan, -1e30, 1e30], requires_grad=True)
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    ends = {"sigmoid": [0, 1], "log_sigmoid": [-torch.inf, 0]}[function.__name__]
    assert y[:2].tolist() == ends and y[2].isnan()
    steep = [0, 0] if function is sigmoid else [1, 0]
    assert slope[:2].tolist() == steep and slope[2].isnan()
    assert slope[3:].tolist() == steep and curvature[3:].tolist() == [0, 0]


def test_infinite_margins_have_the_losses_that_they_lead_to() -> None:
    far = torch.tensor([torch.inf, 0.0, -torch.inf], requires_grad=True)
    indices = torch.tensor([0, 1]), torch.tensor([1, 0])

    def losses(loss_type: str, smoothing: float) -> Tensor:
        return fastrlhf.dpo_loss(
            far[:2], torch.zeros(2), *indices, 1.0, loss_type=loss_type, label_smoothing=smoothing,
            impl="eager",
        )[0]  # fmt: skip

    exo = losses("exo_pair", 0.25)
    assert exo.tolist() == pytest.approx([-np.log(0.75), -np.log(0.25)])
    (gradient,) = torch.autograd.grad(exo.sum(), far)
    assert not gradient.isnan().any()
    assert losses("discopop", 0.0).tolist() == [0, torch.inf]


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_a_soft_gate_that_is_far_open_keeps_its_gradient(tau) -> None:
    for log_ratio in (-8.0, 0.0, 1.0, 3.0, 3.5):  # τ(r - 1) up to 64
        lp = torch.tensor([[log_ratio]], dtype=torch.float32, requires_grad=True)
        loss, _ = fastrlhf.policy_loss(
            lp, torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1), surrogate="sapo",
            sapo_temperatures=(tau, tau),
        )  # fmt: skip
        (got,) = torch.autograd.grad(loss, lp)
        want = mpmath.diff(
            lambda x: -4 / mpf(tau) * _s(mpf(tau) * (mpmath.exp(x) - 1)), log_ratio, h=mpf("1e-30")
        )
        # The gate is off by a rounding of its argument, which is up to 64.
        assert float(got) == pytest.approx(float(want), rel=256 * torch.finfo(lp.dtype).eps)


def test_a_ratio_that_is_nearly_zero_keeps_its_gradient() -> None:
    # The derivative of torch.expm1 is its value plus 1: 0 as soon as the value rounds to -1.
    for log_ratio in (-20.0, -40.0, -80.0):
        lp = torch.tensor([[log_ratio]], requires_grad=True)
        tokens = torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1)
        loss, _ = fastrlhf.policy_loss(lp, *tokens, surrogate="sapo", sapo_temperatures=(1.0, 1.0))
        (got,) = torch.autograd.grad(loss, lp)
        want = -4 * _s(mpf(-1)) * _s(mpf(1)) * mpmath.exp(log_ratio)
        budget = 64 * torch.finfo(lp.dtype).eps
        assert float(got) == pytest.approx(float(want), rel=budget)
        # Of k3, e^x - 1 - x with x = ln ref - ln π, the second derivative.
        penalty = fastrlhf.kl_penalty(lp.new_zeros(1, 1), lp, "k3")
        (slope,) = torch.autograd.grad(penalty.sum(), lp, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), lp)
        assert float(curvature) == pytest.approx(float(mpmath.exp(log_ratio)), rel=budget)


def test_a_label_far_from_its_baseline_keeps_its_gradient() -> None:
    scores = torch.tensor([60.0, -60.0, -60.0, 60.0], requires_grad=True)
    losses, _ = fastrlhf.kto_loss(
        scores, torch.zeros(4), torch.tensor([True, True, False, False]), 0.0, beta=0.5
    )
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    slope = float(_s(mpf(30)) * _s(mpf(-30)) / 2)
    budget = 64 * torch.finfo(torch.float32).eps
    assert gradient.tolist() == pytest.approx([-slope, -slope, slope, slope], rel=budget)


def test_saturated_pairs_from_hidden_states_keep_their_gradient() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 3, 4, dtype=torch.float64)
    weight = 10 * torch.randn(5, 4, dtype=torch.float64)
    targets, pair = torch.randint(5, (2, 3)), (torch.tensor([0]), torch.tensor([1]))
    plain = fastrlhf.linear_token_logprobs(hidden, weight, targets).sum(-1)
    ref = plain + torch.tensor([80.0, -80.0], dtype=torch.float64)  # scores of ∓80, β·s of ∓40

    def gradient(dtype: torch.dtype) -> Tensor:
        h = hidden.to(dtype).requires_grad_()
        losses, _ = fastrlhf.linear_dpo_loss(
            h, weight.to(dtype), targets, ref.to(dtype), *pair, 0.5, loss_type="apo_zero"
        )
        return torch.autograd.grad(losses.sum(), h)[0].double()

    want = gradient(torch.float64)
    assert want.norm() > 0
    # Scores in fp32 are off by roundings of sums of a hundred nats, and e^s with them.
    assert (gradient(torch.float32) - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_rankings_of_distant_scores_have_second_derivatives(dtype) -> None:
    gap = 100.0 if dtype == torch.float32 else 800.0
    scores = torch.tensor([0.0, gap], dtype=dtype, requires_grad=True)

    def curvature(loss: Tensor) -> Tensor:
        slope = torch.autograd.grad(loss, scores, create_graph=True)[0]
        return torch.autograd.grad(slope[0], scores)[0]

    ids, ranks = torch.zeros(2, dtype=torch.long), torch.tensor([0, 1])
    ranking = curvature(fastrlhf.plackett_luce_loss(scores, ids, ranks).sum())
    pair = curvature(fastrlhf.reward_loss(scores[:1], scores[1:])[0].sum())
    assert ranking.isfinite().all() and torch.equal(ranking, pair)
    three = torch.tensor([0.0, gap, 3.0], dtype=dtype, requires_grad=True)
    loss = fastrlhf.plackett_luce_loss(three, torch.zeros(3, dtype=torch.long), torch.arange(3))
    (slope,) = torch.autograd.grad(loss.sum(), three, create_graph=True)
    assert torch.autograd.grad(slope.square().sum(), three)[0].isfinite().all()


def test_mixtures_of_distant_distributions_have_second_derivatives() -> None:
    x = torch.tensor([[0.0, 200.0, 1.0]], requires_grad=True)
    y = torch.tensor([[150.0, 0.0, 1.0]])
    value = fastrlhf.kl_divergence(x, y, direction="jsd")
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    assert torch.autograd.grad((slope * torch.arange(3.0)).sum(), x)[0].isfinite().all()


def test_sums_of_exponentials_take_minus_infinity() -> None:
    a = torch.tensor([-torch.inf, 2.0, 0.0, 500.0], requires_grad=True)
    b = torch.tensor([1.0, -torch.inf, 0.0, 0.0])
    value = log_add_exp(a, b)
    assert value.tolist() == pytest.approx([1.0, 2.0, np.log(2), 500.0])
    (slope,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    assert slope.tolist() == [0.0, 1.0, 0.5, 1.0]
    assert torch.autograd.grad(slope.sum(), a)[0].isfinite().all()


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_an_overflowed_rollout_weight_of_a_token_without_advantage_is_not_looked_at(impl) -> None:
    advantages = fastrlhf.group_advantages(
        torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    )
    weights = torch.ones(4, 3)
    weights[0] = torch.tensor([torch.inf, torch.nan, 1.0])
    old = -torch.rand(4, 3)
    old[1, 0], old[1, 1] = torch.nan, -torch.inf
    mask, targets = torch.ones(4, 3), torch.randint(0, 7, (4, 3))
    hidden, head = torch.randn(4, 3, 5), torch.randn(7, 5)
    plain = torch.where(advantages[:, None] == 0, -1.0, old)

    def losses(old: Tensor, rollout_weights: Tensor, **extra) -> list[Tensor]:
        h = hidden.clone().requires_grad_()
        given = old, advantages, mask
        logits = h @ head.T
        logprobs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        entropy = {"entropy": torch.zeros_like(logprobs)} if "entropy" in extra else {}
        options = {"rollout_weights": rollout_weights, "impl": impl} | extra
        found = [
            fastrlhf.policy_loss(logprobs, *given, rollout_weights=rollout_weights, **entropy),
            fastrlhf.logits_policy_loss(logits, targets, *given, **options),
            fastrlhf.linear_policy_loss(h, head, targets, *given, **options),
        ]
        return [
            x for loss, _ in found for x in (loss, *torch.autograd.grad(loss, h, retain_graph=True))
        ]

    for extra in ({}, {"entropy": True}):
        for got, want in zip(
            losses(old, weights, **extra), losses(plain, torch.ones(4, 3), **extra), strict=True
        ):
            assert torch.equal(got, want)


def test_a_reward_that_is_missing_counts_nowhere() -> None:
    rewards = torch.tensor([1.0, torch.nan, 0.0, torch.inf, 0.0, 1.0, torch.nan])
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    valid = rewards.isfinite()
    for kind in ("grpo", "dr_grpo", "rloo", "reinforce++"):
        got = fastrlhf.group_advantages(rewards, groups, kind=kind, valid=valid)
        want = torch.zeros(7)
        want[valid] = fastrlhf.group_advantages(rewards[valid], groups[valid], kind=kind)
        assert torch.equal(got, want), kind
        assert torch.equal(
            got, fastrlhf.group_advantages(rewards, groups, kind=kind, valid=valid.long())
        )
    alone = fastrlhf.group_advantages(rewards, groups)
    assert alone.isnan().tolist() == [True] * 7
    apart = fastrlhf.group_advantages(
        torch.tensor([1.0, torch.nan, 0, 1]), torch.tensor([0, 0, 1, 1])
    )
    assert apart.isnan().tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match=r"^rewards: .*reinforce.*nan.*valid"):
        fastrlhf.group_advantages(rewards, groups, kind="reinforce++")


def test_rewards_of_zero_and_one_may_be_integers() -> None:
    ones, groups = torch.tensor([1, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1])
    for rewards in (ones, ones.bool(), ones.to(torch.int8)):
        want = fastrlhf.group_advantages(ones.float(), groups)
        assert torch.equal(fastrlhf.group_advantages(rewards, groups), want)
    logps, mask = -torch.rand(5, 3), torch.ones(5, 3)
    want = fastrlhf.shaped_rewards(ones.float(), logps, logps - 0.1, mask, kl_coef=0.1)
    assert torch.equal(fastrlhf.shaped_rewards(ones, logps, logps - 0.1, mask, kl_coef=0.1), want)
    tokens = torch.randint(0, 2, (5, 3))
    for impl in ("eager", "triton"):
        found = fastrlhf.gae(tokens, logps, mask, impl=impl)
        want = fastrlhf.gae(tokens.float(), logps, mask, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    want = fastrlhf.policy_loss(logps, None, ones.float(), mask)[0]
    assert torch.equal(fastrlhf.policy_loss(logps, None, ones, mask)[0], want)


def test_numbers_of_numpy_are_numbers() -> None:
    logits, targets = torch.randn(3, 7), torch.tensor([1, 2, 3])
    for number in (np.float32(2), np.float64(2), np.int64(2), np.float16(2), 2):
        for impl in ("eager", "triton"):
            got = fastrlhf.token_logprobs(logits, targets, temperature=number, impl=impl)
            want = fastrlhf.token_logprobs(logits, targets, temperature=2.0, impl=impl)
            assert torch.equal(got, want)
        lp, mask = -torch.rand(2, 3), torch.ones(2, 3)
        got = fastrlhf.policy_loss(
            lp, lp - 1, torch.ones(2), mask, normalizer=number, clip_high=number
        )
        want = fastrlhf.policy_loss(lp, lp - 1, torch.ones(2), mask, normalizer=2.0, clip_high=2.0)
        assert torch.equal(got[0], want[0])
        got, _ = fastrlhf.reward_loss(lp[0], lp[1], margin=number)
        assert torch.equal(got, fastrlhf.reward_loss(lp[0], lp[1], margin=2.0)[0])
        pair = (torch.tensor([0]), torch.tensor([1]))
        got = fastrlhf.dpo_loss(lp[:, 0], lp[:, 1], *pair, number)[0]
        assert torch.equal(got, fastrlhf.dpo_loss(lp[:, 0], lp[:, 1], *pair, 2.0)[0])


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, torch.nan, -torch.inf])
def test_what_is_no_mask_is_not_taken_for_one(value) -> None:
    mask, lp, ids = torch.ones(2, 3), -torch.rand(2, 3), torch.randint(0, 7, (2, 3))
    mask[0, 1] = value
    pair = (torch.tensor([0]), torch.tensor([1]))
    calls = [
        lambda: fastrlhf.sequence_logprobs(lp, mask),
        lambda: fastrlhf.dpo_loss(lp, lp, *pair, mask=mask),
        lambda: fastrlhf.policy_loss(lp, None, torch.ones(2), mask),
        lambda: fastrlhf.value_loss(lp, lp, lp, mask),
        lambda: fastrlhf.gae(lp, lp, mask),
        lambda: fastrlhf.whiten(lp, mask),
        lambda: fastrlhf.shaped_rewards(lp[:, 0], lp, lp, mask, kl_coef=0.1),
        lambda: fastrlhf.shift_targets(ids, mask),
        lambda: fastrlhf.kl_divergence(torch.randn(2, 3, 5), torch.randn(2, 3, 5), mask=mask),
        lambda: fastrlhf.softmax_fisher_product(
            torch.randn(2, 3, 5), torch.randn(2, 3, 5), mask=mask
        ),
        lambda: fastrlhf.logits_policy_loss(torch.randn(2, 3, 7), ids, None, torch.ones(2), mask),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^mask: expected a mask of 0 and 1, got"):
            call()


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_temperatures_of_sequences_are_not_those_of_positions(impl) -> None:
    # As many positions as sequences: the shape alone does not tell them apart.
    logits, targets = torch.randn(3, 3, 7), torch.randint(0, 7, (3, 3))
    temperature = torch.tensor([0.5, 1.0, 2.0])
    hidden, head, mask = torch.randn(3, 3, 4), torch.randn(7, 4), torch.ones(3, 3)
    calls = [
        lambda t: fastrlhf.token_logprobs(logits, targets, temperature=t, impl=impl),
        lambda t: fastrlhf.linear_token_logprobs(hidden, head, targets, temperature=t, impl=impl),
        lambda t: fastrlhf.kl_divergence(logits, logits.flip(0), temperature=t, impl=impl),
        lambda t: fastrlhf.softmax_fisher_product(logits, logits.flip(0), temperature=t, impl=impl)[
            1
        ],
        lambda t: fastrlhf.logits_policy_loss(
            logits, targets, -torch.ones(3, 3), torch.ones(3), mask, temperature=t, impl=impl
        )[0],
        lambda t: fastrlhf.linear_kl_divergence(
            hidden, head, hidden.flip(0), head, temperature=t, impl=impl
        ),
    ]
    for call in calls:
        want = call(temperature[:, None].expand(3, 3))
        assert torch.equal(call(temperature), want)
        assert torch.equal(call(temperature[:, None]), want)
        assert not torch.equal(call(temperature[None]), want)
    with pytest.raises(ValueError, match=r"^temperature: .*\(3,\).*got \(2,\)"):
        fastrlhf.token_logprobs(logits[:, :2], targets[:, :2], temperature=torch.ones(2), impl=impl)
    with pytest.raises(ValueError, match=r"^temperature: "):
        fastrlhf.token_logprobs(logits[None], targets[None], temperature=temperature, impl=impl)
    flat = fastrlhf.token_logprobs(logits[0], targets[0], temperature=temperature, impl=impl)
    assert torch.equal(flat, calls[0](temperature[None].expand(3, 3))[0])


def _llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_a_model_takes_a_temperature_for_each_sequence_and_names_what_it_does_not_take() -> None:
    model, ids = _llama(), torch.randint(0, 31, (2, 5))
    logits = model(ids).logits[:, :-1].detach()
    temperature = torch.tensor([0.5, 2.0])
    want = fastrlhf.token_logprobs(logits, ids[:, 1:], temperature=temperature)
    for shape in ((2,), (2, 1)):
        got = fastrlhf.model_token_stats(model, ids, temperature=temperature.view(shape)).logprob
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    for bad in (torch.ones(2, 5), torch.ones(3), torch.ones(4)):
        with pytest.raises(ValueError, match=r"^temperature: "):
            fastrlhf.model_token_stats(model, ids, temperature=bad)
    with pytest.raises(TypeError, match=r"^attention_mask: .*dict"):
        fastrlhf.model_token_stats(model, ids, {"full_attention": None})
    with pytest.raises(ValueError, match=r"^attention_mask: "):
        fastrlhf.model_token_stats(model, ids, torch.full((2, 5), 0.5))


def test_a_scale_of_the_config_that_the_model_does_not_use_is_not_used() -> None:
    config = transformers.MptConfig(
        d_model=32, n_heads=4, n_layers=1, vocab_size=31, max_seq_len=16,
        logit_scale="inv_sqrt_d_model",
    )  # fmt: skip
    assert fastrlhf.lm_head(transformers.MptForCausalLM(config)).scale == 1.0
    model, ids = _llama(), torch.randint(0, 31, (2, 5))
    model.config.logit_scale = 3.0
    want = fastrlhf.token_logprobs(model(ids).logits[:, :-1], ids[:, 1:])
    got = fastrlhf.model_token_stats(model, ids).logprob
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("shape", ["transposed", "expanded", "sliced"])
def test_targets_of_any_strides_with_a_trained_head(shape) -> None:
    hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4, requires_grad=True)
    targets = {
        "transposed": torch.randint(5, (3, 2)).T,
        "expanded": torch.randint(5, (1, 3)).expand(2, 3),
        "sliced": torch.randint(5, (2, 7))[:, ::3],
    }[shape]
    rest = (torch.tensor([-3.0, -4.0]), torch.tensor([0]), torch.tensor([1]))
    found = []
    for given in (targets, targets.contiguous()):
        losses, _ = fastrlhf.linear_dpo_loss(hidden, weight, given, *rest)
        found += [losses.detach(), *torch.autograd.grad(losses.sum(), weight)]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize(
    ("dtype", "token", "ignored"),
    [
        (torch.uint8, 156, -100), (torch.uint8, 255, -1), (torch.int8, 5, 261),
        (torch.int16, 5, 2**16 + 5), (torch.int32, 5, 2**32 + 5),
    ],
)  # fmt: skip
def test_a_token_is_not_ignored_for_the_low_bits_of_the_index_that_is(
    dtype, token, ignored, impl
) -> None:
    hidden, weight = torch.randn(2, 2, 4), torch.randn(256, 4, requires_grad=True)
    targets = torch.tensor([[token, 1], [2, token]])
    pairs = (torch.tensor([-3.0, -4.0]), torch.tensor([0]), torch.tensor([1]))
    options = {"ignore_index": ignored, "impl": impl}

    def found(targets: Tensor) -> list[Tensor]:
        stats = fastrlhf.linear_token_stats(hidden, weight, targets, **options)
        loss, _ = fastrlhf.linear_loss(
            lambda stats: stats.logprob.sum(), hidden, weight, targets, **options
        )
        trained, _ = fastrlhf.linear_dpo_loss(hidden, weight, targets, *pairs, **options)
        frozen, _ = fastrlhf.linear_dpo_loss(hidden, weight.detach(), targets, *pairs, **options)
        logprobs = fastrlhf.token_logprobs(hidden @ weight.T, targets, **options)
        values = (stats.logprob, loss, trained, frozen, logprobs)
        losses = (stats.logprob.sum(), loss, trained.sum(), logprobs.sum())
        return [x.detach() for x in values] + [
            torch.autograd.grad(x, weight, retain_graph=True)[0] for x in losses
        ]

    narrow, wide = found(targets.to(dtype)), found(targets)
    assert (wide[0] < 0).all()
    assert all(map(torch.equal, narrow, wide))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.float16, np.float32, np.int64])
def test_a_scale_of_any_kind_of_number_is_that_number(kind) -> None:
    head = {"hidden": torch.randn(2, 4), "weight": torch.randn(5, 4), "tangent": torch.randn(2, 4)}
    for softcap in (None, kind(30)):
        found = fastrlhf.linear_softmax_fisher_product(**head, scale=kind(100), softcap=softcap)
        same = None if softcap is None else 30.0
        want = fastrlhf.linear_softmax_fisher_product(**head, scale=100.0, softcap=same)
        assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "apo_zero"])
def test_token_sums_are_taken_in_the_dtype_that_comes_out(loss_type, impl) -> None:
    lp, mask = -torch.rand(2, 300) * 5, torch.ones(2, 300)
    ref = torch.tensor([-700.0, -710.0], dtype=torch.float64)
    _, rewards = fastrlhf.dpo_loss(
        lp, ref, torch.tensor([0]), torch.tensor([1]), mask=mask, loss_type=loss_type, impl=impl
    )
    want = 0.1 * (lp.double().sum(-1) - ref)
    assert rewards.dtype == torch.float64
    assert ((rewards - want) / want).abs().max() < 1e-13


def test_nan_at_the_target_alone_is_not_lost_on_policy() -> None:
    logits, targets = torch.randn(2, 3, 7), torch.randint(0, 7, (2, 3))
    logits[1, 2, targets[1, 2]] = torch.nan
    for impl in ("eager", "triton"):
        x = logits.clone().requires_grad_()
        loss, _ = fastrlhf.logits_policy_loss(
            x, targets, None, torch.ones(2), torch.ones(2, 3), impl=impl
        )
        assert loss.isnan(), impl
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient[1, 2].isnan().all() and gradient[0].isfinite().all(), impl


@pytest.mark.parametrize("flush", [False, True], ids=["denormals", "flushed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e4])
def test_conjugate_gradients_solve_at_any_scale_and_tolerance(condition, dtype, flush) -> None:
    largest = 30 if dtype == torch.float32 else 250
    size = 20
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    spread = torch.logspace(0, -float(np.log10(condition)), size, dtype=torch.float64)
    matrix, target = (basis * spread) @ basis.T, torch.randn(size, dtype=torch.float64)
    solution = torch.linalg.solve(matrix, target)
    torch.set_flush_denormal(flush)
    try:
        for of_matrix in (-largest, 0, largest):
            for of_target in (-largest, 0, largest):
                if abs(of_target - of_matrix) > largest:
                    continue  # the solution is no number of the dtype
                a = (matrix * 10.0**of_matrix).to(dtype)
                b = (target * 10.0**of_target).to(dtype)
                for tolerance in (0.0, 1e-10):
                    x, residual = fastrlhf.conjugate_gradient(
                        lambda v, a=a: a @ v, b, iterations=400, tolerance=tolerance
                    )
                    assert x.isfinite().all() and 0 <= residual < 1
                    if tolerance == 0:
                        want = solution * 10.0 ** (of_target - of_matrix)
                        error = (x.double() - want).abs().max() / want.abs().max()
                        # What rounding the matrix costs anyone who solves with it.
                        assert error <= 50 * condition * torch.finfo(dtype).eps
    finally:
        torch.set_flush_denormal(False)
