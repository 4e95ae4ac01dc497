"""Do other work where a model would make its logits, in the middle of its own forward.

The model's forward runs with all its wrappers and hooks, but in place of the head stands a
`StandIn`, which does some work on the hidden states. It is done there because what enters a head is
not always what the backbone returns. In place of logits, the stand-in returns three rows of known
numbers. What the model makes of them tells what it does to its logits (see `logit_map`).

The result of the work is tied to the output of the head, and to that of the model: in the backward
a gradient of zeros goes into both. Some wrappers (FSDP2, ZeRO-3) prepare weights when the gradient
of an output arrives. With these zeros they do so before the backward of the work needs the weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrlhf.ops.backend import outside_of_graphs, under_transform
from fastrlhf.ops.vocabulary_part import VocabularyPart

from .logit_map import LogitMap, fit, known_rows
from .tensor_parallel import of_all_ranks, plain_tensors, this_ranks

Work = Callable[[Tensor, Callable[..., Tensor]], tuple[Tensor, int]]


class StandIn:
    """Takes the place of a head during one forward of its model.

    `work(hidden, own_forward)` runs where the head would. It returns a tensor and the size of the
    vocabulary. `result` returns the tensor, tied to the model's output.
    """

    def __init__(self, module: nn.Module, name: str, work: Work):
        self.module, self.name, self.work = module, name, work
        self.made: Tensor | None = None
        self.rows: Tensor
        self.own_forward: Callable[..., Tensor]
        # The patched forward that the module itself had as an attribute, if there was one.
        self.replaced: Callable[..., Tensor] | None = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        # With hooks of accelerate, `forward` moves the weights and calls `_old_forward`, so the
        # latter is replaced.
        name = "_old_forward" if hasattr(self.module, "_hf_hook") else "forward"
        attributes = vars(self.module)
        before = {name: attributes[name]} if name in attributes else {}
        self.own_forward, self.replaced = own_forward(self.module, name), attributes.get(name)
        attributes[name] = self
        try:
            yield
        except (RuntimeError, IndexError) as error:
            if self.made is None or isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(
                f"model: {self.name} fails on what its head returned, three rows of numbers in "
                f"place of logits ({error}); use token_stats on its logits"
            ) from error
        finally:
            del attributes[name]
            attributes.update(before)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return outside_of_graphs(self._run)(*args, **kwargs)

    def _run(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.made is not None or args or kwargs:
            raise RuntimeError(
                "model: its forward calls its head twice or with further arguments, which fastrlhf "
                "does not know; use token_stats on the model's logits"
            )
        streams = hidden.ndim - 3
        for _ in range(streams):
            # ProphetNet's decoder has several streams, and the first one makes the logits. Rows are
            # sent on for the first alone, so that a model which takes another one fails.
            hidden = hidden[:, 0]
        hidden, own_forward, as_given = plain_tensors(hidden, self.own_forward)
        self.made, vocab = self.work(hidden, own_forward)
        self.rows = known_rows(vocab, hidden.dtype, hidden.device)
        sent = as_given(self.rows.view(*(1,) * (streams + 1), *self.rows.shape))
        return tied(sent, self.made)

    def result(self, logits: Tensor) -> Tensor:
        """Return the work's result, tied to the model's output, which was made of the head's."""
        if self.made is None:
            raise RuntimeError(
                f"model: the forward of {self.name} does not call the module of its output "
                "embeddings; use token_stats on its logits"
            )
        return tied(self.made, this_ranks(logits))

    def check(
        self, made: Tensor, expected: LogitMap, part: VocabularyPart | None = None
    ) -> LogitMap:
        """Return the map from the head's logits to the model's, given what the model made of the
        known rows. It is the expected map itself, if that still holds. `part` says which part of
        the vocabulary this rank's head has.

        Raises:
            RuntimeError: no map fits what the model does to its logits.
        """
        rows, trained = self.rows, _is_trained(made)
        made = of_all_ranks(made.detach(), part)
        if made.shape == (1, *rows.shape):
            made = made[0].to(rows)
            if not trained and expected.agrees(rows, made):
                return expected
            fitted = None if trained else fit(rows, made)
            if fitted is not None:
                return fitted
        raise RuntimeError(
            f"model: {self.name} changes the logits of its head by more than a scale, a softcap "
            "and an offset of each word, so log-probs are not known; use token_stats on its logits"
        )


def _is_trained(made: Tensor) -> bool:
    """Whether the model's output depends on trained parameters other than through the head. Their
    gradient would be lost, since the known rows stand in for logits.
    """
    ahead, seen = [made.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen or node.name() == "_TiedBackward":
            continue
        if node.name() == "torch::autograd::AccumulateGrad":
            return True
        seen.add(node)
        ahead += [before for before, _ in node.next_functions]
    return False


def own_forward(module: Any, name: str = "forward") -> Callable[..., Any]:
    """Return the module's own forward, also where `fastrlhf.lazy_logits` has replaced it."""
    forward = getattr(module, name)
    return getattr(forward, "fastrlhf_own", forward)


def logits_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.logits


def tied(value: Tensor, other: Tensor) -> Tensor:
    """Return the value. In the backward, the other tensor gets a gradient of zeros."""
    if under_transform() or not other.requires_grad:
        return value
    return _Tied.apply(value, other)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, other):
        ctx.other = other.shape, other.dtype, other.device
        return value.clone()  # not a view, since models may write into it

    @staticmethod
    def backward(ctx, d_value):
        shape, dtype, device = ctx.other
        zeros = torch.zeros((), dtype=dtype, device=device).expand(shape)
        return d_value if ctx.needs_input_grad[0] else None, zeros
