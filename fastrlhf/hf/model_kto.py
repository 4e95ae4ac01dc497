"""KTO of a causal language model, computed inside its own forward: see `at_head`.

Dims: B sequences, T tokens.
"""

from typing import Any, Literal, cast, overload

from torch import Tensor, nn

from fastrlhf.losses.fused_sequences import sequence_loss_of
from fastrlhf.losses.linear_unpaired import KTO_DEFAULTS, KTOOptions, unpaired_loss
from fastrlhf.losses.signatures import showing
from fastrlhf.ops.checks import check_mask
from fastrlhf.ops.kept_ids import Support
from fastrlhf.ops.layout import layout_of
from fastrlhf.ops.scorer import Scorer

from .at_head import IGNORED, at_head
from .loss_arguments import beside, returned, separated
from .model_inputs import TokenBatch, check_ids


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
    # Here too, so that what is wrong with the options is found before the forward.
    unpaired_loss(input_ids, ref_logps, desirable, kl, beta, layout, options)
    of_tensor = kl if isinstance(kl, Tensor) else None

    def work(scorer: Scorer, targets: Tensor) -> tuple[Tensor, Tensor]:
        ref, labels, moved, borders = beside(targets, ref_logps, desirable, of_tensor, cu_seqlens)
        layout, baseline = layout_of("input_ids", targets, borders), kl if moved is None else moved
        loss = unpaired_loss(targets, ref, labels, baseline, beta, layout, options)
        return sequence_loss_of(scorer, targets, loss, ignore_index=IGNORED)

    batch = TokenBatch(
        input_ids, attention_mask, inputs, mask, cu_seqlens, temperature, chunk_size, impl,
        support, rows, known,
    )  # fmt: skip
    return returned(at_head(model, batch, work), return_outputs)
