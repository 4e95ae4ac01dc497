"""Prompts for rollouts of the tiny model, settings that would spoil its samples, and the comparison
of log-probs with those of each sequence alone.
"""

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from fastrlhf.recipes.rollout import Rollout
from support.compare import assert_as_accurate
from support.recipe_models import EOS, WORDS, plain_logits_one_by_one

CPU = torch.device("cpu")
# Of 1 to 4 tokens, so that all but the longest are padded.
PROMPTS = ["the", "the film was good", "film was", "was the film"] * 4
GOOD = WORDS.index("good")


def hostile() -> GenerationConfig:
    """Everything that would make samples other than those of softmax(logits / temperature)."""
    return GenerationConfig(
        do_sample=True,
        top_k=1,
        top_p=0.1,
        min_p=0.3,
        typical_p=0.2,
        epsilon_cutoff=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=5,
        max_new_tokens=2,
        temperature=0.1,
        bad_words_ids=[[GOOD]],
        suppress_tokens=[WORDS.index("bad")],
        begin_suppress_tokens=[EOS],
        forced_eos_token_id=EOS,
        num_beams=2,
        renormalize_logits=True,
        eos_token_id=[EOS, GOOD],
        pad_token_id=EOS,
    )


def assert_logprobs(found: Tensor, model: nn.Module, batch: Rollout, temperature: float) -> None:
    """Compare with log softmax(logits / temperature) of each sequence without its padding."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]

    def formula(dtype: torch.dtype) -> Tensor:
        logits = plain_logits_one_by_one(model, ids, batch["attention_mask"], dtype)[:, :-1]
        logprobs = (logits / temperature).log_softmax(-1)
        return logprobs.gather(-1, ids[:, 1:, None])[..., 0]

    assert found.shape == mask.shape and found.dtype == torch.float32
    assert not found.requires_grad
    assert (found[~mask] == 0).all()
    plain, exact = formula(torch.float32), formula(torch.float64)
    assert_as_accurate(found[mask], plain[mask], exact[mask], of="log-prob")
