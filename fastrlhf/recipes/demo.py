"""Align a small language model with DPO: `python -m fastrlhf.recipes.demo`.

This is the DPO recipe (`dpo`) with few options. It samples completions of film-review openings,
prefers the ones with the higher sentiment, and trains LoRA adapters with the fused loss. At the end
it compares the fused loss with the plain one, with the memory of both, and shows the sentiment on
held-out prompts before and after training.
"""

import argparse
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_PACKAGES = (
    "transformers",
    "peft",
    "accelerate",
    "gguf",
    "vaderSentiment",
    "matplotlib",
    "rich",
    "tensorboard",
)
_STEPS = 26


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the demo with command-line arguments, and return what its `metrics.json` holds."""
    started = time.perf_counter()
    given = _parser().parse_args(arguments)
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise SystemExit(f'The demo needs {", ".join(missing)}: pip install "fastrlhf[demo]"')
    from .dpo import DPOOptions, train
    from .models import source_of

    # Sampling and evaluation shrink in proportion to the steps, so that a short demo is short.
    share = min(1.0, given.steps / _STEPS)
    metrics = train(
        DPOOptions(
            model=source_of(given.model),
            device=given.device,
            output=str(given.output),
            seed=given.seed,
            steps=given.steps,
            pairs_per_step=6,
            lora_rank=8,
            lora_targets="all-linear",
            draw_pairs=max(16, round(128 * share)),
            eval_prompts=max(8, round(40 * share)),
        )
    )
    print(f"{time.perf_counter() - started:.0f} s in all")
    return metrics


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastrlhf.recipes.demo",
        description="DPO on a small language model, which learns to finish film reviews kindly.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=_positive, default=_STEPS)
    parser.add_argument(
        "--model", help="hub id, folder or GGUF file (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder")
    parser.add_argument("--seed", type=_natural, default=0)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {number}")
    return number


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {number}")
    return number


if __name__ == "__main__":
    from .run import run_command

    run_command(main)
