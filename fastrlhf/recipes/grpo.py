"""Group relative policy optimization: `python -m fastrlhf.recipes.grpo --loss-type dapo`.

There is no critic: the score of a completion is compared with the scores of other completions of
the same prompt (arXiv:2402.03300). The members of the family (GRPO, BNPO, Dr. GRPO, DAPO, GSPO,
CISPO, SAPO) are options of one loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

import fastrlhf.recipes.packages  # noqa: F401  reports missing packages
from fastrlhf import grpo_options, model_policy_loss
from fastrlhf.losses.groups import AdvantageKind

from .curves import Panel
from .evaluation import Evaluation, conclude, evaluate
from .groups import GroupOptions, sample_groups
from .models import load_policy
from .rewards import described, scorer
from .rollout import Rollout
from .run import Run, run_command
from .settings import (
    AdapterOptions,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    option,
    parse,
)


@dataclass
class GRPOOptions(GroupOptions, AdapterOptions):
    """Options of GRPO and its family."""

    steps: Positive = option(12, "rounds of sampling and learning")
    learning_rate: PositiveFloat = option(2e-3, "of AdamW, after its rise falling to 0")
    iterations: Positive = option(1, "updates on the samples of a step")
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"] = option(
        "grpo", "which member of the family"
    )
    kl_coef: NonNegativeFloat = option(0.04, "of the KL to the reference, estimated by k3")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe with command-line arguments, and return what its `metrics.json` holds."""
    return train(parse(GRPOOptions, arguments, "grpo", __doc__ or ""))


def train(options: GRPOOptions) -> dict[str, Any]:
    """Run the recipe; see the module."""
    run = Run("grpo", options)
    policy, tokenizer = load_policy(run)
    reward = scorer(options.reward, run.device, options.batch_size)

    def judge(when: str) -> Evaluation:
        return evaluate(run, policy, tokenizer, options, when)

    before = judge("before")
    (model,) = run.train(policy, learning_rate=options.learning_rate, total=options.steps)
    for step in run.steps(options.steps, judge):
        kind: AdvantageKind = "dr_grpo" if options.loss_type == "dr_grpo" else "grpo"
        groups = sample_groups(run, policy, tokenizer, reward, options, step, kind)
        for _ in range(options.iterations):
            loss, metrics = grpo_loss(run, model, groups.batch, groups.advantages, options)
            run.update(loss)
        run.log(
            {
                **groups.figures(),
                "loss": loss,
                "entropy": metrics["entropy"],
                "clipped": metrics["clip_ratio/region_mean"],
                "equal_groups": _share_of_equal_groups(groups.scores, options.group_size),
            }
        )
    panels = [
        Panel(f"Reward of the samples ({described(options.reward)})", "reward"),
        Panel("KL to the reference, nats a text", "kl"),
        Panel("Entropy, nats a token", "entropy"),
        Panel("Groups of equal rewards", "equal_groups", (0, 1)),
    ]
    return conclude(run, policy, tokenizer, before, judge("after"), panels)


def grpo_loss(
    run: Run, model: nn.Module, batch: Rollout, advantages: Tensor, options: GRPOOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss inside the model's own forward."""
    choice = grpo_options(options.loss_type, kl_coef=options.kl_coef)
    if options.loss_type == "dr_grpo":
        choice["normalizer"] = float(len(advantages) * options.new_tokens)
    elif choice["reduction"] == "token-mean":
        # Data parallelism averages the gradients of the processes. So each process divides its sum
        # by the mean number of tokens of a process, and the result is a mean over all tokens.
        choice["normalizer"] = run.mean(batch["completion_mask"].sum())
    result: tuple[Tensor, dict[str, Tensor]] = model_policy_loss(
        model,
        batch["input_ids"],
        batch["attention_mask"],
        batch["logprobs"],
        advantages,
        mask=batch["completion_mask"],
        ref_logprobs=batch["ref_logprobs"],
        entropy=True,
        temperature=options.temperature,
        **choice,
    )
    return result


def _share_of_equal_groups(scores: Tensor, size: int) -> Tensor:
    """Compute the share of groups whose rewards are all the same, so that they teach nothing."""
    grouped = scores.view(-1, size)
    return (grouped.amax(1) == grouped.amin(1)).float().mean()


if __name__ == "__main__":
    run_command(main)
