"""Sample completions from a policy, with all tensors that a step of training needs.

The step may be one of PPO, GRPO, TRPO or distillation. For example:

    from fastrlhf.recipes.rollout import rollout

    batch = rollout(model, tokenizer, prompts, new_tokens=64)
    batch["scores"] = my_reward(batch["prompts"], batch["completions"])  # (B,)

The result is a dict. Its keys are the ones that the steps in `docs/guide/ppo.md` use.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fastrlhf import model_token_stats


class Rollout(TypedDict, total=False):
    """B prompts, each followed directly by its completion, padded on the right to T positions.

    All tensors are on the device of the model. Masked entries of the (B, T-1) tensors are 0.
    """

    prompts: list[str]
    completions: list[str]  # decoded, without special tokens
    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 0 after the end of a completion
    position_ids: Tensor  # (B, T) int64: 0, 1, ..., which is a forward's default
    completion_mask: Tensor  # (B, T) bool: the completion, with the token that ended it
    truncated: Tensor  # (B,) bool: cut at new_tokens, before a token that ends
    logprobs: Tensor  # (B, T-1) fp32, nats, of input_ids[:, 1:] under the policy
    ref_logprobs: Tensor  # (B, T-1) the same under the reference, if there is one
    hidden_states: Tensor  # (B, T, H) input of the head; only if asked for


@torch.no_grad()
def rollout(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    new_tokens: int = 64,
    temperature: float = 1.0,
    ref_model: nn.Module | None = None,
    logprobs: bool = True,
    hidden_states: bool = False,
) -> Rollout:
    """Sample one completion for each prompt; repeat a prompt to have more.

    Tokens are drawn from softmax(logits / temperature) itself. Whatever the model's own
    `generation_config` would change in it (top-k, top-p, a penalty for repetition) is left out,
    because then the log-probs of training would not be those of the samples. The end-of-sequence
    tokens of that config are respected.

    Args:
        model: a causal language model of transformers, plain, wrapped by peft or by DDP.
        tokenizer: the model's tokenizer; its `padding_side` has no effect.
        prompts: B texts. The tokenizer adds the same special tokens as to any text.
        new_tokens: the largest number of tokens in a completion.
        temperature: temperature of sampling, and of all log-probs returned.
        ref_model: the reference. None: for a peft model, the model with its adapters off; for any
            other model there is no reference.
        logprobs: whether to score the samples. If not, the result has neither log-probs nor
            hidden states.
        hidden_states: whether to return the inputs of the head, for a value head.

    Returns:
        Rollout. Log-probs are recomputed by `model_token_stats`, in one forward each, and not taken
        from generation, whose cache rounds differently from the forward of training.

    Random numbers come from torch's global generator. Dropout is off during the call, and the
    results carry no gradient.

    Raises:
        TypeError: `prompts` is a single text.
        ValueError: there are no prompts, a prompt is empty, the temperature is not positive, or
            neither the tokenizer nor the model knows a token that ends a text.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts: expected a list of texts, got a single one")
    if not prompts:
        raise ValueError("prompts: expected at least one")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    policy: Any = getattr(model, "module", model)  # DDP is not needed: generation has no gradients
    ends = end_tokens(policy, tokenizer)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids, attention = _padded_on_the_left(tokenizer, prompts, pad, policy.device)
    config = GenerationConfig(
        do_sample=True,
        temperature=float(temperature),
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
    )
    with evaluating(policy), _only_config(policy, config):
        sequences = policy.generate(input_ids=ids, attention_mask=attention)
    completion_ids = sequences[:, ids.shape[1] :]
    kept = completion_mask(completion_ids, ends)
    batch: Rollout = {
        "prompts": list(prompts),
        "completions": [
            tokenizer.decode(ids[mask], skip_special_tokens=True)
            for ids, mask in zip(completion_ids, kept, strict=True)
        ],
        **_without_gaps(ids, attention, completion_ids, kept, pad),
        "truncated": ~_is_any(completion_ids, ends).any(dim=1),
    }
    if not logprobs:
        return batch
    with evaluating(policy):
        batch["logprobs"], outputs = token_logprobs(
            policy, batch, temperature, output_hidden_states=hidden_states
        )
        if hidden_states:
            batch["hidden_states"] = outputs.hidden_states[-1]
        if ref_model is None and isinstance(policy, PeftModel):
            with adapters_off(policy):
                batch["ref_logprobs"], _ = token_logprobs(policy, batch, temperature)
    if ref_model is not None:
        with evaluating(ref_model):
            batch["ref_logprobs"], _ = token_logprobs(ref_model, batch, temperature)
    return batch


def token_logprobs(
    model: nn.Module, batch: Rollout, temperature: float = 1.0, **inputs: Any
) -> tuple[Tensor, Any]:
    """Score the completions of a rollout: log-probs (B, T-1) in nats, and the model's outputs."""
    stats, outputs = model_token_stats(
        model,
        batch["input_ids"],
        batch["attention_mask"],
        mask=batch["completion_mask"],
        temperature=temperature,
        return_outputs=True,
        **inputs,
    )
    return stats.logprob, outputs


def completion_mask(completion_ids: Tensor, end_token_ids: int | Sequence[int]) -> Tensor:
    """Mark the tokens of each completion: all up to the first that ends it, and that token itself.

    All later tokens are padding, even if the padding token is one of the tokens that end a text.

    Args:
        completion_ids: (B, T) integer.
        end_token_ids: the token that ends a text, or several.

    Returns:
        (B, T) bool.
    """
    ended = _is_any(completion_ids, end_token_ids).long()
    return ended.cumsum(1) - ended == 0


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the tokens that end a text: the tokenizer's, and those that the model declares.

    Raises:
        ValueError: there is no such token.
    """
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    ending = {token for token in (tokenizer.eos_token_id, *declared) if token is not None}
    if not ending:
        raise ValueError("tokenizer: expected one with an eos token")
    return sorted(ending)


def _padded_on_the_left(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Turn prompts into ids (B, T), padded on the left, and their attention mask."""
    rows = tokenizer(list(prompts)).input_ids
    if not all(rows):
        raise ValueError("prompts: expected at least one token each, got an empty one")
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    places = torch.arange(longest, device=device)
    return ids, (places >= longest - lengths[:, None]).long()


def _without_gaps(
    prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, kept: Tensor, pad: int
) -> Rollout:
    """Move each sequence to the left edge of the batch.

    Before, prompts are padded on the left, and completions that ended early on the right. After, a
    forward without position ids counts positions correctly, and the batch is as short as its
    longest sequence.
    """
    ids = torch.cat((prompt_ids, completion_ids), dim=1)
    valid = torch.cat((prompt_mask.bool(), kept), dim=1)
    sampled = torch.cat((torch.zeros_like(prompt_mask, dtype=torch.bool), kept), dim=1)
    longest = int(valid.sum(dim=1).max())
    order = (~valid).long().argsort(dim=1, stable=True)[:, :longest]  # valid positions first
    attention = valid.gather(1, order)
    return {
        "input_ids": torch.where(attention, ids.gather(1, order), pad),
        "attention_mask": attention.long(),
        "position_ids": torch.arange(longest, device=ids.device).expand_as(order).contiguous(),
        "completion_mask": sampled.gather(1, order),
    }


def _is_any(ids: Tensor, values: int | Sequence[int]) -> Tensor:
    return torch.isin(ids, torch.as_tensor(values, device=ids.device))


@contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """Turn the adapters of a peft model off, which makes it the reference."""
    with model.disable_adapter():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout off, and afterwards return each module to its former mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _only_config(policy: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Replace the model's own generation config by `config`.

    If `config` were only passed to `generate`, its unset fields would come from the model's own.
    """
    owners = [policy, policy.get_base_model()] if isinstance(policy, PeftModel) else [policy]
    before = [vars(owner).get("generation_config") for owner in owners]
    for owner in owners:
        owner.generation_config = config
    try:
        yield
    finally:
        for owner, own in zip(owners, before, strict=True):
            if own is None:  # peft's wrapper has none and shows the inner model's
                del owner.generation_config
            else:
                owner.generation_config = own
