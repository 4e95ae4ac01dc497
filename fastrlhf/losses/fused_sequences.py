"""Losses of whole sequences from hidden states, each as soon as the log-probs that it needs are
known: the machinery of `linear_dpo_loss` and `linear_kto_loss`, and of those of a model.

Dims: B sequences, T tokens of each in rows, L losses: of pairs, or of sequences.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops import ChunkStats
from fastrlhf.ops.backend import outside_of_graphs, under_transform
from fastrlhf.ops.scorer import LinearScorer, Scorer
from fastrlhf.ops.summed_gradient import with_summed_gradient
from fastrlhf.reference import Layout


class SequenceTokens(NamedTuple):
    """Tokens of some of the sequences, all of those that share a loss. Statistics have the names of
    `TokenStats`.
    """

    mask: Tensor  # (B, T) bool, of those whose log-probs are here
    whole_mask: Tensor  # (B, T) bool, of all sequences
    logprob: Tensor  # (B, T)
    log_sum_sq_probs: Tensor | None = None  # (B, T), if asked for


class SequenceLoss(NamedTuple):
    """A loss of sequences with all of its options."""

    function: str  # its name
    of_tokens: Callable[[SequenceTokens], tuple[Tensor, Tensor]]  # losses (L,), rewards (B,)
    layout: Layout  # of the tokens
    # Whether each loss is known from its own sequences, and nothing but their log-probs needs a
    # gradient.
    one_by_one: bool
    # From targets (B, T), with indices that are checked: the number (B,) of the set of sequences
    # that share losses.
    sets: Callable[[Tensor], Tensor]
    # From which sequences are there, (B,) bool: which losses (L,) they have.
    present: Callable[[Tensor], Tensor]
    with_stats: tuple[str, ...] = ()  # besides the log-probs

    @property
    def names(self) -> tuple[str, ...]:
        """Statistics that the loss looks at."""
        return "logprob", *self.with_stats


def sequence_loss_of(
    scorer: Scorer, targets: Tensor, loss: SequenceLoss, *, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Compute losses (L,) and rewards (B,) of whatever scores the targets (B, T)."""
    grouped = loss.one_by_one and not under_transform()
    # The logits of kept ids are few enough to wait for any loss.
    grouped &= getattr(scorer, "support", None) is None
    if grouped and isinstance(scorer, LinearScorer) and scorer.head_is_trained:
        sets = loss.sets(targets)
        return outside_of_graphs(_grouped_losses)(scorer, targets, loss, sets, ignore_index)
    # All log-probs, then the loss: right for any loss.
    return _ungrouped(scorer, targets, loss, ignore_index)


def _ungrouped(
    scorer: Scorer, targets: Tensor, loss: SequenceLoss, ignore_index: int
) -> tuple[Tensor, Tensor]:
    mask = targets != ignore_index
    stats = scorer.stats(targets, ignore_index=ignore_index, lse=False, with_stats=loss.with_stats)
    found = {name: getattr(stats, name) for name in loss.names}
    return loss.of_tokens(SequenceTokens(mask, mask, **found))


def _grouped_losses(
    scorer: LinearScorer, targets: Tensor, loss: SequenceLoss, sets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The losses of the sequences that share them as soon as their log-probs are known."""
    mask, layout = targets != ignore_index, loss.layout

    def put_back(values: Tensor, token: Tensor) -> Tensor:
        return values.new_zeros(mask.numel()).index_put((token,), values).view(mask.shape)

    def of_chunk(stats: ChunkStats, token: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = {name: getattr(stats, name) for name in loss.names}
        here = mask.new_zeros(mask.numel()).index_fill(0, token, True).view(mask.shape)
        back = {name: put_back(x, token) for name, x in found.items()}
        losses, _ = loss.of_tokens(SequenceTokens(here, mask, **back))
        present = loss.present(layout.counts(here) > 0)
        return torch.where(present, losses, 0.0).sum(), {**found, "token": token}

    token = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
    total, aux = scorer.loss(
        of_chunk, targets, token,
        groups=sets.to(mask.device)[layout.ids(targets)], ignore_index=ignore_index, lse=False,
        with_stats=loss.with_stats,
    )  # fmt: skip
    found = {
        name: put_back(aux[name], aux["token"]) if aux else total.new_zeros(mask.shape)
        for name in loss.names
    }
    with torch.no_grad():
        losses, rewards = loss.of_tokens(SequenceTokens(mask, mask, **found))

    def weighted_sum(scorer: LinearScorer, weights: Tensor) -> Tensor:
        return (_ungrouped(scorer, targets, loss, ignore_index)[0] * weights).sum()

    losses = with_summed_gradient(
        losses, total, weighted_sum, scorer, alternative=(loss.function, "linear_token_stats")
    )
    return losses, rewards
