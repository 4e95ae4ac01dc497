"""A batch of policy_loss, and the comparison of its loss and gradient with the formulas of the
papers.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrlhf import policy_loss
from support.compare import assert_as_accurate
from support.plain import plain_policy_loss
from support.policy_formulas import PolicyCase, expected_policy

SURROGATES = ["clip", "cispo", "sapo", "plain"]
REDUCTIONS = ["token-mean", "sequence-mean", "sequence-sum", "constant"]
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
