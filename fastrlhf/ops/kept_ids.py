"""Kept ids: the few ids to which a sampler restricted each token.

Top-p and top-k sampling draw a token from a few ids that they keep. Where training uses the same
ids, the policy is a softmax over these alone. Half of the tokens keep one id, most keep a few, some
keep a hundred. The ids of all tokens come in one tensor, token after token, with the offsets at
which those of each token begin. Time and memory grow with the number of kept ids, not with the
vocabulary.

`checked_support` makes `KeptIds` of the public argument `support`. `kept_stats.py` computes
statistics from the logits of these ids, which come from hidden states (`kept_logits.py`) or out of
a tensor of all logits (`taken_logits.py`).

Dims: N tokens, M kept ids of all of them, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import is_batched
from .checks import (
    assert_on_device,
    check_dense,
    check_indices_on_host,
    check_same_device,
    check_shape,
    known_on_host,
    wide_integers,
)
from .vocabulary_part import VocabularyPart, fingerprint

Support = tuple[Tensor, Tensor]  # ids (M,); offsets (N + 1,) at which those of each token begin

_LIKE = "one for each token, flattened, and the end"


class KeptIds(NamedTuple):
    """A support that was checked, with what is computed from it once for all uses.

    The ids of ignored tokens are never looked at: they are 0 here, and not live.
    """

    ids: Tensor  # (M,) int64
    offsets: Tensor  # (N + 1,) int64
    token: Tensor  # (M,) the number of the token that keeps the id
    live: Tensor  # (M,) whether that token has a target
    live_tokens: Tensor  # (N,) whether a token has a target
    targets: Tensor  # (N,), 0 for ignored tokens
    own: Tensor  # (N,) place of each token's target among the M ids; 0 for ignored tokens
    alone: Tensor  # (N,) whether a token keeps its target alone, so that there is nothing to choose

    @property
    def counts(self) -> Tensor:
        """How many ids each token keeps: (N,)."""
        return self.offsets.diff()

    @property
    def with_choice(self) -> Tensor:
        """Tell which ids (M,) belong to live tokens that keep more than one."""
        return self.live & ~self.alone[self.token]

    def sums(self, values: Tensor) -> Tensor:
        """Sum values (M,) over the ids of each token: (N,). PyTorch adds them up one by one, in
        fp64 so that long sums stay accurate.
        """
        totals = torch.segment_reduce(
            values.double(), "sum", offsets=self.offsets, initial=0, unsafe=True
        )
        return totals.to(values.dtype)

    def largest(self, values: Tensor) -> Tensor:
        """Return the largest (N,) of the values (M,) of each token; -inf where it keeps no id."""
        return torch.segment_reduce(
            values, "max", offsets=self.offsets, initial=-torch.inf, unsafe=True
        )


def checked_support(
    support: Support,
    targets: Tensor,
    vocab: int | Tensor | None,
    ignore_index: int,
    *,
    like: str = _LIKE,
) -> KeptIds:
    """Check a support of tokens (...) with these targets.

    What the tensors hold is checked here on the CPU; on a GPU, by an assertion when the device gets
    there. Ids may be anything where the vocabulary is None.

    Raises:
        TypeError: anything but two tensors of int32 or int64.
        ValueError: shapes or devices that do not fit; offsets that do not start at 0, that
            decrease, or do not end at M; of a token with a target, an id outside [0, V) or twice,
            or a target that is not among its ids.
    """
    flat = wide_integers(targets).reshape(-1)
    tokens = flat.shape[0]
    ids, offsets = _dense_support(support, tokens, like)
    if is_batched(offsets):
        raise ValueError("support[1]: expected offsets that are the same for all of a vmap")
    for i, x in enumerate((ids, offsets)):
        check_same_device(f"support[{i}]", x, "targets", targets)
    _check_offsets(offsets, ids.shape[0])
    live_tokens = flat != ignore_index
    flat = torch.where(live_tokens, flat, 0)
    place = torch.arange(ids.shape[0], device=ids.device)
    token = torch.searchsorted(offsets[1:].contiguous(), place, right=True)
    token = token.clamp(max=max(0, tokens - 1))
    live = live_tokens[token] if tokens else ids.bool()
    known = known_on_host(ids, flat)
    if isinstance(vocab, int):
        check_indices_on_host("support[0]", ids[live] if known else ids, vocab, "ids")
    ids = torch.where(live, ids, 0)
    # Cell N, behind those of the N tokens, takes the ids that are no target.
    is_own = live & (ids == (flat[token] if tokens else ids))
    cell = torch.where(is_own, token, tokens)
    own = torch.zeros(tokens + 1, dtype=torch.int64, device=ids.device)
    times_kept = own.scatter_add(0, cell, torch.ones_like(cell))[:tokens]
    own = own.scatter(0, cell, place)[:tokens]
    alone = live_tokens & (offsets.diff() == 1)
    kept = KeptIds(ids, offsets, token, live, live_tokens, flat, own, alone)
    if not is_batched(ids, flat):
        _check_ids(kept, times_kept, vocab)
    return kept


def of_part(kept: KeptIds, part: VocabularyPart | None) -> tuple[Tensor, Tensor | None]:
    """Number the kept ids (M,) from the first column of this rank's part of the vocabulary, and
    tell which of them lie in it; None stands for all of them.
    """
    if part is None:
        return kept.ids, None
    own = (kept.ids >= part.start) & (kept.ids < part.start + part.size)
    return torch.where(own, kept.ids - part.start, 0), own


def some_of_support(support: Support, some: Tensor) -> Support:
    """Return the support of the tokens with the given numbers. On a GPU, the host waits to learn
    how many ids they keep.
    """
    ids, offsets = support
    first, counts = offsets[:-1][some], offsets.diff()[some]
    ends = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    within = torch.arange(int(ends[-1]), device=ids.device)
    return ids[within + (first - ends[:-1]).repeat_interleave(counts)], ends


def said_with_support(scored: Tensor, support: Support | None, tokens: int) -> Tensor:
    """Add a fingerprint of the support to the targets of the tokens to score, which ranks that
    share a vocabulary compare: ranks with different supports then find that they disagree.
    """
    if support is None:
        return scored
    ids, offsets = _dense_support(support, tokens, _LIKE)
    return scored + fingerprint(ids, None) + 3 * fingerprint(offsets, None)


def _dense_support(support: Support, tokens: int, like: str) -> Support:
    """Return ids and offsets as int64. Their types, dtypes and shapes are checked, not their
    values. `like` describes the expected offsets in an error.
    """
    if not isinstance(support, (tuple, list)) or len(support) != 2:
        got = type(support).__name__
        if isinstance(support, (tuple, list)):
            got = f"{len(support)} of them"
        raise TypeError(
            f"support: expected a tuple of two tensors, ids (M,) and offsets (N + 1,), got {got}"
        )
    for i, x in enumerate(support):
        check_dense(f"support[{i}]", x)
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"support[{i}]: expected int32 or int64, got {x.dtype}")
    ids, offsets = support
    if ids.ndim != 1:
        raise ValueError(f"support[0]: expected ids of shape (M,), got {tuple(ids.shape)}")
    check_shape("support[1]", offsets, (tokens + 1,), like)
    return ids.long(), offsets.long()


def _check_offsets(offsets: Tensor, end: int) -> None:
    if not known_on_host(offsets):
        fits = (offsets.diff() >= 0).all() & (offsets[0] == 0) & (offsets[-1] == end)
        assert_on_device(
            fits, "support[1]: expected to start at 0, not to decrease and to end at M"
        )
        return
    first, last, falls = int(offsets[0]), int(offsets[-1]), offsets.diff() < 0
    if first != 0:
        raise ValueError(f"support[1]: expected offsets that start at 0, got {first}")
    if falls.any():
        place = int(falls.nonzero()[0])
        raise ValueError(
            f"support[1]: expected offsets that do not decrease, got {int(offsets[place + 1])} "
            f"after {int(offsets[place])}"
        )
    if last != end:
        raise ValueError(
            f"support[1]: expected offsets that end at {end}, the number of ids, got {last}"
        )


def _check_ids(kept: KeptIds, times_kept: Tensor, vocab: int | Tensor | None) -> None:
    """Check that each token keeps its target, and no id twice, since it would count twice."""
    keeps_target = ~kept.live_tokens | (times_kept >= 1)
    twice = _stands_before(kept)
    if not known_on_host(kept.ids):
        assert_on_device(
            keeps_target.all(), "support: a target is not among the ids that its token keeps"
        )
        if vocab is not None:
            inside = ~kept.live | ((kept.ids >= 0) & (kept.ids < vocab))
            assert_on_device(inside.all(), "support[0]: an id is outside [0, vocabulary)")
        assert_on_device(~twice.any(), "support[0]: a token keeps an id twice")
        return
    if not keeps_target.all():
        token = int((~keeps_target).nonzero()[0])
        others = int(kept.counts[token])
        raise ValueError(
            "support: expected the target of each token among its ids, got target "
            f"{int(kept.targets[token])} of token {token} (as if flat), which keeps "
            + (f"{others} others" if others else "none; is it one to ignore?")
        )
    if twice.any():
        place = int(twice.nonzero()[0])
        raise ValueError(
            f"support[0]: expected each id of a token once, got {int(kept.ids[place])} twice for "
            f"token {int(kept.token[place])}"
        )


def _stands_before(kept: KeptIds) -> Tensor:
    """Tell which ids (M,) of live tokens repeat an earlier id of the same token."""
    by_id = kept.ids.argsort(stable=True)
    ids, token = kept.ids[by_id], kept.token[by_id]
    same = (ids[1:] == ids[:-1]) & (token[1:] == token[:-1]) & kept.live[by_id][1:]
    twice = torch.zeros_like(kept.live)
    twice[by_id[1:]] = same
    return twice
