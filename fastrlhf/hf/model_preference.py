"""Preference losses of a causal language model, of pairs and of single sequences, computed inside
its own forward.

The arguments of a loss, all but the log-probs of the tokens, are one object: the one that
`linear_dpo_loss` and `linear_kto_loss` make too (`PairLoss`, `UnpairedLoss`). It is checked before
the model runs, and `at_head` has it computed where the model would make its logits.

Dims: B sequences, T tokens, P pairs.
"""

from functools import partial
from typing import Any, Literal, cast, overload

from torch import Tensor, nn

from fastrlhf.losses.arguments import check_pair_indices
from fastrlhf.losses.fused_sequences import SequenceLoss, sequence_loss_of
from fastrlhf.losses.linear_preference import (
    LINEAR_DPO_DEFAULTS,
    LinearDPOOptions,
    LinearPairOptions,
    PairLoss,
)
from fastrlhf.losses.linear_unpaired import KTO_DEFAULTS, KTOOptions, UnpairedLoss
from fastrlhf.losses.signatures import showing
from fastrlhf.ops.checks import check_mask
from fastrlhf.ops.kept_ids import Support
from fastrlhf.ops.layout import layout_of
from fastrlhf.ops.scorer import Scorer

from .at_head import IGNORED, at_head
from .loss_arguments import separated
from .model_inputs import TokenBatch, check_ids, of_positions


@overload
def model_dpo_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    ref_logps: Tensor | None,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float = 0.1,
    *,
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    return_outputs: Literal[False] = False,
    **options_and_inputs: Any,
) -> tuple[Tensor, Tensor]: ...
@overload
def model_dpo_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    ref_logps: Tensor | None,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float = 0.1,
    *,
    mask: Tensor,
    return_outputs: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor, Any]: ...
@showing(LinearDPOOptions, LINEAR_DPO_DEFAULTS, and_others=True)
def model_dpo_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    ref_logps: Tensor | None,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float = 0.1,
    *,
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    return_outputs: bool = False,
    **options_and_inputs: Any,
) -> tuple[Any, ...]:
    """Compute `dpo_loss`, or a reference-free loss, of a model.

    Eager equivalent::

        logprobs = model_token_stats(model, input_ids, attention_mask, mask=mask).logprob
        losses, rewards = dpo_loss(
            logprobs, ref_logps, yw_idxs, yl_idxs, beta, mask=mask[:, 1:], ...
        )

    Args:
        model, input_ids, attention_mask, cu_seqlens, temperature, support, rows, chunk_size, impl:
            as `model_token_stats`; chosen and rejected sequences in one batch, in any
            order. With rows, a row of input_ids is still one sequence.
        ref_logps: (B,) log-probs of whole sequences under the reference model, in nats, or
            (B, T-1) of their tokens, as `model_token_stats` returns them; None for the
            reference-free types.
        yw_idxs, yl_idxs: (P,) integer indices of the preferred and the other sequences.
        beta: as `linear_dpo_loss`.
        mask: (B, T) bool or 0/1, the tokens of the answers.
        return_outputs: return the model's outputs too, without its logits.
        **options_and_inputs: the options of `linear_dpo_loss` (loss_type, loss_weights,
            label_smoothing, ...); and what else the model's forward names.

    Returns:
        (losses, rewards), with return_outputs (losses, rewards, outputs). losses (P,), not reduced,
        and rewards (B,), detached; fp32 (fp64 for fp64 hidden states).

    Differentiable with respect to all parameters and ref_logps. Cost, in matmuls G of the tokens of
    the mask: G without gradients, 2G where the head is frozen, 3G where it is trained; then, and
    for losses that sort over the batch, as `linear_dpo_loss` says.

    Raises:
        TypeError, ValueError, RuntimeError: as `model_token_stats` and `linear_dpo_loss`.

    Source: as `dpo_loss`, `simpo_loss`, `cpo_loss` and `orpo_loss`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1))
        >>> ids = torch.tensor([[3, 1, 4, 1, 5], [3, 1, 8, 2, 6]])  # chosen, rejected
        >>> mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 1]])
        >>> ref_logps, pair = torch.tensor([-10.0, -10.0]), (torch.tensor([0]), torch.tensor([1]))
        >>> losses, rewards = fastrlhf.model_dpo_loss(model, ids, None, ref_logps, *pair, mask=mask)
        >>> losses.mean().backward()
        >>> losses.shape, rewards.shape
        (torch.Size([1]), torch.Size([2]))
    """
    check_ids(input_ids)
    check_mask("mask", mask)
    layout = layout_of("input_ids", input_ids, cu_seqlens)
    check_pair_indices("input_ids", input_ids, yw_idxs, yl_idxs, layout)
    if isinstance(ref_logps, Tensor) and ref_logps.ndim == 2:
        ref_logps = of_positions("ref_logps", ref_logps, input_ids)
    known = tuple(LinearDPOOptions.__annotations__)
    given, inputs = separated(options_and_inputs, known)
    options = LinearPairOptions.parse("model_dpo_loss", given)
    # Before the forward, so that what is wrong is found before any work is done.
    loss = PairLoss(options, ref_logps, yw_idxs, yl_idxs, beta, layout, impl).checked()
    batch = TokenBatch(
        input_ids, attention_mask, inputs, mask, cu_seqlens, temperature, chunk_size, impl,
        support, rows, known,
    )  # fmt: skip
    return at_head(model, batch, partial(_work, loss)).with_outputs(return_outputs)


@overload
def model_kto_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | float | None,
    beta: float = 0.1,
    *,
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    return_outputs: Literal[False] = False,
    **options_and_inputs: Any,
) -> tuple[Tensor, Tensor]: ...
@overload
def model_kto_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | float | None,
    beta: float = 0.1,
    *,
    mask: Tensor,
    return_outputs: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor, Any]: ...
@showing(KTOOptions, KTO_DEFAULTS, and_others=True)
def model_kto_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | float | None,
    beta: float = 0.1,
    *,
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    return_outputs: bool = False,
    **options_and_inputs: Any,
) -> tuple[Any, ...]:
    """Compute `kto_loss` of a model.

    Eager equivalent::

        logprobs = model_token_stats(model, input_ids, attention_mask, mask=mask).logprob
        logps = sequence_logprobs(logprobs, mask[:, 1:])
        losses, rewards = kto_loss(logps, ref_logps, desirable, kl, beta, ...)

    Args:
        model, input_ids, attention_mask, cu_seqlens, temperature, support, rows, chunk_size, impl:
            as `model_token_stats`. With rows, a row of input_ids is still one sequence.
        ref_logps: (B,) log-probs of whole sequences under the reference model, in nats.
        desirable, kl, beta: as `kto_loss`; `kto_kl` makes kl from the log-probs of completions of
            other prompts, which `model_token_stats` computes without gradients.
        mask: (B, T) bool or 0/1, the tokens of the answers.
        return_outputs: return the model's outputs too, without its logits.
        **options_and_inputs: loss_type, desirable_weight and undesirable_weight of `kto_loss`; and
            what else the model's forward names.

    Returns:
        (losses, rewards), with return_outputs (losses, rewards, outputs). losses (B,), not reduced,
        and rewards (B,), detached; fp32 (fp64 for fp64 hidden states).

    Differentiable with respect to all parameters and ref_logps. Cost, in matmuls G of the tokens of
    the mask: G without gradients, 2G where the head is frozen, 3G where it is trained; then, as
    `linear_kto_loss` says.

    Raises:
        TypeError, ValueError, RuntimeError: as `model_token_stats` and `linear_kto_loss`.

    Source: as `kto_loss`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1))
        >>> ids = torch.tensor([[3, 1, 4, 1, 5], [3, 1, 8, 2, 6]])
        >>> mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 1]])
        >>> ref_logps, desirable = torch.tensor([-10.0, -10.0]), torch.tensor([True, False])
        >>> batch = ids, None, ref_logps, desirable
        >>> losses, rewards = fastrlhf.model_kto_loss(model, *batch, kl=0.0, mask=mask)
        >>> losses.mean().backward()
        >>> losses.shape
        torch.Size([2])
    """
    check_ids(input_ids)
    check_mask("mask", mask)
    layout = layout_of("input_ids", input_ids, cu_seqlens)
    known = tuple(KTOOptions.__annotations__)
    given, inputs = separated(options_and_inputs, known)
    options = cast(KTOOptions, given)
    loss = UnpairedLoss(ref_logps, desirable, kl, beta, layout, options).checked(input_ids)
    batch = TokenBatch(
        input_ids, attention_mask, inputs, mask, cu_seqlens, temperature, chunk_size, impl,
        support, rows, known,
    )  # fmt: skip
    return at_head(model, batch, partial(_work, loss)).with_outputs(return_outputs)


def _work(loss: SequenceLoss, scorer: Scorer, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a loss of sequences at the head, which may be on another device than the ids."""
    return sequence_loss_of(scorer, targets, loss.on_device_of(targets), ignore_index=IGNORED)
