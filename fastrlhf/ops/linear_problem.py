"""The arguments of an operation from hidden states, as objects that are handed on whole.

A public function puts its keywords into `LinearInputs` (how logits are made) and `TokenQuestion`
(what is asked of them). `checked_problem` in `linear_arguments.py` makes a `LinearProblem` of these
two and the targets, in which everything is checked and every default is chosen. The autograd
Functions take the problem apart into tensors and `LinearOptions`, and put it together again. They
make a `Workbench` of it, on which the plans of `linear_plans.py` work.

Dims: K width of the hidden states, V vocabulary, U hidden states that tokens share.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kept_ids import KeptIds, Support
from .linear_head import Head, Weight
from .linear_plans import Workbench
from .linear_question import TokenQuestion
from .linear_rows import Rows, SharedRows, live_rows_if_known
from .transform import Transform
from .vocabulary_part import VocabularyPart


class LinearInputs(NamedTuple):
    """How the logits of tokens are made: keywords of `linear_token_stats`. They are not checked
    yet, except that `head_part` has found which part of the head this rank has.
    """

    hidden: Tensor  # (..., K)
    weights: list[Weight]  # column blocks of a (V, K) matrix
    bias: Tensor | None = None
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    scale: float = 1.0
    chunk_size: int | None = None
    impl: str = "auto"
    # The dtype of the matmuls, to which weights of any dtype are converted, a slice at a time.
    # None: as for `F.linear`, that of the hidden states and weights, or of autocast.
    dtype: torch.dtype | None = None
    part: VocabularyPart | None = None  # which part the weights are, where ranks share a vocabulary
    support: Support | None = None  # the ids to which tokens are restricted: see `kept_ids.py`
    rows: Tensor | None = None  # (...) which of the hidden states (U, K) predicts each token

    @property
    def vocab(self) -> int:
        return self.weights[0].shape[0] if self.part is None else int(self.part.vocab)

    @property
    def most_columns(self) -> int:
        """The number of columns of the logits; where ranks share the vocabulary, that of the rank
        which has the most, so that all ranks cut the same chunks.
        """
        part, columns = self.part, self.weights[0].shape[0]
        return columns if part is None or part.largest is None else part.largest

    @property
    def wanted_gradients(self) -> tuple[bool, bool]:
        """Whether gradients of hidden states and of the head will be asked for."""
        grad = torch.is_grad_enabled()
        return grad and self.hidden.requires_grad, self.head_is_trained

    @property
    def head_is_trained(self) -> bool:
        """Whether a gradient of weight or bias is asked for."""
        head = (*self.weights, self.bias)
        return torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in head)


class LinearOptions(NamedTuple):
    """The parts of a checked problem that are not tensors kept by autograd."""

    temperature: float
    softcap: float | None
    scale: float
    question: TokenQuestion
    chunk: int
    impl: str
    dtype: torch.dtype  # of the matmuls
    part: VocabularyPart | None = None  # of a vocabulary that ranks share
    shared: SharedRows | None = None  # where tokens share hidden states


class LinearProblem(NamedTuple):
    """Hidden states, the head, and what is asked about their logits; all of it checked."""

    hidden: Tensor  # (..., K) in the dtype of the matmuls
    weights: list[Weight]  # column blocks of a (V, K) matrix
    bias: Tensor | None  # (V,)
    targets: Tensor  # (...)
    token_temperature: Tensor | None  # (...)
    options: LinearOptions
    kept: KeptIds | None = None  # the ids to which tokens are restricted; None: all ids

    @staticmethod
    def of(options: LinearOptions, tensors: Sequence[Any]) -> "LinearProblem":
        """Put a problem together again that `tensors` took apart."""
        hidden, bias, targets, token_temperature, *weights = tensors
        return LinearProblem(hidden, weights, bias, targets, token_temperature, options)

    def tensors(self) -> tuple[Any, ...]:
        """Return hidden states, bias, targets, temperatures and weights, in the order in which
        autograd Functions take them. A quantized weight is among them, though it is not a tensor.
        """
        return self.hidden, self.bias, self.targets, self.token_temperature, *self.weights

    @property
    def temperature(self) -> float | Tensor:
        """The temperature: one number for all tokens, or (...) one for each."""
        tokens = self.token_temperature
        return self.options.temperature if tokens is None else tokens

    @property
    def transform(self) -> Transform:
        """The transform of the logits, for flattened tokens."""
        options = self.options
        return Transform(
            self.token_temperature, options.temperature, options.softcap, options.scale
        ).flat(options.dtype)

    def order(self) -> Tensor | None:
        """The indices of the tokens with a target; those that share a hidden state follow each
        other. None where they cannot be counted.
        """
        ignore_index = self.options.question.ignore_index
        order = live_rows_if_known(self.targets.reshape(-1), ignore_index)
        if order is None or self.options.shared is None:
            return order
        return order[self.options.shared.state[order].argsort(stable=True)]

    def workbench(self, order: Tensor | None) -> Workbench:
        """Make the workbench for the rows in this order: see `Rows`."""
        options = self.options
        head = Head(self.weights, self.bias, options.dtype)
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])
        targets = self.targets.reshape(-1)
        ignore_index = options.question.ignore_index
        rows = Rows(hidden, targets, self.transform, ignore_index, order, options.shared)
        return Workbench(head, rows, options.question, options.impl, options.part)

    def like_inputs(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Convert gradients of hidden states, bias and weights to the dtypes of these."""
        inputs = (self.hidden, self.bias, *self.weights)
        return [
            None if gradient is None or x is None else gradient.to(x.dtype)
            for gradient, x in zip(gradients, inputs, strict=True)
        ]
