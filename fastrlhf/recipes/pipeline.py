"""RLHF from end to end: `python -m fastrlhf.recipes.pipeline --steps small` (`make pipeline`).

    sft      the model learns to end a film review in one sentence   -> <output>/sft/model
    reward   a 4-bit reward model learns which endings are kinder    -> <output>/reward
    ppo      the policy learns to please the reward model            -> <output>/ppo/adapter

PPO sees only the reward model, never VADER's scores. The test of the whole is whether VADER's score
rises too, on prompts that were used in no training: then the policy learned kindness, and not how
to exploit the reward model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

import fastrlhf.recipes.packages  # noqa: F401  reports missing packages

from . import ppo, reward, sft
from .finished import begin_anew, finished_or_run
from .metrics import write_metrics
from .models import source_of
from .run import is_first_process, run_command
from .settings import RunOptions, option, parse


@dataclass
class PipelineOptions(RunOptions):
    """Options of the pipeline. Each recipe by itself has more."""

    steps: Literal["small", "full"] = option("small", "minutes, or about an hour, on two CPU cores")
    quantize: bool = option(True, "the reward model's frozen weights in 4 bits")


@dataclass(frozen=True)
class Sizes:
    """How long each recipe runs."""

    sft_steps: int
    draw_rankings: int
    reward_steps: int
    ppo_steps: int
    ppo_completions: int
    eval_completions: int


SIZES = {
    "small": Sizes(16, 128, 20, 10, 32, 1),
    "full": Sizes(60, 1024, 120, 60, 64, 4),
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe with command-line arguments, and return what its `metrics.json` holds."""
    return train(parse(PipelineOptions, arguments, "pipeline", __doc__ or ""))


def train(options: PipelineOptions, sizes: Sizes | None = None, **shared: Any) -> dict[str, Any]:
    """Run the three recipes one after the other; see the module.

    Args:
        options: options of the pipeline. With `resume`, finished recipes are not run again, and an
            interrupted recipe continues from its checkpoint.
        sizes: how long each recipe runs. None: the sizes that `options.steps` names.
        shared: options that all three recipes receive, such as `new_tokens`.
    """
    sizes = sizes or SIZES[options.steps]
    source, folder = source_of(options.model), Path(options.output or "pipeline-output").resolve()
    leads = is_first_process()
    if not options.resume:
        begin_anew(folder / name for name in ("sft", "reward", "ppo"))
    shared |= {"seed": options.seed, "device": options.device, "save_every": options.save_every}
    tuned = str(folder / "sft" / "model")
    console = Console(highlight=False, markup=False, quiet=not leads)

    def step(name: str, run: Callable[[Any], dict[str, Any]], choice: Any) -> dict[str, Any]:
        console.print(f"\n== {name}")
        return finished_or_run(run, replace(choice, output=str(folder / name)), options.resume)

    first = step(
        "sft",
        sft.train,
        sft.SFTOptions(
            model=source,
            steps=sizes.sft_steps,
            eval_completions=sizes.eval_completions,
            **shared,
        ),
    )
    second = step(
        "reward",
        reward.train,
        reward.RewardOptions(
            model=tuned,
            steps=sizes.reward_steps,
            draw_rankings=sizes.draw_rankings,
            quantize=options.quantize,
            **{name: value for name, value in shared.items() if not name.startswith("eval_")},
        ),
    )
    third = step(
        "ppo",
        ppo.train,
        ppo.PPOOptions(
            model=tuned,
            reward=str(folder / "reward"),
            steps=sizes.ppo_steps,
            completions_per_step=sizes.ppo_completions,
            eval_completions=sizes.eval_completions,
            **shared,
        ),
    )
    console.print(_summary(first, second, third))
    metrics = {"sft": first, "reward": second, "ppo": third}
    if leads:
        write_metrics(folder, metrics)
    return metrics


def _summary(first: dict[str, Any], second: dict[str, Any], third: dict[str, Any]) -> Table:
    """Make a table of what each step changed, with its time and the peak memory so far."""
    table = Table("step", "what changed", "before", "after", "seconds", "GiB", title="RLHF")
    size = [
        (f"{sum(one['seconds'].values()):.0f}", f"{one['peak_memory_bytes'] / 2**30:.1f}")
        for one in (first, second, third)
    ]
    loss, ended = first["held_out_loss"], first["ended"]
    loss_row = (f"{loss['before']:.2f}", f"{loss['after']:.2f}")
    table.add_row("sft", "loss, nats a token", *loss_row, *size[0])
    table.add_row("", "texts that end", f"{ended['before']:.0%}", f"{ended['after']:.0%}", "", "")
    pairs = [second["held_out"][when] for when in ("before", "after")]
    pairs_row = [f"{one['accuracy']:.3f} ± {one['error']:.3f}" for one in pairs]
    table.add_row("reward", "held-out pairs in order", *pairs_row, *size[1])
    sentiment = [third["sentiment"][when] for when in ("before", "after")]
    sentiment_row = [f"{one['mean']:+.3f} ± {one['standard_error']:.3f}" for one in sentiment]
    table.add_row("ppo", "VADER, held-out prompts", *sentiment_row, *size[2])
    kl = f"{third['kl']['mean']:.2f} ± {third['kl']['standard_error']:.2f}"
    table.add_row("", "KL to the SFT model, nats a text", "0", kl, "", "")
    return table


if __name__ == "__main__":
    run_command(main)
