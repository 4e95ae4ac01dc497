"""TRL's trainers on fastrlhf's kernels, by one line.

::

    from fastrlhf.integrations import trl

    trl.patch()

The losses, their options and their metrics stay TRL's own. What is replaced is the step that they
all share, in which hidden states become per-token log-probs (`trl.trainer.utils.add_fused_lm_head`)
or, for distillation, a divergence. So this one line serves `SFTTrainer`, `DPOTrainer`,
`KTOTrainer`, `GRPOTrainer`, `RLOOTrainer` and `DistillationTrainer`, their subclasses included.

The cost, in matmuls of the scored tokens with the head (G): 2G where the head is frozen, as with
LoRA, and 4G where it is trained, less G for the last block of tokens (see `foreseen_stats`); 3G for
`SFTTrainer`, and for `GRPOTrainer` in the first update after a rollout (see `trl_foresight`). TRL
itself needs 3G and 4G, and on a CPU scores prompts too.

Beyond what TRL does, a LoRA adapter of the head is trained, which TRL refuses; a quantized head is
read as what its codes stand for; and the entropy stays a number where a word's logit is -inf.

Logits are still built for what asks for them: `compute_metrics`, `compute_loss_func`, label
smoothing. Heads whose weight is shared out by ZeRO-3 and trained are left to TRL.
"""

import functools
import inspect
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch

from .replacements import Replacement, Replacements
from .trl_foresight import foreseeing
from .trl_head import (
    divergence_in_place_of,
    has_adapter,
    log_probs_in_place_of,
    with_known_head,
    with_known_heads,
)

KNOWN_VERSIONS = ("1.15", "1.16")
_INSTEAD = "use fastrlhf.model_linear_loss in a loss of your own"

# Whether a trainer is being made that has to refuse an adapter of the head.
_adapters_refused: ContextVar[bool] = ContextVar("adapters_refused", default=False)


def patch() -> None:
    """Put TRL's trainers on fastrlhf's kernels, until `unpatch`.

    Make trainers afterwards: those made before are served only if their heads are plain ones. A
    second call changes nothing.

    Raises:
        ImportError: TRL is not installed, or in a version whose trainers were never tried.

    Example:
        >>> from fastrlhf.integrations import trl
        >>> trl.patch()  # before the trainer is made
        >>> trl.unpatch()
    """
    _replacements.install()


def unpatch() -> None:
    """Put back exactly what `patch` replaced; without it, do nothing.

    Example:
        >>> from fastrlhf.integrations import trl
        >>> trl.patch()
        >>> trl.unpatch()
    """
    _replacements.remove()


def patched() -> AbstractContextManager[None]:
    """Patch TRL within a `with` statement.

    Example:
        >>> from fastrlhf.integrations import trl
        >>> with trl.patched():
        ...     pass  # make the trainer, and trainer.train()
    """
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

    log_probs = _known(logprob.ChunkedLogProbFunction, log_probs_in_place_of)
    divergences = _known(divergence.ChunkedDivergenceFunction, divergence_in_place_of)
    distillation = distillation_trainer.DistillationTrainer
    add = with_known_head(utils.add_fused_lm_head)
    replacements = [
        Replacement(utils, "_ChunkedLogProbFunction", log_probs),
        Replacement(utils, "add_fused_lm_head", add),
        Replacement(divergence, "ChunkedDivergenceFunction", divergences),
        Replacement(distillation_trainer, "ChunkedDivergenceFunction", divergences),
        Replacement(distillation, "_compute_loss", with_known_heads(distillation._compute_loss)),
        *foreseeing(sft_trainer.SFTTrainer, grpo_trainer.GRPOTrainer),
    ]
    # Where TRL believes that it uses Triton, only tokens with a label reach the head: on a CPU too.
    for module in (utils, distillation_trainer):
        replacements.append(Replacement(module, "_use_triton", _always))
    for module, trainer in (
        (sft_trainer, sft_trainer.SFTTrainer),
        (dpo_trainer, dpo_trainer.DPOTrainer),
        (kto_trainer, kto_trainer.KTOTrainer),
        (grpo_trainer, grpo_trainer.GRPOTrainer),
        (rloo_trainer, rloo_trainer.RLOOTrainer),
        (distillation_trainer, distillation),
    ):
        replacements += [
            Replacement(module, "add_fused_lm_head", add),
            Replacement(module, "BaseTunerLayer", _RefusedAdapter),
            Replacement(trainer, "__init__", _made_under_the_patch(trainer.__init__)),
        ]
    return [x for x in replacements if x.name in vars(x.owner)]


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
    """Make a trainer as TRL does, but refuse options that do not go together with the patch, and
    accept an adapter of the head where the patch can train it.
    """

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(init).bind_partial(self, *args, **kwargs).arguments.get("args")
        if getattr(given, "use_liger_kernel", False):
            raise ValueError(
                "use_liger_kernel: expected False where fastrlhf patches TRL, whose head it "
                "replaces; Liger's kernels of other layers are there by liger_kernel.transformers"
            )
        # With this option, TRL casts the base layer of a head alone, and not its adapter.
        token = _adapters_refused.set(getattr(given, "cast_lm_head_to_fp32", False))
        try:
            init(self, *args, **kwargs)
        finally:
            _adapters_refused.reset(token)
        if has_adapter(self.model.get_output_embeddings()):
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


class _AdapterCheck(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return _adapters_refused.get() and has_adapter(instance)


class _RefusedAdapter(metaclass=_AdapterCheck):
    """Stands for peft's BaseTunerLayer, by which TRL's trainers recognise an adapter of a head, to
    refuse it. No head is an instance, except while a trainer is made that has to refuse adapters.
    """


def _known(function: Any, in_place_of: Any) -> Any:
    """What to put in a function's place. Raise ImportError unless TRL calls it with the arguments
    that are known here.
    """
    ours = in_place_of(function)
    expected = list(inspect.signature(ours.apply).parameters)
    theirs = list(inspect.signature(function.forward).parameters)[1:]
    if theirs != expected:
        raise ImportError(
            f"fastrlhf.integrations.trl does not know trl's {function.__name__} of {theirs}, but "
            f"of {expected}; {_INSTEAD}"
        )
    return ours


def _always(device: torch.device) -> bool:
    return True


_replacements = Replacements(_find)
