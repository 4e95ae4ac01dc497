"""Measure the errors of log-probs and KL penalties where plain formulas lose digits.

Usage: python benchmarks/numerics.py [FILE]. Relative errors against fp64 go to standard output as
JSON, and to FILE. For the log-probs, the target's logit exceeds that of all other words by some
nats. The penalty is the estimator k3 for a policy that is near its reference.
"""

import math

import torch
from environment import publish
from torch import Tensor

import fastrlhf

VOCAB = 32_000
LEADS = [float(x) for x in range(2, 41, 2)]
DISTANCES = [10.0**-x for x in range(7)]


def relative(found: Tensor, exact: list[float]) -> list[float]:
    """Compute relative errors. An error of 1 means that all digits of a value are lost."""
    errors = [abs(x - y) / abs(y) for x, y in zip(found.double().tolist(), exact, strict=True)]
    return [float(f"{error:.3g}") for error in errors]


def log_probs() -> dict[str, list[float]]:
    logits = torch.zeros(len(LEADS), VOCAB)
    logits[:, 0] = torch.tensor(LEADS)
    targets = torch.zeros(len(LEADS), dtype=torch.long)
    exact = [-math.log1p((VOCAB - 1) * math.exp(-lead)) for lead in LEADS]
    plain = logits.log_softmax(-1)[:, 0]
    return {
        "plain, float32": relative(plain, exact),
        "plain, bfloat16": relative(logits.bfloat16().log_softmax(-1)[:, 0], exact),
        "fastrlhf, float32": relative(fastrlhf.token_logprobs(logits, targets), exact),
        "fastrlhf, bfloat16": relative(fastrlhf.token_logprobs(logits.bfloat16(), targets), exact),
    }


def penalties() -> dict[str, list[float]]:
    logprobs = torch.full((1, len(DISTANCES)), 0.0)
    reference = torch.tensor([DISTANCES])
    distances = reference[0].double().tolist()
    exact = [math.expm1(x) - x if x > 1e-3 else x**2 / 2 + x**3 / 6 + x**4 / 24 for x in distances]
    plain = ((reference - logprobs).exp() - (reference - logprobs) - 1)[0]
    ours = fastrlhf.kl_penalty(logprobs, reference, "k3")[0]
    return {"plain, float32": relative(plain, exact), "fastrlhf, float32": relative(ours, exact)}


def main() -> None:
    publish({
        "sizes": {"vocab": VOCAB},
        "log-prob of a target that leads by": {"nats": LEADS, "errors": log_probs()},
        "k3 of a log-ratio of": {"nats": DISTANCES, "errors": penalties()},
    })  # fmt: skip


if __name__ == "__main__":
    main()
