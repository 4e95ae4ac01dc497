"""Fine-tune by `transformers.Trainer` without logits, by one line.

    from fastrlhf.integrations import transformers

    transformers.patch()  # until unpatch(); or: with transformers.patched(): trainer.train()

Eager equivalent: the Trainer as it is. Losses, logged metrics and gradients are the same to
rounding, and the matmuls are as many, but the logits (tokens × vocabulary) are not held.

The class is patched, and not derived from, so that Trainers that other code makes are served too.
`Trainer.compute_loss` runs as it is, and in it the model's own forward; within that, the loss is
computed where the logits would be (see `fastrlhf.hf.own_loss`). So counts of tokens over
accumulated batches and devices, labels that are no input ids, and the losses that a mixture of
experts adds stay those of transformers. Evaluation is served where no logits are asked for: without
compute_metrics.

What cannot be served keeps its own loss, and a warning in the log says once why: label smoothing,
compute_loss_func, outputs that are asked for too, DataParallel, a model that has another loss or
whose forward, or a hook, reads its logits after the loss, a head of unknown class. A Trainer whose
own compute_loss does not call that of its base class is not reached. `use_liger_kernel=True`, which
would fuse the same loss, is a ValueError when the loss is taken.

The logits of a block of tokens are held at a time, 64 MiB in fp32 (512 MiB on a GPU). Of a batch
smaller than that, all logits are held.
"""

import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import wraps
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fastrlhf.hf.head_parts import base_model
from fastrlhf.hf.own_loss import with_fused_loss

from .replacements import Replacement, Replacements

Method = Callable[..., Any]

_logger = logging.getLogger(__name__)

# Whether the current step of evaluation wants the loss only.
_loss_only: ContextVar[bool] = ContextVar("_loss_only", default=False)
# Models whose loss could not be fused when that was tried, and the warnings that were logged.
_left_alone: WeakSet[nn.Module] = WeakSet()
_said: set[str] = set()


def patch() -> None:
    """Let every Trainer take the loss of a causal language model fused. A second call changes
    nothing.

    Raises:
        ImportError: transformers is not there, or its Trainer is not one that is known.

    Example:
        >>> from fastrlhf.integrations import transformers
        >>> transformers.patch()  # before training, or in the middle of it
        >>> transformers.unpatch()
    """
    _replacements.install()


def unpatch() -> None:
    """Take `patch` back. Within `patched()`, the patch stays in place until that is left.

    Raises:
        RuntimeError: other code has patched the same methods since.

    Example:
        >>> from fastrlhf.integrations import transformers
        >>> transformers.patch()
        >>> transformers.unpatch()
    """
    _replacements.remove()


def patched() -> AbstractContextManager[None]:
    """Patch within a `with` statement. May be nested, and left in any order by threads.

    Example:
        >>> from fastrlhf.integrations import transformers
        >>> with transformers.patched():
        ...     pass  # trainer.train()
    """
    return _replacements.installed()


# The methods that are patched, with the parameters that are known.
_PARAMETERS = {
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    "prediction_step": ("self", "model", "inputs", "prediction_loss_only", "ignore_keys"),
}


def _find() -> list[Replacement]:
    """What to replace in the Trainer that is installed."""
    trainer = _known_trainer()
    _left_alone.clear()
    _said.clear()
    own = vars(trainer)
    compute_loss = _fused_compute_loss(own["compute_loss"])
    prediction_step = _fused_prediction_step(own["prediction_step"], compute_loss)
    return [
        Replacement(trainer, "compute_loss", compute_loss),
        Replacement(trainer, "prediction_step", prediction_step),
    ]


def _known_trainer() -> Any:
    """Raise ImportError unless the installed Trainer is one of which it is known how it works."""
    works = "what works is transformers >= 5.0, < 6 with accelerate"
    try:
        import transformers
        from transformers import Trainer
    except ImportError as error:
        raise ImportError(f"transformers.Trainer cannot be imported ({error}); {works}") from error
    for name, parameters in _PARAMETERS.items():
        method = vars(Trainer).get(name)
        its_parameters = tuple(inspect.signature(method).parameters) if callable(method) else None
        if its_parameters != parameters:
            raise ImportError(
                f"transformers {transformers.__version__}: Trainer.{name} takes "
                f"{its_parameters}, not {parameters}; {works}"
            )
    return Trainer


def _fused_compute_loss(own: Method) -> Method:
    @wraps(own)
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:  # fmt: skip
        def call() -> Any:
            return own(
                self, model, inputs, return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
            )  # fmt: skip

        if not _has_fusible_loss(self, model, inputs, return_outputs):
            return call()
        if getattr(self.args, "use_liger_kernel", False):
            raise ValueError(
                "use_liger_kernel: expected False where fastrlhf takes the loss, for Liger's fused "
                "loss would take it too; its other kernels are there by liger_kernel.transformers"
            )
        try:
            return with_fused_loss(model, inputs["labels"], call, inputs.get("shift_labels"))
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            why = str(error)
        loss = call()  # if this fails too, its error is the one that the user should see
        _left_alone.add(_innermost(model))
        _say(model, why)
        return loss

    return compute_loss


def _fused_prediction_step(own: Method, compute_loss: Method) -> Method:
    @wraps(own)
    def prediction_step(
        self: Any, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        # A compute_loss of a subclass, around that of the Trainer, may look at the logits.
        plain = getattr(self.compute_loss, "__func__", None) is compute_loss
        token = _loss_only.set(bool(prediction_loss_only) and plain)
        try:
            return own(self, model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        finally:
            _loss_only.reset(token)

    return prediction_step


def _has_fusible_loss(trainer: Any, model: Any, inputs: Any, return_outputs: bool) -> bool:
    """Whether to try to fuse the loss. If how the Trainer is set up forbids that, log why."""
    # TRL's trainers have a fused loss of their own in the model's forward.
    if not isinstance(inputs.get("labels"), Tensor) or "fused_lm_head" in inputs:
        return False
    if _innermost(model) in _left_alone:
        return False
    why = ""
    if trainer.label_smoother is not None:
        why = "label_smoothing_factor is of logits"
    elif trainer.compute_loss_func is not None:
        why = "compute_loss_func is of logits"
    elif isinstance(model, nn.DataParallel):
        why = "DataParallel copies the model; use DistributedDataParallel"
    elif return_outputs and not _loss_only.get():
        why = "compute_loss is asked for outputs too" if model.training else ""
    else:
        return True
    if why:
        _say(model, why)
    return False


def _innermost(model: Any) -> Any:
    """The model of transformers within its wrappers, or a model of another kind."""
    try:
        return base_model(model)
    except TypeError:
        return model


def _say(model: Any, why: str) -> None:
    """Warn, once for each class of model and reason."""
    text = f"The loss of {type(_innermost(model)).__name__} is not fused by fastrlhf: {why}"
    if text not in _said:
        _said.add(text)
        _logger.warning(text)


_replacements = Replacements(_find)
