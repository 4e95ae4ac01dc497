"""Preference losses from hidden states: the logits are never built.

`PairLoss` has all that a loss of pairs takes but the log-probs of the tokens, and computes it from
them by the formulas of `preference.py` and `reference_free.py`. `fused_sequences.py` decides in
which order the log-probs come. `model_dpo_loss` makes the same object, and hands it to the head.

Dims: B sequences, T tokens, P pairs, H hidden, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_pair_indices
from fastrlhf.losses.fused_sequences import (
    SequenceTokens,
    layout_on_device_of,
    sequence_loss_of,
)
from fastrlhf.losses.preference import LOSS_TYPES, PairInputs, dpo_loss_of
from fastrlhf.losses.preference_options import (
    OF_THE_BATCH,
    PairLossType,
    PreferenceOptions,
    SharedDPOOptions,
)
from fastrlhf.losses.reference_free import cpo_loss, orpo_loss, simpo_loss
from fastrlhf.losses.sequences import sequence_logprobs
from fastrlhf.losses.signatures import check_options, showing
from fastrlhf.ops import Weight
from fastrlhf.ops.checks import (
    check_finite,
    check_ignore_index,
    check_one_of,
    wide_integers,
)
from fastrlhf.ops.kept_ids import Support
from fastrlhf.ops.keywords import Unpack
from fastrlhf.ops.ranks import Group
from fastrlhf.ops.scorer import laid_out, linear_scorer
from fastrlhf.ops.tracing import replaced
from fastrlhf.reference import Layout

_REFERENCE_FREE = ("simpo", "cpo", "orpo")
# The options of `dpo_loss` that may be given with a reference-free type too.
_REFERENCE_FREE_OPTIONS = ("loss_type", "label_smoothing", "discopop_tau")

# The options that no other type has: simpo's margin, the weight of cpo's likelihood.
_MARGIN_AND_LIKELIHOOD = {"gamma": 0.5, "alpha": 1.0}
LINEAR_DPO_DEFAULTS = {**PreferenceOptions()._asdict(), **_MARGIN_AND_LIKELIHOOD}


class LinearDPOOptions(SharedDPOOptions, total=False):
    """The options of `linear_dpo_loss`, for `**options: Unpack[LinearDPOOptions]`; see there.

    Source: as `linear_dpo_loss`.

    Example:
        >>> options: fastrlhf.LinearDPOOptions = {"loss_type": "simpo", "gamma": 0.5}
        >>> hidden, weight = torch.zeros(2, 3, 4), torch.zeros(10, 4)
        >>> ids, pair = torch.ones(2, 3, dtype=torch.long), (torch.tensor([0]), torch.tensor([1]))
        >>> losses, _ = fastrlhf.linear_dpo_loss(hidden, weight, ids, None, *pair, 2.0, **options)
        >>> losses
        tensor([0.9741])
    """

    loss_type: PairLossType | Literal["simpo", "cpo", "orpo"] | Sequence[PairLossType]
    gamma: float
    alpha: float


@showing(LinearDPOOptions, LINEAR_DPO_DEFAULTS)
def linear_dpo_loss(
    hidden: Tensor,
    weight: Weight,
    targets: Tensor,
    ref_logps: Tensor | None,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
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
    **options: Unpack[LinearDPOOptions],
) -> tuple[Tensor, Tensor]:
    """Compute `dpo_loss`, or a reference-free loss, from hidden states and the weight of the head.

    Eager equivalent::

        logprobs = linear_token_logprobs(hidden, weight, targets, ...)  # (B, T)
        losses, rewards = dpo_loss(
            logprobs, ref_logps, yw_idxs, yl_idxs, beta, mask=targets != ignore_index, ...
        )

    Args:
        hidden: (B, T, H), chosen and rejected sequences in one batch, in any order.
        weight: (V, H).
        targets: (B, T) integer, aligned with the hidden states that predict them (`shift_targets`);
            ignore_index for prompts and padding.
        ref_logps: (B,) log-probs of whole sequences under the reference model, in nats, or (B, T)
            of their tokens; None for the reference-free types, and with reference_free.
        yw_idxs, yl_idxs: (P,) integer indices of the preferred and the other sequences.
        beta: positive; note that simpo's paper takes 2.0 to 10.
        bias, temperature, softcap, scale, ignore_index, support, rows, chunk_size, impl, group: as
            `linear_token_stats`; where ranks share the vocabulary, losses are the same on every
            rank. With rows, which are (B, T), hidden is (U, H).
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last. With
            them, what is (B, T) is (N,) or (1, N), and hidden (N, H) or (1, N, H). A ref_logps of
            the shape of targets is of tokens.

    Options:
        loss_type: any of `dpo_loss`, or a tuple of them; or "simpo", "cpo" or "orpo", which take
            ref_logps=None.
        gamma: target margin of simpo, 0.5 by default.
        alpha: weight of the likelihood in cpo, 1.0 by default.
        label_smoothing: as `dpo_loss`; simpo and cpo take it too.
        discopop_tau, loss_weights, rpo_alpha, dpop_lambda, reference_free, average, f_divergence,
            f_alpha, ld_alpha, use_weighting: as `dpo_loss`, the last without log_sum_sq_probs,
            which are computed here. The reference-free types take none of these but discopop_tau,
            which has no effect on them.

    Returns:
        losses (P,), not reduced, and rewards (B,), detached; fp32 (fp64 for fp64 hidden states).

    Differentiable with respect to hidden, weight, bias and ref_logps; under `torch.func` (grad,
    vmap, jvp, ...) and forward-mode differentiation too, where the logits are built.

    Cost, in matmuls G of the tokens with a target: G without gradients; 2G where hidden alone needs
    one; 3G where the weight does too, by `linear_loss` on groups of sequences that share a pair.
    That takes the gradient of the sum of the losses in the forward, which serves every reduction
    that weighs all losses alike (a mean, a sum, their multiples); for another, backward computes it
    anew: 4G more. To tell them apart, a GPU is awaited once in the backward; and in the forward
    once to order the tokens. aot and aot_unpaired, and ref_logps that need a gradient, cost 4G.

    Raises:
        TypeError, ValueError: as `linear_token_stats` and `dpo_loss`; ref_logps missing, or given
            to a type that has no reference.

    Source: as `dpo_loss`, `simpo_loss`, `cpo_loss` and `orpo_loss`.

    Example:
        >>> hidden = torch.ones(2, 3, 4, requires_grad=True)  # of the chosen, and the rejected
        >>> weight, ids = torch.zeros(8, 4), torch.tensor([[0, 1, 2], [3, 4, 5]])
        >>> ref_logps, pair = torch.tensor([-6.0, -6.0]), (torch.tensor([0]), torch.tensor([1]))
        >>> losses, rewards = fastrlhf.linear_dpo_loss(hidden, weight, ids, ref_logps, *pair)
        >>> losses.mean().backward()
        >>> losses.detach()
        tensor([0.6931])
    """
    scorer = linear_scorer(
        hidden, weight, bias, temperature, softcap, scale, chunk_size, impl, group, support, rows
    )
    scorer, targets, layout = laid_out(scorer, targets, cu_seqlens)
    checked = LinearPairOptions.parse("linear_dpo_loss", options)
    loss = PairLoss(checked, ref_logps, yw_idxs, yl_idxs, beta, layout, impl).checked()
    ignore_index = check_ignore_index(ignore_index)
    return sequence_loss_of(scorer, wide_integers(targets), loss, ignore_index=ignore_index)


class LinearPairOptions(NamedTuple):
    """The options of `linear_dpo_loss`, checked: those of `dpo_loss`, and, of a type without a
    reference, its name and numbers.
    """

    free_type: str | None  # "simpo", "cpo" or "orpo"; None: a type of `dpo_loss`
    of_pairs: PreferenceOptions
    gamma: float
    alpha: float

    @classmethod
    def parse(cls, function: str, given: Mapping[str, Any]) -> "LinearPairOptions":
        """Make options from the keywords of a function, to which an unknown one is a TypeError."""
        names = (*PreferenceOptions._fields, *_MARGIN_AND_LIKELIHOOD)
        check_options(function, given, names)
        loss_type = given.get("loss_type", "sigmoid")
        free_type = None
        if isinstance(loss_type, str):
            check_one_of("loss_type", loss_type, (*LOSS_TYPES, *_REFERENCE_FREE))
            free_type = loss_type if loss_type in _REFERENCE_FREE else None
        # Checked whatever the type is, though most do not look at them.
        gamma = check_finite("gamma", given.get("gamma", _MARGIN_AND_LIKELIHOOD["gamma"]))
        alpha = check_finite("alpha", given.get("alpha", _MARGIN_AND_LIKELIHOOD["alpha"]))
        of_pairs = {name: x for name, x in given.items() if name not in _MARGIN_AND_LIKELIHOOD}
        if free_type is not None:
            del of_pairs["loss_type"]
        options = PreferenceOptions.parse(function, of_pairs, LOSS_TYPES)
        if free_type is not None:
            _check_reference_free(free_type, options)
        return cls(free_type, options, gamma, alpha)


def _check_reference_free(free_type: str, options: PreferenceOptions) -> None:
    """Raise for an option of `dpo_loss` that a reference-free type does not have."""
    defaults = PreferenceOptions().checked(LOSS_TYPES)
    for name, value in options._asdict().items():
        if name not in _REFERENCE_FREE_OPTIONS and value != getattr(defaults, name):
            raise ValueError(f"{name}: loss_type {free_type!r} does not take it")


class PairLoss(NamedTuple):
    """A loss of preference pairs with all of its arguments but the log-probs of the tokens: a
    `SequenceLoss`.
    """

    options: LinearPairOptions
    ref_logps: Tensor | None
    yw_idxs: Tensor  # (P,)
    yl_idxs: Tensor  # (P,)
    beta: float
    layout: Layout
    impl: str

    def checked(self) -> "PairLoss":
        """Return the loss.

        Raises:
            ValueError: no log-probs of a reference for a type that needs them, or some for one that
                has no reference.
        """
        of_pairs, free_type = self.options.of_pairs, self.options.free_type
        if free_type is not None and self.ref_logps is not None:
            raise ValueError(f"ref_logps: expected None, loss_type {free_type!r} has no reference")
        if free_type is None and not of_pairs.reference_free and self.ref_logps is None:
            raise ValueError(
                f"ref_logps: expected a tensor for loss_type {_type_as_given(of_pairs)}, got None"
            )
        return self

    @property
    def function(self) -> str:
        return "linear_dpo_loss"

    @property
    def one_by_one(self) -> bool:
        # Some types sort over the batch, so that no loss is known before all log-probs are.
        sorts = any(name in OF_THE_BATCH for name in self.options.of_pairs.loss_type)
        return not sorts and not getattr(self.ref_logps, "requires_grad", False)

    @property
    def with_stats(self) -> tuple[str, ...]:
        return ("log_sum_sq_probs",) if self.options.of_pairs.use_weighting else ()

    def on_device_of(self, targets: Tensor) -> "PairLoss":
        device, ref_logps = targets.device, self.ref_logps
        return replaced(
            self,
            ref_logps=None if ref_logps is None else ref_logps.to(device),
            yw_idxs=self.yw_idxs.to(device),
            yl_idxs=self.yl_idxs.to(device),
            layout=layout_on_device_of(targets, self.layout),
        )

    def of_tokens(self, tokens: SequenceTokens) -> tuple[Tensor, Tensor]:
        if self.options.free_type is not None:
            return self._reference_free(tokens)
        given = PairInputs(
            tokens.logprob, self.ref_logps, self.yw_idxs, self.yl_idxs, mask=tokens.mask,
            log_sum_sq_probs=tokens.log_sum_sq_probs, cu_seqlens=self.layout.cu_seqlens,
        )  # fmt: skip
        return dpo_loss_of(
            self.options.of_pairs, given, self.beta, impl=self.impl, whole_mask=tokens.whole_mask
        )

    def sets(self, targets: Tensor) -> Tensor:
        check_pair_indices("targets", targets, self.yw_idxs, self.yl_idxs, self.layout)
        sequences = self.layout.sequences(targets)
        return _sharing_pairs(sequences, self.yw_idxs.long(), self.yl_idxs.long())

    def present(self, sequences: Tensor) -> Tensor:
        return sequences[self.yw_idxs.long()] | sequences[self.yl_idxs.long()]

    def _reference_free(self, tokens: SequenceTokens) -> tuple[Tensor, Tensor]:
        """Compute simpo, cpo or orpo, of the sums over the tokens of each sequence."""
        sums = sequence_logprobs(tokens.logprob, tokens.mask, cu_seqlens=self.layout.cu_seqlens)
        lengths = self.layout.counts(tokens.mask)
        pair, smoothing = (self.yw_idxs, self.yl_idxs), self.options.of_pairs.label_smoothing
        if self.options.free_type == "simpo":
            return simpo_loss(
                sums, lengths, *pair, self.beta, self.options.gamma, label_smoothing=smoothing
            )
        if self.options.free_type == "cpo":
            return cpo_loss(
                sums, *pair, self.beta, alpha=self.options.alpha, label_smoothing=smoothing
            )
        return orpo_loss(sums, lengths, *pair, self.beta)


def _type_as_given(options: PreferenceOptions) -> str:
    """Write the type, or the types, as the caller did."""
    return repr(options.loss_type[0] if len(options.loss_type) == 1 else options.loss_type)


def _sharing_pairs(sequences: int, yw_idxs: Tensor, yl_idxs: Tensor) -> Tensor:
    """Number the sets of sequences that pairs connect: (B,), by union-find."""
    leader = list(range(sequences))

    def lead(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    for chosen, rejected in torch.stack((yw_idxs, yl_idxs), dim=1).tolist():
        leader[lead(chosen)] = lead(rejected)
    return torch.tensor([lead(i) for i in range(sequences)], dtype=torch.int64)
