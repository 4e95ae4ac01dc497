"""DPO from hidden states, forward and backward: this library, plain PyTorch, and TRL's chunks.

    python benchmarks/bench_linear_dpo_loss.py [--rounds N]

prints time and memory side by side, in one process with the providers taking turns, so that
whatever else the machine does meets all of them. Half of each sequence is a prompt, which has no
target. TRL's function gets the rows with a target alone, as its trainers do on a GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastrlhf
from fastrlhf.recipes.memory import peak_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Sequences, tokens, vocabulary and width: those of SmolLM2-135M, and on a GPU those of Llama 3 8B.
SHAPE = (16, 128, 49152, 576) if DEVICE.type == "cpu" else (16, 1024, 128256, 4096)
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16


class Problem(NamedTuple):
    """One batch: chosen sequences, then rejected ones."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    ref: Tensor


def problem(trained: bool, shape: tuple[int, int, int, int] = SHAPE) -> Problem:
    sequences, tokens, vocab, width = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sequences, tokens, width, generator=generator).to(DEVICE, DTYPE)
    weight = (torch.randn(vocab, width, generator=generator) * 0.05).to(DEVICE, DTYPE)
    targets = torch.randint(vocab, (sequences, tokens), generator=generator)
    targets[:, : tokens // 2] = -100
    ref = torch.randn(sequences, generator=generator) - 5.0 * tokens
    return Problem(
        hidden.requires_grad_(), weight.requires_grad_(trained), targets.to(DEVICE), ref.to(DEVICE)
    )


def fused(p: Problem) -> Tensor:
    chosen, rejected = torch.arange(len(p.ref), device=DEVICE).chunk(2)
    losses, _ = fastrlhf.linear_dpo_loss(p.hidden, p.weight, p.targets, p.ref, chosen, rejected)
    return losses.mean()


def _from_token_logprobs(logprobs: Tensor, p: Problem) -> Tensor:
    score = logprobs.sum(-1) - p.ref
    chosen, rejected = score.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def eager(p: Problem) -> Tensor:
    live = p.targets != -100
    log_p = (p.hidden @ p.weight.T).float().log_softmax(-1)
    logprobs = log_p.gather(-1, torch.where(live, p.targets, 0)[..., None])[..., 0]
    return _from_token_logprobs(logprobs * live, p)


def trl(p: Problem) -> Tensor:
    utils = pytest.importorskip("trl.trainer.utils")
    live = p.targets != -100
    logprobs = utils._ChunkedLogProbFunction.apply(
        p.hidden[live], p.weight, None, p.targets[live], 1.0,
        utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, (),
    )[0]  # fmt: skip
    zeros = torch.zeros(live.shape, device=DEVICE)
    return _from_token_logprobs(zeros.masked_scatter(live, logprobs), p)


PROVIDERS: dict[str, Callable[[Problem], Tensor]] = {"fastrlhf": fused, "eager": eager, "trl": trl}


def step(provider: Callable[[Problem], Tensor], p: Problem) -> None:
    p.hidden.grad = p.weight.grad = None
    provider(p).backward()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def check(provider: Callable[[Problem], Tensor], trained: bool) -> None:
    """Fail unless loss and gradients are those of the plain loss, on a small problem."""
    ours, plain = problem(trained, (4, 8, 1000, 32)), problem(trained, (4, 8, 1000, 32))
    losses = provider(ours), eager(plain)
    bounds = (
        {"rtol": 1e-4, "atol": 1e-6} if torch.float32 == DTYPE else {"rtol": 3e-2, "atol": 1e-3}
    )
    torch.testing.assert_close(*losses, **bounds)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(ours.hidden.grad, plain.hidden.grad, **bounds)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, **bounds)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_and_backward(provider, trained, timed, benchmark) -> None:
    benchmark.group = f"DPO from hidden states, head {'trained' if trained else 'frozen'}"
    check(PROVIDERS[provider], trained)
    p = problem(trained)
    timed(lambda: step(PROVIDERS[provider], p))
    timed.extra_info["peak MiB"] = peak_mib(PROVIDERS[provider], p)


def peak_mib(provider: Callable[[Problem], Tensor], p: Problem) -> float:
    p.hidden.grad = p.weight.grad = None
    return round(peak_memory(lambda: step(provider, p), DEVICE)[1] / 2**20, 1)


def take_turns(p: Problem, rounds: int) -> dict[str, list[float]]:
    """Seconds of each provider, one after the other in every round; the first round is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    for _ in range(rounds + 1):
        for name, provider in PROVIDERS.items():
            start = time.perf_counter()
            step(provider, p)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print("sequences, tokens, vocabulary, width:", SHAPE, DTYPE, "on", DEVICE)
    for trained in (True, False):
        for provider in PROVIDERS.values():
            check(provider, trained)
        p = problem(trained)
        seconds = take_turns(p, rounds)
        memory = {name: peak_mib(provider, p) for name, provider in PROVIDERS.items()}
        print(f"head {'trained' if trained else 'frozen'}: median seconds, and peak MiB")
        for name, values in seconds.items():
            ratios = [a / b for a, b in zip(values, seconds["fastrlhf"], strict=True)]
            low, *_, high = statistics.quantiles(ratios, n=5)
            print(
                f"  {name:<9}{statistics.median(values):7.3f} s, "
                f"{statistics.median(ratios):5.2f} ({low:.2f} to {high:.2f}) times fastrlhf's; "
                f"{memory[name]:8.1f} MiB, {memory[name] / memory['fastrlhf']:5.2f} times"
            )


if __name__ == "__main__":
    main()
