"""Losses of a causal language model, computed inside its own forward.

Where the model would make its logits, the loss and its gradient are made instead: see `at_head`.

Dims: B sequences, T tokens, P pairs.
"""

from typing import Any, Literal, overload

from torch import Tensor, nn

from fastrlhf.losses.arguments import check_pair_indices
from fastrlhf.losses.cross_entropy import summed_cross_entropy
from fastrlhf.losses.cross_entropy_options import CrossEntropy, LossType, mean_of
from fastrlhf.losses.fused_policy import policy_loss_of
from fastrlhf.losses.fused_sequences import sequence_loss_of
from fastrlhf.losses.linear_preference import (
    LINEAR_DPO_DEFAULTS,
    LinearDPOOptions,
    LinearOptions,
    pair_loss,
)
from fastrlhf.losses.policy_arguments import (
    PER_SEQUENCE,
    PolicyLossOptions,
    PolicyOptions,
    policy_batch,
)
from fastrlhf.losses.reduce import check_reduction
from fastrlhf.losses.signatures import showing
from fastrlhf.ops.backend import refuse_transforms
from fastrlhf.ops.checks import check_bool, check_mask, check_real
from fastrlhf.ops.kept_ids import Support
from fastrlhf.ops.layout import layout_of
from fastrlhf.ops.linear_loss import LossFunction
from fastrlhf.ops.scorer import Scorer

from .at_head import IGNORED, at_head
from .loss_arguments import beside, returned, separated
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
    ids = None if groups is None else of_positions("groups", groups, input_ids)

    def work(scorer: Scorer, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        here, *of_tokens = beside(targets, ids, *sides)
        return scorer.loss(
            loss_fn, targets, *of_tokens, ignore_index=IGNORED, groups=here, entropy=entropy
        )

    batch = TokenBatch(
        input_ids, attention_mask, inputs, mask, cu_seqlens, temperature, chunk_size, impl,
        support, rows,
    )  # fmt: skip
    return returned(at_head(model, batch, work), return_outputs)


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
        (here,) = beside(targets, weights)
        total, found = summed_cross_entropy(scorer, targets, options, here, ignore_index=IGNORED)
        tokens = (targets != IGNORED).sum().clamp(min=1)
        nothing = total.detach().new_zeros(())
        metrics = {name: found.get(name, nothing).sum() / tokens for name in ("nll", "z_loss")}
        metrics["tokens"] = (targets != IGNORED).sum()
        return mean_of(total, targets != IGNORED, normalizer), metrics

    batch = TokenBatch(
        input_ids, attention_mask, inputs, mask, cu_seqlens, temperature, chunk_size, impl,
        support, rows,
    )  # fmt: skip
    return returned(at_head(model, batch, work), return_outputs)


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
    options = LinearOptions.parse("model_dpo_loss", given)
    # Here too, so that what is wrong with the options is found before the forward.
    pair_loss(options, ref_logps, yw_idxs, yl_idxs, beta, layout, impl)

    def work(scorer: Scorer, targets: Tensor) -> tuple[Tensor, Tensor]:
        ref, chosen, rejected, borders = beside(targets, ref_logps, yw_idxs, yl_idxs, cu_seqlens)
        layout = layout_of("input_ids", targets, borders)
        loss = pair_loss(options, ref, chosen, rejected, beta, layout, impl)
        return sequence_loss_of(scorer, targets, loss, ignore_index=IGNORED)

    batch = TokenBatch(
        input_ids, attention_mask, inputs, mask, cu_seqlens, temperature, chunk_size, impl,
        support, rows, known,
    )  # fmt: skip
    return returned(at_head(model, batch, work), return_outputs)


@overload
def model_policy_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor,
    ref_logprobs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    entropy: bool = False,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    return_outputs: Literal[False] = False,
    **policy_options_and_inputs: Any,
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def model_policy_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor,
    return_outputs: Literal[True],
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor], Any]: ...
@showing(PolicyLossOptions, PolicyOptions()._asdict(), and_others=True)
def model_policy_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor,
    ref_logprobs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    entropy: bool = False,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    return_outputs: bool = False,
    **policy_options_and_inputs: Any,
) -> tuple[Any, ...]:
    """Compute `policy_loss` (PPO, GRPO and relatives) of a model.

    Eager equivalent::

        stats = model_token_stats(model, input_ids, attention_mask, mask=mask, entropy=True)
        loss, metrics = policy_loss(
            stats.logprob, old_logprobs, advantages, mask[:, 1:], entropy=stats.entropy, ...
        )

    Args:
        model, input_ids, attention_mask, cu_seqlens, temperature, support, rows, chunk_size, impl:
            as `model_token_stats`. With packed sequences, what is (B, T) is (1, N). With rows, a
            token of a tree counts once, and a row of input_ids is one sequence: give advantages
            (B, T-1), for a token of several branches the sum of theirs, and as normalizer the
            number of tokens of all branches. A loss of each branch (a ratio of sequences, a KL that
            counts a token in each of its branches) is `linear_policy_loss` on the hidden states of
            `head_inputs`, with rows (branches, T).
        old_logprobs: (B, T-1), aligned with input_ids[:, 1:], as `model_token_stats` returns
            them; None for the policy itself (ratio 1).
        advantages: (B,) one for each sequence, or (B, T-1).
        mask: (B, T) bool or 0/1, the tokens that were sampled.
        ref_logprobs: (B, T-1), see `policy_loss`.
        rollout_weights, kl_weights: (B,), (B, 1) or (B, T-1), see `policy_loss`.
        entropy: report the mean entropy, as a metric; an entropy_coef does so anyway.
        return_outputs: return the model's outputs too, without its logits.
        **policy_options_and_inputs: the options of `policy_loss`, or `**grpo_options(...)`; and
            what else the model's forward names.

    Returns:
        (loss, metrics), as `policy_loss`, for reduction "none" with losses (B, T-1); with
        return_outputs (loss, metrics, outputs).

    Differentiable, once, with respect to all parameters. Cost, in matmuls G of the tokens of the
    mask (without those that have no advantage, unless there is a reference or an entropy to look
    at): G without gradients, 2G where the head is frozen, 3G where it is trained.

    Raises:
        TypeError, ValueError, RuntimeError: as `model_token_stats` and `policy_loss`; rows with a
            ratio, or an off-policy mask, of sequences.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1))
        >>> ids, mask = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[0, 0, 1, 1, 1]])
        >>> old = fastrlhf.model_token_stats(model, ids, mask=mask).logprob.detach()
        >>> advantages = torch.tensor([1.0])
        >>> loss, metrics = fastrlhf.model_policy_loss(model, ids, None, old, advantages, mask=mask)
        >>> loss.backward()
        >>> round(loss.item(), 3), metrics["clip_ratio/region_mean"]
        (-1.0, tensor(0.))
    """
    known = PolicyOptions._fields
    given, inputs = separated(policy_options_and_inputs, known)
    options = PolicyOptions(**given).checked()
    check_bool("entropy", entropy)
    check_ids(input_ids)
    check_mask("mask", mask)
    if rows is not None and options.needs_sequences:
        raise ValueError(
            "rows: expected None for a ratio of sequences, of which a tree has several; use "
            "linear_policy_loss on the hidden states, with rows of each sequence"
        )
    tokens = {
        "old_logprobs": old_logprobs, "advantages": advantages, "ref_logprobs": ref_logprobs,
        "rollout_weights": rollout_weights, "kl_weights": kl_weights,
    }  # fmt: skip
    sequences = layout_of("input_ids", input_ids, cu_seqlens).sequences(input_ids)
    for name, x in tokens.items():
        shapes = ((sequences,), (sequences, 1)) if name in PER_SEQUENCE else ()
        if x is not None and getattr(x, "shape", None) not in shapes:
            tokens[name] = of_positions(name, x, input_ids)
    with_entropy = entropy or options.entropy_coef != 0

    def work(scorer: Scorer, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        *of_tokens, borders = beside(targets, *tokens.values(), cu_seqlens)
        batch = policy_batch(
            options, scorer.hidden.dtype, targets != IGNORED, *of_tokens,
            with_entropy=with_entropy, layout=layout_of("input_ids", targets, borders),
        )  # fmt: skip
        return policy_loss_of(scorer, targets, batch, options, with_entropy=with_entropy)

    batch = TokenBatch(
        input_ids, attention_mask, inputs, mask, cu_seqlens, temperature, chunk_size, impl,
        support, rows, known,
    )  # fmt: skip
    done = at_head(model, batch, work)
    if options.reduction == "none":  # the last position predicts no token
        done = done._replace(result=done.result[:, :-1])
    return returned(done, return_outputs)
