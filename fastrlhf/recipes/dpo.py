"""Direct preference optimization: `python -m fastrlhf.recipes.dpo` (`make demo` runs it small).

This is the controlled sentiment experiment of the DPO paper (arXiv:2305.18290, section 6). The
model itself writes two completions of each prompt, the kinder one is preferred, and LoRA adapters
learn the preference. The reference is the same model with its adapters off. Held-out prompts show
what the model learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

import fastrlhf.recipes.packages  # noqa: F401  reports missing packages
from fastrlhf import model_dpo_loss

from .comparison import compare
from .curves import Panel
from .draws import draw
from .evaluation import Evaluation, conclude, evaluate
from .models import load_policy
from .preference import PairData
from .prompts import TRAIN_PROMPTS
from .run import Run, run_command
from .sampling import sample_completions
from .sentiment import Pair, accuracy, preference_pairs
from .settings import (
    AdapterOptions,
    Bound,
    EvaluationOptions,
    OptionError,
    Positive,
    PositiveFloat,
    option,
    parse,
)

LossType = Literal[
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "aot", "aot_unpaired",
]  # fmt: skip
_SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")


@dataclass
class DPOOptions(EvaluationOptions, AdapterOptions):
    """Options of DPO."""

    steps: Positive = option(24, "of the optimizer")
    pairs_per_step: Positive = option(8, "pairs of each process in one step")
    draw_pairs: Positive = option(128, "pairs that are sampled, ties included")
    minimal_gap: PositiveFloat = option(0.3, "in VADER's score, below which a pair is a tie")
    learning_rate: PositiveFloat = option(2e-3, "of AdamW, after its rise falling to 0")
    beta: PositiveFloat = option(0.1, "how strongly the policy is held to the reference")
    loss_type: LossType = option("sigmoid", "of the DPO family")
    label_smoothing: Annotated[float, Bound(0, most=0.49)] = option(
        0.0, "probability that a preference is wrong; of some types"
    )

    def __post_init__(self) -> None:
        """Check rules that involve more than one option."""
        super().__post_init__()
        if self.label_smoothing > 0 and self.loss_type not in _SMOOTHED:
            raise OptionError(f"argument --label_smoothing: is of {', '.join(_SMOOTHED)}")
        if self.label_smoothing == 0 and self.loss_type == "exo_pair":
            raise OptionError(
                "argument --label_smoothing: expected more than 0 for exo_pair, whose paper takes "
                "0.001"
            )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe with command-line arguments, and return what its `metrics.json` holds."""
    return train(parse(DPOOptions, arguments, "dpo", __doc__ or ""))


def train(options: DPOOptions) -> dict[str, Any]:
    """Run the recipe; see the module.

    Raises:
        ValueError: no pair of completions differs enough in sentiment.
    """
    run = Run("dpo", options)
    policy, tokenizer = load_policy(run)

    def judge(when: str) -> Evaluation:
        return evaluate(run, policy, tokenizer, options, when)

    before = judge("before")
    pairs = _collect_pairs(run, policy, tokenizer, options)
    with run.report.phase("Reference log-probs, adapters off"):
        data = PairData(
            policy, pairs, tokenizer.pad_token_id, options.batch_size, options.temperature
        )
    (model,) = run.train(policy, learning_rate=options.learning_rate, total=options.steps)
    for step in run.steps(options.steps, judge):
        batch, reference = data.of_step(step, options.pairs_per_step, options.seed)
        losses, rewards = model_dpo_loss(
            model,
            batch.input_ids,
            batch.attention_mask,
            reference,
            batch.chosen,
            batch.rejected,
            options.beta,
            mask=batch.completion_mask,
            loss_type=options.loss_type,
            label_smoothing=options.label_smoothing,
            temperature=options.temperature,
        )
        run.update(losses.mean())
        margins = rewards[batch.chosen] - rewards[batch.rejected]
        run.log({"loss": losses.mean(), "accuracy": accuracy(margins), "margin": margins.mean()})
    after = judge("after")
    run.note_peak_memory()
    with run.report.phase("Compare fused and plain loss"):
        few = torch.arange(min(8, len(pairs)))
        comparison = compare(policy, *data.batch(few), options.beta, options.temperature)
    run.report.console.print(comparison.table())
    panels = [
        Panel("DPO loss", "loss"),
        Panel("Pairs in order (a tie is half)", "accuracy", (0, 1.05)),
        Panel("Margin of the implicit rewards", "margin"),
    ]
    return conclude(
        run,
        policy,
        tokenizer,
        before,
        after,
        panels,
        pairs=len(pairs),
        comparison=comparison._asdict(),
    )


def _collect_pairs(
    run: Run, policy: PeftModel, tokenizer: PreTrainedTokenizerBase, options: DPOOptions
) -> list[Pair]:
    """Sample two completions for each prompt, and keep the pairs that differ in sentiment."""
    drawn = draw(TRAIN_PROMPTS, 0, options.draw_pairs * run.processes, options.seed)
    prompts = [prompt for prompt in run.share(drawn) for _ in range(2)]
    with run.report.phase("Sample training completions", len(prompts)) as advance:
        samples = sample_completions(
            policy, tokenizer, prompts, options, options.seed + 7919 * run.rank, advance
        )
    pairs = preference_pairs(samples, options.minimal_gap)
    run.report.line(
        f"  {len(pairs)} of {len(samples) // 2} pairs differ in sentiment by "
        f"{options.minimal_gap:g} or more"
    )
    if run.mean(float(bool(pairs))) < 1:  # if one process has no pairs, all stop
        raise OptionError(
            "argument --minimal_gap: no two completions of a prompt differ in sentiment by "
            f"{options.minimal_gap:g}: the model's texts carry no preference"
        )
    return pairs


if __name__ == "__main__":
    run_command(main)
