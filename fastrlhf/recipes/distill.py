"""On-policy distillation: `python -m fastrlhf.recipes.distill --drop-layers 6`.

The student is the teacher with some of its layers taken out. The student writes texts, and at each
token of its own texts it learns the teacher's distribution over the whole vocabulary. The loss is
the reverse KL, the forward KL or their Jensen-Shannon mixture (GKD, arXiv:2306.13649). No reward is
needed.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fastrlhf.recipes.packages  # noqa: F401  reports missing packages
from fastrlhf import model_kl_divergence

from .curves import Panel, save_curves
from .evaluation import Comparison, compared, gathered, held_out
from .models import add_adapters, load_model, source_of
from .report import one_line
from .rollout import Rollout
from .run import Run, run_command
from .sampling import Sample, sample_step, samples_of
from .sentiment import by_prompt, estimate
from .settings import AdapterOptions, EvaluationOptions, OptionError, Positive, Share, option, parse


@dataclass
class DistillOptions(EvaluationOptions, AdapterOptions):
    """Options of distillation."""

    steps: Positive = option(16, "rounds of sampling and one update")
    completions_per_step: Positive = option(16, "that each process samples in a step")
    drop_layers: Positive = option(8, "layers that the student lacks, evenly spread")
    direction: Literal["reverse", "forward", "jsd"] = option("jsd", "of the divergence")
    beta: Share = option(0.5, "weight of the teacher in the mixture of jsd")


class Judged(NamedTuple):
    """Texts of the student for held-out prompts, and KL(student ‖ teacher) of each text in nats."""

    samples: list[Sample]
    kl: list[float]

    def figures(self) -> dict[str, float]:
        """Return the mean KL over prompts with its standard error."""
        kl = estimate(by_prompt(*self))
        return {"kl": kl.mean, "kl_error": kl.standard_error}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe with command-line arguments, and return what its `metrics.json` holds."""
    return train(parse(DistillOptions, arguments, "distill", __doc__ or ""))


def train(options: DistillOptions) -> dict[str, Any]:
    """Run the recipe; see the module.

    Raises:
        ValueError: the model's layers cannot be taken out, or are too few.
    """
    run = Run("distill", options)
    with run.report.phase("Load the teacher, prune the student"):
        teacher, tokenizer = load_model(source_of(options.model), run.device)
        teacher.requires_grad_(False)
        pruned = without_layers(teacher, options.drop_layers)
        student = add_adapters(pruned, options.lora_rank, options.lora_targets)

    def judge(when: str) -> Judged:
        return judged(run, student, teacher, tokenizer, options, when)

    before = judge("before")
    (model,) = run.train(student, learning_rate=options.learning_rate, total=options.steps)
    for step in run.steps(options.steps, judge):
        count = options.completions_per_step
        batch = sample_step(run, student, tokenizer, options, step, count, logprobs=False)
        values = divergence(model, teacher, batch, options.direction, options)
        # Data parallelism averages the gradients of the processes. So each process divides its sum
        # by the mean number of tokens of a process, and the result is a mean over all tokens.
        loss = values.sum() / run.mean(batch["completion_mask"].sum())
        run.update(loss)
        run.log({"loss": loss})
    after = judge("after")
    kl = compared(by_prompt(*before), by_prompt(*after))
    run.report.line(f"KL(student ‖ teacher), nats a text: {described(kl)}")
    old, new = before.samples[-1], after.samples[-1]
    run.report.line(f"Prompt: {old.prompt}\n  before: …{one_line(old.completion)}")
    run.report.line(f"  after:  …{one_line(new.completion)}")
    if run.accelerator.is_main_process:
        title = f"distill: {run.model_name} without {options.drop_layers} of its layers"
        panels = [Panel(f"Divergence ({options.direction}), nats a token", "loss")]
        save_curves(run.output / "curves.png", title, panels, run.history)
        student.merge_and_unload().save_pretrained(run.output / "model")
        tokenizer.save_pretrained(run.output / "model")
    return run.finish(
        kl={name: one._asdict() for name, one in kl._asdict().items()},
        completions=[
            {"prompt": one.prompt, "before": one.completion, "after": two.completion}
            for one, two in zip(before.samples, after.samples, strict=True)
        ],
    )


def without_layers(teacher: PreTrainedModel, count: int) -> PreTrainedModel:
    """Copy a model and take out some of its layers, evenly spread; the first and the last stay.

    Raises:
        ValueError: the model has no list of layers, or too few layers.
    """
    student = copy.deepcopy(teacher)
    backbone = student.base_model
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise OptionError(
            f"argument --model: {type(teacher).__name__} has no list of layers to take from"
        )
    if count > len(layers) - 2:
        raise OptionError(
            f"argument --drop_layers: expected at most {len(layers) - 2}, got {count}"
        )
    inner = torch.linspace(0, len(layers) - 1, count + 2).round().long().tolist()
    dropped = set(inner[1:-1])
    backbone.layers = nn.ModuleList(
        layer for number, layer in enumerate(layers) if number not in dropped
    )
    student.config.num_hidden_layers = len(backbone.layers)
    kinds = getattr(student.config, "layer_types", None)  # of attention, if they differ
    if kinds is not None:
        student.config.layer_types = [k for n, k in enumerate(kinds) if n not in dropped]
    for number, layer in enumerate(backbone.layers):
        layer.self_attn.layer_idx = number  # index in the key-value cache
    return student


def divergence(
    student: nn.Module, teacher: nn.Module, batch: Rollout, direction: str, options: DistillOptions
) -> Tensor:
    """Compute the divergence (B, T-1) at each token of the student, without building logits."""
    return model_kl_divergence(
        student,
        teacher,
        batch["input_ids"],
        batch["attention_mask"],
        mask=batch["completion_mask"],
        direction=direction,
        beta=options.beta,
        temperature=options.temperature,
    )


@torch.no_grad()
def judged(
    run: Run,
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    options: DistillOptions,
    when: str,
) -> Judged:
    """Let the student complete held-out prompts, and measure its KL to the teacher on them."""
    samples: list[Sample] = []
    values: list[float] = []
    for batch in held_out(run, student, tokenizer, options, when):
        samples += samples_of(batch)
        values += divergence(student, teacher, batch, "reverse", options).sum(-1).tolist()
    judged = gathered(run, list(zip(samples, values, strict=True)))
    return Judged([sample for sample, _ in judged], [value for _, value in judged])


def described(kl: Comparison) -> str:
    """Write the means before and after training with their standard errors."""
    return " -> ".join(f"{one.mean:.2f} ± {one.standard_error:.2f}" for one in kl[:2])


if __name__ == "__main__":
    run_command(main)
