"""Preference losses from hidden states: the logits are never built.

Dims: B sequences, T tokens, P pairs, H hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_pair_indices
from fastrlhf.losses.preference import LOSS_TYPES, dpo_loss
from fastrlhf.losses.reference_free import cpo_loss, orpo_loss, simpo_loss
from fastrlhf.losses.sequences import sequence_logprobs
from fastrlhf.ops import ChunkStats, Weight
from fastrlhf.ops.backend import outside_of_graphs, under_transform
from fastrlhf.ops.checks import (
    check_between,
    check_finite,
    check_ignore_index,
    check_integer,
    check_one_of,
    check_positive,
    wide_integers,
)
from fastrlhf.ops.kept_ids import Support
from fastrlhf.ops.layout import layout_of
from fastrlhf.ops.ranks import Group
from fastrlhf.ops.scorer import LinearScorer, Scorer, linear_scorer
from fastrlhf.ops.sharded import replicated
from fastrlhf.ops.summed_gradient import with_summed_gradient
from fastrlhf.ops.transform import temperatures_of_layout
from fastrlhf.reference import Layout


class PairLoss(NamedTuple):
    """A loss of pairs with all of its options, and the pairs."""

    # From token log-probs (B, T) and the mask of those that count: losses (P,), rewards (B,).
    of_tokens: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    chosen: Tensor  # (P,)
    rejected: Tensor  # (P,)
    layout: Layout  # of the tokens
    # Whether the loss of a pair is known from its own sequences, and nothing but their log-probs
    # needs a gradient.
    one_by_one: bool


_OF_THE_BATCH = ("aot", "aot_unpaired")


def linear_dpo_loss(
    hidden: Tensor,
    weight: Weight,
    targets: Tensor,
    ref_logps: Tensor | None,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float = 0.1,
    *,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    gamma: float = 0.5,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    group: Group | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `dpo_loss`, or a reference-free loss, from hidden states and the weight of the head.

    Eager equivalent::

        logprobs = linear_token_logprobs(hidden, weight, targets, ...)  # (B, T)
        losses, rewards = dpo_loss(
            logprobs, ref_logps, yw_idxs, yl_idxs, beta, mask=targets != ignore_index, ...
        )

    Args:
        hidden: (B, T, H), chosen and rejected sequences in one batch, in any order.
        weight: (V, H).
        targets: (B, T) integer, aligned with the hidden states that predict them (`shift_targets`);
            ignore_index for prompts and padding.
        ref_logps: (B,) log-probs of whole sequences under the reference model, in nats, or (B, T)
            of their tokens; None for the reference-free types.
        yw_idxs, yl_idxs: (P,) integer indices of the preferred and the other sequences.
        beta: positive; note that simpo's paper takes 2.0 to 10.
        loss_type: any of `dpo_loss`; or "simpo", "cpo" and "orpo", which take ref_logps=None.
        label_smoothing, discopop_tau: as `dpo_loss`; cpo takes label_smoothing too.
        gamma: target margin of simpo.
        alpha: weight of the likelihood in cpo.
        bias, temperature, softcap, scale, ignore_index, support, rows, chunk_size, impl, group: as
            `linear_token_stats`; where ranks share the vocabulary, losses are the same on every
            rank. With rows, which are (B, T), hidden is (U, H).
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last. With
            them, what is (B, T) is (N,) or (1, N), and hidden (N, H) or (1, N, H). A ref_logps of
            the shape of targets is of tokens.

    Returns:
        losses (P,), not reduced, and rewards (B,), detached; fp32 (fp64 for fp64 hidden states).

    Differentiable with respect to hidden, weight, bias and ref_logps; under `torch.func` (grad,
    vmap, jvp, ...) and forward-mode differentiation too, where the logits are built.

    Cost, in matmuls G of the tokens with a target: G without gradients; 2G where hidden alone needs
    one; 3G where the weight does too, by `linear_loss` on groups of sequences that share a pair.
    That takes the gradient of the sum of the losses in the forward, which serves every reduction
    that weighs all losses alike (a mean, a sum, their multiples); for another, backward computes it
    anew: 4G more. To tell them apart, a GPU is awaited once in the backward; and in the forward
    once to order the tokens. aot and aot_unpaired, and ref_logps that need a gradient, cost 4G.

    Raises:
        TypeError, ValueError: as `linear_token_stats` and `dpo_loss`; ref_logps missing, or given
            to a type that has no reference.

    Source: as `dpo_loss`, `simpo_loss`, `cpo_loss` and `orpo_loss`.
    """
    scorer = linear_scorer(
        hidden, weight, bias, temperature, softcap, scale, chunk_size, impl, group, support, rows
    )
    targets = replicated("targets", targets)
    check_integer("targets", targets)
    layout = layout_of("targets", targets, cu_seqlens)
    pair_loss = checked_pair_loss(
        loss_type, ref_logps, yw_idxs, yl_idxs, beta, layout, label_smoothing=label_smoothing,
        discopop_tau=discopop_tau, gamma=gamma, alpha=alpha, impl=impl,
    )  # fmt: skip
    scorer = scorer._replace(temperature=temperatures_of_layout(temperature, targets, layout))
    ignore_index = check_ignore_index(ignore_index)
    return preference_loss_of(scorer, wide_integers(targets), pair_loss, ignore_index=ignore_index)


def preference_loss_of(
    scorer: Scorer, targets: Tensor, pair_loss: PairLoss, *, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Compute losses (P,) and rewards (B,) of whatever scores the targets (B, T)."""
    grouped = pair_loss.one_by_one and not under_transform()
    # The logits of kept ids are few enough to wait for any loss.
    grouped &= getattr(scorer, "support", None) is None
    if grouped and isinstance(scorer, LinearScorer) and scorer.head_is_trained:
        pairs = pair_loss.chosen, pair_loss.rejected
        check_pair_indices("targets", targets, *pairs, pair_loss.layout)
        return outside_of_graphs(_grouped_losses)(scorer, targets, pair_loss, ignore_index)
    # All log-probs, then the loss: right for any loss.
    logprobs = scorer.stats(targets, ignore_index=ignore_index, lse=False).logprob
    return pair_loss.of_tokens(logprobs, targets != ignore_index)


def _grouped_losses(
    scorer: LinearScorer, targets: Tensor, pair_loss: PairLoss, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The loss of the sequences that share pairs as soon as their log-probs are known."""
    mask = targets != ignore_index
    chosen, rejected = pair_loss.chosen.long(), pair_loss.rejected.long()
    layout = pair_loss.layout

    def of_chunk(stats: ChunkStats, token: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = stats.logprob.new_zeros(targets.numel()).index_put((token,), stats.logprob)
        here = mask.new_zeros(mask.numel()).index_fill(0, token, True).view(mask.shape)
        losses, _ = pair_loss.of_tokens(logprobs.view(mask.shape), here)
        present = layout.counts(here) > 0
        of_pair_here = present[chosen] | present[rejected]
        return torch.where(of_pair_here, losses, 0.0).sum(), {
            "logprob": stats.logprob,
            "token": token,
        }

    groups = _sharing_pairs(layout.sequences(targets), chosen, rejected).to(targets.device)
    token = torch.arange(targets.numel(), device=targets.device).view(targets.shape)
    total, aux = scorer.loss(
        of_chunk, targets, token,
        groups=groups[layout.ids(targets)], ignore_index=ignore_index, lse=False,
    )  # fmt: skip
    logprobs = total.new_zeros(targets.numel())
    if aux:
        logprobs = logprobs.index_put((aux["token"],), aux["logprob"])
    with torch.no_grad():
        losses, rewards = pair_loss.of_tokens(logprobs.view(targets.shape), mask)

    def weighted_sum(scorer: LinearScorer, weights: Tensor) -> Tensor:
        stats = scorer.stats(targets, ignore_index=ignore_index, lse=False)
        return (pair_loss.of_tokens(stats.logprob, mask)[0] * weights).sum()

    losses = with_summed_gradient(
        losses, total, weighted_sum, scorer, alternative=("linear_dpo_loss", "linear_token_stats")
    )
    return losses, rewards


def _sharing_pairs(sequences: int, yw_idxs: Tensor, yl_idxs: Tensor) -> Tensor:
    """Number the sets of sequences that pairs connect: (B,)."""
    leader = list(range(sequences))

    def lead(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    for chosen, rejected in torch.stack((yw_idxs, yl_idxs), dim=1).tolist():
        leader[lead(chosen)] = lead(rejected)
    return torch.tensor([lead(i) for i in range(sequences)], dtype=torch.int64)


def checked_pair_loss(
    loss_type: str,
    ref_logps: Tensor | None,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float,
    layout: Layout,
    *,
    label_smoothing: float,
    discopop_tau: float,
    gamma: float,
    alpha: float,
    impl: str,
) -> PairLoss:
    """Check the options, and bind everything but the token log-probs and their mask."""
    cu_seqlens = layout.cu_seqlens

    def sums(logprobs: Tensor, mask: Tensor) -> Tensor:
        return sequence_logprobs(logprobs, mask, cu_seqlens=cu_seqlens)

    free: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        "simpo": lambda logprobs, mask: simpo_loss(
            sums(logprobs, mask), layout.counts(mask), yw_idxs, yl_idxs, beta, gamma
        ),
        "cpo": lambda logprobs, mask: cpo_loss(
            sums(logprobs, mask), yw_idxs, yl_idxs, beta,
            alpha=alpha, label_smoothing=label_smoothing,
        ),
        "orpo": lambda logprobs, mask: orpo_loss(
            sums(logprobs, mask), layout.counts(mask), yw_idxs, yl_idxs, beta
        ),
    }  # fmt: skip
    check_one_of("loss_type", loss_type, (*LOSS_TYPES, *free))
    # Also those that the type does not look at.
    check_finite("gamma", gamma)
    check_finite("alpha", alpha)
    check_positive("discopop_tau", discopop_tau)
    check_between("label_smoothing", label_smoothing, 0, 0.5)
    if loss_type in free:
        if ref_logps is not None:
            raise ValueError(f"ref_logps: expected None, loss_type {loss_type!r} has no reference")
        return PairLoss(free[loss_type], yw_idxs, yl_idxs, layout, one_by_one=True)
    if ref_logps is None:
        raise ValueError(f"ref_logps: expected a tensor for loss_type {loss_type!r}, got None")
    reference = ref_logps

    def with_reference(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return dpo_loss(
            logprobs, reference, yw_idxs, yl_idxs, beta, mask=mask, loss_type=loss_type,
            label_smoothing=label_smoothing, discopop_tau=discopop_tau, cu_seqlens=cu_seqlens,
            impl=impl,
        )  # fmt: skip

    # Some sort over the batch, so the loss of a pair is not known before all log-probs are.
    one_by_one = loss_type not in _OF_THE_BATCH and not getattr(reference, "requires_grad", False)
    return PairLoss(with_reference, yw_idxs, yl_idxs, layout, one_by_one)
