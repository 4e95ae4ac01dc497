"""Losses that are returned one by one, of which the gradient of their sum is known already.

Whoever takes their sum, their mean or a multiple of it, which is nearly everybody, weighs them all
alike, and the gradient of the sum is all there is to know. For any other weights, backward computes
the gradient anew.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .backend import current_autocast, refuse_second_derivative, refuse_transforms
from .scorer import LinearScorer
from .value_gradients import weigh_alike

# From a scorer and weights of the losses: the weighted sum, differentiable.
WeightedSum = Callable[[LinearScorer, Tensor], Tensor]


def with_summed_gradient(
    losses: Tensor,
    total: Tensor,
    weighted_sum: WeightedSum,
    scorer: LinearScorer,
    *,
    counted: Tensor | None = None,
    alternative: tuple[str, str],
) -> Tensor:
    """Give losses (...) without a graph the gradient that their sum has.

    Args:
        losses: without a graph.
        total: their sum, 0-d, with its graph.
        weighted_sum: computes another sum, where it is asked for.
        scorer: what the gradient is with respect to.
        counted: (...) bool, the losses that depend on the scorer at all; None: all.
        alternative: this function, and the one whose gradient can be differentiated again.
    """
    dense = [x if isinstance(x, Tensor) else None for x in scorer.weights]
    inputs = scorer.hidden, scorer.bias, *dense
    codes: list[Any] = [None if isinstance(x, Tensor) else x for x in scorer.weights]
    # Tensors are kept by autograd, which lets go of them after the backward.
    options = scorer._replace(hidden=scorer.hidden.new_empty(0), bias=None, weights=codes)
    again = partial(_sum_again, weighted_sum, options, current_autocast(scorer.hidden.device.type))
    return _SummedGradient.apply(again, alternative, total, losses, counted, *inputs)


def _sum_again(
    weighted_sum: WeightedSum,
    options: LinearScorer,
    autocast: Callable[[], torch.autocast],
    d_losses: Tensor,
    hidden: Tensor,
    bias: Tensor | None,
    *dense: Tensor | None,
) -> Tensor:
    weights: list[Any] = [code or new for code, new in zip(options.weights, dense, strict=True)]
    with autocast():
        return weighted_sum(options._replace(hidden=hidden, bias=bias, weights=weights), d_losses)


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, again, alternative, total, losses, counted, *inputs):
        ctx.again, ctx.alternative = again, alternative
        ctx.save_for_backward(counted, *inputs)
        return losses.clone()

    @staticmethod
    def backward(ctx, d_losses):
        function, other = ctx.alternative
        refuse_second_derivative(function, other)
        refuse_transforms(f"{function}'s backward", other, d_losses)
        counted, *inputs = ctx.saved_tensors
        weights = d_losses.reshape(-1) if counted is None else d_losses[counted]
        none = [None] * len(inputs)
        if weights.numel() == 0:
            return None, None, None, None, None, *none
        if weigh_alike(weights):
            return None, None, weights[0].clone(), None, None, *none
        wanted = ctx.needs_input_grad[5:]
        leaves = [
            None if x is None else x.detach().requires_grad_(want)
            for x, want in zip(inputs, wanted, strict=True)
        ]
        with torch.enable_grad():
            total = ctx.again(d_losses, *leaves)
        of = [x for x in leaves if x is not None and x.requires_grad]
        gradients = iter(torch.autograd.grad(total, of))
        return None, None, None, None, None, *(next(gradients) if want else None for want in wanted)
