"""Measure a policy on held-out prompts: its reward, and its KL to the reference.

Recipes evaluate before and after training, and every `eval_every` steps; `conclude` ends a recipe:
it compares both, saves the adapters and writes the figures.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from rich.table import Table
from torch import Tensor, nn

from fastrlhf import head_inputs, linear_kl_divergence

from .comparison import logprob_memory
from .curves import Panel, save_picture
from .devices import kept_random_numbers
from .prompts import HELD_OUT_PROMPTS
from .report import one_line
from .rollout import Rollout, adapters_off, evaluating, rollout
from .run import Run
from .sampling import Sample, samples_of
from .sentiment import Estimate, by_prompt, estimate, sentiments
from .settings import EvaluationOptions

# The seed of evaluation is separate from training, so that samples before and after training use
# the same random numbers.
_SEED = 1_000_000


class Evaluation(NamedTuple):
    """Completions of held-out prompts, with the measurements of each."""

    samples: list[Sample]
    kl: list[float]  # KL to the reference, nats a sequence
    ended: float  # share of the completions that ended with an end token

    @property
    def reward(self) -> list[float]:
        """Mean sentiment of each prompt's completions."""
        return by_prompt(self.samples, sentiments(self.samples))

    @property
    def divergence(self) -> list[float]:
        """Mean KL of each prompt's completions."""
        return by_prompt(self.samples, self.kl)

    def figures(self) -> dict[str, float]:
        """Return the means and their standard errors over prompts, as one flat dict."""
        reward, kl = estimate(self.reward), estimate(self.divergence)
        return {
            "reward": reward.mean,
            "reward_error": reward.standard_error,
            "kl": kl.mean,
            "kl_error": kl.standard_error,
            "ended": self.ended,
        }


@torch.no_grad()
def exact_kl(policy: PeftModel, batch: Rollout, temperature: float) -> Tensor:
    """Sum the exact KL(policy ‖ reference) of each token over each completion: (B,) nats.

    At each token the KL is summed over the whole vocabulary; only the text before the token is
    sampled. The mean of the result over samples estimates the KL of whole texts without bias, and
    as a rule with less variance than the mean of log π(y) - log π_ref(y).
    """
    ids, attention = batch["input_ids"], batch["attention_mask"]
    with evaluating(policy):
        hidden, head = head_inputs(policy, ids, attention)
        with adapters_off(policy):
            ref_hidden, ref_head = head_inputs(policy, ids, attention)
    values = linear_kl_divergence(
        hidden[:, :-1],
        head.weight,
        ref_hidden[:, :-1],
        ref_head.weight,
        mask=batch["completion_mask"][:, 1:],
        temperature=temperature,
        **head.options(),
        **ref_head.options("ref_"),
    )
    return values.sum(-1)


def evaluate(
    run: Run, policy: PeftModel, tokenizer: Any, options: EvaluationOptions, when: str
) -> Evaluation:
    """Complete held-out prompts, and measure the completions."""
    measured: list[tuple[Sample, float, bool]] = []
    for batch in held_out(run, policy, tokenizer, options, when):
        kl = exact_kl(policy, batch, options.temperature).tolist()
        measured += zip(samples_of(batch), kl, (~batch["truncated"]).tolist(), strict=True)
    measured = gathered(run, measured)
    samples, kl, ended = (list(column) for column in zip(*measured, strict=True))
    return Evaluation(samples, kl, sum(ended) / len(ended))


def held_out(
    run: Run, policy: nn.Module, tokenizer: Any, options: EvaluationOptions, when: str
) -> Iterator[Rollout]:
    """Complete held-out prompts, batch by batch; each process completes its part of them.

    Every call uses the same random numbers, and leaves those of training as they were.
    """
    prompts = [
        prompt
        for prompt in HELD_OUT_PROMPTS[: options.eval_prompts]
        for _ in range(options.eval_completions)
    ]
    mine = prompts[run.rank :: run.processes]
    seed = _SEED + options.seed + 7919 * run.rank
    with run.report.phase(f"Complete held-out prompts, {when}", len(prompts)) as advance:
        for start in range(0, len(mine), options.batch_size):
            batch = mine[start : start + options.batch_size]
            with kept_random_numbers(run.device):
                torch.manual_seed(seed + start)
                sampled = rollout(
                    policy,
                    tokenizer,
                    batch,
                    new_tokens=options.new_tokens,
                    temperature=options.temperature,
                    logprobs=False,
                )
            yield sampled
            advance(len(batch) * run.processes)


def gathered(run: Run, rows: list[Any]) -> list[Any]:
    """Collect the rows of all processes. The first entry of each row is a sample."""
    if run.processes == 1:
        return rows
    # Each process has its own device, so samples are moved to the CPU before they are collected.
    rows = [(sample.to("cpu"), *rest) for sample, *rest in rows]
    of_all: list[Any] = gather_object(rows)
    return of_all


class Comparison(NamedTuple):
    """A mean before and after training, and the mean of the differences prompt by prompt."""

    before: Estimate
    after: Estimate
    difference: Estimate  # paired by prompt: its error is not that of two independent means


def compared(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Estimate the means of values of the same prompts before and after training."""
    changes = [new - old for old, new in zip(before, after, strict=True)]
    return Comparison(estimate(before), estimate(after), estimate(changes))


def conclude(
    run: Run,
    policy: PeftModel,
    tokenizer: Any,
    before: Evaluation,
    after: Evaluation,
    panels: Sequence[Panel],
    **further: Any,
) -> dict[str, Any]:
    """Print what training changed, save the adapters, draw `curves.png`, write `metrics.json`."""
    options = run.options
    assert isinstance(options, EvaluationOptions)
    reward = compared(before.reward, after.reward)
    kl = estimate(after.divergence)
    rows = {"VADER": reward, "KL, nats a text": compared(before.divergence, after.divergence)}
    run.report.console.print(_table(rows, len(before.reward)))
    old, new = before.samples[-1], after.samples[-1]
    run.report.line(f"Prompt: {old.prompt}")
    run.report.line(f"  before: …{one_line(old.completion)}")
    run.report.line(f"  after:  …{one_line(new.completion)}")
    run.note_peak_memory()
    few = [sample.to(run.device) for sample in after.samples[:8]]
    memory = logprob_memory(policy, few, tokenizer.pad_token_id)
    if run.accelerator.is_main_process:
        policy.save_pretrained(run.output / "adapter")
        tokenizer.save_pretrained(run.output / "adapter")
        save_picture(
            run.output / "curves.png",
            f"{run.name}: {run.model_name}",
            panels,
            run.history,
            reward,
            memory,
            (old, new),
        )
    run.evaluations.append({"step": run.done, **after.figures()})
    return run.finish(
        sentiment=_asdict(reward),
        kl=kl._asdict(),
        ended={"before": before.ended, "after": after.ended},
        logprob_memory=memory._asdict(),
        completions=[
            {"prompt": old.prompt, "before": old.completion, "after": new.completion}
            for old, new in zip(before.samples, after.samples, strict=True)
        ],
        **further,
    )


def _table(rows: Mapping[str, Comparison], prompts: int) -> Table:
    title = "Mean sentiment (VADER, -1 to 1) and KL to the reference"
    table = Table("", "before", "after", "difference", title=title)
    for name, estimates in rows.items():
        table.add_row(name, *(f"{mean:+.3f} ± {error:.3f}" for mean, error in estimates))
    table.caption = f"± standard error over {prompts} held-out prompts"
    return table


def _asdict(comparison: Comparison) -> dict[str, dict[str, float]]:
    return {name: value._asdict() for name, value in comparison._asdict().items()}
