"""A loss of one's own, and that of supervised fine-tuning, of a causal language model.

Like all losses of models they are computed inside the model's own forward: where the model would
make its logits, the loss and its gradient are made instead. A loss says here what that work is, and
`at_head` does it at the head. Preference losses are in `model_preference.py`, policy losses in
`model_policy.py`, and the divergence from a teacher in `model_divergence.py`.

Dims: B sequences, T tokens.
"""

from typing import Any, Literal, overload

from torch import Tensor, nn

from fastrlhf.losses.cross_entropy import summed_cross_entropy
from fastrlhf.losses.cross_entropy_options import CrossEntropy, LossType, mean_of
from fastrlhf.losses.reduce import check_reduction
from fastrlhf.ops.backend import refuse_transforms
from fastrlhf.ops.checks import check_bool, check_real
from fastrlhf.ops.kept_ids import Support
from fastrlhf.ops.linear_loss import LossFunction
from fastrlhf.ops.scorer import Scorer

from .at_head import IGNORED, at_head
from .loss_arguments import on_device_of
from .model_inputs import TokenBatch, check_ids, of_positions


@overload
def model_linear_loss(
    loss_fn: LossFunction,
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *side_inputs: Tensor,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    return_outputs: Literal[False] = False,
    **inputs: Any,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def model_linear_loss(
    loss_fn: LossFunction,
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *side_inputs: Tensor,
    return_outputs: Literal[True],
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor], Any]: ...
def model_linear_loss(
    loss_fn: LossFunction,
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *side_inputs: Tensor,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    return_outputs: bool = False,
    **inputs: Any,
) -> tuple[Any, ...]:
    """Compute a loss of one's own on the tokens of a model, and its gradient with it.

    Eager equivalent, where one chunk holds all tokens::

        stats = model_token_stats(model, input_ids, attention_mask, mask=mask, ...)  # (B, T-1)
        scored = mask[:, 1:] != 0
        loss, aux = loss_fn(
            ChunkStats(stats.logprob[scored], ...), *(x[scored] for x in side_inputs)
        )

    Args:
        loss_fn: as `linear_loss`, where it is explained; called once for each chunk of the scored
            tokens, and for all of them once more where the model is run once more (see
            `model_token_stats`).
        model, input_ids, attention_mask, mask, cu_seqlens, temperature, entropy, support, rows,
            chunk_size, impl, inputs: as `model_token_stats`.
        side_inputs: (B, T-1) tensors, aligned with input_ids[:, 1:], cut like the tokens.
        groups: (B, T-1) integer ids of tokens that loss_fn must see together; see `linear_loss`.
        return_outputs: return the model's outputs too, without its logits.

    Returns:
        (loss, aux), as `linear_loss`; with return_outputs (loss, aux, outputs).

    Differentiable, once, with respect to all parameters, side inputs and what else loss_fn uses.

    Cost, in matmuls G of the scored tokens: G without gradients, 2G where the head is frozen, 3G
    where it is trained. The gradient of the head is made in its own call, so that its weight is
    never needed after it, and a wrapper that shards it need not bring it back.

    Raises:
        TypeError, ValueError, RuntimeError: as `model_token_stats` and `linear_loss`.

    Source: as `linear_loss`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1))
        >>> ids, weights = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[1.0, 1.0, 0.5, 0.5]])
        >>> def loss_fn(stats, weights):
        ...     return -(stats.logprob * weights).sum(), {"weights": weights.sum()}
        >>> loss, metrics = fastrlhf.model_linear_loss(loss_fn, model, ids, None, weights)
        >>> loss.backward()
        >>> metrics
        {'weights': tensor(3.)}
    """
    refuse_transforms("model_linear_loss", "model_token_stats and a loss of it")
    check_bool("entropy", entropy)
    check_ids(input_ids)
    sides = [
        of_positions(f"side_inputs[{i}]", x, input_ids) for i, x in enumerate(side_inputs)
    ]  # fmt: skip
    group_ids = None if groups is None else of_positions("groups", groups, input_ids)

    def work(scorer: Scorer, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        group_ids_there, *sides_there = on_device_of(targets, group_ids, *sides)
        return scorer.loss(
            loss_fn, targets, *sides_there, ignore_index=IGNORED, groups=group_ids_there,
            entropy=entropy,
        )  # fmt: skip

    batch = TokenBatch(
        input_ids, attention_mask, inputs, mask, cu_seqlens, temperature, chunk_size, impl,
        support, rows,
    )  # fmt: skip
    return at_head(model, batch, work).with_outputs(return_outputs)


@overload
def model_cross_entropy(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_type: LossType = "nll",
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    return_outputs: Literal[False] = False,
    **inputs: Any,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def model_cross_entropy(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    return_outputs: Literal[True],
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor], Any]: ...
def model_cross_entropy(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_type: LossType = "nll",
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    return_outputs: bool = False,
    **inputs: Any,
) -> tuple[Any, ...]:
    """Compute the loss of supervised fine-tuning. Its other name is `sft_loss`.

    Eager equivalent::

        logits = model(input_ids, attention_mask, **inputs).logits[:, :-1].float()
        targets = input_ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        loss = cross_entropy(logits, targets, ...)

    Args:
        model, input_ids, attention_mask, cu_seqlens, temperature, support, rows, chunk_size, impl,
            inputs: as `model_token_stats`.
        mask: (B, T) bool or 0/1, the tokens to learn: those of the answer, not of the prompt. None:
            all that attention_mask has, and that follow one that it has.
        label_smoothing, z_loss, loss_type: as `cross_entropy`.
        weights: (B, T-1), of the tokens input_ids[:, 1:], see `cross_entropy`; the mean is by the
            number of tokens, whatever their weights are.
        normalizer: positive number, or 0-d tensor (whose value is not checked), that replaces the
            number of tokens: that of the global batch, where it is spread over steps or devices
            (the Trainer's num_items_in_batch).
        return_outputs: return the model's outputs too, without its logits.

    Returns:
        (loss, metrics), with return_outputs (loss, metrics, outputs). loss: 0-d, fp32 (fp64 for
        fp64 hidden states). metrics: detached 0-d tensors "nll", the mean over the tokens in nats
        without smoothing, z-loss and weights (and without p, for "dft"), "z_loss", its mean without
        weights, and "tokens", how many there are. Without any token the loss is 0.

    Differentiable, once, with respect to all parameters. Cost: as `model_linear_loss`; label
    smoothing as in `linear_cross_entropy`.

    Raises:
        TypeError, ValueError, RuntimeError: as `model_token_stats`; an option out of range.

    Source: as `cross_entropy`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1))
        >>> ids = torch.tensor([[3, 1, 4, 1, 5]])
        >>> answer = torch.tensor([[0, 0, 1, 1, 1]])
        >>> loss, metrics = fastrlhf.sft_loss(model, ids, mask=answer)
        >>> loss.backward()
        >>> metrics["tokens"]
        tensor(3)
    """
    refuse_transforms("model_cross_entropy", "model_token_stats")
    options = CrossEntropy(label_smoothing, z_loss, loss_type).checked()
    normalizer = check_reduction("token-mean", normalizer)
    check_ids(input_ids)
    if weights is not None:
        check_real("weights", weights)
        weights = of_positions("weights", weights, input_ids)

    def work(scorer: Scorer, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        (weights_there,) = on_device_of(targets, weights)
        total, sums = summed_cross_entropy(
            scorer, targets, options, weights_there, ignore_index=IGNORED
        )
        scored = targets != IGNORED
        return mean_of(total, scored, normalizer), _token_means(sums, total, scored)

    batch = TokenBatch(
        input_ids, attention_mask, inputs, mask, cu_seqlens, temperature, chunk_size, impl,
        support, rows,
    )  # fmt: skip
    return at_head(model, batch, work).with_outputs(return_outputs)


def _token_means(values: dict[str, Tensor], total: Tensor, scored: Tensor) -> dict[str, Tensor]:
    """Make metrics of the values of scored tokens: their means, 0 where there are none, and the
    number of tokens.
    """
    tokens, zero = scored.sum(), total.detach().new_zeros(())
    metrics = {
        name: values.get(name, zero).sum() / tokens.clamp(min=1) for name in ("nll", "z_loss")
    }
    return {**metrics, "tokens": tokens}
