"""Logits → policy loss, with the gradient computed along with it: one launch of the kernel.

`fastrlhf.logits_policy_loss` (in `fastrlhf.losses.fused_policy`) checks the arguments. Where Triton
runs, it calls `policy_loss` here, whose operator calls the launcher in `kernels/policy_loss.py`;
elsewhere it takes `token_stats` and a loss of its log-probs. The loss that is called `policy_loss`
in public takes log-probs, and is in `fastrlhf.losses.policy`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf import reference

from .backend import refuse_second_derivative, refuse_transforms
from .logits_arguments import check_values_on_host
from .rows import can_overwrite, flat_rows
from .tracing import being_traced
from .transform import Transform


class PolicyTokens(NamedTuple):
    """What a policy loss knows of each token besides its logits: each (...), constants."""

    old_logprobs: Tensor | None  # None: those of the logits
    ref_logprobs: Tensor | None
    advantages: Tensor
    weights: Tensor  # of the token's loss in the sum
    kl_weights: Tensor | None = None  # of its penalty; None: 1
    # Advantages before their rollout weights, for what depends on their sign even where these are
    # 0; None: as they are.
    unweighed: Tensor | None = None


class PolicyFormula(NamedTuple):
    """Which formula, by its name in the kernel, and its numbers, as the kernel's settings."""

    surrogate: str
    kl_estimator: str
    kl_bias_correction: bool
    settings: tuple[float, ...]


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    tokens: PolicyTokens,
    transform: Transform,
    formula: PolicyFormula,
    *,
    ignore_index: int,
    entropy: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute Σ weights·loss of the tokens with a target, from arguments already checked.

    Returns the loss (0-d), and log-probs and entropies (...), which are not differentiable. The
    entropies are 0 unless asked for.
    """
    plain, spent = logits.detach(), logits
    overwrite = inplace and not being_traced() and can_overwrite(plain)
    d_logits = plain
    if not overwrite:
        d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    losses, logprobs, entropies = torch.ops.fastrlhf.policy_loss(
        d_logits, plain, targets, *tokens[:4], *transform, formula.surrogate, formula.kl_estimator,
        list(formula.settings), ignore_index, entropy, tokens.kl_weights,
        formula.kl_bias_correction,
    )  # fmt: skip
    handed_out: list[tuple[int, int]] = []
    if overwrite and not logits.is_leaf and not logits._is_view():  # autograd takes neither
        spent = _Spent.apply(logits, handed_out)
    value = (losses * tokens.weights.reshape(-1).to(losses.dtype)).sum()
    loss = _PolicyLoss.apply(spent, d_logits, value, handed_out)
    return loss, logprobs.view(targets.shape), entropies.view(targets.shape)


@torch.library.custom_op("fastrlhf::policy_loss", mutates_args={"d_logits"})
def _launch(
    d_logits: Tensor,  # contiguous, or the logits themselves
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    token_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
    surrogate: str,
    kl_estimator: str,
    settings: list[float],
    ignore_index: int,
    entropy: bool,
    kl_weights: Tensor | None = None,
    kl_bias_correction: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    from fastrlhf.kernels.policy_loss import PolicySettings
    from fastrlhf.kernels.policy_loss import policy_loss as launch

    rows, targets, row_temperature = flat_rows(logits, targets, token_temperature, temperature)
    check_values_on_host(targets, row_temperature, logits.shape[-1], ignore_index)
    d_rows = rows if d_logits is logits else d_logits.view(rows.shape)
    acc = reference.accumulation_dtype(logits.dtype)
    if targets.numel() == 0:
        return _rows_like(logits, targets)

    def flat(x: Tensor) -> Tensor:
        return x.reshape(-1).to(acc).contiguous()

    optional = (old_logprobs, ref_logprobs, kl_weights)
    old, ref, of_kl = (None if x is None else flat(x) for x in optional)
    return launch(
        d_rows, rows, targets, old, ref, flat(advantages), flat(weights), of_kl,
        surrogate=surrogate, kl_estimator=kl_estimator, kl_bias_correction=kl_bias_correction,
        settings=PolicySettings(*settings), entropy=entropy, temperature=row_temperature,
        softcap=softcap, scale=scale,
        ignore_index=ignore_index,
    )  # fmt: skip


@_launch.register_fake
def _launch_fake(d_logits, logits, targets, *_):
    return _rows_like(logits, targets)


def _rows_like(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    acc = reference.accumulation_dtype(logits.dtype)
    losses, logprobs, entropies = (logits.new_empty(targets.numel(), dtype=acc) for _ in range(3))
    return losses, logprobs, entropies


@torch.library.custom_op("fastrlhf::scale_", mutates_args={"values"})
def _scale_(values: Tensor, factor: Tensor) -> None:
    if values.device.type == "cpu" or not values.is_contiguous():
        values.mul_(factor)
        return
    from fastrlhf.kernels.policy_loss import scale_

    scale_(values, factor)


class _PolicyLoss(torch.autograd.Function):
    """A loss whose gradient, for an upstream gradient of 1, is known."""

    @staticmethod
    def forward(ctx, logits, d_logits, value, handed_out):
        ctx.save_for_backward(d_logits)
        ctx.handed_out = handed_out
        return value.clone()

    @staticmethod
    def backward(ctx, d_loss):
        refuse_second_derivative("logits_policy_loss", "policy_loss of token_logprobs")
        refuse_transforms("logits_policy_loss's backward", "policy_loss of token_logprobs", d_loss)
        (d_logits,) = ctx.saved_tensors
        gradient = _scaled(d_logits, d_loss)
        if not being_traced():
            ctx.handed_out[:] = [_identity(gradient)]
        return gradient, None, None, None


class _Spent(torch.autograd.Function):
    """Logits after their gradient has overwritten them: only the loss may be differentiated through
    them, which shows in the gradient that arrives.
    """

    @staticmethod
    def forward(ctx, logits, handed_out):
        ctx.mark_dirty(logits)
        ctx.handed_out = handed_out
        return logits

    @staticmethod
    def backward(ctx, gradient):
        if ctx.handed_out != [_identity(gradient)]:
            raise RuntimeError(
                "logits_policy_loss: the logits were used after their gradient had overwritten "
                "them (inplace_backward=True)"
            )
        return gradient, None


def _identity(x: Tensor) -> tuple[int, int]:
    """Tell a tensor from another, and from itself with something added to it."""
    return x.data_ptr(), x._version


def _scaled(d_logits: Tensor, factor: Tensor) -> Tensor:
    """Multiply the known gradient by the upstream one, a number that is nearly always 1.

    In place, unless the graph is kept for another backward, which will want the values as they are.
    """
    if being_traced():
        return (d_logits * factor).to(d_logits.dtype)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return (d_logits * factor).to(d_logits.dtype)
    if factor.device.type == "cpu" and factor == 1:
        return d_logits
    torch.ops.fastrlhf.scale_(d_logits, factor)
    return d_logits
