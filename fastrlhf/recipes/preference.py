"""Make batches of pairs of completions, with their log-probs under the reference.

The reference is the model without its adapters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from fastrlhf import model_token_stats, sequence_logprobs

from .draws import draw
from .rollout import adapters_off
from .sampling import padded
from .sentiment import Pair


class Batch(NamedTuple):
    """P pairs as B = 2P sequences, padded on the right: the chosen ones, then the rejected ones."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T) 0/1
    completion_mask: Tensor  # (B, T) bool
    chosen: Tensor  # (P,) indices of rows
    rejected: Tensor  # (P,) indices of rows

    @property
    def scored(self) -> Tensor:
        """Mask (B, T-1) of the log-probs of completion tokens. The first token has no log-prob."""
        return self.completion_mask[:, 1:]


def collate(pairs: Sequence[Pair], pad_token_id: int) -> Batch:
    """Make one batch of pairs, on the device of their tokens."""
    samples = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    ids, attention, completion = padded(samples, pad_token_id)
    chosen, rejected = torch.arange(len(samples), device=ids.device).chunk(2)
    return Batch(ids, attention, completion, chosen, rejected)


def completion_logprobs(model: PeftModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Compute the log-prob of each completion token: (B, T-1), 0 elsewhere."""
    return model_token_stats(
        model,
        batch.input_ids,
        batch.attention_mask,
        mask=batch.completion_mask,
        temperature=temperature,
    ).logprob


@torch.no_grad()
def reference_logprobs(model: PeftModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Sum the log-probs of each completion under the model without its adapters: (B,)."""
    with adapters_off(model):
        logprobs = completion_logprobs(model, batch, temperature)
    return sequence_logprobs(logprobs, batch.scored)


class PairData:
    """Pairs with their reference log-probs, which are computed once. Batches are taken by index."""

    def __init__(
        self,
        model: PeftModel,
        pairs: Sequence[Pair],
        pad_token_id: int,
        batch_size: int,
        temperature: float = 1.0,
    ):
        """Compute the reference log-probs, `batch_size` pairs at a time."""
        self.pairs = pairs
        self.pad_token_id = pad_token_id
        references = [
            reference_logprobs(model, self._collate(indices), temperature).chunk(2)
            for indices in torch.arange(len(pairs)).split(batch_size)
        ]
        # (pairs, 2): chosen, rejected
        self.reference = torch.cat([torch.stack(one, dim=1) for one in references])

    def _collate(self, indices: Tensor) -> Batch:
        return collate([self.pairs[index] for index in indices.tolist()], self.pad_token_id)

    def batch(self, indices: Tensor) -> tuple[Batch, Tensor]:
        """Return a batch of pairs by index, and the reference log-probs (B,) of its sequences."""
        return self._collate(indices), self.reference[indices].T.reshape(-1)

    def of_step(self, step: int, pairs_per_step: int, seed: int) -> tuple[Batch, Tensor]:
        """Return the batch of a step; `draw` takes all pairs in random order, pass after pass."""
        return self.batch(torch.tensor(draw(range(len(self.pairs)), step, pairs_per_step, seed)))
