"""Steps of TRPO, against dense matrices in fp64: how far they go, what they report, and when they
are refused and everything is as it was.
"""

import math
from itertools import pairwise

import pytest
import torch
from support.compare import relative_error
from support.one_thread import one_thread  # noqa: F401  of every test in this file
from support.trpo_problems import (
    MODES,
    VOCAB,
    B,
    Batch,
    T,
    bits,
    dense_fisher,
    device_inputs,
    flat,
    same_bits,
    stepped,
)
from torch import Tensor, nn

import fastrlhf
from fastrlhf import fisher_vector_product, trpo_step
from fastrlhf.hf import LMHead

# Steps.


class Bandit:
    """Logits that are the parameters themselves: the Fisher matrix is known, block by block."""

    def __init__(self, device) -> None:
        torch.manual_seed(0)
        self.theta = (device_inputs(device, 4, VOCAB) / 2).requires_grad_()
        self.targets = torch.randint(VOCAB, (4,), device=device)
        self.advantages = device_inputs(device, 4)
        self.mask = torch.tensor([1, 1, 0, 1], device=device)

    def policy(self) -> Tensor:
        return 1.0 * self.theta

    def step(self, **options):
        arguments = {
            "policy": self.policy, "params": [self.theta], "targets": self.targets,
            "advantages": self.advantages, "mask": self.mask,
        }  # fmt: skip
        return trpo_step(**arguments | options)


def realised(info, max_kl: float, ratio: float = 0.8) -> float:
    """KL after the step over what a quadratic KL would be after so many backtracks."""
    return float(info.kl) / (max_kl * ratio ** (2 * info.backtracks))


@pytest.mark.parametrize("kind", ["bandit", "network"])
def test_the_realised_kl_tends_to_the_bound_as_the_step_shrinks(kind, device) -> None:
    errors = []
    for max_kl in (1e-2, 1e-4, 1e-6):
        batch = Bandit(device) if kind == "bandit" else Batch(device)
        info = batch.step(max_kl=max_kl, damping=1e-9, cg_iterations=60)
        assert info.accepted and info.kl <= max_kl and info.surrogate > 0
        errors.append(abs(realised(info, max_kl) - 1))
    # The KL's third order, relative to its second, is as the step: a tenth for a hundredth.
    assert errors[0] < 1
    for larger, smaller in pairwise(errors):
        assert smaller < 0.2 * larger, errors
    assert errors[2] < 5e-3


def test_a_policy_that_returns_its_parameters_themselves_is_held_to_the_kl(device) -> None:
    for view in (lambda x: x, lambda x: x.view(2, 2, VOCAB).flatten(0, 1)):
        steps = []
        for copied in (False, True):
            bandit = Bandit(device)
            policy = bandit.policy if copied else lambda b=bandit, f=view: f(b.theta)
            steps.append((bandit.step(policy=policy, max_kl=0.5, damping=1e-6), bandit.theta))
        # The KL is not that of the new parameters from themselves.
        (info, theta), (expected, expected_theta) = steps
        assert info.kl == expected.kl > 0 and info.backtracks == expected.backtracks
        assert torch.equal(theta, expected_theta)


def test_the_kl_grows_with_the_square_of_the_step(device) -> None:
    batch = Batch(device)
    start = flat(batch.params)
    with torch.no_grad():
        old = batch.policy()
    batch.step(max_kl=1e-6, damping=1e-6)
    direction = flat(batch.params) - start

    def kl(factor: float) -> float:
        with torch.no_grad():
            nn.utils.vector_to_parameters(start + factor * direction, batch.params)
            kl = fastrlhf.kl_divergence(
                batch.policy(), old, direction="forward", mask=batch.mask
            )  # fmt: skip
        return float(kl.sum() / batch.mask.sum())

    for factor in (2.0, 4.0, 8.0):
        assert kl(factor) / kl(1.0) == pytest.approx(factor**2, rel=0.02)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("mode", MODES)
def test_the_step_is_the_natural_gradient(temperature, mode, device) -> None:
    batch = Batch(device)
    max_kl, damping = 1e-3, 0.01
    start = flat(batch.params)
    logprobs = fastrlhf.token_logprobs(batch.policy(), batch.targets, temperature=temperature)
    count = batch.mask.sum()
    surrogate = ((logprobs - logprobs.detach()).exp() * batch.advantages * batch.mask).sum() / count
    gradient = flat(torch.autograd.grad(surrogate, batch.params))
    matrix = dense_fisher(batch, batch.mask, temperature)
    matrix += damping * torch.eye(len(matrix), dtype=torch.float64, device=device)
    x = torch.linalg.solve(matrix, gradient)
    length = math.sqrt(2 * max_kl / float(x @ matrix @ x))
    info = batch.step(
        max_kl=max_kl, damping=damping, cg_iterations=80, temperature=temperature, mode=mode
    )
    assert info.accepted and info.cg_residual < 1e-4
    assert info.step_size == pytest.approx(length * 0.8**info.backtracks, rel=1e-5)
    found = (flat(batch.params) - start) / info.step_size
    assert relative_error(found, x) < 1e-3
    # The gradient itself, or the solution without the mask, is nowhere near.
    matrix += dense_fisher(batch, None, temperature) - dense_fisher(batch, batch.mask, temperature)
    others = gradient * x.norm() / gradient.norm(), torch.linalg.solve(matrix, gradient)
    assert all(relative_error(found, other) > 0.03 for other in others)


def test_what_is_reported_is_what_happened(device) -> None:
    batch = Batch(device)
    with torch.no_grad():
        old = batch.policy()
    old_logprobs = fastrlhf.token_logprobs(old, batch.targets)
    info = batch.step(max_kl=0.05, damping=0.01)
    with torch.no_grad():
        new = batch.policy()
    count = batch.mask.sum()
    ratios = (fastrlhf.token_logprobs(new, batch.targets) - old_logprobs).exp()
    gained = ((ratios - 1) * batch.advantages * batch.mask).sum() / count
    p, q = old.log_softmax(-1), new.log_softmax(-1)
    kl = ((p.exp() * (p - q)).sum(-1) * batch.mask).sum() / count
    assert info.accepted and gained > 0 and kl <= 0.05
    torch.testing.assert_close(info.surrogate, gained)
    torch.testing.assert_close(info.kl, kl)
    # KL in the other direction is another number, which the comparison tells apart.
    other = ((q.exp() * (q - p)).sum(-1) * batch.mask).sum() / count
    assert abs(other / kl - 1) > 1e-3
    for x in (info.surrogate, info.kl, info.cg_residual):
        assert x.shape == () and not x.requires_grad


def test_a_step_too_long_for_the_exact_kl_is_shortened(device) -> None:
    shortened = 0
    for max_kl in (0.3, 1.0, 3.0):
        batch = Batch(device)
        start = flat(batch.params)
        info = batch.step(max_kl=max_kl, damping=1e-6, backtrack_ratio=0.7, max_backtracks=40)
        assert info.accepted and info.kl <= max_kl
        shortened += info.backtracks
        again = Batch(device)
        full = again.step(max_kl=max_kl, damping=1e-6, max_backtracks=0)
        assert full.accepted == (info.backtracks == 0)
        assert torch.equal(flat(again.params), start) != full.accepted
    assert shortened > 0


def rejections(device) -> dict:
    """Options with which no step can be accepted."""
    batch = Batch(device)

    def worse() -> Tensor:
        logits = batch.policy()
        if torch.is_grad_enabled():
            return logits
        # Away from every token that was sampled with an advantage.
        onehot = torch.nn.functional.one_hot(batch.targets, VOCAB)
        return logits - 1e-4 * batch.advantages.sign()[..., None] * onehot

    far = lambda: batch.policy() * (1 if torch.is_grad_enabled() else -9)  # noqa: E731
    nan = lambda: batch.policy() * (1 if torch.is_grad_enabled() else torch.nan)  # noqa: E731
    zeros = torch.zeros_like(batch.advantages)
    return {
        "a surrogate that gets worse": (batch, {"policy": worse, "max_kl": 1e-9}),
        "a KL that is too large": (batch, {"policy": far}),
        "NaN": (batch, {"policy": nan}),
        "a step below rounding": (batch, {"max_kl": 1e-300}),
        "advantages of zero": (batch, {"advantages": zeros}),
        "an empty mask": (batch, {"mask": torch.zeros_like(batch.mask)}),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("why", rejections("cpu"))
def test_a_rejected_step_restores_every_bit(why, dtype, device) -> None:
    batch, options = rejections(device)[why]
    batch.net.to(dtype)
    batch.x = batch.x.to(dtype)
    with torch.no_grad():
        batch.params[0][0, 0] = -0.0
    before = bits(batch.params)
    if why == "a step below rounding" and dtype != torch.float64:
        options["max_kl"] = 1e-30
    info = batch.step(max_backtracks=3, **options)
    assert not info.accepted and same_bits(batch.params, before)
    assert info.surrogate == info.kl == 0 and info.step_size == 0
    assert info.backtracks == (0 if why in ("advantages of zero", "an empty mask") else 4)
    assert math.isfinite(info.cg_residual)
    assert all(p.grad is None and p.requires_grad and p.is_leaf for p in batch.params)


def test_an_error_on_the_way_restores_every_bit(device) -> None:
    batch = Batch(device)
    before = bits(batch.params)

    def breaks() -> Tensor:
        if not torch.is_grad_enabled():
            raise MemoryError("while a step was tried")
        return batch.policy()

    with pytest.raises(MemoryError):
        batch.step(policy=breaks)
    assert same_bits(batch.params, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accepted_steps_in_lower_precision(dtype, device) -> None:
    batch = Batch(device)
    batch.net.to(dtype)
    batch.x = batch.x.to(dtype)
    before = bits(batch.params)
    info = batch.step(max_kl=0.05, damping=0.01, advantages=batch.advantages.float())
    assert info.accepted and not same_bits(batch.params, before)
    assert 0 < info.kl <= 0.05 and info.surrogate > 0
    assert info.kl.dtype == info.surrogate.dtype == torch.float32


def test_advantages_of_sequences_are_those_of_their_tokens(device) -> None:
    of_sequences = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64, device=device)
    found = stepped(device, advantages=of_sequences)
    assert torch.equal(found, stepped(device, advantages=of_sequences[:, None].expand(B, T)))
    assert not torch.equal(found, stepped(device))


def test_what_is_outside_of_the_mask_can_be_anything(device) -> None:
    batch = Batch(device)
    dead = batch.mask == 0
    with torch.no_grad():
        old = fastrlhf.token_logprobs(batch.policy(), batch.targets)
    expected = stepped(device, old_logprobs=old)
    for garbage in (torch.nan, torch.inf, -torch.inf, 1e30):
        found = stepped(
            device,
            targets=batch.targets.masked_fill(dead, 10**6),
            advantages=batch.advantages.masked_fill(dead, garbage),
            old_logprobs=old.masked_fill(dead, garbage),
        )
        assert torch.equal(found, expected)
    for kind in (batch.mask.bool(), batch.mask.double(), batch.mask.int()):
        assert torch.equal(stepped(device, mask=kind), stepped(device))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_are_counted_exactly_in_16_bits(dtype, mode, device) -> None:
    """A sum of 257 in bf16 would be 256."""
    weight = device_inputs(device, 7, 3).requires_grad_()
    hidden = device_inputs(device, 257, 3)
    vector = device_inputs(device, weight.numel())
    products = [
        fisher_vector_product(
            lambda: (hidden @ weight.T).to(dtype), [weight], vector, mask=mask, mode=mode
        )
        for mask in (
            None,
            torch.ones(257, device=device).bfloat16(),
            torch.ones(257, device=device).bool(),
        )
    ]
    assert torch.equal(products[0], products[2]) and torch.equal(products[1], products[2])
    assert products[0].any()


def test_a_batch_without_tokens_moves_nothing(device) -> None:
    batch = Batch(device)
    before, nothing = bits(batch.params), torch.zeros_like(batch.mask)
    info = batch.step(mask=nothing)
    assert not info.accepted and info.cg_residual == 0
    assert same_bits(batch.params, before)
    vector = device_inputs(device, sum(p.numel() for p in batch.params))
    for mode in MODES:
        product = fisher_vector_product(
            batch.policy, batch.params, vector, mask=nothing, damping=0.5, mode=mode
        )
        assert torch.equal(product, 0.5 * vector)


def test_old_logprobs_far_away_make_no_nan(device) -> None:
    batch = Batch(device)
    near = fastrlhf.token_logprobs(batch.policy(), batch.targets).detach()
    far = near.clone()
    far[0, 0] -= 1e4
    # Without an advantage, else the ratio, although finite, would be all of the surrogate.
    batch.advantages[0, 0] = 0.0
    expected = stepped(device, advantages=batch.advantages, old_logprobs=near)
    found = stepped(device, advantages=batch.advantages, old_logprobs=far)
    assert torch.equal(found, expected)


def test_old_logprobs_of_the_policy_itself_change_nothing(device) -> None:
    batch = Batch(device)
    with torch.no_grad():
        old = fastrlhf.token_logprobs(batch.policy(), batch.targets)
    torch.testing.assert_close(stepped(device), stepped(device, old_logprobs=old))
    # Others weigh the tokens: they are not ignored.
    other = old + device_inputs(device, B, T) / 2
    assert relative_error(stepped(device, old_logprobs=other), stepped(device)) > 1e-3


HEAD = {"scale": 1.5, "softcap": 2.0}


@pytest.mark.parametrize("mode", MODES)
def test_the_head_form_takes_the_same_step(mode, device) -> None:
    results = []
    for headed in (False, True):
        batch = Batch(device, headed=False)
        weight = 2 * device_inputs(device, VOCAB, 6)
        head = LMHead(weight, device_inputs(device, VOCAB), **HEAD)

        def logits(batch=batch, head=head):
            raw = 1.5 * (batch.policy() @ head.weight.T + head.bias)
            return 2.0 * torch.tanh(raw / 2.0)

        form = {"policy": batch.policy, "head": head} if headed else {"policy": logits}
        # Few iterations: conjugate gradients make more of each rounding the longer they go on.
        info = batch.step(**form, temperature=0.7, mode=mode, max_kl=0.02, cg_iterations=5)
        assert info.accepted
        results.append((flat(batch.params), info.surrogate, info.kl))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    start = Batch(device, headed=False).params
    assert relative_error(flat(start), results[0][0]) > 1e-3
