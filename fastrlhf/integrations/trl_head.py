"""What TRL's trainers call under the patch in place of TRL's own log-probs and divergences.

These functions are handed hidden states and the head's weight, but not its module. The module is
needed to know whether an adapter belongs to the weight, or what the codes of a quantized weight
stand for. So the callers name it beforehand (`heads_in_play`): the forward of a model that was
given a fused head, and the loss of a DistillationTrainer. `trl` puts all of this in place.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from fastrlhf.hf.head_parts import HeadParts, head_parts, parts_of_weight
from fastrlhf.hf.head_scorer import head_scorer
from fastrlhf.hf.logit_map import LogitMap
from fastrlhf.hf.scored_divergence import scored_divergence
from fastrlhf.ops.backend import outside_of_graphs
from fastrlhf.ops.foreseen_stats import foreseen_stats
from fastrlhf.ops.linear_precision import matmul_dtype
from fastrlhf.ops.scorer import LinearScorer, Scorer

from .trl_foresight import current_foresight, loss_takes_entropy

logger = logging.getLogger(__name__)

# What TRL calls the statistics that it can ask for, and what they are called here.
_STATISTICS = {
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
_IGNORED = -100

# The head modules of the models that are being called; TRL hands on the weight of one of them.
_heads: ContextVar[tuple[Any, ...]] = ContextVar("heads", default=())


def with_known_head(add_fused_lm_head: Any) -> Any:
    """Let the forward that `add_fused_lm_head` gives to a model say whose head is called: TRL hands
    on the head's weight alone.
    """

    @functools.wraps(add_fused_lm_head)
    def add(model: Any, *args: Any, **kwargs: Any) -> None:
        add_fused_lm_head(model, *args, **kwargs)
        fused = model.forward.__func__

        @functools.wraps(fused)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            with heads_in_play(self):
                return fused(self, *args, **kwargs)

        model.forward = MethodType(forward, model)

    return add


def with_known_heads(compute_loss: Any) -> Any:
    """Let the loss of a DistillationTrainer say whose heads are called."""

    @functools.wraps(compute_loss)
    def wrapped(self: Any, unwrapped_student: Any, *args: Any, **kwargs: Any) -> Any:
        with heads_in_play(unwrapped_student, self.accelerator.unwrap_model(self.teacher_model)):
            return compute_loss(self, unwrapped_student, *args, **kwargs)

    return wrapped


@contextmanager
def heads_in_play(*models: Any) -> Iterator[None]:
    token = _heads.set(tuple(model.get_output_embeddings() for model in models))
    try:
        yield
    finally:
        _heads.reset(token)


def log_probs_in_place_of(original: Any) -> Any:
    """What to put in the place of TRL's `ChunkedLogProbFunction`."""

    class LogProbs:
        @staticmethod
        def apply(
            hidden: Tensor,
            weight: Any,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = ("entropy", *_STATISTICS),
        ) -> tuple[Tensor | None, ...]:
            """Score n hidden states (n, H): log-probs (n,), and the other statistics or None."""
            if _is_shared_out(weight, backward_needs_it=True):
                return original.apply(
                    hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping,
                    logit_scale, outputs,
                )  # fmt: skip
            scorer = _scorer(
                hidden, weight, bias, temperature, logit_scale, final_logit_softcapping
            )
            return outside_of_graphs(_statistics)(scorer, targets.unsqueeze(0), outputs)

    return LogProbs


def divergence_in_place_of(original: Any) -> Any:
    """What to put in the place of TRL's `ChunkedDivergenceFunction`."""

    class Divergence:
        @staticmethod
        def apply(
            student_hidden: Tensor,
            student_weight: Any,
            student_bias: Tensor | None,
            teacher_hidden: Tensor,
            teacher_weight: Any,
            teacher_bias: Tensor | None,
            beta: float,
            temperature: float = 1.0,
            student_logit_scale: float = 1.0,
            student_final_logit_softcapping: float | None = None,
            teacher_logit_scale: float = 1.0,
            teacher_final_logit_softcapping: float | None = None,
        ) -> tuple[Tensor, Tensor]:
            """Compare n tokens: their divergence (n,), and the student's entropy (n,)."""
            if any(_is_shared_out(x) for x in (student_weight, teacher_weight)):
                return original.apply(
                    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight,
                    teacher_bias, beta, temperature, student_logit_scale,
                    student_final_logit_softcapping, teacher_logit_scale,
                    teacher_final_logit_softcapping,
                )  # fmt: skip
            student = _scorer(
                student_hidden, student_weight, student_bias, temperature, student_logit_scale,
                student_final_logit_softcapping,
            )  # fmt: skip
            teacher = _scorer(
                teacher_hidden, teacher_weight, teacher_bias, temperature, teacher_logit_scale,
                teacher_final_logit_softcapping,
            )  # fmt: skip
            scored = torch.ones(
                1, len(student_hidden), dtype=torch.bool, device=student_hidden.device
            )
            direction = {0.0: "forward", 1.0: "reverse"}.get(beta, "jsd")
            divergence, entropy = scored_divergence(
                student, teacher, scored, direction=direction, beta=beta, entropy=True
            )
            assert entropy is not None
            return divergence[0], entropy[0]

    return Divergence


def _statistics(
    scorer: Scorer, targets: Tensor, outputs: tuple[str, ...]
) -> tuple[Tensor | None, ...]:
    """What TRL asks for of the tokens (1, n): each (n,), or None."""
    options: dict[str, Any] = {
        "ignore_index": _IGNORED,
        "entropy": "entropy" in outputs,
        "with_stats": [ours for name, ours in _STATISTICS.items() if name in outputs],
    }
    if not isinstance(scorer, LinearScorer):
        stats = scorer.stats(targets, **options)
    elif scorer.head_is_trained:
        foresight = current_foresight(targets.numel())
        stats = foreseen_stats(scorer.problem(targets, **options), foresight)
    elif loss_takes_entropy():  # the forward then keeps the entropy's gradient as well
        stats = scorer.stats(targets, **options)
    else:
        stats = foreseen_stats(scorer.problem(targets, **options), None)
    further = (getattr(stats, name) for name in _STATISTICS.values())
    return tuple(None if x is None else x[0] for x in (stats.logprob, stats.entropy, *further))


def _scorer(
    hidden: Tensor,
    weight: Any,
    bias: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
) -> Scorer:
    """What scores n hidden states (n, H), as a batch of one sequence, by the head of a weight."""
    module, parts = head_of(weight, bias)
    if parts is None and weight.is_floating_point():
        hidden = hidden.to(weight.dtype)  # as the module's own matmul takes them
    scorer = head_scorer(
        hidden.unsqueeze(0), module, parts, LogitMap(scale, softcap), temperature=temperature
    )
    if isinstance(scorer, LinearScorer):
        return scorer._replace(dtype=matmul_dtype(hidden))
    return scorer


def _is_shared_out(weight: Any, *, backward_needs_it: bool = False) -> bool:
    """Whether ZeRO-3 has taken a weight away, or will have when the backward needs it."""
    shared_out = hasattr(weight, "ds_id") and (weight.requires_grad or not backward_needs_it)
    if shared_out:
        _say_once("a head under DeepSpeed's ZeRO-3 is left to TRL's own kernels")
    return shared_out


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def head_of(weight: Any, bias: Tensor | None) -> tuple[Any, HeadParts | None]:
    """The module of the head whose weight TRL read, and its parts; None where only the module knows
    what it computes.

    Raises:
        RuntimeError: a head whose logits are not known.
    """
    heads = _heads.get()
    for module in heads:
        if module.weight is weight:
            try:
                return module, head_parts(module)
            except TypeError:  # a class that is not known, or one packed for a CPU by bitsandbytes
                return module, None
    if any(map(has_adapter, heads)):
        raise RuntimeError(
            "model: its head is sharded by itself (FSDP2) and carries an adapter, which "
            "fastrlhf.integrations.trl cannot serve; use fastrlhf.model_linear_loss in a loss of "
            "your own"
        )
    # The weight was gathered from its shards, or the trainer was made before `patch`. In both cases
    # it has no adapters.
    return None, parts_of_weight(weight, bias)


def has_adapter(module: Any) -> bool:
    """Whether a head is one of peft's layers that TRL refuses, told without importing peft."""
    return any(
        cls.__name__ == "BaseTunerLayer" and cls.__module__.startswith("peft.")
        for cls in type(module).__mro__
    )
