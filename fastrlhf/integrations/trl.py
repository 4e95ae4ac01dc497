"""TRL's trainers on fastrlhf's kernels, by one line.

::

    from fastrlhf.integrations import trl

    trl.patch()

The losses, their options and their metrics stay TRL's own. What is replaced is the step that they
all share, in which hidden states become per-token log-probs (`trl.trainer.utils.add_fused_lm_head`)
or, for distillation, a divergence. So there is one such line for `SFTTrainer`, `DPOTrainer`,
`KTOTrainer`, `GRPOTrainer`, `RLOOTrainer` and `DistillationTrainer`, their subclasses included.

In matmuls G of the scored tokens with the head: 2G where the head is frozen, as with LoRA, and 4G
where it is trained, less G for the last block of tokens (see `foreseen_stats`); 3G for
`SFTTrainer`, and for `GRPOTrainer` in the first update after a rollout (see `trl_foresight`). TRL
itself needs 3G and 4G, and on a CPU scores prompts too. Besides, a LoRA adapter of the head is
trained, which TRL refuses, a quantized head is read as what its codes stand for, and a word whose
logit is -inf leaves the entropy a number.

What still builds logits is what asks for them: `compute_metrics`, `compute_loss_func`, label
smoothing. Heads whose weight is shared out by ZeRO-3 and trained are left to TRL.
"""

import functools
import inspect
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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
from fastrlhf.ops.linear_arguments import matmul_dtype
from fastrlhf.ops.scorer import LinearScorer, Scorer

from .replacements import Replacement, Replacements
from .trl_foresight import current_foresight, foreseeing, loss_takes_entropy

logger = logging.getLogger(__name__)

KNOWN_VERSIONS = ("1.15", "1.16")
_INSTEAD = "use fastrlhf.model_linear_loss in a loss of your own"

# What TRL calls the statistics that it can ask for, and what they are called here.
_STATISTICS = {
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
_IGNORED = -100

# The modules of the heads, of whose weights TRL reads one.
_heads: ContextVar[tuple[Any, ...]] = ContextVar("heads", default=())
# Whether a trainer is being made that has to refuse an adapter of the head.
_adapters_refused: ContextVar[bool] = ContextVar("adapters_refused", default=False)


def patch() -> None:
    """Put TRL's trainers on fastrlhf's kernels, until `unpatch`.

    Trainers are to be made afterwards, or their heads have to be plain ones. Calling it twice
    changes nothing.

    Raises:
        ImportError: TRL is not installed, or of a version whose trainers were never tried.
    """
    _replacements.install()


def unpatch() -> None:
    """Put back exactly what `patch` replaced; without it, do nothing."""
    _replacements.remove()


def patched() -> AbstractContextManager[None]:
    """Patch TRL within a `with` statement."""
    return _replacements.installed()


def _find() -> list[Replacement]:
    """What to replace in the version of TRL that is installed."""
    _check_version()
    import trl.kernels.chunked_divergence as divergence
    import trl.kernels.chunked_logprob as logprob
    from trl.trainer import (
        distillation_trainer,
        dpo_trainer,
        grpo_trainer,
        kto_trainer,
        rloo_trainer,
        sft_trainer,
        utils,
    )

    _check_parameters(logprob.ChunkedLogProbFunction, _LogProbs.apply)
    _check_parameters(divergence.ChunkedDivergenceFunction, _Divergence.apply)
    distillation = distillation_trainer.DistillationTrainer
    add = _with_known_head(utils.add_fused_lm_head)
    found = [
        Replacement(utils, "_ChunkedLogProbFunction", _LogProbs),
        Replacement(utils, "add_fused_lm_head", add),
        Replacement(divergence, "ChunkedDivergenceFunction", _Divergence),
        Replacement(distillation_trainer, "ChunkedDivergenceFunction", _Divergence),
        Replacement(distillation, "_compute_loss", _with_known_heads(distillation._compute_loss)),
        *foreseeing(sft_trainer.SFTTrainer, grpo_trainer.GRPOTrainer),
    ]
    # Only tokens with a label reach the head, on a CPU too.
    for module in (utils, distillation_trainer):
        found.append(Replacement(module, "_use_triton", _always))
    for module, trainer in (
        (sft_trainer, sft_trainer.SFTTrainer),
        (dpo_trainer, dpo_trainer.DPOTrainer),
        (kto_trainer, kto_trainer.KTOTrainer),
        (grpo_trainer, grpo_trainer.GRPOTrainer),
        (rloo_trainer, rloo_trainer.RLOOTrainer),
        (distillation_trainer, distillation),
    ):
        found += [
            Replacement(module, "add_fused_lm_head", add),
            Replacement(module, "BaseTunerLayer", _RefusedAdapter),
            Replacement(trainer, "__init__", _made_under_the_patch(trainer.__init__)),
        ]
    return [x for x in found if x.name in vars(x.owner)]


def _check_version() -> None:
    try:
        import trl
    except ImportError as error:
        raise ImportError(
            "fastrlhf.integrations.trl patches TRL, which is not installed: pip install trl"
        ) from error
    version = getattr(trl, "__version__", "of no version")
    if not any(f"{version}.".startswith(f"{known}.") for known in KNOWN_VERSIONS):
        known = ", ".join(f"{known}.*" for known in KNOWN_VERSIONS)
        raise ImportError(
            f"fastrlhf.integrations.trl knows the trainers of trl {known}, found {version}; "
            f"install one of these, or {_INSTEAD}"
        )


def _made_under_the_patch(init: Any) -> Any:
    """Let a trainer be made as one of TRL's, but for what goes together with the patch and what
    does not.
    """

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(init).bind_partial(self, *args, **kwargs).arguments.get("args")
        if getattr(given, "use_liger_kernel", False):
            raise ValueError(
                "use_liger_kernel: expected False where fastrlhf patches TRL, whose head it "
                "replaces; Liger's kernels of other layers are there by liger_kernel.transformers"
            )
        # TRL casts the base layer of a head alone.
        token = _adapters_refused.set(getattr(given, "cast_lm_head_to_fp32", False))
        try:
            init(self, *args, **kwargs)
        finally:
            _adapters_refused.reset(token)
        if _has_adapter(self.model.get_output_embeddings()):
            self.compute_loss = _only_patched(self.compute_loss)

    return wrapped


def _only_patched(compute_loss: Any) -> Any:
    """Raise where a trainer of an adapted head is used without the patch: TRL's own kernels would
    leave the adapter out.
    """

    @functools.wraps(compute_loss)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not _replacements.in_place:
            raise RuntimeError(
                "this trainer was made under fastrlhf's patch of TRL, for an adapter of the head, "
                "which TRL alone would leave out: call fastrlhf.integrations.trl.patch() again"
            )
        return compute_loss(*args, **kwargs)

    return wrapped


def _has_adapter(module: Any) -> bool:
    """Whether a head is one of peft's layers that TRL refuses, told without importing peft."""
    return any(
        cls.__name__ == "BaseTunerLayer" and cls.__module__.startswith("peft.")
        for cls in type(module).__mro__
    )


class _AdapterCheck(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return _adapters_refused.get() and _has_adapter(instance)


class _RefusedAdapter(metaclass=_AdapterCheck):
    """In the place of peft's BaseTunerLayer, by which TRL's trainers recognise an adapter of a head
    to refuse it: no head is an instance, but while a trainer is made that has to refuse it.
    """


def _check_parameters(function: Any, ours: Any) -> None:
    """Raise ImportError unless TRL calls its function as it is known here."""
    expected = list(inspect.signature(ours).parameters)
    found = list(inspect.signature(function.forward).parameters)[1:]
    if found != expected:
        raise ImportError(
            f"fastrlhf.integrations.trl does not know trl's {function.__name__} of {found}, but of "
            f"{expected}; {_INSTEAD}"
        )


def _always(device: torch.device) -> bool:
    return True


def _with_known_head(add_fused_lm_head: Any) -> Any:
    """Let the forward that `add_fused_lm_head` gives to a model say whose head is called: TRL hands
    on the head's weight alone.
    """

    @functools.wraps(add_fused_lm_head)
    def add(model: Any, *args: Any, **kwargs: Any) -> None:
        add_fused_lm_head(model, *args, **kwargs)
        fused = model.forward.__func__

        @functools.wraps(fused)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _in_play(self):
                return fused(self, *args, **kwargs)

        model.forward = MethodType(forward, model)

    return add


def _with_known_heads(compute_loss: Any) -> Any:
    """Let the loss of a DistillationTrainer say whose heads are called."""

    @functools.wraps(compute_loss)
    def wrapped(self: Any, unwrapped_student: Any, *args: Any, **kwargs: Any) -> Any:
        with _in_play(unwrapped_student, self.accelerator.unwrap_model(self.teacher_model)):
            return compute_loss(self, unwrapped_student, *args, **kwargs)

    return wrapped


@contextmanager
def _in_play(*models: Any) -> Iterator[None]:
    token = _heads.set(tuple(model.get_output_embeddings() for model in models))
    try:
        yield
    finally:
        _heads.reset(token)


class _LogProbs:
    """In the place of TRL's `ChunkedLogProbFunction`."""

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
            original = _replacements.original(_utils(), "_ChunkedLogProbFunction")
            return original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping,
                logit_scale, outputs,
            )  # fmt: skip
        scorer = _scorer(hidden, weight, bias, temperature, logit_scale, final_logit_softcapping)
        return outside_of_graphs(_statistics)(scorer, targets.unsqueeze(0), outputs)


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
    elif loss_takes_entropy():  # whose gradient the forward then keeps as well
        stats = scorer.stats(targets, **options)
    else:
        stats = foreseen_stats(scorer.problem(targets, **options), None)
    further = (getattr(stats, name) for name in _STATISTICS.values())
    return tuple(None if x is None else x[0] for x in (stats.logprob, stats.entropy, *further))


class _Divergence:
    """In the place of TRL's `ChunkedDivergenceFunction`."""

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
            original = _replacements.original(_divergences(), "ChunkedDivergenceFunction")
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
        scored = torch.ones(1, len(student_hidden), dtype=torch.bool, device=student_hidden.device)
        direction = {0.0: "forward", 1.0: "reverse"}.get(beta, "jsd")
        divergence, entropy = scored_divergence(
            student, teacher, scored, direction=direction, beta=beta, entropy=True
        )
        assert entropy is not None
        return divergence[0], entropy[0]


def _scorer(
    hidden: Tensor,
    weight: Any,
    bias: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
) -> Scorer:
    """What scores n hidden states (n, H), as a batch of one sequence, by the head of a weight."""
    module, parts = _head_of(weight, bias)
    if parts is None and weight.is_floating_point():
        hidden = hidden.to(weight.dtype)  # as the module's own matmul takes them
    scorer = head_scorer(
        hidden.unsqueeze(0), module, parts, LogitMap(scale, softcap), temperature=temperature
    )
    if isinstance(scorer, LinearScorer):
        return scorer._replace(dtype=matmul_dtype(hidden))
    return scorer


def _is_shared_out(weight: Any, *, backward_needs_it: bool = False) -> bool:
    """Whether ZeRO-3 has, or in time for the backward will have, taken a weight away."""
    shared_out = hasattr(weight, "ds_id") and (weight.requires_grad or not backward_needs_it)
    if shared_out:
        _say_once("a head under DeepSpeed's ZeRO-3 is left to TRL's own kernels")
    return shared_out


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _utils() -> Any:
    from trl.trainer import utils

    return utils


def _divergences() -> Any:
    from trl.kernels import chunked_divergence

    return chunked_divergence


def _head_of(weight: Any, bias: Tensor | None) -> tuple[Any, HeadParts | None]:
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
            except TypeError:  # of a class that is not known, or packed for a CPU by bitsandbytes
                return module, None
    if any(map(_has_adapter, heads)):
        raise RuntimeError(
            "model: its head is sharded by itself (FSDP2) and carries an adapter, which "
            f"fastrlhf.integrations.trl cannot serve; {_INSTEAD}"
        )
    # Gathered from its shards; or of a trainer that was made before `patch`, without adapters.
    return None, parts_of_weight(weight, bias)


_replacements = Replacements(_find)
