"""Trust region policy optimization: `python -m fastrlhf.recipes.trpo --max-kl 0.02`.

Each step follows the natural gradient as far as a bound on KL(old ‖ new) allows
(arXiv:1502.05477). This KL is exact: it sums over the whole vocabulary and is averaged over tokens.
Nothing else limits the policy: there is no clipping, no penalty and no learning rate. The score of
a completion is compared with the scores of other completions of the same prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor

import fastrlhf.recipes.packages  # noqa: F401  reports missing packages
from fastrlhf import TrustRegionInfo, lm_head, trpo_step

from .curves import Panel
from .evaluation import Evaluation, conclude, evaluate
from .groups import GroupOptions, sample_groups
from .models import load_policy
from .rewards import described, scorer
from .rollout import Rollout
from .run import Run, run_command
from .settings import (
    LoraOptions,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    TwoOrMore,
    option,
    parse,
)


@dataclass
class TRPOOptions(GroupOptions, LoraOptions):
    """Options of TRPO."""

    steps: Positive = option(6, "rounds of sampling and one step of the policy")
    group_size: TwoOrMore = option(4, "completions of each prompt")
    max_kl: PositiveFloat = option(0.02, "δ, nats a token, that a step may move the policy")
    cg_iterations: Positive = option(5, "products with the Fisher matrix for a direction")
    damping: NonNegativeFloat = option(0.01, "λ, added to that matrix")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe with command-line arguments, and return what its `metrics.json` holds."""
    return train(parse(TRPOOptions, arguments, "trpo", __doc__ or ""))


def train(options: TRPOOptions) -> dict[str, Any]:
    """Run the recipe; see the module."""
    run = Run("trpo", options)
    policy, tokenizer = load_policy(run)
    reward = scorer(options.reward, run.device, options.batch_size)

    def judge(when: str) -> Evaluation:
        return evaluate(run, policy, tokenizer, options, when)

    before = judge("before")
    run.keep(policy)
    for step in run.steps(options.steps, judge):
        groups = sample_groups(run, policy, tokenizer, reward, options, step)
        info = natural_step(policy, groups.batch, groups.advantages, options)
        run.log(
            {
                **groups.figures(),
                "step_kl": info.kl,
                "gain": info.surrogate,
                "accepted": float(info.accepted),
                "backtracks": float(info.backtracks),
            }
        )
    panels = [
        Panel(f"Reward of the samples ({described(options.reward)})", "reward"),
        Panel("KL to the reference, nats a text", "kl"),
        Panel(f"KL of the step, nats a token (bound {options.max_kl:g})", "step_kl"),
        Panel("Times that a step was shortened", "backtracks"),
    ]
    return conclude(run, policy, tokenizer, before, judge("after"), panels)


def natural_step(
    policy: PeftModel, batch: Rollout, advantages: Tensor, options: TRPOOptions
) -> TrustRegionInfo:
    """Take one step of the adapters, together in all processes. The logits are never built."""
    backbone = policy.get_base_model().base_model

    def hidden_states() -> Tensor:
        outputs = backbone(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
        )
        hidden: Tensor = outputs.last_hidden_state
        return hidden[:, :-1]

    return trpo_step(
        policy=hidden_states,
        params=[parameter for parameter in policy.parameters() if parameter.requires_grad],
        targets=batch["input_ids"][:, 1:],
        advantages=advantages,
        mask=batch["completion_mask"][:, 1:],
        max_kl=options.max_kl,
        cg_iterations=options.cg_iterations,
        damping=options.damping,
        temperature=options.temperature,
        head=lm_head(policy),
    )


if __name__ == "__main__":
    run_command(main)
