"""The loss that a model of transformers computes from labels in its own forward, without logits.

Two parts of the model are replaced during that forward. In place of the head, the summed
cross-entropy and its gradient are computed. The model's loss function would be called with logits;
its replacement returns that sum, divided as the model's own function would do. All else is the
model's own: other terms of the loss (such as that of a router of experts), and what wrappers and
callers do with its output.

Dims: B sequences, T tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastrlhf.losses.cross_entropy import summed_cross_entropy
from fastrlhf.losses.cross_entropy_options import CrossEntropy
from fastrlhf.ops import shift_targets
from fastrlhf.ops.backend import outside_of_graphs
from fastrlhf.ops.scorer import Scorer

from .at_head import IGNORED, in_place_of_head
from .head_parts import base_model, check_weights, head_module, virtual_tokens
from .model_inputs import TokenBatch, check_model
from .spent_logits import spend
from .stand_in import StandIn

Result = TypeVar("Result")


def with_fused_loss(
    model: nn.Module,
    labels: Tensor,
    call: Callable[[], Result],
    shift_labels: Tensor | None = None,
) -> Result:
    """Return what `call` returns, which has to call the model once, with labels.

    `call` is called once more if the model does something to its logits that was not known before.

    Args:
        model: a causal language model of transformers, plain or wrapped.
        labels, shift_labels: (B, T), those that the model is called with; -100 is no label.
        call: the model's output in it has the loss that it would have without this function, up to
            rounding, and has no logits.

    Raises:
        TypeError, ValueError, RuntimeError: a model whose loss is not the cross-entropy of the
            logits that its head makes, or whose head is not known; see `model_token_stats`.
    """
    owner = _owner_of_loss(model)
    targets = shift_targets(labels, labels != IGNORED) if shift_labels is None else shift_labels
    scored = (targets != IGNORED).sum()

    def work(scorer: Scorer, targets: Tensor) -> tuple[Tensor, None]:
        return summed_cross_entropy(scorer, targets, CrossEntropy(), ignore_index=IGNORED)[0], None

    def forward(stand_in: StandIn) -> tuple[Any, Tensor]:
        loss = _LossStandIn(stand_in, scored)
        with loss.in_place(owner):
            result = call()
        if loss.logits is None:
            raise TypeError(f"model: {stand_in.name} does not take its loss from loss_function")
        return result, loss.logits

    batch = TokenBatch(labels, None, {})
    return in_place_of_head(model, targets.long(), batch, work, forward).outputs


def _owner_of_loss(model: nn.Module) -> nn.Module:
    """Find the module whose forward computes the loss; raise if its loss cannot be replaced."""
    base = base_model(model)
    module, name = head_module(base), type(base).__name__
    check_model(base, name)
    check_weights(module, name)
    if virtual_tokens(model):
        raise TypeError("model: labels of learned prompts (virtual tokens) are not known")
    # Some wrappers (FSDP1, DeepSpeed) pass on all attributes of their model, so that only the class
    # tells which module has a loss_function of its own.
    while not hasattr(type(base), "loss_function") and hasattr(base, "module"):
        base = base.module
    loss = getattr(base, "loss_function", None)
    # The function is recognised by its name, since transformers is not imported here.
    if getattr(loss, "__qualname__", None) != "ForCausalLMLoss":
        raise TypeError(f"model: the loss_function of {name} is no ForCausalLMLoss but {loss}")
    return base


class _LossStandIn:
    """Takes the place of a model's ForCausalLMLoss during one forward."""

    def __init__(self, stand_in: StandIn, scored: Tensor):
        self.stand_in, self.scored = stand_in, scored
        self.logits: Tensor | None = None  # what the model made of the output of its head

    @contextmanager
    def in_place(self, owner: nn.Module) -> Iterator[None]:
        name, attributes = "_loss_function", vars(owner)
        before = {name: attributes[name]} if name in attributes else {}
        attributes[name] = self
        try:
            yield
        finally:
            del attributes[name]
            attributes.update(before)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return outside_of_graphs(self._run)(*args, **kwargs)

    def _run(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        **kwargs: Any,  # ignored, as ForCausalLMLoss does; shift_labels has been taken before
    ) -> Tensor:
        if self.logits is not None or ignore_index != IGNORED:
            raise TypeError(
                f"model: {self.stand_in.name} calls its loss_function twice, or with another "
                "ignore_index, which is not known"
            )
        self.logits = logits.view_as(logits)
        total = self.stand_in.result(logits)
        spend(logits)
        return _divided(total, self.scored.to(total.device), num_items_in_batch)


def _divided(total: Tensor, scored: Tensor, by: Tensor | int | None) -> Tensor:
    """Divide the sum by the number of scored tokens, or if given, of items of a global batch.

    Without any scored token the result is NaN, as in PyTorch, and gradients are zero.
    """
    divisor = scored if by is None else torch.as_tensor(by, device=total.device)
    safe = torch.where(scored > 0, divisor, 1)
    return torch.where(scored > 0, total / safe, total.detach() / divisor)
