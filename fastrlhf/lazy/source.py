"""One call of a head: what entered it, and how its logits, or statistics of them, are computed.

Everything is computed in a graph of its own, the *inner* graph, which starts at the hidden states
and the head's parameters and ends in a few numbers for each token. It is differentiated when, in
the user's graph, the gradient of the logits arrives where the head was called (see `graph`). That
is when plain logits would be differentiated: so wrappers of models that look at the gradient of an
output, or prepare a weight for backward, see what they are used to.

Dims: H hidden, K hidden plus the ranks of adapters, U hidden states, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrlhf.hf.head_parts import HeadParts
from fastrlhf.hf.head_scorer import with_adapters
from fastrlhf.hf.logit_map import LogitMap
from fastrlhf.hf.own_module import ModuleScorer
from fastrlhf.ops.backend import backend_of, current_autocast
from fastrlhf.ops.linear_head import Weight
from fastrlhf.ops.linear_rows import default_chunk
from fastrlhf.ops.scorer import LinearScorer, Scorer

from .as_it_was import AsItWas
from .gradient import Terms, dense
from .meaning import Distribution, Rows

# The logits of an eighth of a batch are held at a time, or those of as many tokens as keep a matmul
# busy, if that is more.
_PARTS = 8
_FEWEST_TOKENS = {"cpu": 32}
_FEWEST_TOKENS_OF_GPU = 1024


class Source:
    """One call of a head, whose logits were not made."""

    def __init__(
        self, module: nn.Module, own: Callable[[Tensor], Tensor], hidden: Tensor,
        parts: HeadParts | None, *, holds_weight: bool, impl: str,
    ):  # fmt: skip
        self.own, self.parts, self.impl = AsItWas(module, own), parts, impl
        self.autocast = current_autocast(hidden.device.type)
        self.parameters = [x for x in module.parameters() if x.requires_grad]
        grad = torch.is_grad_enabled()
        self.requires_grad = grad and (hidden.requires_grad or bool(self.parameters))
        self.hidden = hidden.detach()  # (..., H), a leaf of the inner graph
        self.hidden.requires_grad_(self.requires_grad and hidden.requires_grad)
        with torch.no_grad():
            empty = own(_no_tokens(module, hidden))
        self.dtype, self.vocab = empty.dtype, empty.shape[-1]
        self.shape = torch.Size((*hidden.shape[:-1], self.vocab))
        self.device = hidden.device
        self.tokens = hidden.shape[:-1].numel()
        # One backend, chosen by the size of all tokens, however few are scored at a time.
        self.backend = backend_of(impl, hidden, self.tokens * self.vocab)
        self.wide, self.weights = self.hidden, list[Weight]()
        # Adapters, with their dropout, are applied to the hidden states once, now: everything that
        # is computed later sees the same draw.
        drops = parts is not None and any(_drops(x.dropout) for x in parts.adapters)
        if parts is not None:
            with torch.set_grad_enabled(self.requires_grad):
                self.wide, self.weights = with_adapters(parts, self.hidden)
                if holds_weight:
                    self.weights = [x.clone() if isinstance(x, Tensor) else x for x in self.weights]
        self.known: list[Any] = []  # `scores.Known` computed so far, for questions that share them
        self.own_is_there = not (holds_weight or drops)
        looked_at = [hidden, *(() if holds_weight else module.parameters())]
        self._seen = [(x, _version(x)) for x in looked_at]

    @property
    def head_is_trained(self) -> bool:
        return self.requires_grad and bool(self.parameters)

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that the inner graph starts from, and that have a gradient."""
        hidden = [self.hidden] if self.hidden.requires_grad else []
        return [*hidden, *self.parameters]

    def check_unchanged(self) -> None:
        """Raise RuntimeError where the logits can no longer be made as they would have been."""
        if any(_version(x) != version for x, version in self._seen):
            raise RuntimeError(
                "lazy_logits: the logits of a model are asked for after its head's weight, or what "
                "enters the head, was changed (by a step of the optimizer): ask before that, or "
                "call the model outside of lazy_logits"
            )

    @contextmanager
    def at_work(self, *, differentiable: bool) -> Iterator[None]:
        """Compute under the modes that the head's own call was made in."""
        self.check_unchanged()
        with torch.set_grad_enabled(differentiable and self.requires_grad), self.autocast():
            yield

    def logits(self) -> Tensor:
        """All logits (..., V), in the inner graph: by the module's own forward, unless a dropout
        was drawn, or only a copy of the weight is there.
        """
        if self.own_is_there:
            return self.own(self.hidden)
        rows = torch.arange(self.tokens, device=self.device)
        return self.scorer(self.whole).logits(rows).to(self.dtype).view(self.shape)

    @property
    def whole(self) -> Distribution:
        """The softmax of all of the logits."""
        numbers = torch.arange(self.tokens, device=self.device)
        return Distribution(
            self, Rows(numbers.view(self.shape[:-1])), constant=not self.requires_grad
        )

    def gradients(self, terms: Terms, rest: Tensor | None) -> list[Tensor | None]:
        """Gradients of hidden states and parameters, from the gradients of what was computed of the
        logits (`terms`), and a gradient of the logits themselves (`rest`).
        """
        outputs = [(computed.graph(), dense(upstream)) for computed, upstream, _ in terms]
        if rest is not None:
            with self.at_work(differentiable=True):
                outputs.append((self.logits(), rest))
        inputs = self.inputs
        gradients: Sequence[Tensor | None] = [None] * len(inputs)
        if outputs and inputs:
            of, upstream = zip(*outputs, strict=True)
            gradients = torch.autograd.grad(
                of, inputs, upstream, retain_graph=True, allow_unused=True
            )
        for computed, *_ in terms:
            computed.differentiated()
        self.known.clear()
        return [*([] if self.hidden.requires_grad else [None]), *gradients]

    def differentiable_gradients(
        self, hidden: Tensor, parameters: Sequence[Tensor], gradient: Tensor
    ) -> list[Tensor | None]:
        """The same from a gradient of the logits; the result can be differentiated once more."""
        if not self.own_is_there:
            raise RuntimeError(
                "lazy_logits: gradients of a head with a dropout, or whose weight a wrapper takes "
                "away, cannot be differentiated (create_graph=True); leave lazy_logits"
            )
        with self.at_work(differentiable=True):
            inputs = [x for x in (hidden, *parameters) if x.requires_grad]
            logits = self.own(hidden)
            gradients = torch.autograd.grad(
                logits, inputs, gradient, create_graph=True, allow_unused=True
            )
        return [*([] if hidden.requires_grad else [None]), *gradients]

    def scorer(
        self,
        of: Distribution,
        *,
        temperature: Tensor | None = None,
        rows: Tensor | None = None,
        only: Tensor | None = None,
        held: int = 1,
    ) -> Scorer:
        """Make a scorer of tokens by the logits of a distribution.

        There is one token for each of the U hidden states; or, with `rows`, any tokens, given by
        the numbers of their hidden states; or, with `only`, one for each of some hidden states.
        The temperature is that of these tokens. `held`: how many times as much memory for a token
        as log-probs what is to be computed takes.
        """
        softcap = of.factor if of.capped else None
        scale = of.scale * of.factor if of.capped else of.scale
        temperatures: Any = 1.0 if temperature is None else temperature
        hidden = self.hidden if self.parts is None else self.wide
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if of.constant:
            hidden = hidden.detach()
        if only is not None:
            hidden = hidden[only]
        if self.parts is None:
            return ModuleScorer(
                hidden, self.own, LogitMap(scale, softcap, of.offset), self.vocab, temperatures,
                self._chunk(held), self.backend, rows=rows,
            )  # fmt: skip
        return LinearScorer(
            hidden, self.weights, self.bias_of(of), temperatures, softcap, scale, self._chunk(held),
            self.backend, rows=rows,
        )  # fmt: skip

    def bias_of(self, of: Distribution) -> Tensor | None:
        """The bias of a head that is a matrix, with the offset of a distribution added."""
        bias = None if self.parts is None else self.parts.bias
        return LogitMap(of.scale, offset=of.offset).folded_bias(bias)

    def _chunk(self, held: int) -> int:
        fewest = _FEWEST_TOKENS.get(self.device.type, _FEWEST_TOKENS_OF_GPU)
        return min(
            default_chunk(self.vocab, self.device), max(fewest, self.tokens // (_PARTS * held))
        )


def _no_tokens(module: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden states of no token, by which a head shows its dtype and vocabulary at no cost; or of
    one token for a quantized head, whose kernels need some.
    """
    quantized = any(type(x).__module__.startswith("bitsandbytes") for x in module.modules())
    return hidden.reshape(1, -1, hidden.shape[-1])[:, : 1 if quantized else 0]


def _drops(dropout: nn.Module) -> bool:
    return dropout.training and getattr(dropout, "p", 0.0) > 0


def _version(x: Tensor) -> tuple[int, ...]:
    """A key that changes when a tensor's numbers do."""
    return () if x.is_inference() else (x._version, x.data_ptr())
