"""The sentiment experiment of the DPO paper, small: a model learns to finish film reviews kindly.

Two completions of each prompt, sampled from the model itself, are ordered by their sentiment; DPO
trains LoRA adapters on the pairs, with the model itself as the reference. Other prompts tell what
it learned.
"""

import dataclasses
import json
import platform
from importlib import metadata
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

import fastrlhf

from .comparison import compare
from .curves import save_curves
from .models import add_adapters, load_model
from .preference import PairData, Step, train
from .prompts import HELD_OUT_PROMPTS, TRAIN_PROMPTS
from .report import Report, describe
from .sampling import Sample, sample_completions
from .sentiment import Estimate, by_prompt, estimate, preference_pairs
from .settings import Settings


class Sentiment(NamedTuple):
    """Mean sentiment of the completions of the held-out prompts, over prompts."""

    before: Estimate
    after: Estimate
    difference: Estimate  # of the same prompt, so its error is not that of two independent means


def run(settings: Settings, report: Report) -> dict[str, Any]:
    """Run the experiment, show it, and write `curves.png` and `metrics.json`.

    Returns:
        What `metrics.json` holds.

    Raises:
        ValueError: no pair of completions differs enough in sentiment.
    """
    settings.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)  # for the adapters
    with report.phase("Load the model"):
        base, tokenizer = load_model(settings.model, torch.device(settings.device))
        model = add_adapters(base, settings.training.lora_rank)
    before = _sample_held_out(model, tokenizer, settings, report, "before")
    data = _collect_pairs(model, tokenizer, settings, report)
    steps = _train(model, data, settings, report)
    after = _sample_held_out(model, tokenizer, settings, report, "after")
    with report.phase("Compare fused and plain loss"):
        few = torch.arange(min(8, len(data.pairs)))
        comparison = compare(model, *data.batch(few), settings.training.beta)
    sentiment = _sentiment(before, after)

    report.comparison(comparison)
    report.sentiment(*sentiment, prompts=len(HELD_OUT_PROMPTS))
    report.example(before[-1], after[-1])
    steps_per_pass = data.steps_per_pass(settings.training.pairs_per_step)
    metrics = {
        "settings": dataclasses.asdict(settings),
        "versions": _versions(),
        "seconds": report.seconds,
        "pairs": len(data.pairs),
        "steps_per_pass": steps_per_pass,
        "training": [step._asdict() for step in steps],
        "sentiment": {name: value._asdict() for name, value in sentiment._asdict().items()},
        "comparison": comparison._asdict(),
        "completions": [
            {"prompt": old.prompt, "before": old.completion, "after": new.completion}
            for old, new in zip(before, after, strict=True)
        ],
    }
    image = settings.output / "curves.png"
    save_curves(image, steps, steps_per_pass, sentiment.before, sentiment.after)
    text = json.dumps(metrics, indent=2, default=str, ensure_ascii=False)
    (settings.output / "metrics.json").write_text(text + "\n", encoding="utf-8")
    return metrics


def _sample_held_out(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    report: Report,
    when: str,
) -> list[Sample]:
    """Complete the held-out prompts, from the same random numbers each time."""
    prompts = [prompt for prompt in HELD_OUT_PROMPTS for _ in range(settings.held_out_per_prompt)]
    with report.phase(f"Sample held-out completions, {when}", len(prompts)) as advance:
        return sample_completions(
            model, tokenizer, prompts, settings.sampling, settings.seed + 1, advance
        )


def _collect_pairs(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, report: Report
) -> PairData:
    """Sample completions two by two, keep the pairs with a preference, and add the reference."""
    draws = 2 * settings.pairs_per_prompt
    prompts = [prompt for prompt in TRAIN_PROMPTS for _ in range(draws)]
    with report.phase("Sample training completions", len(prompts)) as advance:
        samples = sample_completions(
            model, tokenizer, prompts, settings.sampling, settings.seed, advance
        )
    pairs = preference_pairs(samples, settings.minimal_gap)
    report.line(
        f"  {len(pairs)} of {len(samples) // 2} pairs differ in sentiment by "
        f"{settings.minimal_gap} or more"
    )
    if not pairs:
        raise ValueError(
            f"no two completions of a prompt differ in sentiment by {settings.minimal_gap}: the "
            "model's texts carry no preference"
        )
    with report.phase("Reference log-probs, adapters off"):
        return PairData(model, pairs, tokenizer.pad_token_id, batch_size=16)


def _train(model: PeftModel, data: PairData, settings: Settings, report: Report) -> list[Step]:
    steps: list[Step] = []
    total = settings.training.steps
    with report.phase("Train", total) as advance:
        for step in train(model, data, settings.training, settings.seed):
            steps.append(step)
            advance(1, describe(step))
            report.step(len(steps), total, step)
    return steps


def _sentiment(before: list[Sample], after: list[Sample]) -> Sentiment:
    old, new = by_prompt(before), by_prompt(after)
    gains = [new_score - old_score for old_score, new_score in zip(old, new, strict=True)]
    return Sentiment(estimate(old), estimate(new), estimate(gains))


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "peft", "vaderSentiment")
    versions = {name: metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "fastrlhf": fastrlhf.__version__, **versions}
