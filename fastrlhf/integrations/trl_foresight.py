"""Tells the kernels beforehand what the losses of TRL's trainers will ask of the log-probs.

A trained head costs 3G instead of 4G (G: a matmul of the scored tokens with the head) where the
derivatives of the loss with respect to the log-probs, its slopes, are foreseen. How that is used is
in `fastrlhf.ops.foreseen_stats`; a wrong guess costs time only. What is foreseen:

- `SFTTrainer`: a cross-entropy has the same slope for each token, and the loss "dft" has the
  token's probability as its slope.
- `GRPOTrainer`, in the first update after a rollout: the policy is the one that sampled, so all
  ratios are 1, and the slopes do not depend on the log-probs. The trainer's own loss is asked for
  them, once, with zeros for log-probs, on a copy of the trainer that logs nothing.

The slopes of DPO, KTO and RLOO depend on the log-probs of whole sequences, which are not known
before the last token has been through the head.
"""

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastrlhf.ops.foreseen_stats import Foresight
from fastrlhf.ops.linear_statistics import Statistics

from .replacements import Replacement

# Takes how many tokens reach the head, and returns what is foreseen of their slopes, or None.
_Foreseer = Callable[[int], Foresight | None]

_foreseer: ContextVar[_Foreseer | None] = ContextVar("foreseer", default=None)
_takes_entropy: ContextVar[bool] = ContextVar("takes_entropy", default=False)


def current_foresight(tokens: int) -> Foresight | None:
    """What the trainer whose loss is being computed will ask of its tokens, if that is known."""
    foreseer = _foreseer.get()
    return None if foreseer is None else foreseer(tokens)


def loss_takes_entropy() -> bool:
    """Whether the loss that is being computed has a gradient in the entropies."""
    return _takes_entropy.get()


def foreseeing(sft_trainer: Any, grpo_trainer: Any) -> list[Replacement]:
    """Let the losses of these trainers say beforehand what they will ask."""
    sft, grpo = vars(sft_trainer)["compute_loss"], vars(grpo_trainer)["_compute_loss"]

    @functools.wraps(sft)
    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        of_tokens = {"nll": _equal, "dft": _probability}.get(self.args.loss_type)
        with _announced(None if of_tokens is None else lambda _: of_tokens):
            return sft(self, *args, **kwargs)

    log_probs = grpo_trainer._get_per_token_logps_and_entropies

    @functools.wraps(grpo)
    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Any:
        foreseer = None
        # A subclass with other versions of these methods may also change itself or its model in
        # them, so its loss is not asked beforehand.
        its_own = type(self)._compute_loss, type(self)._get_per_token_logps_and_entropies
        if its_own == (_compute_loss, log_probs) and _is_first_update(self, inputs):
            foreseer = _OfItsLoss(self, grpo, inputs)
        with _announced(foreseer, takes_entropy=self._entropy_bonus_enabled):
            return grpo(self, model, inputs)

    return [
        Replacement(sft_trainer, "compute_loss", compute_loss),
        Replacement(grpo_trainer, "_compute_loss", _compute_loss),
    ]


@contextmanager
def _announced(foreseer: _Foreseer | None, *, takes_entropy: bool = False) -> Iterator[None]:
    tokens = _foreseer.set(foreseer), _takes_entropy.set(takes_entropy)
    try:
        yield
    finally:
        _foreseer.reset(tokens[0])
        _takes_entropy.reset(tokens[1])


def _equal(stats: Statistics, place: Tensor) -> Tensor:
    return torch.ones_like(stats.logprob)


def _probability(stats: Statistics, place: Tensor) -> Tensor:
    return stats.logprob.exp()


def _is_first_update(trainer: Any, inputs: dict[str, Any]) -> bool:
    """Whether a GRPO trainer takes the log-probs of now for those of the rollout, and neither they
    nor the entropies enter its loss in another way.
    """
    return (
        inputs.get("old_per_token_logps") is None
        and trainer.beta == 0.0
        and trainer.top_entropy_quantile == 1.0
        and not trainer._entropy_bonus_enabled
    )


class _OfItsLoss:
    """Foresees the slopes of a trainer's loss by asking that loss, with zeros for log-probs."""

    def __init__(self, trainer: Any, compute_loss: Any, inputs: dict[str, Any]):
        self.trainer, self.compute_loss, self.inputs = trainer, compute_loss, inputs

    def __call__(self, tokens: int) -> Foresight | None:
        stub = _Stub()
        with torch.enable_grad():
            loss = self.compute_loss(_silent(self.trainer), stub, self.inputs)
            if stub.logprobs is None or stub.logprobs.numel() != tokens:
                return None
            (slopes,) = torch.autograd.grad(loss, stub.logprobs, allow_unused=True)
        return None if slopes is None else lambda stats, place: slopes[place]


class _Stub:
    """Stands for a model with a fused head, and returns zeros for the statistics of its tokens."""

    logprobs: Tensor | None = None  # (n,) of the tokens with a label

    def __call__(self, *, labels: Tensor, **_: Any) -> Any:
        scored = labels[:, 1:] != -100
        self.logprobs = torch.zeros(int(scored.sum()), device=labels.device, requires_grad=True)
        zeros = self.logprobs.new_zeros(scored.shape)
        return SimpleNamespace(
            log_probs=zeros.masked_scatter(scored, self.logprobs),
            entropy=zeros,
            aux_loss=zeros.sum(),
            label_mask=scored,
        )


def _silent(trainer: Any) -> Any:
    """A copy of a trainer that logs nothing and waits for no other process."""
    other = copy.copy(trainer)
    other._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    other.accelerator = _Alone(trainer.accelerator)
    other.args = copy.copy(trainer.args)
    other.args.report_to = []
    return other


class _Alone:
    """An accelerator whose process is the only one."""

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_for_metrics(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor
