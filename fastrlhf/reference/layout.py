"""Where the tokens of each sequence stand, and sums over the tokens of sequences.

`preference.py` here uses it, as do the losses of sequences in `fastrlhf/losses` and `fastrlhf/ops`.

Dims: B sequences, T tokens.
"""

import torch
from torch import Tensor

from .scalars import accumulation_dtype


class Layout:
    """Where the tokens of each sequence stand: here in rows (B, T).

    `fastrlhf.ops.layout.Runs` is the layout of packed tokens, one sequence after the other.
    """

    cu_seqlens: Tensor | None = None

    def sequences(self, tokens: Tensor) -> int:
        """Return B."""
        return tokens.shape[0]

    def sums(self, x: Tensor) -> Tensor:
        """Sum each sequence: (B,)."""
        return x.sum(-1)

    def counts(self, mask: Tensor) -> Tensor:
        """Count the tokens of the mask in each sequence: (B,) int64."""
        return (mask != 0).sum(-1)

    def total(self, x: Tensor) -> Tensor:
        """Sum all tokens: 0-d."""
        return x.sum()

    def spread(self, x: Tensor) -> Tensor:
        """Give each token the value (B,) of its sequence, in a shape that broadcasts to theirs."""
        return x.unsqueeze(-1)

    def last(self, mask: Tensor) -> Tensor:
        """Tell which tokens are the last ones of the mask in their sequence."""
        counts = mask != 0
        return counts & (counts.flip(-1).cumsum(-1).flip(-1) == 1)

    def ids(self, tokens: Tensor) -> Tensor:
        """Return the number of its sequence, from 0, for each token of such a tensor."""
        return torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(1).expand(tokens.shape)

    def tokens(self, x: Tensor) -> Tensor:
        """Return rows as they are, and packed tokens as a single row, so that what is 2-d belongs
        to tokens, and what is 1-d to sequences.
        """
        return x


ROWS = Layout()


def masked_sum(values: Tensor, mask: Tensor | None, layout: Layout = ROWS) -> Tensor:
    """Sum the tokens of the mask, whatever the others hold, to (B,). Without a mask, the values are
    sums (B,) already.
    """
    values = values.to(accumulation_dtype(values.dtype))
    if mask is None:
        return values
    keep = mask if mask.dtype == torch.bool else mask != 0
    return layout.sums(torch.where(keep, values, 0.0))


def sequence_scores(
    policy: Tensor, reference: Tensor, mask: Tensor | None, layout: Layout = ROWS
) -> Tensor:
    """Compute s (B,) = Σ(ln π - ln π_ref); the reference's log-probs may be summed already."""
    # The conversion comes before the sum, which would be rounded to 16 bits otherwise.
    dtype = accumulation_dtype(torch.promote_types(policy.dtype, reference.dtype))
    policy, reference = policy.to(dtype), reference.to(dtype)
    if mask is not None and reference.ndim == 2:
        return masked_sum(policy - reference, mask, layout)
    return masked_sum(policy, mask, layout) - masked_sum(reference, None)


def sequence_lengths(
    mask: Tensor | None, lengths: Tensor | None, dtype: torch.dtype, layout: Layout = ROWS
) -> Tensor:
    """Return the number of tokens of each sequence (B,), at least 1, from the mask if given."""
    counts = layout.counts(mask) if mask is not None else lengths
    assert counts is not None
    return counts.to(dtype).clamp(min=1)
