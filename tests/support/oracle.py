"""Token statistics and their gradient, a row at a time in NumPy's fp64: independent of torch's
autograd.
"""

from dataclasses import dataclass

import numpy as np
import torch


def options_of(kind: str, rows: int, device) -> dict:
    """Named combinations of the logit transform."""
    own = torch.linspace(0.5, 2.0, rows, dtype=torch.float64, device=device)
    return {
        "plain": {},
        "scaled": {"scale": 0.3, "temperature": 0.7},
        "capped": {"softcap": 12.0, "scale": 1.5},
        "all": {"softcap": 8.0, "scale": 0.5, "temperature": own},
    }[kind]


@dataclass(frozen=True)
class RowOracle:
    """Statistics of one row, and the gradient of g·logprob + h·entropy + l·lse with respect to its
    logits.
    """

    logprob: float
    entropy: float
    lse: float
    gradient: np.ndarray


def row_oracle(
    x: np.ndarray,
    target: int,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    g: float = 1.0,
    h: float = 0.0,
    l: float = 0.0,
) -> RowOracle:
    """Evaluate the textbook formulas for one row of logits."""
    x = x.astype(np.float64)
    z, chain = scale * x, np.full_like(x, scale)
    if softcap is not None:
        saturation = np.tanh(z / softcap)
        z, chain = softcap * saturation, chain / np.cosh(np.minimum(np.abs(z / softcap), 300)) ** 2
    z, chain = z / temperature, chain / temperature
    top = z.max()
    if top == -np.inf:
        return RowOracle(-np.inf, 0.0, -np.inf, np.zeros_like(x))
    weight = np.exp(z - top)
    p = weight / weight.sum()
    log_p = (z - top) - np.log(weight.sum())
    with np.errstate(invalid="ignore"):
        surprise = np.where(p > 0, p * log_p, 0.0)
        spread = np.where(p > 0, p * (log_p - surprise.sum()), 0.0)
    onehot = np.eye(1, x.size, target)[0]
    others = np.delete(weight, target).sum() / weight.sum()
    hit = np.where(onehot == 1, g * others, -g * p)
    return RowOracle(
        -np.log1p(others / p[target]) if others < 0.5 else log_p[target],
        -surprise.sum(),
        top + np.log(weight.sum()),
        (hit - h * spread + l * p) * chain,
    )


@dataclass(frozen=True)
class Oracle:
    """The same for all rows, as fp64 tensors on the CPU: (N,) and (N, V)."""

    logprob: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor
    gradient: torch.Tensor


def token_stats_oracle(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    g: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    l: torch.Tensor | None = None,
) -> Oracle:
    """Evaluate `row_oracle` for every row of (N, V) logits; ignored rows are zeros."""
    rows, vocab = logits.shape
    x = logits.detach().cpu().double().numpy()
    zeros = torch.zeros(rows, dtype=torch.float64)
    found = Oracle(zeros, zeros.clone(), zeros.clone(), torch.zeros(rows, vocab).double())
    for i in range(rows):
        if targets[i] == ignore_index:
            continue
        row = row_oracle(
            x[i],
            int(targets[i]),
            temperature=float(temperature[i])
            if isinstance(temperature, torch.Tensor)
            else temperature,
            softcap=softcap,
            scale=scale,
            g=1.0 if g is None else float(g[i]),
            h=0.0 if h is None else float(h[i]),
            l=0.0 if l is None else float(l[i]),
        )
        found.logprob[i], found.entropy[i], found.lse[i] = row.logprob, row.entropy, row.lse
        found.gradient[i] = torch.from_numpy(row.gradient)
    return found
