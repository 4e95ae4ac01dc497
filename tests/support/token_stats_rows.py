"""Random rows of logits, and their token statistics with gradients."""

import pytest
import torch

import fastrlhf

IMPLS = ["eager", "compiled", "triton"]
BACKENDS = pytest.mark.parametrize("impl", IMPLS)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def evaluate(logits, targets, *, g=None, h=None, impl="triton", **options):
    """Statistics of (N, V) logits, and the gradient of Σ g·logprob + h·entropy."""
    x = logits.detach().clone().requires_grad_()
    stats = fastrlhf.token_stats(x, targets, entropy=h is not None, impl=impl, **options)
    upstream = [torch.ones_like(stats.logprob) if g is None else g.to(stats.logprob)]
    outputs = [stats.logprob]
    if h is not None:
        outputs, upstream = [*outputs, stats.entropy], [*upstream, h.to(stats.entropy)]
    (gradient,) = torch.autograd.grad(outputs, x, upstream)
    return stats, gradient


def random_rows(rows, vocab, device, dtype=torch.float32, spread=4.0):
    """Logits, targets with an ignored row of NaN (if there are three rows), and coefficients g,
    h.
    """
    logits = torch.randn(rows, vocab, device=device).mul(spread).to(dtype)
    targets = torch.randint(vocab, (rows,), device=device)
    targets[0] = logits[0].argmax()  # a likely target, for which 1 - p(target) is not 1
    if rows > 2:
        targets[2], logits[2] = -100, torch.nan
    return logits, targets, *(torch.randn(rows, device=device) for _ in range(2))
