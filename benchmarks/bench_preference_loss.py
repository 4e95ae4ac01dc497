"""DPO from token log-probs of 32 pairs, forward and backward: the part after the vocabulary."""

import pytest
import torch
from providers import dpo_from_tokens


@pytest.mark.parametrize("provider", ["fastrlhf", "eager", "torch.compile"])
def test_forward_and_backward(provider, timed, device, benchmark) -> None:
    benchmark.group = "DPO loss from token log-probs, 64x1024, forward + backward"
    torch.manual_seed(0)
    logprobs = torch.randn(64, 1024, device=device).neg_().requires_grad_()
    mask = torch.rand(64, 1024, device=device) > 0.5
    ref = torch.randn(64, device=device)
    loss = dpo_from_tokens(provider)
    torch.testing.assert_close(
        loss(logprobs, mask, ref), dpo_from_tokens("eager")(logprobs, mask, ref)
    )

    def step() -> None:
        logprobs.grad = None
        loss(logprobs, mask, ref).backward()

    timed(step)
