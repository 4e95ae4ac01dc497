"""The definition of operations from hidden states: by all logits at once, in plain PyTorch.

It needs memory for all logits. But autograd can differentiate it again and `torch.func` can batch
it, so it is used for second derivatives and under transforms. Everything else goes block by block
(`linear_plans.py`).

Dims: K width of the hidden states, V vocabulary, U hidden states that tokens share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.reference import TokenStats, accumulation_dtype

from .linear_head import Weight
from .linear_plans import Needs
from .linear_precision import exact

if TYPE_CHECKING:
    from .linear_problem import LinearProblem


def full_logits(
    hidden: Tensor, weight: Weight, bias: Tensor | None, live: Tensor, dtype: torch.dtype
) -> Tensor:
    """Make all logits (..., V) of a head in plain PyTorch; hidden states of tokens that are not
    live count as 0.

    Operands are rounded to `dtype`, and products are added up in fp32 or fp64, as in `Head.logits`.
    Call it within `exact`, since autocast would round the sums.
    """
    sums = accumulation_dtype(dtype)
    # Other hidden states, which may be NaN, must not reach the weight's gradient, a sum over rows.
    operand = torch.where(live.unsqueeze(-1), hidden, 0.0).to(dtype).to(sums)
    logits = operand @ weight[0 : weight.shape[0]].to(dtype).to(sums).T
    return logits if bias is None else logits + bias.to(sums)


def stats_by_logits(
    problem: LinearProblem, hidden: Tensor, bias: Tensor | None, weights: Sequence[Weight]
) -> TokenStats:
    """Compute the statistics from all logits, which torch.func can differentiate and batch."""
    options, targets, question = problem.options, problem.targets, problem.options.question
    weight = torch.cat([weight[0 : weight.shape[0]] for weight in weights], dim=1)
    live = targets != question.ignore_index
    if options.shared is not None:
        hidden = one_state_a_token(hidden, options.shared.row, targets)
    with exact(hidden):
        return reference.token_stats(
            full_logits(hidden, weight, bias, live, options.dtype), targets,
            temperature=problem.temperature, softcap=options.softcap, scale=options.scale,
            ignore_index=question.ignore_index, entropy=question.entropy,
            entropy_grad=question.entropy_grad, with_stats=question.with_stats,
        )  # fmt: skip


def differentiable_gradients(
    problem: LinearProblem, needs: Needs, d_logprob: Tensor | None, d_entropy: Tensor | None
) -> list[Tensor | None]:
    """Compute the gradients by autograd through all logits, so that they can be differentiated
    again, or batched.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Gradients are taken with respect to views of the inputs: where one input was computed from
        # another, autograd stops at the view and does not follow that path.
        hidden = problem.hidden.view_as(problem.hidden)
        bias = None if problem.bias is None else problem.bias.view_as(problem.bias)
        weights = [weight[0 : weight.shape[0]] for weight in problem.weights]
        stats = stats_by_logits(problem, hidden, bias, weights)
    outputs = [
        (value, upstream.view(value.shape))
        for value, upstream in ((stats.logprob, d_logprob), (stats.entropy, d_entropy))
        if value is not None and upstream is not None
    ]
    values, upstream = zip(*outputs, strict=True)
    wanted = needs.hidden, needs.bias, *needs.weights
    tensors = (hidden, bias, *weights)
    inputs = [x for x, want in zip(tensors, wanted, strict=True) if want and x is not None]
    gradients = iter(torch.autograd.grad(values, inputs, upstream, create_graph=again))
    return [next(gradients) if want else None for want in wanted]


def one_state_a_token(hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Copy the shared hidden states (U, K) so that each target has its own: (..., K)."""
    if len(hidden) == 0:  # then all tokens are ignored, and have row 0, which has to be there
        hidden = torch.cat((hidden, hidden.new_zeros(1, hidden.shape[1])))
    return hidden[rows].view(*targets.shape, hidden.shape[1])
