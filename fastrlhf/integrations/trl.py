"""TRL's trainers on fastrlhf's kernels, by one line.

::

    from fastrlhf.integrations import trl

    trl.patch()

The losses, their options and their metrics stay TRL's own. What is replaced is the step that they
all share, in which hidden states become per-token log-probs (`trl.trainer.utils.add_fused_lm_head`)
or, for distillation, a divergence. So there is one such line for `SFTTrainer`, `DPOTrainer`,
`KTOTrainer`, `GRPOTrainer`, `RLOOTrainer` and `DistillationTrainer`, their subclasses included.

In matmuls G of the scored tokens with the head: 2G where the head is frozen, as with LoRA, and 4G
where it is trained; 3G for `SFTTrainer`, whose loss is known in the forward, and for `GRPOTrainer`
in the first update after a rollout (see `trl_foresight`). TRL itself needs 3G and 4G, and on a CPU
scores prompts too. Besides, a LoRA adapter of the head is trained, which TRL refuses, a quantized
head is read as what its codes stand for, and a word whose logit is -inf leaves the entropy a
number.

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
from torch import Tensor, nn

from fastrlhf.hf.head_parts import HeadParts, head_parts, parts_of_weight
from fastrlhf.hf.head_scorer import head_scorer
from fastrlhf.hf.logit_map import LogitMap
from fastrlhf.ops.foreseen_stats import foreseen_stats
from fastrlhf.ops.linear_arguments import matmul_dtype
from fastrlhf.ops.linear_divergence import divergence_and_entropy_of
from fastrlhf.ops.scorer import LinearScorer

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

_scored_model: ContextVar[nn.Module | None] = ContextVar("scored_model", default=None)


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
    try:
        import trl
    except ImportError as error:
        raise ImportError(
            "fastrlhf.integrations.trl patches TRL, which is not installed: pip install trl"
        ) from error
    version = getattr(trl, "__version__", "of no version")
    if not any(version.startswith(f"{known}.") for known in KNOWN_VERSIONS):
        known = ", ".join(f"{known}.*" for known in KNOWN_VERSIONS)
        raise ImportError(
            f"fastrlhf.integrations.trl knows the trainers of trl {known}, found {version}; "
            f"install one of these, or {_INSTEAD}"
        )
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
    trainers = [sft_trainer, dpo_trainer, kto_trainer, grpo_trainer, rloo_trainer]
    found = [
        Replacement(utils, "_ChunkedLogProbFunction", _LogProbs),
        Replacement(divergence, "ChunkedDivergenceFunction", _Divergence),
        Replacement(distillation_trainer, "ChunkedDivergenceFunction", _Divergence),
    ]
    # Only tokens with a label reach the head, on a CPU too.
    found += [
        Replacement(module, "_use_triton", _always) for module in (utils, distillation_trainer)
    ]
    add = with_known_model(utils.add_fused_lm_head)
    found += [Replacement(module, "add_fused_lm_head", add) for module in (utils, *trainers)]
    # By which they recognise an adapter on a head, to refuse it.
    found += [Replacement(module, "BaseTunerLayer", _Refused) for module in trainers]
    found += foreseeing(sft_trainer.SFTTrainer, grpo_trainer.GRPOTrainer)
    return [x for x in found if x.name in vars(x.owner)]


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


class _Refused:
    """What no head is an instance of."""


def with_known_model(add_fused_lm_head: Any) -> Any:
    """Let the forward that `add_fused_lm_head` gives to a model say whose head is called: TRL hands
    on the head's weight alone.
    """

    @functools.wraps(add_fused_lm_head)
    def add(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("cast_lm_head_to_fp32") and not isinstance(_head(model), nn.Linear):
            raise ValueError(
                "cast_lm_head_to_fp32: TRL casts a plain linear head, but this one carries an "
                f"adapter ({type(_head(model)).__name__}); set it to False: logits are made in "
                "fp32 anyway"
            )
        add_fused_lm_head(model, *args, **kwargs)
        fused: Any = model.forward.__func__  # type: ignore[attr-defined]

        @functools.wraps(fused)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with _scoring(self):
                return fused(self, *args, **kwargs)

        model.forward = MethodType(forward, model)

    return add


@contextmanager
def _scoring(model: nn.Module) -> Iterator[None]:
    token = _scored_model.set(model)
    try:
        yield
    finally:
        _scored_model.reset(token)


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
        if _is_shared_out(weight):
            original = _replacements.original(_utils(), "_ChunkedLogProbFunction")
            return original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping,
                logit_scale, outputs,
            )  # fmt: skip
        module, parts = _head_of(weight, bias)
        scorer = head_scorer(
            hidden.unsqueeze(0), module, parts, LogitMap(logit_scale, final_logit_softcapping),
            temperature=temperature,
        )  # fmt: skip
        options: dict[str, Any] = {
            "ignore_index": _IGNORED,
            "entropy": "entropy" in outputs,
            "with_stats": [ours for name, ours in _STATISTICS.items() if name in outputs],
        }
        targets = targets.unsqueeze(0)
        if isinstance(scorer, LinearScorer) and not loss_takes_entropy():
            scorer = scorer._replace(dtype=matmul_dtype(hidden))
            trained = scorer.head_is_trained
            foresight = current_foresight(targets.numel()) if trained else None
            stats = foreseen_stats(scorer.problem(targets, **options), foresight)
        else:
            stats = scorer.stats(targets, **options)
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
        student = _divergence_scorer(
            student_hidden, student_weight, student_bias, temperature, student_logit_scale,
            student_final_logit_softcapping,
        )  # fmt: skip
        teacher = _divergence_scorer(
            teacher_hidden, teacher_weight, teacher_bias, temperature, teacher_logit_scale,
            teacher_final_logit_softcapping,
        )  # fmt: skip
        direction = {0.0: "forward", 1.0: "reverse"}.get(beta, "jsd")
        divergence, entropy = divergence_and_entropy_of(
            student, teacher, None, direction=direction, beta=beta, sum_expected=True
        )
        assert entropy is not None
        return divergence, entropy


def _divergence_scorer(
    hidden: Tensor,
    weight: Any,
    bias: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
) -> LinearScorer:
    parts = parts_of_weight(weight, bias)
    return LinearScorer(
        hidden, [parts.weight], parts.bias, temperature, softcap, scale, dtype=matmul_dtype(hidden)
    )


def _is_shared_out(weight: Any) -> bool:
    """Whether ZeRO-3 will take a weight away before the backward, which needs it."""
    shared_out = hasattr(weight, "ds_id") and weight.requires_grad
    if shared_out:
        _say_once("a trained head under DeepSpeed's ZeRO-3 is left to TRL's own kernels")
    return shared_out


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _utils() -> Any:
    from trl.trainer import utils

    return utils


def _head(model: Any) -> Any:
    return model.get_output_embeddings()


def _head_of(weight: Any, bias: Tensor | None) -> tuple[Any, HeadParts | None]:
    """The module of the head whose weight TRL read, and its parts; None where only the module knows
    what it computes.

    Raises:
        RuntimeError: a head whose logits are not known.
    """
    model = _scored_model.get()
    module = None if model is None else _head(model)
    if module is None:  # of a trainer that was made before `patch`, which refused adapters
        return None, parts_of_weight(weight, bias)
    if weight is module.weight:
        try:
            return module, head_parts(module)
        except TypeError:  # of a class that is not known, or packed for a CPU by bitsandbytes
            return module, None
    if not isinstance(module, nn.Linear):
        raise RuntimeError(
            f"model: its head, a {type(module).__name__}, is sharded (FSDP2) and carries an "
            f"adapter, which fastrlhf.integrations.trl cannot serve; {_INSTEAD}"
        )
    return module, parts_of_weight(weight, bias)  # gathered from its shards


_replacements = Replacements(_find)
