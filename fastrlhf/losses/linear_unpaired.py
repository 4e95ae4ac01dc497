"""KTO from hidden states: the logits are never built.

`UnpairedLoss` has all that `kto_loss` takes but the log-probs of the tokens. `fused_sequences.py`
decides in which order these come; `model_kto_loss` makes the same object, and hands it to the head.

Dims: B sequences, T tokens, H hidden, V vocabulary.
"""

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from fastrlhf.losses.fused_sequences import (
    SequenceTokens,
    layout_on_device_of,
    sequence_loss_of,
)
from fastrlhf.losses.sequences import sequence_logprobs
from fastrlhf.losses.signatures import check_options, showing
from fastrlhf.losses.unpaired import KTOLossType, check_labels, kto_loss
from fastrlhf.ops import Weight
from fastrlhf.ops.checks import (
    check_floating,
    check_ignore_index,
    check_same_device,
    check_shape,
    wide_integers,
)
from fastrlhf.ops.kept_ids import Support
from fastrlhf.ops.keywords import Unpack
from fastrlhf.ops.ranks import Group
from fastrlhf.ops.scorer import laid_out, linear_scorer
from fastrlhf.ops.tracing import replaced
from fastrlhf.reference import Layout


class KTOOptions(TypedDict, total=False):
    """The options of `kto_loss`, for `**options: Unpack[KTOOptions]`; see there.

    Source: as `kto_loss`.

    Example:
        >>> options: fastrlhf.KTOOptions = {"desirable_weight": 1.0, "undesirable_weight": 2.0}
        >>> logps, labels = torch.tensor([-10.0, -12.0]), torch.tensor([True, False])
        >>> losses, _ = fastrlhf.kto_loss(logps, logps, labels, kl=0.0, **options)
        >>> losses
        tensor([0.5000, 1.0000])
    """

    loss_type: KTOLossType
    desirable_weight: float
    undesirable_weight: float


KTO_DEFAULTS = {"loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0}


@showing(KTOOptions, KTO_DEFAULTS)
def linear_kto_loss(
    hidden: Tensor,
    weight: Weight,
    targets: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | float | None,
    beta: float = 0.1,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    support: Support | None = None,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
    group: Group | None = None,
    **options: Unpack[KTOOptions],
) -> tuple[Tensor, Tensor]:
    """Compute `kto_loss` from hidden states and the weight of the head.

    Eager equivalent::

        logprobs = linear_token_logprobs(hidden, weight, targets, ...)  # (B, T)
        logps = sequence_logprobs(logprobs, targets != ignore_index)
        losses, rewards = kto_loss(logps, ref_logps, desirable, kl, beta, ...)

    Args:
        hidden: (B, T, H).
        weight: (V, H).
        targets: (B, T) integer, aligned with the hidden states that predict them (`shift_targets`);
            ignore_index for prompts and padding.
        ref_logps: (B,) log-probs of whole sequences under the reference model, in nats.
        desirable, kl, beta: as `kto_loss`; for the completions of which `kto_kl` is made,
            `linear_token_logprobs` without gradients serves.
        bias, temperature, softcap, scale, ignore_index, support, rows, chunk_size, impl, group: as
            `linear_token_stats`; where ranks share the vocabulary, losses are the same on every
            rank. With rows, which are (B, T), hidden is (U, H).
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last. With
            them, what is (B, T) is (N,) or (1, N), and hidden (N, H) or (1, N, H).
        **options: loss_type, desirable_weight and undesirable_weight of `kto_loss`.

    Returns:
        losses (B,), not reduced, and rewards (B,), detached; fp32 (fp64 for fp64 hidden states).

    Differentiable with respect to hidden, weight, bias and ref_logps. Cost, in matmuls G of the
    tokens with a target: G without gradients, 2G where hidden alone needs one, 3G where the weight
    does too; then, and for reductions that do not weigh all losses alike, as `linear_dpo_loss`.

    Raises:
        TypeError, ValueError: as `linear_token_stats` and `kto_loss`.

    Source: as `kto_loss`.

    Example:
        >>> hidden, weight = torch.ones(2, 3, 4, requires_grad=True), torch.zeros(8, 4)
        >>> ids, ref_logps = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([-7.0, -6.0])
        >>> desirable = torch.tensor([True, False])
        >>> batch = ids, ref_logps, desirable
        >>> losses, rewards = fastrlhf.linear_kto_loss(hidden, weight, *batch, kl=0.5)
        >>> losses.mean().backward()
        >>> losses.detach()
        tensor([0.4935, 0.4816])
    """
    scorer = linear_scorer(
        hidden, weight, bias, temperature, softcap, scale, chunk_size, impl, group, support, rows
    )
    scorer, targets, layout = laid_out(scorer, targets, cu_seqlens)
    check_options("linear_kto_loss", options, KTOOptions.__annotations__)
    loss = UnpairedLoss(ref_logps, desirable, kl, beta, layout, options).checked(targets)
    ignore_index = check_ignore_index(ignore_index)
    return sequence_loss_of(scorer, wide_integers(targets), loss, ignore_index=ignore_index)


class UnpairedLoss(NamedTuple):
    """KTO's loss with all of its arguments but the log-probs of the tokens: a `SequenceLoss`."""

    ref_logps: Tensor  # (B,)
    desirable: Tensor  # (B,)
    kl: Tensor | float | None
    beta: float
    layout: Layout
    options: KTOOptions

    def checked(self, tokens: Tensor) -> "UnpairedLoss":
        """Return the loss, of which what is wrong is found here, before any work is done. `tokens`
        are of the shape of the log-probs.

        Raises:
            TypeError, ValueError: as `kto_loss`.
        """
        sequences = self.layout.sequences(tokens)
        check_floating("ref_logps", self.ref_logps)
        check_shape("ref_logps", self.ref_logps, (sequences,), "one sum for each of B sequences")
        check_same_device("ref_logps", self.ref_logps, "targets", tokens)
        zeros = torch.zeros_like(self.ref_logps)
        check_labels(self.desirable, zeros)
        kto_loss(zeros, zeros, self.desirable, self.kl, self.beta, **self.options)
        return self

    @property
    def function(self) -> str:
        return "linear_kto_loss"

    @property
    def one_by_one(self) -> bool:
        return not self.ref_logps.requires_grad

    @property
    def with_stats(self) -> tuple[str, ...]:
        return ()

    def on_device_of(self, targets: Tensor) -> "UnpairedLoss":
        device, kl = targets.device, self.kl
        return replaced(
            self,
            ref_logps=self.ref_logps.to(device),
            desirable=self.desirable.to(device),
            kl=kl.to(device) if isinstance(kl, Tensor) else kl,
            layout=layout_on_device_of(targets, self.layout),
        )

    def of_tokens(self, tokens: SequenceTokens) -> tuple[Tensor, Tensor]:
        sums = sequence_logprobs(tokens.logprob, tokens.mask, cu_seqlens=self.layout.cu_seqlens)
        return kto_loss(sums, self.ref_logps, self.desirable, self.kl, self.beta, **self.options)

    def sets(self, targets: Tensor) -> Tensor:
        """A set for each sequence, whose loss is its own."""
        return torch.arange(self.layout.sequences(targets))

    def present(self, sequences: Tensor) -> Tensor:
        return sequences
