"""Sample completions of prompts from a causal language model, in batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .settings import SamplingOptions


@dataclass(frozen=True)
class Sample:
    """A prompt and one completion, without padding; an eos token that ended it is part of it."""

    prompt: str
    completion: str
    prompt_ids: Tensor
    completion_ids: Tensor


def completion_mask(completion_ids: Tensor, eos_token_id: int) -> Tensor:
    """Mark the tokens of each completion: all up to its first eos token, and that token itself.

    What follows is padding, even where the padding token is the eos token.

    Args:
        completion_ids: (B, T) integer.
        eos_token_id: the token that ends a text.

    Returns:
        (B, T) bool.
    """
    ended = (completion_ids == eos_token_id).long()
    return ended.cumsum(1) - ended == 0


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    options: SamplingOptions,
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Sample]:
    """Sample one completion for each prompt; repeat a prompt to have more.

    The seed decides them. `advance` is told how many completions each batch brought.
    """
    torch.manual_seed(seed)
    samples: list[Sample] = []
    for start in range(0, len(prompts), options.batch_size):
        batch = list(prompts[start : start + options.batch_size])
        samples += _sample_batch(model, tokenizer, batch, options)
        advance(len(batch))
    return samples


def _sample_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    options: SamplingOptions,
) -> list[Sample]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    inputs = inputs.to(model.device)
    # The attention mask goes along: where padding is the eos token, it cannot be told from the ids.
    sequences = model.generate(
        **inputs,
        do_sample=True,
        max_new_tokens=options.new_tokens,
        temperature=options.temperature,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    completions = sequences[:, inputs.input_ids.shape[1] :]
    masks = completion_mask(completions, tokenizer.eos_token_id)
    prompt_masks = inputs.attention_mask.bool()
    samples = []
    for row, prompt in enumerate(prompts):
        completion_ids = completions[row, masks[row]]
        text = tokenizer.decode(completion_ids, skip_special_tokens=True)
        prompt_ids = inputs.input_ids[row, prompt_masks[row]]
        samples.append(Sample(prompt, text, prompt_ids, completion_ids))
    return samples
