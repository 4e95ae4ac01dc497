"""Divergences and their gradients written a second time in NumPy's fp64, from textbooks, and
comparisons with them.
"""

import numpy as np
import pytest
import torch
from torch import autograd

import fastrlhf
from support.compare import assert_as_accurate, assert_gradient_as_accurate

IMPLS = ["eager", "compiled", "triton"]
BACKENDS = pytest.mark.parametrize("impl", IMPLS)
MEASURES = {
    "reverse": {"direction": "reverse"},
    "forward": {"direction": "forward"},
    "jsd 0.1": {"direction": "jsd", "beta": 0.1},
    "jsd 0.5": {"direction": "jsd", "beta": 0.5},
    "jsd 0.9": {"direction": "jsd", "beta": 0.9},
}

# One of each kind: where it is the code that matters, and not the numbers.
KINDS = pytest.mark.parametrize("measure", ["reverse", "forward", "jsd 0.1"])

FINE = (torch.float64, torch.float32)
DTYPES = [(dtype, dtype) for dtype in (*FINE, torch.float16, torch.bfloat16)] + [
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float16),
    (torch.bfloat16, torch.float64),
]


def softmax(x, temperature, softcap, scale):
    """Probabilities, their logarithms, and the derivative of the effective logits."""
    z, chain = scale * x, np.full_like(x, scale)
    if softcap is not None:
        z, chain = softcap * np.tanh(z / softcap), scale / np.cosh(z / softcap) ** 2
    z = z / temperature
    log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
    return np.exp(log_p), log_p, chain / temperature


def relative_entropy(p, log_p, log_q):
    """KL(p‖q): what p rules out does not count."""
    possible = p > 0
    return (p[possible] * (log_p[possible] - log_q[possible])).sum()


def row_oracle(x, y, *, direction, beta=0.5, temperature=1.0, softcap=None, scale=1.0):
    """Divergence of one row, and its gradients with respect to both logits.

    The derivatives with respect to the probabilities, times these, go through the softmax:
    dz = p·(f' - Σp·f').
    """
    p, log_p, chain_p = softmax(x, temperature, softcap, scale)
    q, log_q, chain_q = softmax(y, temperature, softcap, scale)
    with np.errstate(invalid="ignore", divide="ignore"):
        if direction == "reverse":
            value = relative_entropy(p, log_p, log_q)
            by_p, by_q = np.where(p > 0, p * (log_p - log_q + 1), 0), -p
        elif direction == "forward":
            value = relative_entropy(q, log_q, log_p)
            by_p, by_q = -q, np.where(q > 0, q * (log_q - log_p + 1), 0)
        else:
            log_m = np.logaddexp(log_p + np.log(1 - beta), log_q + np.log(beta))
            value = beta * relative_entropy(q, log_q, log_m)
            value += (1 - beta) * relative_entropy(p, log_p, log_m)
            by_p = np.where(p > 0, (1 - beta) * p * (log_p - log_m), 0)
            by_q = np.where(q > 0, beta * q * (log_q - log_m), 0)
        return value, (by_p - p * by_p.sum()) * chain_p, (by_q - q * by_q.sum()) * chain_q


def oracle(logits, ref, mask=None, *, g=None, temperature=1.0, **options):
    """Evaluate `row_oracle` for every row of (N, V): values, and the gradients of Σ g·value."""
    x, y = (t.detach().cpu().double() for t in (logits, ref))
    values, d_x, d_y = torch.zeros(x.shape[0]).double(), torch.zeros_like(x), torch.zeros_like(x)
    for i in range(x.shape[0]):
        if mask is not None and not mask[i]:
            continue
        own = float(temperature[i]) if isinstance(temperature, torch.Tensor) else temperature
        value, *slopes = row_oracle(x[i].numpy(), y[i].numpy(), temperature=own, **options)
        values[i] = value
        upstream = 1.0 if g is None else float(g[i])
        d_x[i], d_y[i] = (upstream * torch.from_numpy(slope) for slope in slopes)
    return values, d_x, d_y


def evaluate(logits, ref, *, g=None, **options):
    """Values of kl_divergence, and the gradients of Σ g·value with respect to both sides."""
    x, y = (t.detach().clone().requires_grad_() for t in (logits, ref))
    values = fastrlhf.kl_divergence(x, y, **options)
    upstream = torch.ones_like(values) if g is None else g.to(values)
    return values.detach(), *autograd.grad(values, (x, y), upstream)


def random_pair(rows, vocab, device, dtypes=(torch.float32, torch.float32), spread=2.0):
    """Logits of both sides, which agree in part."""
    common = torch.randn(rows, vocab, device=device)
    own = [torch.randn(rows, vocab, device=device) for _ in range(2)]
    return [(spread * (common + 0.5 * x)).to(t) for x, t in zip(own, dtypes, strict=True)]


def assert_rows_as_accurate(found, plain, expected, mask, ulps=None):
    """The same, with the budget that the plain formula's errors give."""
    assert_gradient_as_accurate(found, plain, expected, largest(expected, mask), ulps)


def largest(gradient, mask):
    return torch.where(mask.cpu(), gradient.abs().argmax(1), -1)


def assert_close_to_oracle(found, plain, expected):
    """Compare values, and both gradients entry by entry."""
    for name, own, by_plain, exact in zip(
        ("value", "policy", "reference"), found, plain, expected, strict=True
    ):
        assert_as_accurate(own, by_plain, exact, size=1.0 if name == "value" else None, of=name)


def transform_of(kind: str, rows: int, device) -> dict:
    own = torch.linspace(0.6, 2.0, rows, dtype=torch.float64, device=device)
    return {
        "plain": {},
        "scaled": {"scale": 0.6, "temperature": 0.7},
        "capped": {"softcap": 12.0, "scale": 1.5},
        "all": {"softcap": 8.0, "scale": 0.7, "temperature": own},
    }[kind]
