"""Supervised fine-tuning, the first step of RLHF: `python -m fastrlhf.recipes.sft`.

The model learns to complete the opening of a film review in one sentence and then to stop. The
endings of the training texts are kind, unkind and neutral in equal parts, so that a preference for
kind ones can only come from the later steps of RLHF. The loss covers the ending, not the opening.
At the end the adapters are merged into the model, and `<output>/model` is what later steps start
from.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import fastrlhf.recipes.packages  # noqa: F401  reports missing packages
from fastrlhf import sft_loss

from .curves import Panel
from .draws import draw
from .evaluation import Evaluation, conclude, evaluate
from .models import load_policy
from .reviews import REVIEWS
from .run import Run, run_command
from .sampling import Sample, padded
from .settings import AdapterOptions, EvaluationOptions, Positive, option, parse

_HELD_OUT_EVERY = 8  # every eighth opening is not trained on


@dataclass
class SFTOptions(EvaluationOptions, AdapterOptions):
    """Options of supervised fine-tuning."""

    steps: Positive = option(20, "of the optimizer")
    texts_per_step: Positive = option(16, "texts of each process in one step")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe with command-line arguments, and return what its `metrics.json` holds."""
    return train(parse(SFTOptions, arguments, "sft", __doc__ or ""))


def train(options: SFTOptions) -> dict[str, Any]:
    """Run the recipe; see the module."""
    run = Run("sft", options)
    policy, tokenizer = load_policy(run)
    training, held_out = texts(tokenizer, run.device)

    def judge(when: str) -> Evaluation:
        return evaluate(run, policy, tokenizer, options, when)

    @torch.no_grad()
    def held_out_loss() -> float:
        return batch_loss(policy, held_out, tokenizer.pad_token_id, run).item()

    before, loss_before = judge("before"), held_out_loss()
    (model,) = run.train(policy, learning_rate=options.learning_rate, total=options.steps)
    count = options.texts_per_step * run.processes
    for step in run.steps(options.steps, judge):
        batch = run.share(draw(training, step, count, options.seed))
        loss = batch_loss(model, batch, tokenizer.pad_token_id, run)
        run.update(loss)
        run.log({"loss": loss})
    after, loss_after = judge("after"), held_out_loss()
    run.report.line(f"Loss of held-out texts: {loss_before:.3f} -> {loss_after:.3f} nats a token")
    panels = [Panel("Cross-entropy, nats a token", "loss")]
    if run.accelerator.is_main_process:
        # A copy is merged: the policy's adapters are still to be saved, and to be turned off where
        # the reference is needed.
        merged = copy.deepcopy(policy).merge_and_unload()
        merged.save_pretrained(run.output / "model")
        tokenizer.save_pretrained(run.output / "model")
    return conclude(
        run,
        policy,
        tokenizer,
        before,
        after,
        panels,
        held_out_loss={"before": loss_before, "after": loss_after},
    )


def batch_loss(model: torch.nn.Module, batch: list[Sample], pad_token_id: int, run: Run) -> Tensor:
    """Compute the mean cross-entropy of the endings' tokens, inside the model's own forward."""
    ids, attention, completion = padded(batch, pad_token_id)
    # Data parallelism averages the gradients of the processes. So each process divides its sum by
    # the mean number of tokens of a process, and the result is a mean over all tokens.
    tokens = run.mean(completion.sum())
    loss: Tensor = sft_loss(model, ids, attention, mask=completion, normalizer=tokens)[0]
    return loss


def texts(
    tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[list[Sample], list[Sample]]:
    """Turn the reviews into samples for training and held-out samples. Each ends with eos."""
    training: list[Sample] = []
    held_out: list[Sample] = []
    for number, (opening, endings) in enumerate(REVIEWS.items()):
        place = held_out if number % _HELD_OUT_EVERY == 0 else training
        for ending in endings:
            prompt = tokenizer(opening).input_ids
            # Opening and ending are tokenized together: tokens may depend on what surrounds them.
            whole = tokenizer(f"{opening} {ending}").input_ids + [tokenizer.eos_token_id]
            ids = torch.tensor(whole, device=device)
            place.append(Sample(opening, ending, ids[: len(prompt)], ids[len(prompt) :]))
    return training, held_out


if __name__ == "__main__":
    run_command(main)
