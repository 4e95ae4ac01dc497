"""A policy on this rank's part of a batch: its output, its head, and means over all ranks' tokens.

`step.py` needs the policy's log-probs and their gradient, `fisher.py` its output and how the output
moves with the parameters. Both take means over the tokens that count, of all ranks; such means are
defined here alone.

Dims: T tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastrlhf.hf import LMHead
from fastrlhf.ops import linear_token_logprobs, token_logprobs
from fastrlhf.ops.checks import check_positive
from fastrlhf.ops.ranks import Group, check_group
from fastrlhf.ops.targets import MASKED_OUT

from .parameters import Parameters

Policy = Callable[[], Tensor]


class PolicyOnBatch:
    """A policy, its parameters, and means over the tokens of a batch, of all ranks."""

    def __init__(
        self,
        policy: Policy,
        params: Sequence[Tensor],
        mask: Tensor | None,
        temperature: float,
        head: LMHead | None,
        group: Group | None,
    ):
        if not callable(policy):
            raise TypeError(f"policy: expected a function, got {type(policy).__name__}")
        if head is not None and not isinstance(head, LMHead):
            raise TypeError(f"head: expected an LMHead or None, got {type(head).__name__}")
        self.policy, self.mask, self.head = policy, mask, head
        self.temperature = check_positive("temperature", temperature)
        self.parameters = Parameters(params)
        if head is not None:
            _check_head_is_apart(head, self.parameters)
        self.group = _ranks(group)

    def output(self) -> Tensor:
        """Call the policy: logits (..., V), or hidden states (..., H), with their graph."""
        output = self.policy()
        if not isinstance(output, Tensor) or not output.requires_grad:
            got = "one without gradient" if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"policy: expected it to return a differentiable tensor, got {got}")
        return output

    def options(self) -> dict[str, Any]:
        """Keywords of the operations that take what the policy returns."""
        head = {} if self.head is None else self.head.options()
        return head | {"temperature": self.temperature}

    def logprobs(self, output: Tensor, targets: Tensor) -> Tensor:
        options = self.options() | {"ignore_index": MASKED_OUT}
        if self.head is None:
            return token_logprobs(output, targets, **options)
        return linear_token_logprobs(output, self.head.weight, targets, **options)

    def summed(self, x: Tensor) -> Tensor:
        """Add up what the ranks have."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def count(self, rows: Tensor) -> Tensor:
        """Number of tokens that count, of all ranks, at least 1. `rows`: one element per token."""
        # Rows and mask may be of 16 bits, in which a number of tokens would be rounded.
        if self.mask is None:
            here = rows.new_full((), rows.numel(), dtype=torch.float32)
        else:
            here = (self.mask != 0).sum().to(rows.device, torch.float32)
        return self.summed(here).clamp(min=1)

    def mean(self, values: Tensor) -> Tensor:
        """This rank's summand of the mean over all tokens; values are 0 outside of the mask."""
        return values.sum() / self.count(values.detach())

    def gradient(self, value: Tensor) -> Tensor:
        """Gradient (D,) of the sum of a value over the ranks."""
        return self.summed(self.parameters.gradient(value))


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Choose the one backend of attention that has forward-mode and second derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _check_head_is_apart(head: LMHead, parameters: Parameters) -> None:
    """Raise ValueError for a head that moves with the parameters: products with the Fisher matrix
    take it as fixed.
    """
    for x in (head.weight, head.bias):
        made = isinstance(x, Tensor) and x.grad_fn is not None
        if made or any(x is p for p in parameters.tensors):
            raise ValueError(
                "head: expected one that does not depend on params; let policy make logits"
            )


def _ranks(group: Group | None) -> Group | None:
    """The group, or all ranks if there are any."""
    if check_group(group) is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return group
