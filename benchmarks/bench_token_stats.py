"""Token log-probs from logits, forward and backward: time, and peak memory beyond the logits.

Half of the positions are a prompt, which has no target. Every provider passes a check against fp64
first.
"""

import pytest
import torch
from providers import TOKEN_LOGPROBS

from fastrlhf.recipes.memory import peak_memory

SHAPES = {"cpu": [(512, 32000), (512, 128256)], "cuda": [(8192, 32000), (8192, 128256)]}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(rows: int, vocab: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, vocab, device=device, generator=generator).bfloat16()
    targets = torch.randint(vocab, (rows,), device=device, generator=generator)
    targets[: rows // 2] = -100
    return logits, targets


def check(provider, device) -> None:
    """Fail unless values and gradients are right, on a small problem."""
    logits, targets = inputs(8, 1000, device)
    exact = logits.double().log_softmax(-1)[torch.arange(4, 8), targets[4:]]
    leaf = logits.clone().requires_grad_()
    found = provider(leaf, targets)
    torch.testing.assert_close(found[4:].double(), exact, rtol=1e-2, atol=1e-2)
    found.sum().backward()
    onehot = torch.eye(1000, device=device)[targets[4:]]
    expected = onehot - logits[4:].float().softmax(-1)
    torch.testing.assert_close(leaf.grad[4:].float(), expected, rtol=2e-2, atol=1e-4)
    assert not leaf.grad[:4].any()


@pytest.mark.parametrize("provider", TOKEN_LOGPROBS)
@pytest.mark.parametrize("shape", SHAPES[DEVICE], ids=lambda shape: "{}x{}".format(*shape))
def test_forward_and_backward(provider, shape, timed, device, benchmark) -> None:
    benchmark.group = "token log-probs, {}x{} bf16, forward + backward".format(*shape)
    function = TOKEN_LOGPROBS[provider]()
    check(function, device)
    logits, targets = inputs(*shape, device)
    logits.requires_grad_()

    def step() -> None:
        logits.grad = None
        function(logits, targets).sum().backward()

    timed(step)
    logits.grad = None
    _, peak = peak_memory(step, device)
    timed.extra_info["peak MiB"] = round(peak / 2**20, 1)
