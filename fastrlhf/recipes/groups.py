"""Sample groups and compute their advantages: what GRPO and TRPO share.

A group is several completions of one prompt. Each completion's score is compared with the scores of
the others in its group, so no critic is needed.
"""

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
    """What a step learns from: a rollout in which completions of one prompt are adjacent rows."""

    batch: Rollout
    scores: Tensor  # (B,)
    advantages: Tensor  # (B,) relative to the group

    def figures(self) -> dict[str, Tensor]:
        """Return the means that the log of every step contains."""
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
    """Sample the groups of a step, score them, and compute each completion's advantage within its
    group. `kind` is passed to `group_advantages`.
    """
    batch = sample_step(
        run, policy, tokenizer, options, step, options.prompts_per_step, options.group_size
    )
    scores = reward(batch)
    prompts = torch.arange(options.prompts_per_step, device=scores.device)
    groups = prompts.repeat_interleave(options.group_size)
    return Groups(batch, scores, group_advantages(scores, groups, kind=kind))
