"""Losses of whole sequences from hidden states, each as soon as the log-probs that it needs are
known: the machinery of `linear_dpo_loss` and `linear_kto_loss`, and of those of a model.

A loss is an object that has all its arguments but the log-probs of the tokens (`SequenceLoss`);
`PairLoss` in `linear_preference.py` and `UnpairedLoss` in `linear_unpaired.py` are the two there
are. `sequence_loss_of` computes it by whatever scores tokens by a head (`fastrlhf.ops.scorer`).
Where the head is trained, sequences that share a loss are grouped, and the gradient of the sum of
the losses is made along with the log-probs; otherwise all log-probs come first.

Dims: B sequences, T tokens of each in rows, L losses: of pairs, or of sequences.
"""

from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastrlhf.ops import ChunkStats
from fastrlhf.ops.backend import outside_of_graphs, under_transform
from fastrlhf.ops.layout import layout_of
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


class SequenceLoss(Protocol):
    """A loss of sequences with all of its arguments but the log-probs of the tokens."""

    @property
    def function(self) -> str:
        """The name of the public function that computes it from hidden states."""

    @property
    def layout(self) -> Layout:
        """How the tokens lie."""

    @property
    def one_by_one(self) -> bool:
        """Whether each loss is known from its own sequences, and nothing but their log-probs needs
        a gradient.
        """

    @property
    def with_stats(self) -> tuple[str, ...]:
        """The statistics that it looks at besides the log-probs."""

    def on_device_of(self, targets: Tensor) -> "SequenceLoss":
        """Bring its tensors to where the targets are."""

    def of_tokens(self, tokens: SequenceTokens) -> tuple[Tensor, Tensor]:
        """Compute losses (L,) and rewards (B,)."""

    def sets(self, targets: Tensor) -> Tensor:
        """Number the sets of sequences that share losses, (B,), of targets (B, T)."""

    def present(self, sequences: Tensor) -> Tensor:
        """Tell which losses, (L,) bool, have all they need of the sequences that are here, (B,)."""


def layout_on_device_of(targets: Tensor, layout: Layout) -> Layout:
    """Bring a layout to where the targets are."""
    borders = layout.cu_seqlens
    return layout_of("input_ids", targets, None if borders is None else borders.to(targets.device))


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
    return _ungrouped_losses(scorer, targets, loss, ignore_index)


def _ungrouped_losses(
    scorer: Scorer, targets: Tensor, loss: SequenceLoss, ignore_index: int
) -> tuple[Tensor, Tensor]:
    mask = targets != ignore_index
    stats = scorer.stats(targets, ignore_index=ignore_index, lse=False, with_stats=loss.with_stats)
    given = {name: getattr(stats, name) for name in ("logprob", *loss.with_stats)}
    return loss.of_tokens(SequenceTokens(mask, mask, **given))


def _grouped_losses(
    scorer: LinearScorer, targets: Tensor, loss: SequenceLoss, sets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Compute the losses of sequences that share them as soon as their log-probs are known."""
    mask = targets != ignore_index
    positions = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
    chunk_loss = _ChunkLoss(loss, mask)
    total, aux = scorer.loss(
        chunk_loss.of_chunk, targets, positions,
        groups=sets.to(mask.device)[loss.layout.ids(targets)], ignore_index=ignore_index, lse=False,
        with_stats=loss.with_stats,
    )  # fmt: skip
    stats = {
        name: chunk_loss.put_back(aux[name], aux["positions"]) if aux
        else total.new_zeros(mask.shape)
        for name in chunk_loss.names
    }  # fmt: skip
    with torch.no_grad():
        losses, rewards = loss.of_tokens(SequenceTokens(mask, mask, **stats))
    losses = with_summed_gradient(
        losses, total, partial(_weighted_sum, targets, loss, ignore_index), scorer,
        alternative=(loss.function, "linear_token_stats"),
    )  # fmt: skip
    return losses, rewards


class _ChunkLoss(NamedTuple):
    """The losses of a chunk of whole sequences, for `linear_loss`."""

    loss: SequenceLoss
    mask: Tensor  # (B, T) of all sequences

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the statistics that the loss looks at."""
        return "logprob", *self.loss.with_stats

    def of_chunk(self, stats: ChunkStats, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the losses of the chunk's sequences. `positions` are those of its tokens in the
        flattened batch. The chunk is put back into a whole batch, whose other sequences are empty.
        """
        given = {name: getattr(stats, name) for name in self.names}
        of_chunk = self.mask.new_zeros(self.mask.numel()).index_fill(0, positions, True)
        of_chunk = of_chunk.view(self.mask.shape)
        in_place = {name: self.put_back(x, positions) for name, x in given.items()}
        losses, _ = self.loss.of_tokens(SequenceTokens(of_chunk, self.mask, **in_place))
        present = self.loss.present(self.loss.layout.counts(of_chunk) > 0)
        return torch.where(present, losses, 0.0).sum(), {**given, "positions": positions}

    def put_back(self, values: Tensor, positions: Tensor) -> Tensor:
        """Put numbers of some tokens in their places, (B, T), in zeros."""
        zeros = values.new_zeros(self.mask.numel())
        return zeros.index_put((positions,), values).view(self.mask.shape)


def _weighted_sum(
    targets: Tensor, loss: SequenceLoss, ignore_index: int, scorer: LinearScorer, weights: Tensor
) -> Tensor:
    """Sum the losses with the weights that the backward asks for; these differ from each other."""
    return (_ungrouped_losses(scorer, targets, loss, ignore_index)[0] * weights).sum()
