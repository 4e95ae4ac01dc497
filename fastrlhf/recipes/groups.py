"""Several completions of one prompt, which are each other's baseline: what GRPO and TRPO share."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf import group_advantages
from fastrlhf.losses.groups import AdvantageKind

from .rewards import Scorer
from .rollout import Rollout
from .run import Run
from .sampling import sample_step
from .settings import EvaluationOptions, Positive, TwoOrMore, option


@dataclass
class GroupOptions(EvaluationOptions):
    """How groups are sampled and scored."""

    prompts_per_step: Positive = option(4, "prompts of each process in one step")
    group_size: TwoOrMore = option(8, "completions of each prompt")
    reward: str = option("vader", "vader, or the output folder of the recipe reward")


class Groups(NamedTuple):
    """What a step learns from; the completions of one prompt stand one after the other."""

    batch: Rollout
    scores: Tensor  # (B,)
    advantages: Tensor  # (B,) over the others of the group

    def figures(self) -> dict[str, Tensor]:
        """Give the means that every curve begins with."""
        kl = (self.batch["logprobs"] - self.batch["ref_logprobs"]).sum(-1)
        return {"reward": self.scores.mean(), "kl": kl.mean()}


def sample_groups(
    run: Run,
    policy: Any,
    tokenizer: Any,
    reward: Scorer,
    options: GroupOptions,
    step: int,
    kind: AdvantageKind = "grpo",
) -> Groups:
    """Sample the groups of a step, score them, and compare each with its own; `kind` is that of
    `group_advantages`.
    """
    batch = sample_step(
        run, policy, tokenizer, options, step, options.prompts_per_step, options.group_size
    )
    scores = reward(batch)
    prompts = torch.arange(options.prompts_per_step, device=scores.device)
    groups = prompts.repeat_interleave(options.group_size)
    return Groups(batch, scores, group_advantages(scores, groups, kind=kind))
