"""Do something else where a model would make its logits, in the middle of its own forward.

The model's forward runs, wrappers, hooks and all, but for the time of the call its head does other
work on the hidden states that it is called with: what enters a head is not always what a backbone
returns. In place of logits the head passes on three rows of known numbers, and what the model makes
of them tells what it does to its logits (see `logit_map`).

The results of the work are tied to that output, twice: their gradient passes through the outputs
of the head and of the model, as a gradient of zeros. So wrappers that prepare weights when the
gradient of an output arrives (FSDP2, ZeRO-3) do so before the backward of the work needs them.
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

    `work(hidden, own_forward)` runs where the head would. It returns one tensor, which `result`
    returns, tied to the model's output; and the size of the vocabulary.
    """

    def __init__(self, module: nn.Module, name: str, work: Work):
        self.module, self.name, self.work = module, name, work
        self.made: Tensor | None = None
        self.rows: Tensor
        self.own_forward: Callable[..., Tensor]
        # A patched forward that stood in the attributes of the module itself, if there was one.
        self.replaced: Callable[..., Tensor] | None = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        # accelerate wraps the module's forward in one that moves weights.
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
            # ProphetNet's decoder has several streams, of which the first makes the logits: only
            # for the first are rows sent on, so that a model that takes another one fails.
            hidden = hidden[:, 0]
        hidden, own_forward, as_given = plain_tensors(hidden, self.own_forward)
        self.made, vocab = self.work(hidden, own_forward)
        self.rows = known_rows(vocab, hidden.dtype, hidden.device)
        sent = as_given(self.rows.view(*(1,) * (streams + 1), *self.rows.shape))
        return tied(sent, self.made)

    def result(self, logits: Tensor) -> Tensor:
        """The work's result, once the model has made something of what its head returned."""
        if self.made is None:
            raise RuntimeError(
                f"model: the forward of {self.name} does not call the module of its output "
                "embeddings; use token_stats on its logits"
            )
        return tied(self.made, this_ranks(logits))

    def check(
        self, made: Tensor, expected: LogitMap, part: VocabularyPart | None = None
    ) -> LogitMap:
        """The map from the head's logits to the model's: the expected one, if it still holds; of a
        head of which this rank has a part.

        Raises:
            RuntimeError: a model that does to its logits what no map says.
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
    """Whether what a model makes of its head's output depends on parameters that are trained: their
    gradient would be lost.
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
    """The forward of a module, in whose place `fastrlhf.lazy_logits` may have put another."""
    forward = getattr(module, name)
    return getattr(forward, "fastrlhf_own", forward)


def logits_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.logits


def tied(value: Tensor, other: Tensor) -> Tensor:
    """Return the value; its gradient reaches the other tensor too, as zeros."""
    if under_transform() or not other.requires_grad:
        return value
    return _Tied.apply(value, other)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, other):
        ctx.other = other.shape, other.dtype, other.device
        return value.clone()  # no view, since models may write into it

    @staticmethod
    def backward(ctx, d_value):
        shape, dtype, device = ctx.other
        zeros = torch.zeros((), dtype=dtype, device=device).expand(shape)
        return d_value if ctx.needs_input_grad[0] else None, zeros
