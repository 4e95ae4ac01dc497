"""The batches that are timed: small ones on a CPU; on a GPU those of real models.

They come in stages. The first stage is the central batch, the next has batches that differ from it
in one property, then come those that differ in two, and so on. So a run that is cut short has
measured the most telling batches.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from batch import Shape, Source

# In each list the value of the central batch comes first.
_GPU_ROWS = [8192, 4096, 16384, 32768]
_GPU_VOCABS = [128256, 32000, 50257, 151936, 262144]
_GPU_WIDTHS = [4096, 2048]
_PROMPTS = [0.5, 0.0]
_TOKENS = 1024


def shapes(source: Source, device: torch.device, stage: int | None = None) -> list[Shape]:
    """Return the batches for operations of a source, those of one stage or of all stages."""
    staged = _on_gpu(source) if device.type == "cuda" else _on_cpu(source)
    return [shape for s, shape in staged if stage in (None, s)]


def stages(device: torch.device) -> int:
    """Return the number of stages."""
    staged = _on_gpu("hidden") if device.type == "cuda" else _on_cpu("hidden")
    return 1 + max(stage for stage, _ in staged)


def _on_cpu(source: Source) -> list[tuple[int, Shape]]:
    if source == "tokens":
        return [(0, Shape(64, 512)), (1, Shape(64, 1024))]
    if "hidden" in source:  # in fp32, because most CPUs multiply bf16 far slower
        center = Shape(8, 32, 32000, 256)
        others = [{"vocab": 50257}, {"sequences": 16}, {"prompt": 0.0}]
    else:
        center = Shape(8, 64, 32000, dtype=torch.bfloat16)
        others = [{"vocab": 128256}, {"sequences": 16}, {"prompt": 0.0}, {"dtype": torch.float32}]
    staged = [(0, center), *((1, replace(center, **change)) for change in others)]
    return _with_trained_head(staged) if "hidden" in source else staged


def _on_gpu(source: Source) -> list[tuple[int, Shape]]:
    if source == "tokens":
        return [(0, Shape(64, _TOKENS)), (1, Shape(512, _TOKENS))]
    hidden = "hidden" in source
    choices = [_GPU_ROWS, _GPU_VOCABS, _PROMPTS, _GPU_WIDTHS if hidden else [0]]
    staged = []
    for chosen in itertools.product(*choices):
        rows, vocab, prompt, width = chosen
        stage = sum(x != values[0] for x, values in zip(chosen, choices, strict=True))
        sizes = (rows // _TOKENS, _TOKENS, vocab, width)
        staged.append((stage, Shape(*sizes, prompt, dtype=torch.bfloat16)))
    return _with_trained_head(staged) if hidden else staged


def _with_trained_head(staged: list[tuple[int, Shape]]) -> list[tuple[int, Shape]]:
    """Return each shape twice: with a frozen head, then with a trained head."""
    return [
        (stage, replace(shape, trained=trained))
        for stage, shape in staged
        for trained in (False, True)
    ]
