"""A batch and a training step for the compiled backend, and what it has compiled and said."""

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import fastrlhf
from fastrlhf.ops import compiled

VOCAB = 300


def batch(rows: int, vocab: int = VOCAB, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, vocab).to(dtype).requires_grad_(), torch.randint(vocab, (rows,))


def step(logits: Tensor, targets: Tensor, **options) -> tuple[Tensor, Tensor]:
    logprobs = fastrlhf.token_logprobs(logits, targets, **options)
    return logprobs.detach(), torch.autograd.grad(logprobs.sum(), logits)[0]


def told(caplog) -> list[str]:
    """What this library logged."""
    return [record.getMessage() for record in caplog.records if record.name == "fastrlhf"]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def uncompiled(function: compiled.RowFunction) -> compiled.RowFunction:
    return compiled.RowFunction(function.function, " ".join(function.dimensions))
