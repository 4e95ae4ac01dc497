"""Measure what a call of a lazy tensor costs, apart from the computation itself.

The logits are so small that the computation takes next to no time.

Usage: python benchmarks/lazy_overhead.py [FILE]. Medians in microseconds of calls on plain and on
lazy logits, which take turns, go to standard output as JSON, and to FILE.
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
    """Return a call of the head and a fused loss on it, with the backward."""
    hidden = torch.randn(1, TOKENS, TINY["hidden_size"], requires_grad=True)

    def work() -> None:
        F.cross_entropy(model.lm_head(hidden).flatten(0, 1), IDS.flatten()).backward()

    return work


def of_logits(work: Callable[[Tensor], Any], *, build: bool = False) -> Callable[..., Any]:
    """Make the call of a function on logits that exist already; `build`: that are built already."""

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
    """Time calls that take turns, and return their medians in microseconds."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            taken[name].append(1e6 * (time.perf_counter() - begin))
    return {name: round(statistics.median(x[ROUNDS // 10 :]), 1) for name, x in taken.items()}


def measured(call: Callable[[nn.Module], Callable[[], Any]]) -> dict[str, float]:
    """Time a call on two equal models, of which the second makes lazy logits."""
    plain, lazy = (random_model(torch.device("cpu"), **TINY) for _ in range(2))
    with fastrlhf.lazy_logits(lazy):
        return medians({"plain": call(plain), "lazy": call(lazy)})


def main() -> None:
    """Run the command: measure all calls and publish the figures."""
    taken = {name: measured(call) for name, call in CALLS.items()}
    sizes = {"tokens": TOKENS, "vocab": TINY["vocab_size"], "width": TINY["hidden_size"]}
    publish({"sizes": sizes, "microseconds": taken})


if __name__ == "__main__":
    main()
