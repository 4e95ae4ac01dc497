"""The loss of supervised fine-tuning, from logits, or from hidden states without building them.

`cross_entropy_options.py` has the options and the loss of a chunk of tokens;
`fastrlhf/hf/model_losses.py` computes the same of a model.

Dims: N tokens, H hidden, V vocabulary.
"""

import torch
from torch import Tensor

from fastrlhf.losses.cross_entropy_options import (
    CrossEntropy,
    CrossEntropyOptions,
    LossType,
    Reduction,
    check_reduction_of_losses,
    checked_weights,
    mean_of,
)
from fastrlhf.losses.signatures import showing
from fastrlhf.ops import ChunkStats, Weight
from fastrlhf.ops.backend import refuse_transforms
from fastrlhf.ops.checks import check_ignore_index
from fastrlhf.ops.kept_ids import Support
from fastrlhf.ops.keywords import Unpack
from fastrlhf.ops.ranks import Group
from fastrlhf.ops.scorer import LinearScorer, Scorer, linear_scorer
from fastrlhf.ops.sharded import replicated
from fastrlhf.ops.summed_gradient import with_summed_gradient
from fastrlhf.ops.token_stats import differentiable_stats


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_type: LossType = "nll",
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    support: Support | None = None,
    impl: str = "auto",
    group: Group | None = None,
) -> Tensor:
    """Compute the cross-entropy of logits: the loss of supervised fine-tuning.

    Eager equivalent::

        z = logits.float()
        losses = F.cross_entropy(
            z.flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing, reduction="none"
        ).view(targets.shape)
        if loss_type == "dft":
            losses = losses * (-losses).exp().detach()
        live = targets != ignore_index
        losses = weights * (losses + z_loss * z.logsumexp(-1) ** 2)  # weights 1 where None
        loss = losses[live].sum() / live.sum()

    Args:
        logits, targets, temperature, softcap, scale, ignore_index, inplace_backward, support, impl,
            group: as `token_stats`: targets are aligned with the logits that predict them. Where
            ranks share the vocabulary, the loss is the same on every rank. With a support, label
            smoothing is over the kept ids.
        label_smoothing: share ε in [0, 1] of the label that all words have alike.
        z_loss: factor ζ ≥ 0 of the squared log-sum-exp of each token, which keeps logits from
            drifting (1e-4 in 2204.02311; Liger's lse_square_scale).
        loss_type: "nll", or "dft" (Dynamic Fine-Tuning): -sg(p)·ln p of a token whose probability
            is p, where sg stops the gradient. Not with label smoothing; a z-loss is not multiplied
            with p.
        weights: (...) of tokens, floating, integer or bool, by which their losses are multiplied,
            z-loss included; any finite numbers, and anything where a target is ignored. They are
            constants: no gradient goes to them. A token of weight 0 has loss 0, even where its
            logits are infinite or NaN, and these are not read backward.
        reduction: "mean" over the tokens with a target, whatever their weights are; "sum"; "none".
            For a mean by weight give, as normalizer, the sum of the weights of these tokens.
        normalizer: positive number, or 0-d tensor (whose value is not checked), that replaces the
            number of tokens in the mean, for batches that are spread over steps or devices; see
            `global_normalizer`.

    Returns:
        0-d in nats, or with "none" (...), 0 for ignored tokens; fp32 (fp64 for fp64 logits).
        Without any target the loss is 0, with gradient 0.

    Differentiable with respect to the logits, and works under `torch.func`, as `token_stats`.

    The kernels read the logits once forward; backward they read them and write the gradient once,
    whatever the options. Nothing else of that size is allocated but the gradient, and not even that
    with inplace_backward.

    Raises:
        TypeError, ValueError: as `token_stats`; an option out of range, label smoothing with "dft",
            weights that do not fit.

    Source: label smoothing 1512.00567; z-loss 2204.02311 (PaLM), section 5; DFT 2508.05629 Eq. 7-9.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> loss = fastrlhf.cross_entropy(logits, torch.tensor([0, 2]), label_smoothing=0.1)
        >>> loss.backward()
        >>> loss.detach()
        tensor(0.8031)
    """
    options = CrossEntropy(label_smoothing, z_loss, loss_type).checked()
    normalizer = check_reduction_of_losses(reduction, normalizer)
    stats = differentiable_stats(
        logits, targets, temperature=temperature, softcap=softcap, scale=scale,
        ignore_index=ignore_index, with_stats=options.with_stats,
        inplace_backward=inplace_backward, support=support, impl=impl, group=group,
    )  # fmt: skip
    targets, weights = replicated("targets", targets), replicated("weights", weights)
    live, weights = targets != ignore_index, checked_weights(weights, targets)
    if weights is not None:
        weights = torch.where(live, weights, 0)
    # The statistics of ignored tokens are 0, and so are their losses.
    losses = options.of_tokens(stats, weights)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else mean_of(losses.sum(), live, normalizer)


@showing(CrossEntropyOptions, CrossEntropy()._asdict())
def linear_cross_entropy(
    hidden: Tensor,
    weight: Weight,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
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
    **options: Unpack[CrossEntropyOptions],
) -> Tensor:
    """Compute the cross-entropy of the logits that a linear head gives, without building them.

    Eager equivalent: `cross_entropy(F.linear(hidden, weight, bias), targets, ...)`.

    Args:
        hidden, weight, targets, bias, temperature, softcap, scale, ignore_index, support, rows,
            chunk_size, impl, group: as `linear_token_stats`; where ranks share the vocabulary, the
            loss is the same on every rank. With a support, label smoothing is over the kept ids.
        weights, reduction, normalizer: as `cross_entropy`. A token of weight 0 costs its forward.
        **options: label_smoothing, z_loss and loss_type of `cross_entropy`.

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

    Example:
        >>> hidden = torch.eye(2, requires_grad=True)
        >>> weight = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]], requires_grad=True)
        >>> loss = fastrlhf.linear_cross_entropy(hidden, weight, torch.tensor([0, 2]))
        >>> loss.backward()
        >>> loss.detach(), weight.grad.shape
        (tensor(0.7531), torch.Size([3, 2]))
    """
    loss = CrossEntropy.parse("linear_cross_entropy", dict(options))
    normalizer = check_reduction_of_losses(reduction, normalizer)
    ignore_index = check_ignore_index(ignore_index)
    refuse_transforms("linear_cross_entropy", "fastrlhf.cross_entropy of the logits")
    scorer = linear_scorer(
        hidden, weight, bias, temperature, softcap, scale, chunk_size, impl, group, support, rows
    )
    targets, weights = replicated("targets", targets), replicated("weights", weights)
    if reduction == "none":
        return cross_entropies(scorer, targets, loss, weights, ignore_index=ignore_index)
    total, _ = summed_cross_entropy(scorer, targets, loss, weights, ignore_index=ignore_index)
    return total if reduction == "sum" else mean_of(total, targets != ignore_index, normalizer)


def cross_entropies(
    scorer: LinearScorer,
    targets: Tensor,
    options: CrossEntropy,
    weights: Tensor | None = None,
    *,
    ignore_index: int,
) -> Tensor:
    """Compute the loss of each token (...), 0 without a target, with the gradient of their sum made
    along with it; see `with_summed_gradient`.
    """
    total, aux = summed_cross_entropy(scorer, targets, options, weights, ignore_index=ignore_index)
    losses = total.detach().new_zeros(targets.shape)
    if aux:
        losses = losses.view(-1).index_put((aux["positions"],), aux["losses"]).view(targets.shape)
    if not total.requires_grad:
        return losses

    def weighted_sum(scorer: LinearScorer, d_losses: Tensor) -> Tensor:
        return summed_cross_entropy(
            scorer, targets, options, weights, d_losses, ignore_index=ignore_index
        )[0]  # fmt: skip

    return with_summed_gradient(
        losses, total, weighted_sum, scorer, counted=targets != ignore_index,
        alternative=("linear_cross_entropy", "linear_token_stats"),
    )  # fmt: skip


def summed_cross_entropy(
    scorer: Scorer,
    targets: Tensor,
    options: CrossEntropy,
    weights: Tensor | None = None,
    d_losses: Tensor | None = None,
    *,
    ignore_index: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the losses of the tokens (...) with a target, each times its weight, if there are any;
    and, if given, times d_losses, which are weights that backward asks for.

    Returns the sum, and of these tokens, in some order, their `positions` as if they were flat, and
    detached `losses`, `nll` and `z_loss`, of which the last two are without weights; an empty dict
    where there are no such tokens.
    """
    sides = {"positions": torch.arange(targets.numel(), device=targets.device).view(targets.shape)}
    weights = checked_weights(weights, targets)
    named = {"weights": weights, "d_losses": d_losses}
    sides |= {name: x for name, x in named.items() if x is not None}

    def of_chunk(stats: ChunkStats, *chunk: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        given = dict(zip(sides, chunk, strict=True))
        losses = options.of_tokens(stats, given.get("weights"))
        total = (losses * given["d_losses"]).sum() if "d_losses" in given else losses.sum()
        return total, {
            "positions": given["positions"],
            "losses": losses,
            "nll": -stats.logprob,
            "z_loss": options.z_losses(stats.lse),
        }

    return scorer.loss(
        of_chunk, targets, *sides.values(),
        ignore_index=ignore_index, with_stats=options.with_stats, lse=options.takes_lse,
    )  # fmt: skip
