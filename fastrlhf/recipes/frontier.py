"""Reward against KL, all methods on one task: `python -m fastrlhf.recipes.frontier`.

This is the left half of Fig. 2 of the DPO paper (arXiv:2305.18290) at a small size. DPO, PPO, GRPO
and TRPO start from the same SFT model and learn to raise VADER's score. Each method runs with
several values of the coefficient that keeps it near the reference. During training and at its end,
the reward and the exact KL are measured on texts for held-out prompts. The baseline is best of n,
which trains nothing. At the same KL, the method with more reward is the better one, so methods with
different coefficients can be compared. With `--resume`, finished cells are not run again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

import fastrlhf.recipes.packages  # noqa: F401  reports missing packages

from . import best_of_n, dpo, grpo, ppo, sft, trpo
from .finished import begin_anew, finished_or_run
from .frontier_picture import save_frontier
from .metrics import number, write_metrics
from .models import source_of
from .run import is_first_process, named, run_command
from .settings import (
    Bound,
    EvaluationOptions,
    NonNegative,
    NonNegativeFloats,
    OptionError,
    Positive,
    PositiveFloats,
    option,
    parse,
)


@dataclass
class FrontierOptions(EvaluationOptions):
    """Options of the comparison."""

    eval_completions: Positive = option(1, "completions of each held-out prompt")
    eval_every: NonNegative = option(5, "steps between the points of DPO, PPO and GRPO")
    betas: PositiveFloats = option([0.05, 0.2, 1.0], "of DPO")
    ppo_kl_coefs: NonNegativeFloats = option([0.0, 0.1], "of PPO's rewards")
    grpo_kl_coefs: NonNegativeFloats = option([0.1], "of GRPO's loss")
    max_kls: PositiveFloats = option([0.03, 0.1], "δ of TRPO, nats a token")
    best_of: Positive = option(16, "texts of each held-out prompt that the best is chosen from")
    sft_steps: Positive = option(16, "of the SFT model, which is the reference of all")
    dpo_steps: Positive = option(15, "of DPO")
    online_steps: Positive = option(10, "of PPO and GRPO")
    trpo_steps: Positive = option(6, "of TRPO")
    texts_per_step: Annotated[int, Bound(4)] = option(
        32, "completions in a step of PPO and GRPO, a multiple of 4; TRPO: half"
    )

    def __post_init__(self) -> None:
        """Check rules that the bounds of single options do not express."""
        super().__post_init__()
        if self.texts_per_step % 4:
            given = self.texts_per_step
            raise OptionError(f"argument --texts_per_step: expected a multiple of 4, got {given}")


@dataclass(frozen=True)
class Cell:
    """One method with one setting of its coefficient: a line of the picture."""

    method: str
    setting: str
    run: Callable[[Any], dict[str, Any]]
    options: Any


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe with command-line arguments, and return what its `metrics.json` holds."""
    return train(parse(FrontierOptions, arguments, "frontier", __doc__ or ""))


def train(options: FrontierOptions) -> dict[str, Any]:
    """Run the recipe; see the module."""
    leads = is_first_process()
    console = Console(highlight=False, markup=False, quiet=not leads)
    folder = Path(options.output or "frontier-output").resolve()
    shared = {
        name: getattr(options, name)
        for name in (
            "seed", "device", "save_every", "new_tokens", "temperature", "batch_size",
            "eval_prompts", "eval_completions",
        )
    }  # fmt: skip
    start = sft.SFTOptions(
        model=source_of(options.model),
        output=str(folder / "sft"),
        steps=options.sft_steps,
        **shared,
    )
    if not options.resume:
        begin_anew(
            [start.output, *(cell.options.output for cell in cells(options, folder, shared))]
        )
    console.print("\n== SFT, the reference")
    tuned = finished_or_run(sft.train, start, options.resume)
    shared["model"] = str(folder / "sft" / "model")
    lines = []
    for cell in cells(options, folder, shared):
        console.print(f"\n== {cell.method} {cell.setting}")
        metrics = finished_or_run(cell.run, cell.options, options.resume)
        seconds = sum(metrics["seconds"].values())
        points = [{k: number(v) for k, v in point.items()} for point in metrics["evaluations"]]
        lines.append(
            {
                "method": cell.method,
                "setting": cell.setting,
                "seconds": seconds,
                "peak_memory_bytes": metrics["peak_memory_bytes"],  # peak of the process so far
                "before": metrics.get("sentiment", {}).get("before"),
                "points": points,
            }
        )
        console.print(f"{cell.method} {cell.setting}: {described(points[-1])}, {seconds:.0f} s")
    metrics = {
        "options": asdict(options),
        "versions": tuned["versions"],
        "sft": tuned["ended"],
        "lines": lines,
    }
    if leads:
        name = named(options.model)
        save_frontier(folder / "frontier.png", lines, name, options.eval_prompts)
        write_metrics(folder, metrics)
    console.print(f"\nPicture and figures in {options.output or folder}/")
    return metrics


def cells(options: FrontierOptions, folder: Path, shared: dict[str, Any]) -> list[Cell]:
    """List the cells in the order in which they run."""

    def cell(method: str, sign: str, value: float, module: Any, kind: Any, **choice: Any) -> Cell:
        place = folder / f"{method}-{value:g}".lower().replace(" ", "-")
        options = kind(output=str(place), **shared | choice)
        return Cell(method, f"{sign} {value:g}", module.train, options)

    texts, every = options.texts_per_step, {"eval_every": options.eval_every}
    online = {"steps": options.online_steps, **every}
    group = _groups(texts, 8)
    half = _groups(texts // 2, 4)  # a step of TRPO takes several times as long as other steps
    count = options.best_of
    cells = [cell("best of n", "n ≤", count, best_of_n, best_of_n.BestOfNOptions, best_of=count)]
    for beta in options.betas:
        choice = {"beta": beta, "steps": options.dpo_steps, **every}
        cells.append(cell("DPO", "β =", beta, dpo, dpo.DPOOptions, **choice))
    for coef in options.ppo_kl_coefs:
        choice = {"kl_coef": coef, "completions_per_step": texts, **online}
        cells.append(cell("PPO", "KL coef. =", coef, ppo, ppo.PPOOptions, **choice))
    for coef in options.grpo_kl_coefs:
        choice = {"kl_coef": coef, **group, **online}
        cells.append(cell("GRPO", "KL coef. =", coef, grpo, grpo.GRPOOptions, **choice))
    for delta in options.max_kls:
        choice = {"max_kl": delta, "steps": options.trpo_steps, "eval_every": 3, **half}
        cells.append(cell("TRPO", "δ =", delta, trpo, trpo.TRPOOptions, **choice))
    return cells


def _groups(texts: int, largest: int) -> dict[str, int]:
    """Split texts evenly into groups of at most `largest` texts."""
    size = math.gcd(texts, largest)
    return {"group_size": size, "prompts_per_step": texts // size}


def described(point: dict[str, float]) -> str:
    """Write a point of the picture in words."""
    return (
        f"VADER {point['reward']:+.3f} ± {point['reward_error']:.3f} at "
        f"KL {point['kl']:.2f} ± {point['kl_error']:.2f} nats a text"
    )


if __name__ == "__main__":
    run_command(main)
