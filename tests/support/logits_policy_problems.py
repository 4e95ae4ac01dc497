"""Batches of logits_policy_loss, and what its loss and gradient must be by two oracles in a row:
those of the token statistics and of the policy losses.
"""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrlhf import logits_policy_loss
from support.compare import assert_as_accurate, assert_gradient_as_accurate
from support.oracle import token_stats_oracle
from support.plain import plain_policy_loss, plain_token_stats
from support.policy_formulas import PolicyCase, expected_policy

IMPLS = ["eager", "triton"]
BACKENDS = pytest.mark.parametrize("impl", IMPLS)
SURROGATES = ["clip", "cispo", "sapo", "plain", "dppo_tv", "dppo_kl"]

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
