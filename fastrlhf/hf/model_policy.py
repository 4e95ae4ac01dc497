"""The policy losses (PPO, GRPO and relatives) of a causal language model, computed inside its own
forward.

The options and tensors are those of `policy_options.py` and `policy_arguments.py` in
`fastrlhf/losses`. Before the model runs they are checked and aligned with the positions that
predict the tokens; at the head, `policy_batch` and `policy_loss_of` compute the loss, as they do
for `linear_policy_loss`.

Dims: B sequences, T tokens.
"""

from typing import Any, Literal, NamedTuple, overload

from torch import Tensor, nn

from fastrlhf.losses.fused_policy import policy_loss_of
from fastrlhf.losses.policy import Metrics
from fastrlhf.losses.policy_arguments import PER_SEQUENCE, PolicyTensors, policy_batch
from fastrlhf.losses.policy_options import PolicyLossOptions, PolicyOptions
from fastrlhf.losses.signatures import showing
from fastrlhf.ops.checks import check_bool, check_mask
from fastrlhf.ops.kept_ids import Support
from fastrlhf.ops.layout import layout_of
from fastrlhf.ops.scorer import Scorer

from .at_head import IGNORED, at_head
from .loss_arguments import on_device_of, separated
from .model_inputs import TokenBatch, check_ids, of_positions


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

    Source: as `policy_loss`.

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
    sequences = layout_of("input_ids", input_ids, cu_seqlens).sequences(input_ids)
    tensors = PolicyTensors(old_logprobs, advantages, ref_logprobs, rollout_weights, kl_weights)
    tensors = _of_positions(tensors, input_ids, sequences)
    loss = _PolicyLoss(options, tensors, cu_seqlens, entropy or options.entropy_coef != 0)
    batch = TokenBatch(
        input_ids, attention_mask, inputs, mask, cu_seqlens, temperature, chunk_size, impl,
        support, rows, known,
    )  # fmt: skip
    done = at_head(model, batch, loss.work)
    if options.reduction == "none":  # the last position predicts no token
        done = done._replace(result=done.result[:, :-1])
    return done.with_outputs(return_outputs)


def _of_positions(tensors: PolicyTensors, input_ids: Tensor, sequences: int) -> PolicyTensors:
    """Align tensors of tokens with the positions that predict them; leave those of sequences."""
    given = tensors._asdict()
    for name, x in given.items():
        of_sequences = ((sequences,), (sequences, 1)) if name in PER_SEQUENCE else ()
        if x is not None and getattr(x, "shape", None) not in of_sequences:
            given[name] = of_positions(name, x, input_ids)
    return PolicyTensors(**given)


class _PolicyLoss(NamedTuple):
    """A policy loss with all of its arguments but the log-probs of the tokens."""

    options: PolicyOptions
    tensors: PolicyTensors  # aligned with the positions that predict the tokens
    cu_seqlens: Tensor | None
    with_entropy: bool

    def work(self, scorer: Scorer, targets: Tensor) -> tuple[Tensor, Metrics]:
        """Compute the loss at the head, which may be on another device than the ids."""
        *tensors, cu_seqlens = on_device_of(targets, *self.tensors, self.cu_seqlens)
        batch = policy_batch(
            self.options, scorer.hidden.dtype, targets != IGNORED, *tensors,
            with_entropy=self.with_entropy, layout=layout_of("input_ids", targets, cu_seqlens),
        )  # fmt: skip
        return policy_loss_of(scorer, targets, batch, self.options, with_entropy=self.with_entropy)
