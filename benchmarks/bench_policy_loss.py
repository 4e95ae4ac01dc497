"""PPO's clipped loss from logits, forward and backward: time, and peak memory beyond the logits.

Half of the positions are a prompt, which the loss does not count. Every provider passes a check
against fp64 first.
"""

import pytest
import torch
from providers import PPO_FROM_LOGITS, ppo_eager

from fastrlhf.recipes.memory import peak_memory

SHAPES = {"cpu": [(4, 128, 32000)], "cuda": [(8, 1024, 32000), (8, 1024, 128256)]}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(batch: int, tokens: int, vocab: int, device) -> tuple[torch.Tensor, ...]:
    """Logits of the policy, and targets, old log-probs, advantages and mask (B, T)."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, tokens)
    logits = torch.randn(*shape, vocab, device=device, generator=generator).bfloat16()
    targets = torch.randint(vocab, shape, device=device, generator=generator)
    # Near the log-prob of a likely enough token, so that some ratios are clipped and some not.
    noise, advantages = (torch.randn(shape, device=device, generator=generator) for _ in range(2))
    logprobs = torch.stack(
        [row.float().log_softmax(-1).gather(-1, t[:, None])[:, 0]
         for row, t in zip(logits, targets, strict=True)]
    )  # fmt: skip
    mask = torch.arange(tokens, device=device).expand(shape) >= tokens // 2
    return logits, targets, logprobs + 0.2 * noise, advantages, mask


def check(provider, device) -> None:
    """Fail unless loss and gradient are right, on a small problem."""
    logits, *rest = inputs(2, 8, 1000, device)
    gradients = []
    for function, dtype in ((provider, torch.bfloat16), (ppo_eager, torch.float64)):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        loss = function(leaf, *rest)
        (gradient,) = torch.autograd.grad(loss, leaf)
        gradients.append((loss.detach().double(), gradient.double()))
    (loss, gradient), (exact_loss, exact) = gradients
    torch.testing.assert_close(loss, exact_loss, rtol=1e-4, atol=1e-5)
    assert (gradient - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("provider", PPO_FROM_LOGITS)
@pytest.mark.parametrize("shape", SHAPES[DEVICE], ids=lambda shape: "{}x{}x{}".format(*shape))
def test_forward_and_backward(provider, shape, timed, device, benchmark) -> None:
    benchmark.group = "PPO loss from logits, {}x{}x{} bf16, forward + backward".format(*shape)
    function = PPO_FROM_LOGITS[provider]()
    check(function, device)
    logits, *rest = inputs(*shape, device)
    logits.requires_grad_()

    def step() -> None:
        logits.grad = None
        function(logits, *rest).backward()

    timed(step)
    logits.grad = None
    _, peak = peak_memory(step, device)
    timed.extra_info["peak MiB"] = round(peak / 2**20, 1)
