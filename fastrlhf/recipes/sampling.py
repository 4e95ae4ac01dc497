"""Sample completions of many prompts, batch by batch, and convert them to and from batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .devices import kept_random_numbers
from .draws import draw
from .prompts import TRAIN_PROMPTS
from .rollout import Rollout, completion_mask, rollout
from .run import Run
from .settings import SamplingOptions

__all__ = ["Sample", "completion_mask", "padded", "sample_completions", "sample_step", "samples_of"]


@dataclass(frozen=True)
class Sample:
    """A prompt and one completion, without padding. The completion includes its final eos token."""

    prompt: str
    completion: str
    prompt_ids: Tensor
    completion_ids: Tensor

    def to(self, device: torch.device | str) -> "Sample":
        """Return a copy with the tokens on a device."""
        ids = (self.prompt_ids.to(device), self.completion_ids.to(device))
        return Sample(self.prompt, self.completion, *ids)


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    options: SamplingOptions,
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Sample]:
    """Sample one completion for each prompt; repeat a prompt to have more.

    The samples depend on the seed alone, and the random state outside of the call does not change.
    After each batch, `advance` is called with the number of its completions.
    """
    samples: list[Sample] = []
    with kept_random_numbers(model.device):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), options.batch_size):
            batch = prompts[start : start + options.batch_size]
            samples += samples_of(
                rollout(
                    model,
                    tokenizer,
                    batch,
                    new_tokens=options.new_tokens,
                    temperature=options.temperature,
                    logprobs=False,
                )
            )
            advance(len(batch))
    return samples


def sample_step(
    run: Run,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: SamplingOptions,
    step: int,
    prompts: int,
    each: int = 1,
    logprobs: bool = True,
    hidden_states: bool = False,
) -> Rollout:
    """Sample what a step of training learns from: `each` completions of some training prompts.

    Each process takes its part of the step's prompts. The completions of one prompt are adjacent
    rows. `logprobs` and `hidden_states` are passed to `rollout`.
    """
    drawn = run.share(draw(TRAIN_PROMPTS, step, prompts * run.processes, options.seed))
    return rollout(
        policy,
        tokenizer,
        [prompt for prompt in drawn for _ in range(each)],
        new_tokens=options.new_tokens,
        temperature=options.temperature,
        logprobs=logprobs,
        hidden_states=hidden_states,
    )


def samples_of(batch: Rollout) -> list[Sample]:
    """Split a rollout into its samples, without padding."""
    prompt_mask = batch["attention_mask"].bool() & ~batch["completion_mask"]
    return [
        Sample(prompt, completion, ids[before], ids[scored])
        for prompt, completion, ids, before, scored in zip(
            batch["prompts"],
            batch["completions"],
            batch["input_ids"],
            prompt_mask,
            batch["completion_mask"],
            strict=True,
        )
    ]


def padded(samples: Sequence[Sample], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make one batch of samples, padded on the right, on the device of their tokens.

    Returns:
        input_ids (B, T), attention_mask (B, T) 0/1, and completion_mask (B, T) bool.
    """
    sequences = [torch.cat((sample.prompt_ids, sample.completion_ids)) for sample in samples]
    completions = [
        torch.arange(len(sequence), device=sequence.device) >= len(sample.prompt_ids)
        for sequence, sample in zip(sequences, samples, strict=True)
    ]
    attention = [torch.ones_like(sequence) for sequence in sequences]
    return (
        pad_sequence(sequences, batch_first=True, padding_value=pad_token_id),
        pad_sequence(attention, batch_first=True),
        pad_sequence(completions, batch_first=True),
    )
