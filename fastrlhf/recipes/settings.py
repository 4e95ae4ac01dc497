"""What the sentiment demo can be told; the defaults fit its time on two CPU cores."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample completions."""

    new_tokens: int = 24
    temperature: float = 0.8
    batch_size: int = 128


@dataclass(frozen=True)
class TrainingOptions:
    """How to train: AdamW on LoRA adapters, the learning rate falling to 0 linearly."""

    steps: int = 26
    pairs_per_step: int = 6
    beta: float = 0.1
    learning_rate: float = 2e-3
    lora_rank: int = 8


@dataclass(frozen=True)
class Settings:
    """Which model to train where, on what, and where to write about it."""

    model: str  # a GGUF file, a folder in the format of transformers, or a hub id
    device: str
    output: Path
    seed: int = 0
    pairs_per_prompt: int = 2
    minimal_gap: float = 0.3  # in VADER's compound score, between the completions of a pair
    held_out_per_prompt: int = 2
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
