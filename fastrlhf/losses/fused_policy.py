"""The policy losses from logits, in one launch, and from hidden states, at the fewest matmuls.

The arguments are checked as those of `policy_loss` are, by `policy_options.py` and
`policy_arguments.py`, and the formulas are its own, in `policy.py`. From logits, on a GPU, the
kernel computes loss and gradient at once through the operation `fastrlhf.ops.policy_loss`, which is
called `policy_kernel` here. From hidden states, `policy_loss_of` hands the loss of a chunk of
tokens to whatever scores tokens by a head (`fastrlhf.ops.scorer`); `model_policy_loss` takes that
way too, in a model's own forward.

Dims: B sequences, T tokens, H hidden, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_like
from fastrlhf.losses.policy import Metrics, loss_and_metrics, policy_metrics, token_losses
from fastrlhf.losses.policy_arguments import PolicyBatch, PolicyTensors, policy_batch
from fastrlhf.losses.policy_options import (
    OPTIONAL_TOKEN_TENSORS,
    PolicyLossOptions,
    PolicyOptions,
    PolicyOptionsAndTensors,
)
from fastrlhf.losses.segments import segment_sums
from fastrlhf.losses.signatures import showing
from fastrlhf.ops import ChunkStats, PolicyFormula, PolicyTokens, Weight, token_stats
from fastrlhf.ops import policy_loss as policy_kernel
from fastrlhf.ops.backend import check_impl, is_batched, under_transform, use_triton
from fastrlhf.ops.checks import (
    check_bool,
    check_indices_on_host,
    check_integer,
    check_mask,
)
from fastrlhf.ops.kept_ids import Support
from fastrlhf.ops.keywords import Unpack
from fastrlhf.ops.layout import layout_of
from fastrlhf.ops.logits_arguments import checked_logits
from fastrlhf.ops.ranks import Group
from fastrlhf.ops.scorer import Scorer, laid_out, linear_scorer
from fastrlhf.ops.sharded import is_dtensor, replicated
from fastrlhf.ops.targets import MASKED_OUT
from fastrlhf.ops.tracing import being_traced
from fastrlhf.ops.transform import temperatures_of_layout


@showing(PolicyLossOptions, PolicyOptions()._asdict())
def logits_policy_loss(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    entropy: bool = False,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    inplace_backward: bool = False,
    support: Support | None = None,
    impl: str = "auto",
    group: Group | None = None,
    **policy_options: Unpack[PolicyLossOptions],
) -> tuple[Tensor, Metrics]:
    """Compute `policy_loss` and its gradient from logits, in one launch.

    Eager equivalent::

        stats = token_stats(logits, targets, entropy=True, ...)
        loss, metrics = policy_loss(
            stats.logprob, old_logprobs, advantages, mask, entropy=stats.entropy, ...
        )

    Args:
        logits: (B, T, V) bf16, fp16, fp32 or fp64, any strides.
        targets: (B, T) integer, the tokens that were sampled, aligned with the logits that predict
            them: `shift_targets(input_ids, completion_mask)` and the mask `targets != -100`, or
            logits[:, :-1], input_ids[:, 1:] and completion_mask[:, 1:]. Outside of the mask they
            can hold anything.
        old_logprobs, advantages, mask, ref_logprobs, rollout_weights, kl_weights: as `policy_loss`.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last. With
            them, what is (B, T) is (N,) or (1, N), and logits are (N, V) or (1, N, V).
        entropy: report the mean entropy, as a metric; an entropy_coef does so anyway.
        temperature, softcap, scale, support, impl, group: as `token_stats`, with a vocabulary that
            ranks share, or logits that are a DTensor; the loss is the same on every rank.
        inplace_backward: let the gradient overwrite the logits, where their memory does not overlap
            itself. It is computed along with the loss, so the logits are spent once this function
            returns (on a GPU; the eager backend spends them backward): whatever else needs them has
            to come before. Autograd refuses the backward of graphs that had saved them, and of
            those that use them later, unless the logits are a view.
        **policy_options: the options of `policy_loss`; or `**grpo_options(...)`.

    Returns:
        loss and metrics, as `policy_loss`.

    Differentiable, once, with respect to the logits. Under `torch.func` (grad, vmap, jvp, ...) and
    forward-mode differentiation it is `policy_loss` of `token_stats`.

    The kernel reads the logits twice, the second time mostly from the cache, and writes the
    gradient once. Tokens outside of the mask are not read, nor are those without an advantage,
    unless there is a reference or an entropy to look at; a token whose ratio is clipped is read
    once. Backward hands the gradient on if its upstream is 1, and otherwise scales it: a factor for
    gradient accumulation costs less as a normalizer. Without gradients, the logits are read once.
    What is of sequences (their ratios, the off-policy mask) needs all log-probs before the first
    gradient: it takes `token_stats` and its backward, as do losses that are not reduced, fp16
    logits, whose gradient must be scaled before it is rounded, a vocabulary that ranks share, and
    the eager backend.

    Raises:
        TypeError, ValueError: as `policy_loss` and `token_stats`; an unknown option.

    Source: as `policy_loss`.

    Example:
        >>> logits = torch.zeros(2, 3, 8, requires_grad=True)
        >>> actions = torch.tensor([[0, 1, 2], [3, 4, 5]])
        >>> old = fastrlhf.token_logprobs(logits.detach(), actions)
        >>> advantages, mask = torch.tensor([1.0, -1.0]), torch.ones(2, 3)
        >>> loss, metrics = fastrlhf.logits_policy_loss(logits, actions, old, advantages, mask)
        >>> loss.backward()
        >>> logits.grad[0, 0, :2]
        tensor([-0.1458,  0.0208])
    """
    options = PolicyOptions.parse("logits_policy_loss", policy_options)
    check_bool("entropy", entropy)
    check_bool("inplace_backward", inplace_backward)
    check_impl(impl)
    targets = replicated("targets", targets)
    check_integer("targets", targets)
    layout = layout_of("targets", targets, cu_seqlens)
    temperature = temperatures_of_layout(temperature, targets, layout)
    over_ranks = group is not None or is_dtensor(logits)
    transform = checked_logits(
        logits, targets, temperature, softcap, scale, may_be_empty=over_ranks
    )
    check_mask("mask", mask)
    check_like("mask", mask, "targets", targets)
    with_entropy = entropy or options.entropy_coef != 0
    tensors = PolicyTensors(old_logprobs, advantages, ref_logprobs, rollout_weights, kl_weights)
    batch = policy_batch(
        options, logits.dtype, mask, *tensors, with_entropy=with_entropy, layout=layout
    )
    targets = _active_targets(targets, batch, None if over_ranks else logits.shape[-1])
    one_launch = support is None and not over_ranks and _kernel_has(options, logits)
    if use_triton(impl, logits) and one_launch and not under_transform():
        loss, logprobs, entropies = policy_kernel(
            logits, targets, batch.tokens, transform, _formula(options),
            ignore_index=MASKED_OUT, entropy=with_entropy, inplace=inplace_backward,
        )  # fmt: skip
        return loss, policy_metrics(options, batch, logprobs, entropies if with_entropy else None)
    stats = token_stats(
        logits, targets, temperature=temperature, softcap=softcap, scale=scale,
        ignore_index=MASKED_OUT, entropy=with_entropy, inplace_backward=inplace_backward, impl=impl,
        support=support, group=group,
    )  # fmt: skip
    return loss_and_metrics(options, batch, stats.logprob, stats.entropy)


@showing(PolicyOptionsAndTensors, {**OPTIONAL_TOKEN_TENSORS, **PolicyOptions()._asdict()})
def linear_policy_loss(
    hidden: Tensor,
    weight: Weight,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    entropy: bool = False,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    group: Group | None = None,
    **options_and_tensors: Unpack[PolicyOptionsAndTensors],
) -> tuple[Tensor, Metrics]:
    """Compute `policy_loss` from hidden states and the weight of the head: no logits are built.

    Eager equivalent::

        stats = linear_token_stats(hidden, weight, targets, entropy=True, ...)
        loss, metrics = policy_loss(
            stats.logprob, old_logprobs, advantages, mask, entropy=stats.entropy, ...
        )

    Args:
        hidden: (B, T, H).
        weight: (V, H); of a model, `head = lm_head(model)` gives `weight=head.weight` and, as
            important, `**head.options()`.
        targets, old_logprobs, advantages, mask, entropy: as `logits_policy_loss`.
        **options_and_tensors: ref_logprobs, rollout_weights and kl_weights, as `logits_policy_loss`
            has them, and the options of `policy_loss`; or `**grpo_options(...)`.
        cu_seqlens: as `logits_policy_loss`, with hidden states (N, H) or (1, N, H).
        bias, temperature, softcap, scale, support, rows, chunk_size, impl, group: as
            `linear_token_stats`; where ranks share the vocabulary, the loss is the same on every
            rank. With rows, which are of the shape of targets, hidden is (U, H).

    Returns:
        loss and metrics, as `policy_loss`.

    Differentiable, once, with respect to hidden, weight and bias. Under `torch.func` (grad, vmap,
    jvp, ...) and forward-mode differentiation it is `policy_loss` of `linear_token_stats`.

    Cost, in matmuls G of the active tokens: G without gradients, 2G where hidden or the head alone
    needs one, 3G for both, with an entropy bonus too. Active are the tokens of the mask, without
    those that have no advantage, unless there is a reference or an entropy to look at. Tokens that
    have no gradient, as where the ratio is clipped, cost the first G alone. Memory: as
    `linear_loss`, by which it is computed; for what is of sequences (their ratios, the off-policy
    mask), those are its groups. Losses that are not reduced cost what `linear_token_stats` does.

    Raises:
        TypeError, ValueError: as `policy_loss` and `linear_token_stats`; an unknown option.

    Source: as `policy_loss`.

    Example:
        >>> hidden, weight = torch.ones(2, 3, 4, requires_grad=True), torch.zeros(8, 4)
        >>> actions = torch.tensor([[0, 1, 2], [3, 4, 5]])
        >>> old = fastrlhf.linear_token_logprobs(hidden.detach(), weight, actions)
        >>> batch = actions, old, torch.tensor([1.0, -0.5]), torch.ones(2, 3)
        >>> loss, metrics = fastrlhf.linear_policy_loss(hidden, weight, *batch)
        >>> loss.backward()
        >>> loss.detach(), hidden.grad.shape
        (tensor(-0.2500), torch.Size([2, 3, 4]))
    """
    given: dict[str, Any] = {**options_and_tensors}
    optional_tensors = [given.pop(name, None) for name in OPTIONAL_TOKEN_TENSORS]
    options = PolicyOptions.parse("linear_policy_loss", given)
    check_bool("entropy", entropy)
    scorer = linear_scorer(
        hidden, weight, bias, temperature, softcap, scale, chunk_size, impl, group, support, rows
    )
    scorer, targets, layout = laid_out(scorer, targets, cu_seqlens)
    check_mask("mask", mask)
    check_like("mask", mask, "targets", targets)
    with_entropy = entropy or options.entropy_coef != 0
    tensors = PolicyTensors(old_logprobs, advantages, *optional_tensors)
    batch = policy_batch(
        options, hidden.dtype, mask, *tensors, with_entropy=with_entropy, layout=layout
    )
    return policy_loss_of(scorer, targets, batch, options, with_entropy=with_entropy)


def policy_loss_of(
    scorer: Scorer,
    targets: Tensor,
    batch: PolicyBatch,
    options: PolicyOptions,
    *,
    with_entropy: bool,
) -> tuple[Tensor, Metrics]:
    """Compute the loss and its metrics of whatever scores the targets (B, T)."""
    mask = batch.mask
    targets = _active_targets(targets, batch, scorer.vocab)
    if under_transform() or options.reduction == "none":
        stats = scorer.stats(targets, ignore_index=MASKED_OUT, entropy=with_entropy, lse=False)
        return loss_and_metrics(options, batch, stats.logprob, stats.entropy)
    given = {name: x for name, x in batch.tokens._asdict().items() if x is not None}
    chunk_loss = _ChunkLoss(options, batch.tokens, tuple(given))
    positions = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
    loss, aux = scorer.loss(
        chunk_loss.of_chunk, targets, positions, *given.values(),
        groups=batch.layout.ids(mask) if options.needs_sequences else None,
        ignore_index=MASKED_OUT, entropy=with_entropy, lse=False,
    )  # fmt: skip

    def of_all(name: str) -> Tensor:
        """Put what the chunks gave back in its place, in zeros of the mask's shape."""
        values = loss.detach().new_zeros(mask.numel())
        return (values.index_put((aux["positions"],), aux[name]) if aux else values).view(
            mask.shape
        )

    entropies = of_all("entropy") if with_entropy else None
    return loss, policy_metrics(options, batch, of_all("logprob"), entropies)


class _ChunkLoss(NamedTuple):
    """The loss of a chunk of tokens, for `linear_loss`, and what the metrics need of the chunk."""

    options: PolicyOptions
    whole: PolicyTokens  # of the batch
    names: tuple[str, ...]  # of the fields of PolicyTokens that are given, in their order

    def of_chunk(
        self, stats: ChunkStats, positions: Tensor, *of_tokens: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`of_tokens`: the chunk's part of each given field; `positions`: of its tokens, as if the
        batch were flat.
        """
        tokens = self.whole._replace(**dict(zip(self.names, of_tokens, strict=True)))

        def sums(x: Tensor) -> Tensor:
            assert stats.groups is not None
            return segment_sums(x, stats.groups)

        losses = token_losses(self.options, tokens, stats.logprob, stats.entropy, sums)
        aux = {"positions": positions, "logprob": stats.logprob}
        if stats.entropy is not None:
            aux["entropy"] = stats.entropy
        return (losses * tokens.weights).sum(), aux


def _active_targets(targets: Tensor, batch: PolicyBatch, vocab: int | None) -> Tensor:
    """Return the targets (B, T) of the active tokens, with all others ignored. With a vocab, check
    those of the mask on the CPU.
    """
    can_be_looked_at = not being_traced() and not is_batched(targets, batch.mask)
    if vocab is not None and can_be_looked_at:
        of_mask = targets[batch.mask] if targets.device.type == "cpu" else targets[:0]
        what = "wherever the mask is set: is the mask aligned with the targets, not with the ids?"
        check_indices_on_host("targets", of_mask, vocab, what)
    return torch.where(batch.active, targets.long(), MASKED_OUT)


def _kernel_has(options: PolicyOptions, logits: Tensor) -> bool:
    """Whether the kernel computes a loss with these options, and its gradient with it."""
    return (
        torch.is_grad_enabled()
        and logits.requires_grad
        and not options.needs_sequences
        and options.reduction != "none"
        # fp16 gradients are kept from vanishing by a scale, which comes with the backward; the
        # kernel makes them before.
        and logits.dtype != torch.float16
    )


def _formula(options: PolicyOptions) -> PolicyFormula:
    """Write the options as the kernel takes them."""
    bounds = options.bounds
    dual_clip = torch.inf if bounds.dual_clip is None else bounds.dual_clip
    settings = (
        bounds.low, bounds.high, dual_clip, bounds.tau_positive, bounds.tau_negative,
        options.kl_coef, options.entropy_coef,
    )  # fmt: skip
    return PolicyFormula(
        options.surrogate, options.kl_estimator, options.kl_bias_correction, settings
    )
