"""Providers of the log-probs of a batch: this library, plain PyTorch as in trainers, and the peers.

A provider's `load` imports what it needs and returns a function of a batch. It raises if the peer
is not installed. The log-probs of prompts are 0. `composed` turns providers of log-probs into
providers of a loss of log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from batch import IGNORED, Batch
from torch import Tensor

import fastrlhf

Function = Callable[[Batch], Tensor]


class Provider(NamedTuple):
    """One way to compute an operation."""

    load: Callable[[], Function]
    spends_logits: bool = False  # its backward overwrites the logits
    backward_only: bool = False  # not timed forward alone: that equals another provider's
    compiles: bool = False  # its first call with each new size takes long
    gpu_only: bool = False
    # The work that its plan requires in forward and backward, if it exceeds the operation's least:
    matmuls: int | None = None  # with a trained head
    passes: tuple[int, int] | None = None  # over the rows that count, and over all rows


def upcast(logits: Tensor) -> Tensor:
    """Convert logits to fp32, as trainers do. The fp64 logits of a check stay fp64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def eager_logprobs(batch: Batch) -> Tensor:
    """Compute log-probs as trainers write them: logits upcast, log_softmax, gather."""
    logits = batch.hidden @ batch.weight.T if batch.logits is None else batch.logits
    log_p = upcast(logits).log_softmax(-1)
    return log_p.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0] * batch.mask


def compiled(function: Function) -> Provider:
    """Make a provider that compiles a function with PyTorch, for exactly the shape of its call."""

    def load() -> Function:
        # The function gets a code object of its own, because the compiler keeps only a few
        # compilations for each. A reset of the compiler would drop all, those of this library too.
        fresh = FunctionType(
            function.__code__.replace(), function.__globals__, function.__name__,
            function.__defaults__, function.__closure__,
        )  # fmt: skip
        return torch.compile(fresh, dynamic=False)

    return Provider(load, compiles=True)


def composed(providers: Mapping[str, Provider], loss: Callable[[Tensor, Batch], Tensor]) -> dict:
    """Make providers of a loss of log-probs from providers of log-probs."""

    def compose(provider: Provider) -> Provider:
        def load() -> Function:
            logprobs = provider.load()
            return lambda batch: loss(logprobs(batch), batch)

        return provider._replace(load=load)

    return {name: compose(provider) for name, provider in providers.items()}


def _live_rows(batch: Batch, logprobs_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Compute log-probs by a function of the states and targets that count; 0 elsewhere."""
    mask = batch.mask
    logprobs = logprobs_of(batch.hidden[mask], batch.targets[mask])
    return torch.zeros_like(batch.old, dtype=logprobs.dtype).masked_scatter(mask, logprobs)


# Providers from logits.


def _fused(batch: Batch) -> Tensor:
    return fastrlhf.token_logprobs(batch.logits, batch.targets)


def _fused_inplace(batch: Batch) -> Tensor:
    # A view of the leaf is passed, since the output of a head is not a leaf either.
    logits = batch.logits.view_as(batch.logits)
    return fastrlhf.token_logprobs(logits, batch.targets, inplace_backward=True)


def _load_trl() -> Function:
    from trl.trainer.utils import selective_log_softmax

    # Without a GPU the result has the dtype of the logits; a trainer would not add it up in that.
    return lambda batch: selective_log_softmax(
        batch.logits, batch.targets.clamp(min=0), row_mask=batch.mask
    ).float()


def _load_liger() -> Function:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def logprobs(batch: Batch) -> Tensor:
        rows, targets = batch.logits.flatten(0, 1), batch.targets.flatten()
        losses = liger_cross_entropy(rows, targets, ignore_index=IGNORED, reduction="none")
        # Here, too, the result has the dtype of the logits.
        return -losses.float().view_as(batch.targets)

    return logprobs


# Liger's cross-entropy writes its gradient into the logits in its forward, so it spends them.
FUSED_LOGPROBS = {
    "fastrlhf": Provider(lambda: _fused),
    "fastrlhf, in place": Provider(lambda: _fused_inplace, spends_logits=True, backward_only=True),
}
PEER_LOGPROBS = {
    "TRL selective_log_softmax": Provider(_load_trl),
    "Liger cross-entropy": Provider(_load_liger, spends_logits=True, gpu_only=True),
}


# Providers from hidden states.


def _fused_linear(batch: Batch) -> Tensor:
    return fastrlhf.linear_token_logprobs(batch.hidden, batch.weight, batch.targets)


def _load_linear_trl() -> Function:
    from trl.trainer import utils

    def logprobs(batch: Batch) -> Tensor:
        def of_rows(hidden: Tensor, targets: Tensor) -> Tensor:
            return utils._ChunkedLogProbFunction.apply(
                hidden, batch.weight, None, targets, 1.0,
                utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, (),
            )[0]  # fmt: skip

        return _live_rows(batch, of_rows)

    return logprobs


def linear_cross_entropy(batch: Batch, **options: Any) -> Tensor:
    """Call PyTorch's own function, with as many logits at a time as this library holds.

    By default PyTorch takes a few rows at a time, which takes ten times as long at the small sizes
    of a CPU.
    """
    workspace = 2**29 if batch.hidden.is_cuda else 2**26
    chunks = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=max(1, workspace // (4 * batch.shape.vocab))
    )
    return F.linear_cross_entropy(
        batch.hidden.flatten(0, 1), batch.weight, batch.targets.flatten(),
        ignore_index=IGNORED, options=chunks, **options,
    )  # fmt: skip


def load_linear_cross_entropy(use: Function) -> Callable[[], Function]:
    """Make a `load` that returns `use`, or raises if this PyTorch is too old for it."""

    def load() -> Function:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
        return use

    return load


def _torch_linear(batch: Batch) -> Tensor:
    return -linear_cross_entropy(batch, reduction="none").float().view_as(batch.targets)


def _load_linear_liger() -> Function:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    def logprobs(batch: Batch) -> Tensor:
        rows, targets = batch.hidden.flatten(0, 1), batch.targets.flatten()
        return -Scaled.apply(rows, batch.weight, targets, 1.0, IGNORED).view_as(batch.targets)

    return logprobs


def _load_cut_cross_entropy() -> Function:
    from cut_cross_entropy import linear_cross_entropy as cut

    def logprobs(batch: Batch) -> Tensor:
        rows = (batch.hidden, batch.weight, batch.targets)
        return -cut(*rows, ignore_index=IGNORED, reduction="none").float()

    return logprobs


FUSED_LINEAR_LOGPROBS = {"fastrlhf": Provider(lambda: _fused_linear, matmuls=4)}
PEER_LINEAR_LOGPROBS = {
    "TRL chunked log-probs": Provider(_load_linear_trl),
    "F.linear_cross_entropy": Provider(load_linear_cross_entropy(_torch_linear)),
    "Liger scaled cross-entropy": Provider(_load_linear_liger),
    "cut-cross-entropy": Provider(_load_cut_cross_entropy, gpu_only=True, compiles=True),
}


def by_linear_logprobs(
    fused: Callable[[Tensor, Batch], Tensor], plain_loss: Callable[[Tensor, Batch], Tensor]
) -> dict[str, Provider]:
    """Make providers of a loss from hidden states that compute it through token log-probs."""
    ours = composed(FUSED_LINEAR_LOGPROBS, fused)["fastrlhf"]
    return {
        "fastrlhf, by log-probs": ours._replace(backward_only=True),
        **plain(lambda batch: plain_loss(eager_logprobs(batch), batch)),
        **composed(PEER_LINEAR_LOGPROBS, plain_loss),
    }


def plain(loss: Function) -> dict[str, Provider]:
    """Make providers of an operation in plain PyTorch: one eager and one compiled."""
    return {"eager": Provider(lambda: loss), "torch.compile": compiled(loss)}
