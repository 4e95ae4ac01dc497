"""Train LoRA adapters by DPO, where the reference is the same model with its adapters off."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastrlhf import dpo_loss, model_token_stats, sequence_logprobs

from .sentiment import Pair
from .settings import TrainingOptions


class Batch(NamedTuple):
    """P pairs as B = 2P sequences, padded on the right: the chosen ones, then the rejected ones."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T) 0/1
    completion_mask: Tensor  # (B, T) bool
    chosen: Tensor  # (P,) rows
    rejected: Tensor  # (P,) rows

    @property
    def scored(self) -> Tensor:
        """Mask (B, T-1) of the log-probs of completion tokens: the first token has none."""
        return self.completion_mask[:, 1:]


class Step(NamedTuple):
    """The figures of one optimizer step."""

    loss: float
    accuracy: float  # share of pairs whose chosen completion has the higher reward
    margin: float  # mean difference of the rewards


def collate(pairs: Sequence[Pair], pad_token_id: int) -> Batch:
    """Lay pairs out as one batch, on the device of their tokens."""
    samples = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    sequences = [torch.cat((sample.prompt_ids, sample.completion_ids)) for sample in samples]
    completions = [
        torch.arange(len(sequence), device=sequence.device) >= len(sample.prompt_ids)
        for sequence, sample in zip(sequences, samples, strict=True)
    ]
    input_ids = pad_sequence(sequences, batch_first=True, padding_value=pad_token_id)
    attention = pad_sequence(
        [torch.ones_like(sequence) for sequence in sequences], batch_first=True
    )
    completion = pad_sequence(completions, batch_first=True)
    chosen, rejected = torch.arange(len(samples), device=input_ids.device).chunk(2)
    return Batch(input_ids, attention, completion, chosen, rejected)


def completion_logprobs(model: PeftModel, batch: Batch) -> Tensor:
    """Compute the log-prob of each completion token: (B, T-1), 0 elsewhere."""
    return model_token_stats(
        model, batch.input_ids, batch.attention_mask, mask=batch.completion_mask
    ).logprob


@torch.no_grad()
def reference_logprobs(model: PeftModel, batch: Batch) -> Tensor:
    """Sum the log-probs of each completion under the model without its adapters: (B,)."""
    with model.disable_adapter():
        logprobs = completion_logprobs(model, batch)
    return sequence_logprobs(logprobs, batch.scored)


class PairData:
    """Pairs with their reference log-probs, computed once; batches of it by index."""

    def __init__(self, model: PeftModel, pairs: Sequence[Pair], pad_token_id: int, batch_size: int):
        self.pairs = pairs
        self.pad_token_id = pad_token_id
        self.reference = torch.cat(
            [
                torch.stack(reference_logprobs(model, self._collate(indices)).chunk(2), dim=1)
                for indices in torch.arange(len(pairs)).split(batch_size)
            ]
        )  # (pairs, 2): chosen, rejected

    def _collate(self, indices: Tensor) -> Batch:
        return collate([self.pairs[index] for index in indices.tolist()], self.pad_token_id)

    def batch(self, indices: Tensor) -> tuple[Batch, Tensor]:
        """Take some pairs, and the reference log-probs (B,) of their sequences."""
        return self._collate(indices), self.reference[indices].T.reshape(-1)

    def steps_per_pass(self, pairs_per_step: int) -> int:
        """Count the full batches in one pass, which `shuffled` draws; at least one."""
        return max(1, len(self.pairs) // pairs_per_step)

    def shuffled(self, pairs_per_step: int, seed: int) -> Iterator[tuple[Batch, Tensor]]:
        """Draw batches for ever, each pair at most once in a pass: what remains is left out."""
        generator = torch.Generator().manual_seed(seed)
        size = min(pairs_per_step, len(self.pairs))
        while True:
            order = torch.randperm(len(self.pairs), generator=generator)
            for indices in order.split(size):
                if len(indices) == size:
                    yield self.batch(indices)


def train(model: PeftModel, data: PairData, options: TrainingOptions, seed: int) -> Iterator[Step]:
    """Train the adapters, and yield the figures of each step."""
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / options.steps)
    batches = data.shuffled(options.pairs_per_step, seed)
    for batch, reference in islice(batches, options.steps):
        losses, rewards = dpo_loss(
            completion_logprobs(model, batch),
            reference,
            batch.chosen,
            batch.rejected,
            options.beta,
            mask=batch.scored,
        )
        loss = losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        margins = rewards[batch.chosen] - rewards[batch.rejected]
        yield Step(loss.item(), (margins > 0).float().mean().item(), margins.mean().item())
