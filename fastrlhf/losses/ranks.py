"""Losses over the ranks of a torch.distributed group.

Two things can be spread over ranks.

Sequences, as in data parallelism. The losses need not know: each rank's is of its own sequences,
divided by what `global_normalizer` counts on all ranks, so that they add up to the loss of all.
What is of the batch itself has a `group=`: `whiten`, `group_advantages`, `gdpo_advantages`,
`pf_ppo_weights`, `kto_kl`, `top_entropy_mask`, `clip_cov_mask`, `kl_cov_mask`, and `trpo_step`.

The tokens of each sequence, as in context parallelism: `group=` of `sequence_logprobs`, `dpo_loss`,
`policy_loss`, `ppo_loss`, `grpo_loss`, `value_loss`, `process_reward_loss`, `wpo_weights` and the
corrections for rollouts. Every rank has the same B sequences in the
same order, and of each those tokens that are its own: any number, none included, in rows (B, T) or
packed (1, N). What is of tokens is of its own; what is of sequences, (B,) or (P,), is the same on
all ranks. So are losses and metrics, which are those of all tokens, in the same bits; the gradient
of each rank is that of this one loss with respect to its own tokens. A model whose parameters
every rank has thus gets the sum of the ranks' gradients. (DDP and FSDP take their mean: for these,
multiply the loss by the number of ranks, or give a normalizer of `gradients="mean"`, with which the
loss itself is as many times larger.)

Such a group (the context-parallel one) is another than that of the operations from logits or hidden
states (the tensor-parallel one), whose ranks have the same tokens and share the vocabulary. A loss
that is given the tensor-parallel group counts every token once for each of its ranks.

All ranks make the same calls, on tensors of one dtype that need a gradient on all or on none, and
differentiate together. `gae` and `shaped_rewards` have no group: they need the order of the tokens,
which ranks cut in ways of their own. Gather those few numbers a token before.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastrlhf.ops.checks import check_mask, check_one_of
from fastrlhf.ops.ranks import (
    Group,
    check_group,
    shared_by_ranks,
    size_of,
    sum_over_ranks,
    summed,
)
from fastrlhf.reference import Layout


class OverRanks(Layout):
    """Tokens that lie in some layout, those of each sequence on several ranks.

    From tokens to sequences, numbers are added up over ranks, and their gradients are those of all;
    back to tokens, it is the other way around.
    """

    def __init__(self, here: Layout, group: Group) -> None:
        self.here, self.group = here, group

    def sequences(self, tokens: Tensor) -> int:
        return self.here.sequences(tokens)

    def sums(self, x: Tensor) -> Tensor:
        return sum_over_ranks(self.here.sums(x), self.group)

    def counts(self, mask: Tensor) -> Tensor:
        return summed(self.here.counts(mask), self.group)

    def total(self, x: Tensor) -> Tensor:
        return sum_over_ranks(x.sum(), self.group)

    def spread(self, x: Tensor) -> Tensor:
        return self.here.spread(shared_by_ranks(x, self.group))

    def last(self, mask: Tensor) -> Tensor:
        raise NotImplementedError("which token is the last depends on how ranks cut a sequence")

    def ids(self, tokens: Tensor) -> Tensor:
        return self.here.ids(tokens)

    def tokens(self, x: Tensor) -> Tensor:
        return self.here.tokens(x)


@torch.no_grad()
def global_normalizer(
    mask: Tensor | Iterable[Tensor], group: Group | None = None, *, gradients: str = "sum"
) -> Tensor:
    """Count what a mask marks on all ranks: the `normalizer` of a loss that is spread over
    micro-batches and ranks, which so becomes that of one large batch.

    Eager equivalent: `mask.sum()`, after an all-reduce; at least 1.

    A step that accumulates gradients, of which DDP or FSDP then takes the mean over ranks::

        n = global_normalizer([b["mask"] for b in batches], group, gradients="mean")
        for b in batches:
            loss, metrics = policy_loss(..., b["mask"], normalizer=n)
            loss.backward()

    The losses of pairs are not reduced, and are counted by a mask of their own::

        pairs = [torch.ones_like(b["yw_idxs"]) for b in batches]
        n = global_normalizer(pairs, group, gradients="mean")
        for b in batches:
            losses, rewards = dpo_loss(...)
            (losses.sum() / n).backward()

    Args:
        mask: bool or 0/1 of any shape, one entry for each of what the loss is a mean of: tokens,
            (B, T) or packed; for a mean over sequences, (B,) ones; for one over pairs, (P,) ones.
            Or the masks of all micro-batches of this rank, as many as it has.
        group: torch.distributed group of the ranks; None: this process alone.
        gradients: what becomes of the gradients of the ranks. "sum": the count as it is; "mean",
            of DDP and FSDP: divided by the number of ranks, by which the mean divides once more.
            The loss of the whole batch is the sum of the ranks' losses, or their mean, likewise.

    Where C ranks share each sequence (`group=` of the losses), a sequence or a pair is counted C
    times: divide by C. A token is on one rank, and counted once.

    Returns:
        0-d int64, for "mean" fp64; the same on every rank. Nobody waits for a GPU.

    Raises:
        TypeError, ValueError: what is no mask, or none at all; a group that is none, or without
            this process; an unknown word for the gradients.

    Source: huggingface.co/blog/gradient_accumulation, on means of means.

    Example:
        >>> masks = [torch.tensor([[1, 1, 0]]), torch.tensor([[1, 1, 1]])]  # of two micro-batches
        >>> tokens = fastrlhf.global_normalizer(masks)
        >>> tokens
        tensor(5)
        >>> logprobs = torch.zeros(1, 3)
        >>> batch = logprobs, logprobs, torch.ones(1), masks[0]
        >>> loss, _ = fastrlhf.ppo_loss(*batch, normalizer=tokens)
        >>> loss
        tensor(-0.4000)
    """
    check_one_of("gradients", gradients, ("sum", "mean"))
    masks = [mask] if isinstance(mask, Tensor) or not isinstance(mask, Iterable) else list(mask)
    for x in masks:
        check_mask("mask", x)
    if not masks:
        raise ValueError("mask: expected at least one (one without entries, on an idle rank)")
    count = torch.stack([(x != 0).sum().to(masks[0].device) for x in masks]).sum()
    if (group := check_group(group)) is not None:
        count = summed(count, group)
    count = count.clamp(min=1)
    ranks = 1 if group is None else size_of(group)
    return count if gradients == "sum" else count.double() / ranks
