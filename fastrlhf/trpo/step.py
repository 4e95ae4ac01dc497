"""One TRPO step: along the natural gradient, as far as an exact KL allows.

The surrogate mean(r·A) is differentiated once; conjugate gradients solve (F + λI)x = g for its
gradient g (`conjugate_gradient.py`), with products that `fisher.py` makes; and the step along x is
shortened until the policy that it leads to, evaluated on the whole batch, improves the surrogate
and is within the trust region.

Dims: B sequences, T tokens, H hidden, V vocabulary, D parameters.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.hf import LMHead
from fastrlhf.losses.ratios import saturated
from fastrlhf.ops import kl_divergence, linear_kl_divergence
from fastrlhf.ops.checks import (
    check_between,
    check_floating,
    check_integer,
    check_mask,
    check_one_of,
    check_positive,
    check_real,
    check_same_device,
    check_shape,
    check_whole,
)
from fastrlhf.ops.ranks import Group
from fastrlhf.ops.targets import MASKED_OUT

from .conjugate_gradient import conjugate_gradient
from .fisher import MODES, FisherProduct, checked_damping
from .parameters import Parameters, wide
from .policy import Policy, PolicyOnBatch, differentiable_attention


class TrustRegionInfo(NamedTuple):
    """The result of a step; tensors are 0-d, and of the whole batch on every rank.

    Source: as `trpo_step`.

    Example:
        >>> policy = torch.nn.Linear(3, 4)
        >>> batch = torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, -1.0, 0.5]]), torch.ones(1, 3)
        >>> params = list(policy.parameters())
        >>> info = fastrlhf.trpo_step(lambda: policy(torch.eye(3).unsqueeze(0)), params, *batch)
        >>> bool(info.surrogate > 0), bool(info.kl <= 0.01)
        (True, True)
    """

    accepted: bool
    surrogate: Tensor  # mean of r·A after the step, less that before it; 0 if not accepted
    kl: Tensor  # mean KL(old‖new) in nats after the step; 0 if not accepted
    cg_residual: Tensor  # |g - (F + λI)x| / |g|
    step_size: float  # factor of the natural gradient x; 0 if not accepted
    backtracks: int  # steps that were tried and taken back


def trpo_step(
    policy: Policy,
    params: Sequence[Tensor],
    targets: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    max_kl: float = 0.01,
    damping: float = 0.1,
    cg_iterations: int = 15,
    backtrack_ratio: float = 0.8,
    max_backtracks: int = 10,
    temperature: float = 1.0,
    head: LMHead | None = None,
    mode: str = "auto",
    group: Group | None = None,
) -> TrustRegionInfo:
    """Take one TRPO step: along the natural gradient, as far as an exact KL allows.

    Eager equivalent of a step that needs no shortening, with F = the Fisher matrix + damping·I::

        g = gradient of (ratio * advantages)[mask].mean() with respect to params
        x, _ = conjugate_gradient(lambda v: F @ v, g, iterations=cg_iterations)
        params += (2 * max_kl / (x @ g)).sqrt() * x

    It solves (F + λI)x = g for the gradient g of mean(r·A), moves the parameters by
    √(2·max_kl / xᵀ(F + λI)x)·x, and shortens that step until the surrogate improves and the exact
    mean KL(old‖new), over the whole vocabulary, is at most max_kl.

    Args:
        policy, params, temperature, head, mode, group: as `fisher_vector_product`.
        targets: (...) integer, the tokens that were sampled, aligned with what the policy returns.
        advantages: the shape of targets, or (B,) for targets (B, T).
        mask: (...) bool or 0/1, the tokens that count; the others can hold anything.
        old_logprobs: (...) log-probs of when the tokens were sampled, in nats; None: those of the
            policy as it is now. For the step to be TRPO's, the tokens must in any case be sampled
            from the policy as it is now.
        max_kl: δ, in nats per token.
        damping: λ, which keeps directions that the batch says little about in check.
        cg_iterations: products with F.
        backtrack_ratio, max_backtracks: by how much a step that fails is shortened, and how often.

    Returns:
        TrustRegionInfo. Parameters are changed in place if a step is accepted, and otherwise keep
        the same bits as before.

    Cost: one forward and backward for g, cg_iterations products with F, and one forward for each
    step tried. Memory, with a head: the hidden states of the old policy and a few vectors of D
    elements; without one, also its logits.

    Raises:
        TypeError, ValueError: shapes, devices or options that do not fit.

    Source: 1502.05477 section 6 and appendix C.

    Example:
        >>> policy = torch.nn.Linear(3, 4)
        >>> states, actions = torch.eye(3).unsqueeze(0), torch.tensor([[0, 1, 2]])
        >>> advantages, mask = torch.tensor([[1.0, -1.0, 0.5]]), torch.ones(1, 3)
        >>> params = list(policy.parameters())
        >>> info = fastrlhf.trpo_step(lambda: policy(states), params, actions, advantages, mask)
        >>> info.accepted, bool(info.kl <= 0.01)
        (True, True)
    """
    max_kl = check_positive("max_kl", max_kl)
    damping = checked_damping(damping)
    backtrack_ratio = check_between("backtrack_ratio", backtrack_ratio, 0, 1)
    max_backtracks = check_whole("max_backtracks", max_backtracks, 0)
    cg_iterations = check_whole("cg_iterations", cg_iterations, 1)
    batch = _checked_batch(targets, advantages, mask, old_logprobs)
    check_one_of("mode", mode, MODES)
    on_batch = PolicyOnBatch(policy, params, batch.mask, temperature, head, group)
    before, gradient, batch = _differentiated(on_batch, batch)
    direction, residual = conjugate_gradient(
        FisherProduct(on_batch, mode, damping), gradient, iterations=cg_iterations
    )
    # xᵀ(F + λI)x = xᵀ(g - residual), and the residual of conjugate gradients is orthogonal to x.
    length = float(direction @ gradient)
    full_step = math.sqrt(2 * max_kl / length) if length > 0 else 0.0
    tries = max_backtracks + 1 if full_step > 0 and math.isfinite(full_step) else 0
    parameters = on_batch.parameters
    saved = parameters.copies()
    accepted = False
    try:
        for i in range(tries):
            step = full_step * backtrack_ratio**i
            parameters.move(saved, step * direction)
            surrogate, kl = _surrogate_and_kl(on_batch, batch, before.output)
            accepted = float(surrogate) > float(before.surrogate) and float(kl) <= max_kl
            if accepted:
                improvement = surrogate - before.surrogate
                return TrustRegionInfo(True, improvement, kl, residual, step, i)
    finally:  # after an error on the way too
        if not accepted:
            parameters.restore(saved)
    zero = torch.zeros_like(before.surrogate)
    return TrustRegionInfo(False, zero, zero, residual, 0.0, tries)


class _Batch(NamedTuple):
    """The tokens of a batch, cleared of whatever was outside of the mask."""

    targets: Tensor  # MASKED_OUT where the mask is 0
    advantages: Tensor
    mask: Tensor
    old: Tensor | None  # log-probs; None: those of the policy before the step


class _Before(NamedTuple):
    """The policy before the step."""

    output: Tensor  # without a graph
    surrogate: Tensor  # 0-d, of all ranks


def _differentiated(on_batch: PolicyOnBatch, batch: _Batch) -> tuple[_Before, Tensor, _Batch]:
    """Compute the policy before the step and the gradient (D,) of its surrogate. Returns them, and
    the batch with its old log-probs.
    """
    with differentiable_attention():
        output = on_batch.output()
        _check_shape_of(output, batch.targets, on_batch.head)
        logprobs = on_batch.logprobs(output, batch.targets)
        if batch.old is None:
            batch = batch._replace(old=logprobs.detach())
        surrogate = on_batch.mean(_surrogate_of_tokens(logprobs, batch))
        gradient = on_batch.gradient(surrogate)
    kept = _kept(output, on_batch.parameters)
    return _Before(kept, on_batch.summed(surrogate.detach())), gradient, batch


def _kept(output: Tensor, parameters: Parameters) -> Tensor:
    """Return the policy's output so that it stays the same when the parameters move: a copy, if
    it lies in the memory of one of them.
    """
    output = output.detach()
    memory = output.untyped_storage().data_ptr()
    shared = any(p.untyped_storage().data_ptr() == memory for p in parameters.tensors)
    return output.clone() if shared else output


@torch.no_grad()
def _surrogate_and_kl(
    on_batch: PolicyOnBatch, batch: _Batch, old_output: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the surrogate and the mean KL(old‖new) of the parameters as they are."""
    output, head = on_batch.policy(), on_batch.head
    of_tokens = _surrogate_of_tokens(on_batch.logprobs(output, batch.targets), batch)
    options = on_batch.options() | {"direction": "forward", "mask": batch.mask}
    if head is None:
        kl = kl_divergence(output, old_output, **options)
    else:
        kl = linear_kl_divergence(
            output, head.weight, old_output, head.weight, ref_bias=head.bias, **options
        )
    summed, mean = on_batch.summed, on_batch.mean
    return summed(mean(of_tokens)), summed(mean(kl))


def _surrogate_of_tokens(logprobs: Tensor, batch: _Batch) -> Tensor:
    """r·A of each token, 0 outside of the mask."""
    assert batch.old is not None
    return saturated(logprobs - batch.old).exp() * batch.advantages


def _checked_batch(
    targets: Tensor, advantages: Tensor, mask: Tensor, old_logprobs: Tensor | None
) -> _Batch:
    check_integer("targets", targets)
    check_mask("mask", mask)
    check_real("advantages", advantages)
    shape = tuple(targets.shape)
    if advantages.shape == shape[:1] and len(shape) > 1:
        advantages = advantages.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    others = {"mask": mask, "advantages": advantages}
    if old_logprobs is not None:
        check_floating("old_logprobs", old_logprobs)
        others["old_logprobs"] = old_logprobs
    for name, x in others.items():
        check_shape(name, x, shape, "the shape of targets")
        check_same_device(name, x, "targets", targets)
    inside = mask != 0
    cleared = [
        None if x is None else torch.where(inside, wide(x.detach()), 0.0)
        for x in (advantages, old_logprobs)
    ]
    assert cleared[0] is not None
    return _Batch(torch.where(inside, targets.long(), MASKED_OUT), cleared[0], inside, cleared[1])


def _check_shape_of(output: Tensor, targets: Tensor, head: LMHead | None) -> None:
    what = "logits (..., V)" if head is None else "hidden states (..., H)"
    if output.shape[:-1] != targets.shape:
        raise ValueError(
            f"policy: expected {what} for targets {tuple(targets.shape)}, got {tuple(output.shape)}"
        )
