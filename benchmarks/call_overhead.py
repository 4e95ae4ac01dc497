"""Measure what a call costs on a CPU, apart from its loops over logits.

The batch is so small that the loops take next to no time.

Usage: python benchmarks/call_overhead.py [FILE]. The results go to standard output as JSON, and to
FILE: medians in microseconds, once for calls that follow each other directly ("warm"), and once for
calls between which other work has emptied the processor's caches ("cold").
"""

import statistics
import time

import torch
from environment import publish

import fastrlhf

ROUNDS, ROWS, VOCAB = 200, 64, 64
OTHER_WORK_BYTES = 2**26


def microseconds(impl: str, *, cold: bool) -> float:
    logits, targets = torch.randn(ROWS, VOCAB), torch.randint(VOCAB, (ROWS,))
    others = torch.zeros(OTHER_WORK_BYTES, dtype=torch.uint8)
    taken = []
    for _ in range(ROUNDS):
        if cold:
            others.add_(1)
        begin = time.perf_counter()
        fastrlhf.token_logprobs(logits, targets, impl=impl)
        taken.append(time.perf_counter() - begin)
    return round(1e6 * statistics.median(taken[ROUNDS // 10 :]))


def main() -> None:
    taken = {
        impl: {"warm": microseconds(impl, cold=False), "cold": microseconds(impl, cold=True)}
        for impl in ("compiled", "eager")
    }
    publish({"sizes": {"rows": ROWS, "vocab": VOCAB}, "microseconds": taken})


if __name__ == "__main__":
    main()
