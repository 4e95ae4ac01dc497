"""A reward model, the second step of RLHF: `python -m fastrlhf.recipes.reward`.

The language model writes k completions of each prompt, and VADER ranks them. The reward model is a
sequence classifier with one score: the same language model in 4 bits with LoRA adapters (QLoRA,
arXiv:2305.14314). It learns the order with the loss of Bradley and Terry from pairs, or with that
of Plackett and Luce from longer rankings (`--completions 4`). It never sees VADER's numbers, unless
`--margin` is given. Rankings of held-out prompts show how often it is right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastrlhf.recipes.packages  # noqa: F401  reports missing packages
from fastrlhf import plackett_luce_loss, reward_loss

from .curves import Panel, save_curves
from .draws import draw
from .evaluation import gathered
from .models import add_adapters, check_quantize, load_model, load_reward_model, source_of
from .prompts import HELD_OUT_PROMPTS, TRAIN_PROMPTS
from .rankings import Ranking, pairs_in_order, ranked
from .rewards import RewardModel
from .run import Run, run_command
from .sampling import sample_completions
from .sentiment import by_prompt, estimate
from .settings import (
    AdapterOptions,
    NonNegativeFloat,
    OptionError,
    Positive,
    PositiveFloat,
    SamplingOptions,
    TwoOrMore,
    option,
    parse,
)


@dataclass
class RewardOptions(SamplingOptions, AdapterOptions):
    """Options of training a reward model."""

    steps: Positive = option(24, "of the optimizer")
    rankings_per_step: Positive = option(8, "rankings of each process in one step")
    completions: TwoOrMore = option(2, "k, completions in a ranking: 2 are a pair")
    draw_rankings: Positive = option(192, "rankings that are sampled, ties included")
    eval_rankings: Positive = option(80, "the same, of held-out prompts")
    minimal_gap: PositiveFloat = option(0.3, "in VADER's score, below which there is a tie")
    margin: NonNegativeFloat = option(0.0, "of a pair's scores, a unit of VADER (2307.09288)")
    center_coef: NonNegativeFloat = option(0.01, "of the pull of a ranking's scores towards 0")
    quantize: bool = option(True, "the frozen weights in 4 bits, by bitsandbytes")

    def __post_init__(self) -> None:
        """Check rules that involve more than one option."""
        super().__post_init__()
        if self.completions > 2 and self.margin > 0:
            raise OptionError("argument --margin: is of pairs, --completions 2")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe with command-line arguments, and return what its `metrics.json` holds."""
    return train(parse(RewardOptions, arguments, "reward", __doc__ or ""))


def train(options: RewardOptions) -> dict[str, Any]:
    """Run the recipe; see the module.

    Raises:
        ValueError: the completions of no prompt differ enough in sentiment.
    """
    run = Run("reward", options)
    check_quantize(options.quantize)
    source = source_of(options.model)
    training, held_out, tokenizer = collect(run, source, options)
    with run.report.phase("Load the reward model"):
        base = load_reward_model(source, run.device, options.quantize)
        model = add_adapters(base, options.lora_rank, options.lora_targets, task="SEQ_CLS")
    reward = RewardModel(model, tokenizer.pad_token_id, mean=0.0, deviation=1.0)
    before = judge(run, reward, held_out, options, "before")
    (reward.model,) = run.train(model, learning_rate=options.learning_rate, total=options.steps)
    for step in run.steps(options.steps):
        batch = draw(training, step, options.rankings_per_step, options.seed)
        loss, figures = loss_of(reward, batch, options)
        run.update(loss)
        run.log({"loss": loss, **figures})
    reward.model = model
    after = judge(run, reward, held_out, options, "after")
    with run.report.phase("Normalise the scores"):
        some = [sample for one in training[: options.eval_rankings] for sample in one.samples]
        scores = reward.scores(some, options.batch_size)
        reward.mean, reward.deviation = scores.mean().item(), scores.std().clamp(min=1e-6).item()
    run.report.line(
        f"Held-out pairs in order: {before['accuracy']:.3f} ± {before['error']:.3f} before, "
        f"{after['accuracy']:.3f} ± {after['error']:.3f} after; correlation of score and VADER "
        f"{after['correlation']:+.2f}"
    )
    if run.accelerator.is_main_process:
        reward.save(run.output, source, options.quantize, tokenizer)
        panels = [
            Panel("Loss", "loss"),
            Panel("Pairs in order (a tie is half)", "accuracy", (0, 1.05)),
        ]
        title = f"reward: {run.model_name}, {len(training)} rankings of {options.completions}"
        save_curves(run.output / "curves.png", title, panels, run.history)
    return run.finish(
        rankings={"training": len(training), "held out": len(held_out)},
        held_out={"before": before, "after": after},
    )


def collect(
    run: Run, source: str, options: RewardOptions
) -> tuple[list[Ranking], list[Ranking], Any]:
    """Sample completions from the language model and rank them by sentiment.

    Returns the training rankings, the held-out rankings and the tokenizer.
    """
    with run.report.phase("Load the language model"):
        policy, tokenizer = load_model(source, run.device)
    rankings = []
    for name, prompts, size, seed in (
        ("training", TRAIN_PROMPTS, "draw_rankings", 0),
        ("held-out", HELD_OUT_PROMPTS, "eval_rankings", 1_000_000),
    ):
        count = getattr(options, size)
        drawn = run.share(draw(prompts, 0, count * run.processes, options.seed))
        texts = [prompt for prompt in drawn for _ in range(options.completions)]
        with run.report.phase(f"Sample {name} completions", len(texts)) as advance:
            samples = sample_completions(
                policy, tokenizer, texts, options, seed + options.seed + 7919 * run.rank, advance
            )
        rankings.append(ranked(samples, options.completions, options.minimal_gap))
        run.report.line(f"  {len(rankings[-1])} of {len(drawn)} {name} rankings have an order")
        # A standard error over prompts needs at least two prompts.
        enough = len({ranking.samples[0].prompt for ranking in rankings[-1]}) >= 2
        if run.mean(float(enough)) < 1:  # if one has too few, all processes stop
            raise OptionError(
                f"argument --{size}: too few {name} completions of a prompt differ in sentiment"
            )
    return rankings[0], rankings[1], tokenizer


def loss_of(
    reward: RewardModel, batch: list[Ranking], options: RewardOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the mean loss of a batch of rankings, and the share of their pairs in order."""
    scores = reward.raw([sample for ranking in batch for sample in ranking.samples])
    sizes = torch.tensor([len(ranking.samples) for ranking in batch], device=scores.device)
    if options.completions == 2:
        pairs = scores.view(-1, 2)
        gaps = scores.new_tensor([ranking.sentiment[0] - ranking.sentiment[1] for ranking in batch])
        losses, _ = reward_loss(
            pairs[:, 0],
            pairs[:, 1],
            margin=options.margin * gaps,
            center_coef=options.center_coef,
        )
    else:
        groups = torch.arange(len(batch), device=scores.device).repeat_interleave(sizes)
        # The samples of a ranking are sorted, best first, so their positions serve as ranks.
        losses = plackett_luce_loss(scores, groups, torch.arange(len(scores), device=scores.device))
        # For a pair, `reward_loss` penalises (s_w + s_l)², the square of twice the mean score. For
        # longer rankings this is the same penalty.
        means = torch.stack([part.mean() for part in scores.split(sizes.tolist())])
        losses = losses + options.center_coef * (2 * means).square()
    parts = scores.detach().split(sizes.tolist())
    in_order = torch.stack([pairs_in_order(part) for part in parts]).mean()
    return losses.mean(), {"accuracy": in_order, "score": scores.detach().mean()}


def judge(
    run: Run, reward: RewardModel, rankings: list[Ranking], options: RewardOptions, when: str
) -> dict[str, float]:
    """Measure accuracy on held-out rankings, with its standard error over prompts."""
    samples = [sample for ranking in rankings for sample in ranking.samples]
    sentiment = [s for ranking in rankings for s in ranking.sentiment]
    with run.report.phase(f"Score held-out completions, {when}"):
        scores = reward.scores(samples, options.batch_size)
    in_order = [pairs_in_order(p).item() for p in scores.split([len(r.samples) for r in rankings])]
    judged = gathered(
        run, [(r.samples[0], value) for r, value in zip(rankings, in_order, strict=True)]
    )
    scored = gathered(run, list(zip(samples, scores.tolist(), sentiment, strict=True)))
    right, error = estimate(by_prompt(*zip(*judged, strict=True)))
    both = torch.tensor([row[1:] for row in scored]).T
    return {"accuracy": right, "error": error, "correlation": torch.corrcoef(both)[0, 1].item()}


if __name__ == "__main__":
    run_command(main)
