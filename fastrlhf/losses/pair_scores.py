"""Compute the scores of pairs from log-probs, and the sum of their losses.

Used by `preference.py`, which has `dpo_loss`; `pair_losses.py` has the loss of each pair.

Dims: B sequences, T tokens of each in rows, P pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.losses.f_divergence import f_score
from fastrlhf.losses.pair_losses import Pairs, loss_of_pairs
from fastrlhf.losses.preference_options import PreferenceOptions
from fastrlhf.losses.public_length import length_desensitized
from fastrlhf.reference import (
    Layout,
    accumulation_dtype,
    masked_sum,
    sequence_lengths,
    sequence_scores,
)


class Logps(NamedTuple):
    """Log-probs under policy and reference, of sequences (B,) or, with a mask, of tokens."""

    policy: Tensor
    ref: Tensor
    mask: Tensor | None
    lengths: Tensor | None
    layout: Layout

    def scores(self, average: bool = False) -> Tensor:
        """Compute s (B,) = ln π - ln π_ref."""
        scores = sequence_scores(self.policy, self.ref, self.mask, self.layout)
        return scores / self.counts(scores.dtype) if average else scores

    def ref_sums(self, average: bool = False) -> Tensor:
        sums = masked_sum(self.ref, self.mask if self.ref.ndim == 2 else None, self.layout)
        return sums / self.counts(sums.dtype) if average else sums

    def counts(self, dtype: torch.dtype) -> Tensor:
        """Tokens of each sequence (B,), at least 1; without a mask and lengths, 1."""
        if self.mask is None and self.lengths is None:
            return self.policy.new_ones((), dtype=dtype)
        return sequence_lengths(self.mask, self.lengths, dtype, self.layout)

    def of_pairs(self, pair: tuple[Tensor, Tensor], options: PreferenceOptions) -> list[Tensor]:
        """Scores and sums of the reference, of the chosen and the rejected sequences: 4 of (P,)."""
        if options.ld_alpha is None:
            sums = self.scores(options.average), self.ref_sums(options.average)
            return [x[i] for x in sums for i in pair]
        assert self.mask is not None
        dtype = accumulation_dtype(torch.promote_types(self.policy.dtype, self.ref.dtype))
        ref = self.ref.to(dtype) if self.ref.ndim == 2 else torch.zeros_like(self.policy)
        tokens = self.policy.to(dtype) - ref, ref
        return [
            x
            for of_tokens in tokens
            for x in length_desensitized(
                of_tokens, self.mask, pair, options.ld_alpha, self.layout
            )
        ]  # fmt: skip


def summed_losses(
    logps: Logps,
    pair: tuple[Tensor, Tensor],
    beta: float,
    options: PreferenceOptions,
    whole_mask: Tensor | None,
) -> Tensor:
    """Compute the weighted sum of all losses (P,), but for the weights of pairs."""
    chosen, rejected, chosen_ref, rejected_ref = logps.of_pairs(pair, options)
    of_chosen, of_rejected = (
        f_score(x, options.f_divergence, options.f_alpha) for x in (chosen, rejected)
    )
    lengths = logps.counts(chosen.dtype)
    counts = [lengths[i] if lengths.ndim else lengths for i in pair]

    def margin(chosen: Tensor, rejected: Tensor) -> Tensor:
        if options.dpop_lambda:  # DPOP, 2402.13228
            chosen = chosen - options.dpop_lambda * torch.relu(-chosen)
        return chosen - rejected

    pairs = Pairs(
        chosen, rejected, chosen_ref, rejected_ref, margin(of_chosen, of_rejected),
        margin(of_chosen / counts[0], of_rejected / counts[1]),
        _sft(logps, pair[0], whole_mask) if "sft" in options.types else None,
    )  # fmt: skip
    parts = [
        loss_of_pairs(name, pairs, beta, options) * weight for name, weight in options.types.items()
    ]
    if options.rpo_alpha:  # 2404.19733
        parts.append(options.rpo_alpha * _nll(logps, pair[0]) / counts[0])
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _nll(logps: Logps, chosen: Tensor) -> Tensor:
    return -masked_sum(logps.policy, logps.mask, logps.layout)[chosen]


def _sft(logps: Logps, chosen: Tensor, whole_mask: Tensor | None) -> Tensor:
    """-ln π of each chosen sequence (P,), over the mean number of their tokens."""
    counts = logps.lengths if whole_mask is None else logps.layout.counts(whole_mask)
    assert counts is not None
    nll = _nll(logps, chosen)
    return nll * (chosen.shape[0] / counts[chosen].sum().to(nll.dtype).clamp(min=1))
