"""Measure bytes and time of a step with a vocabulary that is split between ranks.

This library is compared with the usual vocabulary-parallel formula, which Megatron computes, in
plain PyTorch. The usual formula finds the largest logit by an all-reduce, the sum of exponentials
and the target's logit by a second one, and the gradient of the hidden states by a third.

Usage: python benchmarks/ranks.py [FILE]. Two processes with one thread each take steps of both
forms in turn. Figures go to standard output as JSON, and to FILE.

Dims: N tokens, H hidden, V vocabulary, W ranks.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from environment import publish
from torch import Tensor

import fastrlhf

RANKS, ROUNDS = 2, 11
SIZES = {"tokens": 512, "hidden": 512, "vocab": 32000}


class _ToAll(torch.autograd.Function):
    """Return hidden states unchanged; in the backward, sum their gradient over ranks."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, d_hidden):
        d_hidden = d_hidden.float()
        dist.all_reduce(d_hidden)
        return d_hidden


class _ParallelLogprobs(torch.autograd.Function):
    """Compute log-probs from a rank's part of the logits, which the softmax then overwrites."""

    @staticmethod
    def forward(ctx, logits, targets, start):
        logits = logits.float()
        peak = logits.amax(-1)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        logits = logits - peak.unsqueeze(-1)
        own = targets - start
        here = (own >= 0) & (own < logits.shape[-1])
        place = torch.where(here, own, 0).unsqueeze(-1)
        target = torch.where(here, logits.gather(-1, place).squeeze(-1), 0.0)
        softmax = logits.exp_()
        sums = torch.stack((target, softmax.sum(-1)))
        dist.all_reduce(sums)
        softmax.div_(sums[1].unsqueeze(-1))
        ctx.save_for_backward(softmax, here, place)
        return sums[0] - sums[1].log()

    @staticmethod
    def backward(ctx, d_logprobs):
        softmax, here, place = ctx.saved_tensors
        d_logits = softmax.neg_()
        d_logits.scatter_add_(-1, place, here.to(d_logits).unsqueeze(-1))
        return d_logits.mul_(d_logprobs.unsqueeze(-1)), None, None


class Part(NamedTuple):
    """The tensors of a step that one rank holds."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V/W, H)
    targets: Tensor  # (N,)
    start: int


def usual(part: Part) -> Tensor:
    logits = F.linear(_ToAll.apply(part.hidden), part.weight)
    return _ParallelLogprobs.apply(logits, part.targets, part.start)


def ours(part: Part) -> Tensor:
    group = dist.group.WORLD
    return fastrlhf.linear_token_logprobs(part.hidden, part.weight, part.targets, group=group)


def ours_as_a_loss(part: Part) -> Tensor:
    group = dist.group.WORLD
    return -fastrlhf.linear_cross_entropy(
        part.hidden, part.weight, part.targets, reduction="sum", group=group
    )


FORMS: dict[str, Callable[[Part], Tensor]] = {
    "usual": usual, "linear_token_logprobs": ours, "linear_cross_entropy": ours_as_a_loss,
}  # fmt: skip


def problem(rank: int, *, trained: bool) -> Part:
    torch.manual_seed(0)
    tokens, width, vocab = SIZES.values()
    weight = torch.randn(vocab, width) * width**-0.5
    hidden = torch.randn(tokens, width).requires_grad_()
    own = weight.chunk(RANKS)[rank].clone().requires_grad_(trained)
    return Part(hidden, own, torch.randint(vocab, (tokens,)), rank * (vocab // RANKS))


def step(form: Callable[[Part], Tensor], part: Part) -> tuple[float, Tensor]:
    """Run a forward and backward that all ranks begin together.

    Returns its seconds, and the gradient of the hidden states.
    """
    part.hidden.grad = part.weight.grad = None
    dist.barrier()
    begin = time.perf_counter()
    form(part).sum().backward()
    return time.perf_counter() - begin, part.hidden.grad


def sent_bytes(form: Callable[[Part], Tensor], part: Part) -> dict[str, int]:
    """Count the bytes that a rank passes to each kind of collective in a step."""
    sent: dict[str, int] = {}

    def counting(name: str) -> Callable[..., Any]:
        kind = name.removesuffix("_single").removesuffix("_into_tensor")
        own = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            x = args[1] if "gather" in name else args[0]
            sent[kind] = sent.get(kind, 0) + x.numel() * x.element_size()
            return own(*args, **kwargs)

        return call

    names = ("all_gather_single", "all_gather_into_tensor", "all_reduce")
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}
    for name in originals:
        setattr(dist, name, counting(name))
    try:
        step(form, part)
    finally:
        for name, own in originals.items():
            setattr(dist, name, own)
    return sent


def measure(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    found: dict[str, Any] = {}
    for head, trained in (("frozen head", False), ("trained head", True)):
        part = problem(rank, trained=trained)
        seconds: dict[str, list[float]] = {name: [] for name in FORMS}
        gradients = {}
        for _ in range(ROUNDS):
            for name, form in FORMS.items():
                taken, gradients[name] = step(form, part)
                seconds[name].append(taken)
        for name, gradient in gradients.items():
            error = (gradient - gradients["usual"]).norm() / gradients["usual"].norm()
            assert error < 1e-5, f"{name}: the gradient is off by {float(error):.1e}"
        found[head] = {
            name: {
                "milliseconds": round(1e3 * statistics.median(seconds[name][1:]), 1),
                "bytes": sent_bytes(form, part),
            }
            for name, form in FORMS.items()
        }
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (folder,), nprocs=RANKS)
        found = json.loads(Path(folder, "found.json").read_text())
    publish({"ranks": RANKS, "sizes": SIZES, **found})


if __name__ == "__main__":
    main()
