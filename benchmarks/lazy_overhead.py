"""What a call of a lazy tensor costs beside what it computes: the time of calls on logits so small
that computing takes next to nothing.

Usage: python benchmarks/lazy_overhead.py [FILE]. Medians in microseconds, of plain logits and of
lazy ones, which take turns, go to standard output as JSON, and to FILE.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from environment import publish
from model_step import TINY, random_model
from torch import Tensor, nn

import fastrlhf

ROUNDS, TOKENS = 200, 64
IDS = torch.arange(TOKENS)[None]


def head_and_loss(model: nn.Module) -> Callable[[], Any]:
    """The call of the head and one that is fused, forward and backward."""
    hidden = torch.randn(1, TOKENS, TINY["hidden_size"], requires_grad=True)

    def work() -> None:
        F.cross_entropy(model.lm_head(hidden).flatten(0, 1), IDS.flatten()).backward()

    return work


def of_logits(work: Callable[[Tensor], Any], *, build: bool = False) -> Callable[..., Any]:
    """What is done with logits that are there."""

    def make(model: nn.Module) -> Callable[[], Any]:
        with torch.no_grad():
            logits = model.lm_head(torch.randn(1, TOKENS, TINY["hidden_size"]))
        if build:
            logits.sigmoid()
        return lambda: work(logits)

    return make


CALLS: dict[str, Callable[[nn.Module], Callable[[], Any]]] = {
    "head and cross_entropy, forward and backward": head_and_loss,
    "shape": of_logits(lambda logits: logits.shape),
    "slice": of_logits(lambda logits: logits[:, :-1]),
    "cross_entropy": of_logits(lambda x: F.cross_entropy(x[0], IDS[0])),
    "a function of built logits": of_logits(torch.sigmoid, build=True),
}


def medians(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Of microseconds."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            taken[name].append(1e6 * (time.perf_counter() - begin))
    return {name: round(statistics.median(x[ROUNDS // 10 :]), 1) for name, x in taken.items()}


def measured(call: Callable[[nn.Module], Callable[[], Any]]) -> dict[str, float]:
    """Of two models that are alike, of which one makes lazy logits."""
    plain, lazy = (random_model(torch.device("cpu"), **TINY) for _ in range(2))
    with fastrlhf.lazy_logits(lazy):
        return medians({"plain": call(plain), "lazy": call(lazy)})


def main() -> None:
    """Measure, and print."""
    taken = {name: measured(call) for name, call in CALLS.items()}
    sizes = {"tokens": TOKENS, "vocab": TINY["vocab_size"], "width": TINY["hidden_size"]}
    publish({"sizes": sizes, "microseconds": taken})


if __name__ == "__main__":
    main()
