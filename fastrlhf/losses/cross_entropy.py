"""The loss of supervised fine-tuning, from hidden states: the logits are never built.

Dims: N tokens, H hidden, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.losses.reduce import check_reduction
from fastrlhf.ops import ChunkStats, Weight
from fastrlhf.ops.backend import refuse_transforms
from fastrlhf.ops.checks import check_at_least, check_between, check_ignore_index, check_one_of
from fastrlhf.ops.kept_ids import Support
from fastrlhf.ops.ranks import Group
from fastrlhf.ops.scorer import LinearScorer, Scorer, linear_scorer
from fastrlhf.ops.sharded import replicated
from fastrlhf.ops.summed_gradient import with_summed_gradient

_REDUCTIONS = ("mean", "sum", "none")


class CrossEntropy(NamedTuple):
    """The loss of a token: (1-ε)·nll + ε·(mean of the nll of all words) + ζ·lse²."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def checked(self) -> "CrossEntropy":
        """Return the options as floats.

        Raises:
            TypeError, ValueError: one that is not what it should be.
        """
        return CrossEntropy(
            check_between("label_smoothing", self.label_smoothing, 0, 1),
            check_at_least("z_loss", self.z_loss, 0),
        )

    def of_tokens(self, stats: ChunkStats) -> tuple[Tensor, Tensor]:
        """The losses of some tokens, and the part of them that is the z-loss."""
        losses = -stats.logprob
        if stats.mean_logit is not None:
            every_word = stats.lse - stats.mean_logit
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * every_word
        if self.z_loss == 0:
            return losses, torch.zeros_like(losses)
        z_losses = self.z_loss * stats.lse.square()
        return losses + z_losses, z_losses


def linear_cross_entropy(
    hidden: Tensor,
    weight: Weight,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    group: Group | None = None,
) -> Tensor:
    """Compute the cross-entropy of the logits that a linear head gives, without building them.

    Eager equivalent::

        logits = F.linear(hidden, weight, bias).float()
        loss = F.cross_entropy(
            logits.flatten(0, -2), targets.flatten(),
            label_smoothing=label_smoothing, reduction=reduction, ignore_index=ignore_index,
        )
        loss += z_loss * logits.logsumexp(-1)[targets != ignore_index].square().mean()

    Args:
        hidden, weight, targets, bias, temperature, softcap, scale, ignore_index, support, rows,
            chunk_size, impl, group: as `linear_token_stats`; where ranks share the vocabulary, the
            loss is the same on every rank. With a support, label smoothing is over the kept ids.
        label_smoothing: share ε in [0, 1] of the label that all words have alike.
        z_loss: factor ζ ≥ 0 of the squared log-sum-exp of each token, which keeps logits from
            drifting (1e-4 in 2204.02311).
        reduction: "mean" over the tokens with a target, "sum", or "none".
        normalizer: positive number, or 0-d tensor (whose value is not checked), that replaces the
            number of tokens in the mean, for batches that are spread over steps or devices; see
            `global_normalizer`.

    Returns:
        0-d in nats, or with "none" (...), 0 for ignored tokens; fp32 (fp64 for fp64 hidden states).
        Without any target the loss is 0, with gradient 0.

    Differentiable, once, with respect to hidden, weight and bias.

    Cost, in matmuls G of the tokens with a target, and memory: as `linear_loss`, G without
    gradients, 2G where hidden or the head alone needs one, 3G for both. "none" costs as much where
    backward weighs all losses alike, and another 3G where it does not; to tell, a GPU is awaited
    once in backward. Label smoothing with a softcap takes another chunk of logits.

    Raises:
        TypeError, ValueError: as `linear_token_stats`; an option out of range.
        RuntimeError: under `torch.func` transforms.

    Source: label smoothing 1512.00567; z-loss 2204.02311 (PaLM), section 5.
    """
    check_one_of("reduction", reduction, _REDUCTIONS)
    normalizer = check_reduction("token-mean", normalizer)
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer: expected None for reduction {reduction!r}, which is no mean")
    options = CrossEntropy(label_smoothing, z_loss).checked()
    ignore_index = check_ignore_index(ignore_index)
    refuse_transforms("linear_cross_entropy", "F.cross_entropy of the logits")
    scorer = linear_scorer(
        hidden, weight, bias, temperature, softcap, scale, chunk_size, impl, group, support, rows
    )
    targets = replicated("targets", targets)
    total, found = summed_cross_entropy(scorer, targets, options, ignore_index=ignore_index)
    if reduction == "sum":
        return total
    live = targets != ignore_index
    if reduction == "mean":
        by = live.sum().clamp(min=1) if normalizer is None else normalizer
        return total / (by.detach().to(total) if isinstance(by, Tensor) else by)
    losses = total.detach().new_zeros(targets.shape)
    if found:
        losses = losses.view(-1).index_put((found["token"],), found["losses"]).view(targets.shape)
    if not total.requires_grad:
        return losses

    def weighted_sum(scorer: LinearScorer, weights: Tensor) -> Tensor:
        return summed_cross_entropy(
            scorer, targets, options, weights, ignore_index=ignore_index
        )[0]  # fmt: skip

    return with_summed_gradient(
        losses, total, weighted_sum, scorer, counted=live,
        alternative=("linear_cross_entropy", "linear_token_stats"),
    )  # fmt: skip


def summed_cross_entropy(
    scorer: Scorer,
    targets: Tensor,
    options: CrossEntropy,
    weights: Tensor | None = None,
    *,
    ignore_index: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the losses, or weighted losses, of the tokens (...) with a target.

    Returns the sum, and of these tokens in some order `token`, their numbers as if flat, and
    detached `losses`, `nll` and `z_loss`; nothing where there are none.
    """
    sides = {"token": torch.arange(targets.numel(), device=targets.device).view(targets.shape)}
    if weights is not None:
        sides["weights"] = weights

    def of_chunk(stats: ChunkStats, *chunk: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        of = dict(zip(sides, chunk, strict=True))
        losses, z_losses = options.of_tokens(stats)
        total = (losses * of["weights"]).sum() if "weights" in of else losses.sum()
        nll = -stats.logprob
        return total, {"token": of["token"], "losses": losses, "nll": nll, "z_loss": z_losses}

    return scorer.loss(
        of_chunk, targets, *sides.values(),
        ignore_index=ignore_index, with_stats=("mean_logit",) if options.label_smoothing else (),
        lse=options.label_smoothing > 0 or options.z_loss > 0,
    )  # fmt: skip
