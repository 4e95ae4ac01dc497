"""Single launches of each kernel on the logits of a large batch, and the bytes they must move.

K1 is the kernel of the statistics of logits, K2 the kernel of their gradient, and K3 that of the
policy loss with its gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .machine import Machine

_SOFTCAP, _SHARE = 30.0, 0.5
_NOTHING = (None, 1.0, None, 1.0)  # no temperature per token, temperature, no softcap, scale
_CAPPED = (None, 1.0, _SOFTCAP, 1.0)
# Clipping at 0.8 and 1.2, no dual clip, the default temperatures of SAPO, no KL, no entropy.
_PPO = ("clip", "k3", [0.8, 1.2, 1e9, 1.0, 1.05, 0.0, 0.0])


class KernelWork(NamedTuple):
    """A launch, and how many times the logits of one model must be read or written for it."""

    run: Callable[[], Any]
    passes: int


class Logits:
    """The logits of two models in bf16, and the kernels' other inputs for each row."""

    def __init__(self, machine: Machine, rows: int, vocab: int) -> None:
        """Draw the inputs. They are filled in place, because twice the memory would be too much."""
        device = machine.device
        self.x, self.other = (
            torch.empty(rows, vocab, dtype=torch.bfloat16, device=device).normal_(0, 2)
            for _ in range(2)
        )
        self.targets = torch.randint(vocab, (rows,), device=device)
        self.g = torch.randn(rows, device=device)
        self.ones = torch.ones(rows, device=device)
        self.mask = self.ones > 0

    @property
    def pass_bytes(self) -> int:
        """Bytes of one model's logits."""
        return self.x.nbytes

    def works(self) -> dict[str, KernelWork]:
        """Return launches of all kernels on logits. Those that overwrite the logits come last."""
        ops: Any = torch.ops.fastrlhf
        x, other, targets, mask, g = self.x, self.other, self.targets, self.mask, self.g

        def statistics(transform: tuple, entropy: bool) -> Any:
            return ops.token_stats(x, targets, *transform, -100, entropy, False, "triton")

        @functools.cache
        def saved(entropy: bool) -> tuple[Tensor, ...]:
            logprob, row_entropy, _, peak, log_norm = statistics(_NOTHING, entropy)
            return logprob, row_entropy, peak, log_norm

        def divergence(share: float | None) -> Any:
            return ops.divergence(x, other, mask, *_NOTHING, share, "triton")

        kept = functools.cache(lambda share: divergence(share)[1])

        def backward(share: float | None, of_p: bool) -> Any:
            rest = (kept(share), g, *_NOTHING, share, of_p, "triton")
            return ops.divergence_backward(x, other, mask, *rest)

        last = (*_NOTHING, "triton")
        double = torch.full((), 2.0, device=x.device)
        return {
            "K1 statistics": KernelWork(lambda: statistics(_NOTHING, False), 1),
            "K1 with entropy": KernelWork(lambda: statistics(_NOTHING, True), 1),
            "K1 with softcap": KernelWork(lambda: statistics(_CAPPED, False), 1),
            "K2 gradient": KernelWork(
                lambda: ops.token_stats_backward(x, targets, *saved(False), g, None, *last), 2
            ),
            "K2 with entropy": KernelWork(
                lambda: ops.token_stats_backward(x, targets, *saved(True), g, g, *last), 2
            ),
            "K3 policy loss": KernelWork(lambda: self._policy(torch.empty_like(x)), 2),
            "KL forward": KernelWork(lambda: divergence(None), 2),
            "KL backward, policy": KernelWork(lambda: backward(None, True), 3),
            "KL backward, reference": KernelWork(lambda: backward(None, False), 3),
            "JSD forward": KernelWork(lambda: divergence(_SHARE), 2),
            "JSD backward": KernelWork(lambda: backward(_SHARE, True), 3),
            "Fisher product": KernelWork(
                lambda: ops.fisher_product(x, other, mask, None, 1.0, "triton"), 3
            ),
            "scale_ by 2": KernelWork(lambda: ops.scale_(other, double), 2),
            "K2 in place": KernelWork(
                lambda: ops.token_stats_backward_(x, targets, *saved(False), g, None, *last), 2
            ),
            "K3 in place": KernelWork(lambda: self._policy(x), 2),
        }

    def _policy(self, d_logits: Tensor) -> Any:
        """Compute the loss, and its gradient in `d_logits`. Every token has an advantage."""
        found = torch.ops.fastrlhf.policy_loss(
            d_logits, self.x, self.targets, None, None, self.g, self.ones, *_NOTHING, *_PPO,
            -100, False,
        )  # fmt: skip
        return *found, d_logits
