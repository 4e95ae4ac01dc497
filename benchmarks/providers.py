"""Who computes the log-probs of a batch: this library, PyTorch as trainers write it, and the peers.

A provider's `load` imports what it needs and returns a function of a batch; it raises where the
peer is not installed. The log-probs of the prompt are 0. Losses of log-probs go through `composed`.
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
    spends_logits: bool = False  # its backward overwrites them
    backward_only: bool = False  # its forward alone is another provider's
    compiles: bool = False  # its first call takes long, for every new size
    gpu_only: bool = False
    # What its plan must do in forward and backward, if that is more than the operation's least:
    matmuls: int | None = None  # with a trained head
    passes: tuple[int, int] | None = None  # over the rows that count, and over all rows


def upcast(logits: Tensor) -> Tensor:
    """To fp32, as trainers do; the exact logits of a check stay fp64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def eager_logprobs(batch: Batch) -> Tensor:
    """Log-probs as a trainer writes them: logits upcast, log_softmax, gather."""
    logits = batch.hidden @ batch.weight.T if batch.logits is None else batch.logits
    log_p = upcast(logits).log_softmax(-1)
    return log_p.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0] * batch.mask


def compiled(function: Function) -> Provider:
    """Have PyTorch's compiler build the function, for the very shape that it is called with."""

    def load() -> Function:
        # With code of its own, of which the compiler keeps a few compilations: a reset would take
        # them all, this library's too.
        fresh = FunctionType(
            function.__code__.replace(), function.__globals__, function.__name__,
            function.__defaults__, function.__closure__,
        )  # fmt: skip
        return torch.compile(fresh, dynamic=False)

    return Provider(load, compiles=True)


def composed(providers: Mapping[str, Provider], loss: Callable[[Tensor, Batch], Tensor]) -> dict:
    """Providers of a loss of log-probs, from providers of log-probs."""

    def compose(provider: Provider) -> Provider:
        def load() -> Function:
            logprobs = provider.load()
            return lambda batch: loss(logprobs(batch), batch)

        return provider._replace(load=load)

    return {name: compose(provider) for name, provider in providers.items()}


def _live_rows(batch: Batch, logprobs_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Give hidden states and targets of the tokens that count to a function; zeros elsewhere."""
    mask = batch.mask
    logprobs = logprobs_of(batch.hidden[mask], batch.targets[mask])
    return torch.zeros_like(batch.old, dtype=logprobs.dtype).masked_scatter(mask, logprobs)


# From logits.


def _fused(batch: Batch) -> Tensor:
    return fastrlhf.token_logprobs(batch.logits, batch.targets)


def _fused_inplace(batch: Batch) -> Tensor:
    # Through a view, so that a leaf stands for the output of a head.
    logits = batch.logits.view_as(batch.logits)
    return fastrlhf.token_logprobs(logits, batch.targets, inplace_backward=True)


def _load_trl() -> Function:
    from trl.trainer.utils import selective_log_softmax

    # Without a GPU in the dtype of the logits, in which no trainer would add them up.
    return lambda batch: selective_log_softmax(
        batch.logits, batch.targets.clamp(min=0), row_mask=batch.mask
    ).float()


def _load_liger() -> Function:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def logprobs(batch: Batch) -> Tensor:
        rows, targets = batch.logits.flatten(0, 1), batch.targets.flatten()
        losses = liger_cross_entropy(rows, targets, ignore_index=IGNORED, reduction="none")
        # In the dtype of the logits here, too.
        return -losses.float().view_as(batch.targets)

    return logprobs


# Liger's cross-entropy computes its gradient in the forward, in the memory of the logits.
FUSED_LOGPROBS = {
    "fastrlhf": Provider(lambda: _fused),
    "fastrlhf, in place": Provider(lambda: _fused_inplace, spends_logits=True, backward_only=True),
}
PEER_LOGPROBS = {
    "TRL selective_log_softmax": Provider(_load_trl),
    "Liger cross-entropy": Provider(_load_liger, spends_logits=True, gpu_only=True),
}


# From hidden states.


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
    """PyTorch's own, with as many logits at a time as this library holds.

    Its default, a few rows at a time, takes ten times as long at the small sizes of a CPU.
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
    """Load `use`, or say that this PyTorch is too old for it."""

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
    """A loss of hidden states by way of log-probs: this library's, plain PyTorch's, the peers'."""
    ours = composed(FUSED_LINEAR_LOGPROBS, fused)["fastrlhf"]
    return {
        "fastrlhf, by log-probs": ours._replace(backward_only=True),
        **plain(lambda batch: plain_loss(eager_logprobs(batch), batch)),
        **composed(PEER_LINEAR_LOGPROBS, plain_loss),
    }


def plain(loss: Function) -> dict[str, Provider]:
    """The plain PyTorch of an operation, as it is and compiled."""
    return {"eager": Provider(lambda: loss), "torch.compile": compiled(loss)}
