"""Sequence log-probs → loss of each pair, for the losses that depend on the margin between two
sequences.

On a GPU, one launch forward and one backward for sums, loss, slope and the gradient of every token;
elsewhere the definition in `fastrlhf.reference`, which is as good for so few numbers.
"""

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.reference import MARGIN_LOSSES, ROWS, Layout

from .backend import under_transform, use_triton
from .checks import token_contiguous, wide_integers
from .layout import Runs


def preference_loss(
    policy: Tensor,
    ref: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    impl: str,
    layout: Layout = ROWS,
) -> tuple[Tensor, Tensor]:
    """Compute losses (P,) and rewards (B,) as `reference.preference_loss` does, from arguments
    already checked. Packed tokens are (1, N), with a mask.
    """
    # The kernel is launched on a handful of numbers, so the interpreter is quick enough to be a
    # default.
    if not use_triton(impl, policy, auto_interprets=True) or under_transform():
        return reference.preference_loss(
            policy, ref, chosen, rejected, mask, lengths, loss_type=loss_type, beta=beta,
            label_smoothing=label_smoothing, layout=layout,
        )  # fmt: skip
    if not MARGIN_LOSSES[loss_type].average:
        lengths = None
    losses, _, rewards, _ = _forward(
        policy, ref, chosen, rejected, mask, lengths, loss_type, beta, label_smoothing,
        layout.cu_seqlens,
    )  # fmt: skip
    return losses, rewards.detach()


@torch.library.custom_op("fastrlhf::preference_loss", mutates_args=())
def _forward(
    policy: Tensor,
    ref: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastrlhf.kernels.preference_loss import preference_loss_forward

    loss = MARGIN_LOSSES[loss_type]
    return preference_loss_forward(
        token_contiguous(policy if mask is not None else policy.unsqueeze(1)),
        token_contiguous(ref),
        wide_integers(chosen).contiguous(),
        wide_integers(rejected).contiguous(),
        None if mask is None else token_contiguous(mask),
        None if lengths is None else lengths.contiguous(),
        formula=loss.kernel,
        average=loss.average,
        beta=beta,
        label_smoothing=label_smoothing if loss.smoothed else 0.0,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
    )


@_forward.register_fake
def _forward_fake(
    policy, ref, chosen, rejected, mask, lengths, loss_type, beta, label_smoothing, cu_seqlens=None
):
    acc = reference.accumulation_dtype(torch.promote_types(policy.dtype, ref.dtype))
    pairs, sequences = chosen.shape[0], _sequences(policy, cu_seqlens)
    return tuple(policy.new_empty(n, dtype=acc) for n in (pairs, pairs, sequences, sequences))


@torch.library.custom_op("fastrlhf::preference_loss_backward", mutates_args=())
def _backward(
    policy: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    mask: Tensor | None,
    slopes: Tensor,
    weights: Tensor,
    d_losses: Tensor,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from fastrlhf.kernels.preference_loss import preference_loss_backward

    return preference_loss_backward(
        wide_integers(chosen).contiguous(),
        wide_integers(rejected).contiguous(),
        None if mask is None else token_contiguous(mask),
        slopes,
        weights,
        d_losses.contiguous(),
        tokens=policy.shape[1] if mask is not None else 1,
        dtype=policy.dtype,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
    )


@_backward.register_fake
def _backward_fake(policy, chosen, rejected, mask, slopes, weights, d_losses, cu_seqlens=None):
    shape = policy.shape if mask is not None else (policy.shape[0], 1)
    return policy.new_empty(shape), torch.empty_like(weights)


def _sequences(policy: Tensor, cu_seqlens: Tensor | None) -> int:
    return policy.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _layout(policy: Tensor, cu_seqlens: Tensor | None) -> Layout:
    return ROWS if cu_seqlens is None else Runs(cu_seqlens, policy)


def _setup_context(ctx, inputs, output):
    policy, ref, chosen, rejected, mask, lengths, *options, cu_seqlens = inputs
    _, slopes, _, weights = output
    ctx.save_for_backward(policy, ref, chosen, rejected, mask, lengths, cu_seqlens, slopes, weights)
    ctx.options = options


def _autograd(ctx, d_losses, *_):
    policy, ref, chosen, rejected, mask, lengths, cu_seqlens, *known = ctx.saved_tensors
    if torch.is_grad_enabled() or under_transform(d_losses):
        # The gradient is itself to be differentiated (create_graph), or one of many at once
        # (is_grads_batched): take it by autograd, with respect to views, so that a path from one
        # input to the other is not walked here.
        again = torch.is_grad_enabled()
        loss_type, beta, label_smoothing = ctx.options
        with torch.enable_grad():
            policy, ref = policy.view_as(policy), ref.view_as(ref)
            losses = reference.preference_loss(
                policy, ref, chosen, rejected, mask, lengths, loss_type=loss_type, beta=beta,
                label_smoothing=label_smoothing, layout=_layout(policy, cu_seqlens),
            )[0]  # fmt: skip
        wanted = [x for x in (policy, ref) if x.requires_grad]
        gradients = iter(torch.autograd.grad(losses, wanted, d_losses, create_graph=again))
        d_policy, d_ref = (next(gradients) if x.requires_grad else None for x in (policy, ref))
    else:
        d_tokens, d_sums = _backward(policy, chosen, rejected, mask, *known, d_losses, cu_seqlens)
        d_policy, d_ref = d_tokens.view(policy.shape), None
        if ref.requires_grad:
            d_ref = -d_sums
            if mask is not None and ref.ndim == 2:  # of tokens
                d_ref = _layout(policy, cu_seqlens).spread(d_ref)
                d_ref = torch.where(mask != 0, d_ref, 0.0)
            d_ref = d_ref.to(ref.dtype)
    return d_policy, d_ref, *[None] * 8


_forward.register_autograd(_autograd, setup_context=_setup_context)
