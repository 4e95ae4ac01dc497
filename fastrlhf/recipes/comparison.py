"""Compare the fused log-probs and DPO loss with those of plain PyTorch, as trainers write them.

Both start from the same hidden states. The recipe `dpo` shows their values, gradients and memory at
its end; `curves` draws the memory of the log-probs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from rich.table import Table
from torch import Tensor

from fastrlhf import (
    LMHead,
    head_inputs,
    linear_dpo_loss,
    linear_token_logprobs,
    shift_targets,
)
from fastrlhf.reference import capped_logits

from .memory import peak_memory
from .preference import Batch
from .sampling import Sample, padded

_MIB = 2**20
LossFunction = Callable[[Tensor, LMHead, Batch, Tensor, float, float], Tensor]


class Comparison(NamedTuple):
    """Values of both losses, their largest differences, and the bytes held beyond the inputs."""

    shape: tuple[int, ...]  # of the hidden states: (B, T, H)
    vocabulary: int
    dtype: str
    fused_loss: float
    plain_loss: float
    loss_difference: float
    fused_gradient: float  # the largest |d loss / d hidden|
    plain_gradient: float
    gradient_difference: float  # the largest absolute difference of the two
    logits_bytes: int  # size of the logits (B, T, V), which the fused loss does not build
    fused_bytes: int
    plain_bytes: int

    def table(self) -> Table:
        """Make a table of both losses, their differences and their memory."""
        size = (
            f"Loss and gradient from {self.dtype} hidden states {self.shape},\n"
            f"whose logits over {self.vocabulary} tokens take "
            f"{self.logits_bytes / _MIB:.1f} MiB"
        )
        table = Table("", "fused", "plain", "", title=size)
        table.add_row(
            "DPO loss",
            f"{self.fused_loss:.7f}",
            f"{self.plain_loss:.7f}",
            f"difference {self.loss_difference:.1e}",
        )
        table.add_row(
            "largest gradient",
            f"{self.fused_gradient:.3e}",
            f"{self.plain_gradient:.3e}",
            f"largest difference {self.gradient_difference:.1e}",
        )
        table.add_row(
            "peak memory",
            f"{self.fused_bytes / _MIB:.1f} MiB",
            f"{self.plain_bytes / _MIB:.1f} MiB",
            f"{self.plain_bytes / self.fused_bytes:.2f} times less",
        )
        return table


def fused_loss(
    hidden: Tensor, head: LMHead, batch: Batch, reference: Tensor, beta: float, temperature: float
) -> Tensor:
    """Compute the mean DPO loss with the operations of this package."""
    targets = shift_targets(batch.input_ids, batch.completion_mask)
    losses, _ = linear_dpo_loss(
        hidden, head.weight, targets, reference, batch.chosen, batch.rejected, beta,
        temperature=temperature, **head.options(),
    )  # fmt: skip
    return losses.mean()


def plain_loss(
    hidden: Tensor, head: LMHead, batch: Batch, reference: Tensor, beta: float, temperature: float
) -> Tensor:
    """Compute the mean DPO loss in plain PyTorch, as trainers write it."""
    logits = plain_logits(hidden[:, :-1], head) / temperature
    log_p = logits.float().log_softmax(-1)
    logprobs = log_p.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    log_ratios = (logprobs * batch.scored).sum(-1) - reference
    margins = log_ratios[batch.chosen] - log_ratios[batch.rejected]
    return -F.logsigmoid(beta * margins).mean()


def plain_logits(hidden: Tensor, head: LMHead) -> Tensor:
    """Compute the logits from the hidden states, as the model's own forward does."""
    weight = head.weight[0 : head.weight.shape[0]]
    return capped_logits(F.linear(hidden, weight, head.bias), head.softcap, head.scale)


def compare(
    model: PeftModel, batch: Batch, reference: Tensor, beta: float, temperature: float = 1.0
) -> Comparison:
    """Run both losses forward and backward from the same hidden states, and measure their values,
    gradients and memory.
    """
    with torch.no_grad():
        hidden, head = head_inputs(model, batch.input_ids, batch.attention_mask)

    def measure(loss_fn: LossFunction) -> tuple[float, Tensor, int]:
        leaf = hidden.clone().requires_grad_()
        work = partial(_forward_backward, loss_fn, leaf, head, batch, reference, beta, temperature)
        (loss, gradient), peak = peak_memory(work, hidden.device)
        return loss, gradient, peak

    # The first runs do not count: they also allocate workspaces and compile kernels.
    measure(fused_loss)
    measure(plain_loss)
    fused, fused_gradient, fused_bytes = measure(fused_loss)
    plain, plain_gradient, plain_bytes = measure(plain_loss)
    vocabulary = head.weight.shape[0]
    return Comparison(
        shape=tuple(hidden.shape),
        vocabulary=vocabulary,
        dtype=str(hidden.dtype).removeprefix("torch."),
        fused_loss=fused,
        plain_loss=plain,
        loss_difference=abs(fused - plain),
        fused_gradient=fused_gradient.abs().max().item(),
        plain_gradient=plain_gradient.abs().max().item(),
        gradient_difference=(fused_gradient - plain_gradient).abs().max().item(),
        logits_bytes=hidden.shape[:-1].numel() * vocabulary * hidden.element_size(),
        fused_bytes=fused_bytes,
        plain_bytes=plain_bytes,
    )


def _forward_backward(
    loss_fn: LossFunction,
    hidden: Tensor,
    head: LMHead,
    batch: Batch,
    reference: Tensor,
    beta: float,
    temperature: float,
) -> tuple[float, Tensor]:
    loss = loss_fn(hidden, head, batch, reference, beta, temperature)
    loss.backward()
    assert hidden.grad is not None
    return loss.item(), hidden.grad


class LogprobMemory(NamedTuple):
    """Peak bytes of computing log-probs and their gradient from hidden states.

    The hidden states themselves are not counted.
    """

    tokens: int  # positions of the batch, including prompts and padding
    fused_bytes: int
    plain_bytes: int


def logprob_memory(
    policy: PeftModel, samples: Sequence[Sample], pad_token_id: int
) -> LogprobMemory:
    """Measure the memory of log-probs of a few completions, fused and in plain PyTorch."""
    ids, attention, completion = padded(samples, pad_token_id)
    targets = shift_targets(ids, completion)
    with torch.no_grad():
        hidden, head = head_inputs(policy, ids, attention)

    def fused(leaf: Tensor) -> Tensor:
        return linear_token_logprobs(leaf, head.weight, targets, **head.options())

    def plain(leaf: Tensor) -> Tensor:
        log_p = plain_logits(leaf, head).float().log_softmax(-1)
        return log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)

    def peak(logprobs: Callable[[Tensor], Tensor]) -> int:
        leaf = hidden.clone().requires_grad_()
        work = partial(_sum_backward, logprobs, leaf)
        work()  # not measured: the first run also allocates workspaces and compiles kernels
        return peak_memory(work, hidden.device)[1]

    return LogprobMemory(targets.numel(), peak(fused), peak(plain))


def _sum_backward(logprobs: Callable[[Tensor], Tensor], leaf: Tensor) -> None:
    logprobs(leaf).sum().backward()
