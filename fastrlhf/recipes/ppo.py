"""Proximal policy optimization: `python -m fastrlhf.recipes.ppo`.

This is RLHF as in InstructGPT (arXiv:2203.02155; PPO: 1707.06347; the adaptive penalty:
1909.08593). It needs four models, and with LoRA one model serves as three of them. The policy
writes, the reference is the policy with its adapters off, and the critic is a head on the policy's
hidden states (or a model of its own with `--separate-critic`). The reward is VADER or the model of
the recipe `reward` (`--reward FOLDER`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

import fastrlhf.recipes.packages  # noqa: F401  reports missing packages
from fastrlhf import gae, model_policy_loss, shaped_rewards, value_loss, whiten

from .adaptive_kl import AdaptiveKL
from .critics import SeparateCritic, ValueHead
from .curves import Panel
from .draws import minibatches
from .evaluation import Evaluation, conclude, evaluate
from .models import load_policy
from .rewards import described, scorer
from .rollout import Rollout
from .run import Run, run_command
from .sampling import sample_step
from .settings import (
    AdapterOptions,
    EvaluationOptions,
    NonNegativeFloat,
    OptionError,
    Positive,
    PositiveFloat,
    Share,
    option,
    parse,
)


@dataclass
class PPOOptions(EvaluationOptions, AdapterOptions):
    """Options of PPO."""

    steps: Positive = option(12, "rounds of sampling and learning")
    completions_per_step: Positive = option(32, "that each process samples in a step")
    epochs: Positive = option(2, "passes over the samples of a step")
    minibatches: Positive = option(1, "updates in a pass")
    learning_rate: PositiveFloat = option(1.5e-3, "of AdamW, after its rise falling to 0")
    reward: str = option("vader", "vader, or the output folder of the recipe reward")
    truncation_penalty: NonNegativeFloat = option(0.0, "taken off the score of a cut completion")
    separate_critic: bool = option(False, "a value model of its own, not a head on the policy")
    kl_coef: NonNegativeFloat = option(0.05, "of log π/π_ref in the rewards, at first")
    kl_target: PositiveFloat | None = option(None, "nats a text, to which kl_coef adapts")
    kl_gain: PositiveFloat = option(0.1, "how fast it adapts: K_β of 1909.08593")
    # The bound seems large because the log-prob of a single token can change by ten nats in one
    # update, and the mean takes the square of each change.
    kl_stop: PositiveFloat | None = option(
        0.5, "mean of (change of a token's log-prob)²/2 at which the next step begins"
    )
    clip_range: PositiveFloat = option(0.2, "of the ratio")
    value_clip: PositiveFloat = option(0.2, "of the change of a value")
    value_coef: NonNegativeFloat = option(0.1, "of the value loss")
    gamma: Share = option(1.0, "discount")
    lam: Share = option(0.95, "λ of generalized advantage estimation")

    def __post_init__(self) -> None:
        """Check rules that involve more than one option."""
        super().__post_init__()
        if self.kl_target is not None and self.kl_coef == 0:
            raise OptionError("argument --kl_target: needs a kl_coef to start from, got 0")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe with command-line arguments, and return what its `metrics.json` holds."""
    return train(parse(PPOOptions, arguments, "ppo", __doc__ or ""))


def train(options: PPOOptions) -> dict[str, Any]:
    """Run the recipe; see the module."""
    run = Run("ppo", options)
    policy, tokenizer = load_policy(run)
    reward = scorer(options.reward, run.device, options.batch_size)
    penalty = AdaptiveKL(options.kl_coef, options.kl_target, options.kl_gain)
    run.accelerator.register_for_checkpointing(penalty)

    def judge(when: str) -> Evaluation:
        return evaluate(run, policy, tokenizer, options, when)

    before = judge("before")
    kind = SeparateCritic if options.separate_critic else ValueHead
    models = policy, kind.of(policy, options)
    actor, critic = run.train(*models, learning_rate=options.learning_rate, total=options.steps)
    for step in run.steps(options.steps, judge):
        batch = sample_step(
            run, policy, tokenizer, options, step, options.completions_per_step, hidden_states=True
        )
        scores = reward(batch) - options.truncation_penalty * batch["truncated"].float()
        data = ppo_targets(batch, scores, critic, penalty.coefficient, options)
        figures = learn(run, actor, critic, data, options)
        kl = run.mean((batch["logprobs"] - batch["ref_logprobs"]).sum(-1).mean())
        run.log({"reward": scores.mean(), "kl": kl, "kl_coef": penalty.coefficient, **figures})
        penalty.update(kl)
    panels = [
        Panel(f"Reward of the samples ({described(options.reward)})", "reward"),
        Panel("KL to the reference, nats a text", "kl"),
        Panel("Value loss", "value_loss"),
        Panel("Entropy, nats a token", "entropy"),
    ]
    return conclude(run, policy, tokenizer, before, judge("after"), panels)


@torch.no_grad()
def ppo_targets(
    batch: Rollout, scores: Tensor, critic: nn.Module, kl_coef: float, options: PPOOptions
) -> dict[str, Tensor]:
    """Add values, advantages and returns (B, T-1) to the tensors of a rollout; scores are (B,)."""
    keep = batch["completion_mask"][:, 1:]
    values = critic(batch["hidden_states"], batch)
    rewards = shaped_rewards(
        scores, batch["logprobs"], batch["ref_logprobs"], keep, kl_coef=kl_coef
    )
    advantages, returns = gae(rewards, values, keep, gamma=options.gamma, lam=options.lam)
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    tensors.pop("hidden_states")
    return tensors | {
        "values": values,
        "advantages": whiten(advantages, keep),
        "returns": returns,
    }


def learn(
    run: Run, policy: nn.Module, critic: nn.Module, data: dict[str, Tensor], options: PPOOptions
) -> dict[str, float]:
    """Update on the samples in minibatches.

    Updates end early if the policy is farther than `kl_stop` from the policy that sampled.
    """
    figures: list[dict[str, Tensor]] = []
    updates = 0.0
    passes = (minibatches(data, options.minibatches) for _ in range(options.epochs))
    for part in chain.from_iterable(passes):
        # Data parallelism averages the gradients of the processes. So each process divides its sum
        # by the mean number of tokens of a process, and the result is a mean over all tokens.
        tokens = run.mean(part["completion_mask"].sum())
        loss, metrics = ppo_loss(policy, critic, part, tokens, options)
        figures.append(metrics)
        if options.kl_stop is not None and run.mean(metrics["approx_kl"]) > options.kl_stop:
            break
        run.update(loss)
        updates += 1
    means = {name: torch.stack([one[name] for one in figures]).mean().item() for name in figures[0]}
    return means | {"updates": updates}


def ppo_loss(
    policy: nn.Module,
    critic: nn.Module,
    part: dict[str, Tensor],
    tokens: float,
    options: PPOOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the clipped policy loss, inside the model's own forward, plus the value loss.

    Both are sums over tokens divided by `tokens`.
    """
    mask = part["completion_mask"]
    loss, metrics, outputs = model_policy_loss(
        policy,
        part["input_ids"],
        part["attention_mask"],
        part["logprobs"],
        part["advantages"],
        mask=mask,
        entropy=True,
        temperature=options.temperature,
        clip_low=options.clip_range,
        clip_high=options.clip_range,
        normalizer=tokens,
        return_outputs=True,
        output_hidden_states=True,
    )
    values = critic(outputs.hidden_states[-1], part)
    error, _ = value_loss(
        values,
        part["values"],
        part["returns"],
        mask[:, 1:],
        clip_range=options.value_clip,
        normalizer=tokens,
    )
    return loss + options.value_coef * error, {
        "policy_loss": loss.detach(),
        "value_loss": error.detach(),
        "entropy": metrics["entropy"],
        "approx_kl": metrics["policy/approxkl_avg"],
        "clipped": metrics["clip_ratio/region_mean"],
    }


if __name__ == "__main__":
    run_command(main)
