"""The divergence of a model from a teacher, token by token: on-policy distillation.

The teacher's forward runs in the call of the model's head, and the divergence is computed in the
call of the teacher's head within: there both weights are whole, however wrappers shard them.

Dims: B sequences, T tokens.
"""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from fastrlhf.ops.backend import refuse_transforms
from fastrlhf.ops.checks import check_bool
from fastrlhf.ops.divergence import checked_measure
from fastrlhf.ops.scorer import Scorer

from .at_head import IGNORED, at_head
from .head_parts import base_model, head_module
from .model_inputs import TokenBatch
from .scored_divergence import scored_divergence


@overload
def model_kl_divergence(
    model: nn.Module,
    teacher: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    direction: str = "reverse",
    beta: float = 0.5,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    chunk_size: int | None = None,
    impl: str = "auto",
    entropy: Literal[False] = False,
    return_outputs: Literal[False] = False,
    **inputs: Any,
) -> Tensor: ...
@overload
def model_kl_divergence(
    model: nn.Module,
    teacher: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    entropy: Literal[True],
    return_outputs: Literal[False] = False,
    **options: Any,
) -> tuple[Tensor, Tensor]: ...
@overload
def model_kl_divergence(
    model: nn.Module,
    teacher: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    entropy: Literal[False] = False,
    return_outputs: Literal[True],
    **options: Any,
) -> tuple[Tensor, Any]: ...
@overload
def model_kl_divergence(
    model: nn.Module,
    teacher: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    entropy: Literal[True],
    return_outputs: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor, Any]: ...
def model_kl_divergence(
    model: nn.Module,
    teacher: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    direction: str = "reverse",
    beta: float = 0.5,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    chunk_size: int | None = None,
    impl: str = "auto",
    entropy: bool = False,
    return_outputs: bool = False,
    **inputs: Any,
) -> Any:
    """Compute the exact divergence of a model from a teacher at each token.

    Eager equivalent::

        logits, ref_logits = (
            m(input_ids, attention_mask, **inputs).logits[:, :-1] for m in (model, teacher)
        )
        values = kl_divergence(logits, ref_logits, direction=direction, mask=mask[:, 1:], ...)

    Args:
        model: as `model_token_stats`.
        teacher: likewise, of the same vocabulary and on the same device, of whatever width. It is
            not trained: its forward runs without gradients. Where the model's head is tensor
            parallel, its head is cut alike, or whole and not quantized.
        input_ids, attention_mask, mask, cu_seqlens, temperature, chunk_size, impl: as
            `model_token_stats`; with a `chunk_size`, the logits of both are held.
        direction, beta: as `kl_divergence`.
        entropy: return the model's own entropy too, from the same logits, at no matmul more.
        return_outputs: return the model's outputs too, without its logits.
        inputs: what else the forwards of both name.

    Returns:
        (B, T-1) in nats, aligned with input_ids[:, 1:], 0 for tokens that are not scored; fp32
        (fp64 if a model is). With entropy (values, entropies), of which the second are (B, T-1)
        too, and not differentiable; with return_outputs these, and the outputs.

    Differentiable, once, with respect to the parameters of the model.

    Cost, in matmuls G of one head with the scored tokens: 2G without gradients, 3G where the
    model's head is frozen, 4G where it is trained, if backward weighs all values alike, as their
    sum or mean does; for other weights 3G more. To tell, a GPU is awaited once in backward. Memory:
    as `linear_kl_divergence`.

    Raises:
        TypeError, ValueError, RuntimeError: as `model_token_stats` and `kl_divergence`, of either
            model; a teacher of another vocabulary, or that shares its head with the model; in
            backward, values that are weighed differently where the model's head is trained and the
            teacher's is sharded by itself, and so no longer there.

    Source: 2306.13649 (GKD).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1)
        >>> model, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config)
        >>> ids = torch.tensor([[3, 1, 4, 1, 5]])
        >>> divergence = fastrlhf.model_kl_divergence(model, teacher, ids)
        >>> divergence.mean().backward()
        >>> divergence.shape
        torch.Size([1, 4])
    """
    refuse_transforms("model_kl_divergence", "kl_divergence of the models' logits")
    check_bool("entropy", entropy)
    check_bool("return_outputs", return_outputs)
    checked_measure(direction, beta)
    if head_module(base_model(teacher)) is head_module(base_model(model)):
        raise ValueError("teacher: expected another model, got one that shares the model's head")
    batch = TokenBatch(
        input_ids, attention_mask, inputs, mask, cu_seqlens, temperature, chunk_size, impl
    )

    done = at_head(model, batch, _BesideTeacher(teacher, batch, direction, beta, entropy).work)
    results = [done.result[:, :-1]]
    if entropy:
        results.append(done.aside[:, :-1])
    if return_outputs:
        results.append(done.outputs)
    return results[0] if len(results) == 1 else tuple(results)


class _BesideTeacher(NamedTuple):
    """The work at the model's head: run the teacher, and compare the two at the teacher's head."""

    teacher: nn.Module
    batch: TokenBatch
    direction: str
    beta: float
    entropy: bool

    def work(self, ours: Scorer, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the divergence of each token (B, T), and the model's entropy if asked for."""
        comparison = _Comparison(ours, targets != IGNORED, self)
        with torch.no_grad():  # for the teacher's forward
            at_head(self.teacher, self.batch, comparison.work)
        return comparison.divergence, comparison.entropies


class _Comparison:
    """The work at the teacher's head, within that at the model's, which has prepared it."""

    def __init__(self, ours: Scorer, scored: Tensor, asked: _BesideTeacher):
        self.ours, self.scored, self.asked = ours, scored, asked
        self.recorded = torch.is_grad_enabled()
        self.divergence: Tensor
        self.entropies: Tensor | None

    def work(self, theirs: Scorer, _: Tensor) -> tuple[Tensor, None]:
        """Keep the divergence, with its graph, which the teacher's own result does not have."""
        _check_teacher(self.ours, theirs)
        with torch.set_grad_enabled(self.recorded):
            self.divergence, self.entropies = scored_divergence(
                self.ours, theirs, self.scored, direction=self.asked.direction,
                beta=self.asked.beta, entropy=self.asked.entropy,
            )  # fmt: skip
        return self.divergence.detach(), None


def _check_teacher(ours: Scorer, theirs: Scorer) -> None:
    if theirs.vocab != ours.vocab:
        raise ValueError(
            f"teacher: expected a vocabulary of {ours.vocab}, that of the model, got {theirs.vocab}"
        )
    if theirs.hidden.device != ours.hidden.device:
        raise ValueError(
            f"teacher: expected its head on {ours.hidden.device}, where that of the model is, got "
            f"{theirs.hidden.device}"
        )
