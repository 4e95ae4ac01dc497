"""Preference losses from hidden states: the logits are never built.

Dims: B sequences, T tokens, P pairs, H hidden, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_pair_indices
from fastrlhf.losses.preference import LOSS_TYPES, dpo_loss
from fastrlhf.losses.reference_free import cpo_loss, orpo_loss, simpo_loss
from fastrlhf.losses.sequences import sequence_logprobs
from fastrlhf.ops import ChunkStats, Weight, linear_loss, linear_token_logprobs
from fastrlhf.ops.backend import (
    outside_of_graphs,
    refuse_second_derivative,
    refuse_transforms,
    under_transform,
)
from fastrlhf.ops.checks import (
    check_between,
    check_finite,
    check_integer,
    check_one_of,
    check_positive,
    wide_integers,
)

# From token log-probs (B, T) and the mask of those that count: losses (P,), rewards (B,).
PairLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# They sort over the batch, so the loss of a pair is not known before all log-probs are.
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
    chunk_size: int | None = None,
    impl: str = "auto",
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
        bias, temperature, softcap, scale, ignore_index, chunk_size, impl: as `linear_token_stats`.

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
    pair_loss = _pair_loss(
        loss_type, ref_logps, yw_idxs, yl_idxs, beta, label_smoothing=label_smoothing,
        discopop_tau=discopop_tau, gamma=gamma, alpha=alpha, impl=impl,
    )  # fmt: skip
    head: dict[str, Any] = {
        "bias": bias, "temperature": temperature, "softcap": softcap, "scale": scale,
        "ignore_index": ignore_index, "chunk_size": chunk_size, "impl": impl,
    }  # fmt: skip
    check_integer("targets", targets)
    if targets.ndim != 2:
        raise ValueError(f"targets: expected shape (B, T), got {tuple(targets.shape)}")
    targets = wide_integers(targets)
    # What is no tensor is refused further down, by its name.
    trained, differentiable_ref = (
        any(getattr(x, "requires_grad", False) for x in tensors)
        for tensors in ((weight, bias), (ref_logps,))
    )
    if (
        torch.is_grad_enabled()
        and trained
        and isinstance(weight, Tensor)
        and not differentiable_ref
        and loss_type not in _OF_THE_BATCH
        and not under_transform()
    ):
        pairs = yw_idxs, yl_idxs
        grouped = outside_of_graphs(_grouped_losses)
        return grouped(pair_loss, hidden, weight, targets, pairs, head)
    return _ungrouped_losses(pair_loss, hidden, weight, targets, head)


def _ungrouped_losses(
    pair_loss: PairLoss, hidden: Tensor, weight: Weight, targets: Tensor, head: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """All log-probs, then the loss: right for any loss."""
    logprobs = linear_token_logprobs(hidden, weight, targets, **head)
    return pair_loss(logprobs, targets != head["ignore_index"])


def _grouped_losses(
    pair_loss: PairLoss,
    hidden: Tensor,
    weight: Weight,
    targets: Tensor,
    pairs: tuple[Tensor, Tensor],
    head: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The loss of the sequences that share pairs as soon as their log-probs are known."""
    mask = targets != head["ignore_index"]
    check_pair_indices("targets", targets, *pairs)
    chosen, rejected = (index.long() for index in pairs)

    def of_chunk(stats: ChunkStats, token: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = stats.logprob.new_zeros(targets.numel()).index_put((token,), stats.logprob)
        here = mask.new_zeros(mask.numel()).index_fill(0, token, True).view(mask.shape)
        losses, _ = pair_loss(logprobs.view(mask.shape), here)
        present = here.any(-1)
        of_pair_here = present[chosen] | present[rejected]
        return torch.where(of_pair_here, losses, 0.0).sum(), {
            "logprob": stats.logprob,
            "token": token,
        }

    groups = _sharing_pairs(targets.shape[0], *pairs).to(targets.device)
    token = torch.arange(targets.numel(), device=targets.device).view(targets.shape)
    total, aux = linear_loss(
        of_chunk, hidden, weight, targets, token,
        groups=groups.unsqueeze(1).expand(targets.shape), **head,
    )  # fmt: skip
    logprobs = total.new_zeros(targets.numel())
    if aux:
        logprobs = logprobs.index_put((aux["token"],), aux["logprob"])
    with torch.no_grad():
        losses, rewards = pair_loss(logprobs.view(targets.shape), mask)
    again = partial(_losses_again, pair_loss, targets, head, _current_autocast(hidden))
    return _SummedGradient.apply(again, total, losses, hidden, weight, head["bias"]), rewards


def _losses_again(
    pair_loss: PairLoss,
    targets: Tensor,
    head: dict[str, Any],
    autocast: torch.autocast,
    hidden: Tensor,
    weight: Weight,
    bias: Tensor | None,
) -> Tensor:
    with autocast:
        return _ungrouped_losses(pair_loss, hidden, weight, targets, {**head, "bias": bias})[0]


def _current_autocast(hidden: Tensor) -> torch.autocast:
    """Make a context that restores autocast as it is now: backward runs outside of it."""
    device = hidden.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype=dtype, enabled=enabled)


class _SummedGradient(torch.autograd.Function):
    """Losses whose sum's gradient is known: it is their gradient where all are weighed alike."""

    @staticmethod
    def forward(ctx, again, total, losses, hidden, weight, bias):
        ctx.again = again
        ctx.save_for_backward(hidden, weight, bias)
        return losses.clone()

    @staticmethod
    def backward(ctx, d_losses):
        refuse_second_derivative("linear_dpo_loss", "linear_token_stats")
        refuse_transforms("linear_dpo_loss's backward", "linear_token_stats", d_losses)
        nothing = (None, None, None, None, None, None)
        if d_losses.numel() == 0:
            return nothing
        if bool((d_losses == d_losses[0]).all()):
            return None, d_losses[0].clone(), None, None, None, None
        wanted = ctx.needs_input_grad[3:]
        inputs = [
            None if x is None else x.detach().requires_grad_(want)
            for x, want in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        with torch.enable_grad():
            losses = ctx.again(*inputs)
        leaves = [x for x in inputs if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(losses, leaves, d_losses))
        return None, None, None, *(next(found) if want else None for want in wanted)


def _sharing_pairs(sequences: int, yw_idxs: Tensor, yl_idxs: Tensor) -> Tensor:
    """Number the sets of sequences that pairs connect: (B,)."""
    leader = list(range(sequences))

    def lead(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    for chosen, rejected in torch.stack((yw_idxs.long(), yl_idxs.long()), dim=1).tolist():
        leader[lead(chosen)] = lead(rejected)
    return torch.tensor([lead(i) for i in range(sequences)], dtype=torch.int64)


def _pair_loss(
    loss_type: str,
    ref_logps: Tensor | None,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float,
    *,
    label_smoothing: float,
    discopop_tau: float,
    gamma: float,
    alpha: float,
    impl: str,
) -> PairLoss:
    """Bind everything but the token log-probs and their mask."""
    free: dict[str, PairLoss] = {
        "simpo": lambda logprobs, mask: simpo_loss(
            sequence_logprobs(logprobs, mask), mask.sum(-1), yw_idxs, yl_idxs, beta, gamma
        ),
        "cpo": lambda logprobs, mask: cpo_loss(
            sequence_logprobs(logprobs, mask), yw_idxs, yl_idxs, beta,
            alpha=alpha, label_smoothing=label_smoothing,
        ),
        "orpo": lambda logprobs, mask: orpo_loss(
            sequence_logprobs(logprobs, mask), mask.sum(-1), yw_idxs, yl_idxs, beta
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
        return free[loss_type]
    if ref_logps is None:
        raise ValueError(f"ref_logps: expected a tensor for loss_type {loss_type!r}, got None")
    reference = ref_logps

    def with_reference(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return dpo_loss(
            logprobs, reference, yw_idxs, yl_idxs, beta, mask=mask, loss_type=loss_type,
            label_smoothing=label_smoothing, discopop_tau=discopop_tau, impl=impl,
        )  # fmt: skip

    return with_reference
