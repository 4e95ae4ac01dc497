"""Preference losses from hidden states: the logits are never built.

Dims: B sequences, T tokens, P pairs, H hidden, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_pair_indices
from fastrlhf.losses.fused_sequences import SequenceLoss, SequenceTokens, sequence_loss_of
from fastrlhf.losses.preference import LOSS_TYPES, dpo_loss_of
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
from fastrlhf.reference import Layout

_FREE = ("simpo", "cpo", "orpo")
# What the reference-free types take of the options.
_OF_FREE = ("loss_type", "label_smoothing", "discopop_tau", "gamma", "alpha")


# Those that no other type has: simpo's margin, the weight of cpo's likelihood.
_MARGIN_AND_LIKELIHOOD = {"gamma": 0.5, "alpha": 1.0}
LINEAR_DPO_DEFAULTS = {**PreferenceOptions()._asdict(), **_MARGIN_AND_LIKELIHOOD}


class LinearDPOOptions(SharedDPOOptions, total=False):
    """The options of `linear_dpo_loss`, for `**options: Unpack[LinearDPOOptions]`; see there.

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
            which are computed here. The reference-free types do not take those after the first.

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
    checked = LinearOptions.parse("linear_dpo_loss", options)
    loss = pair_loss(checked, ref_logps, yw_idxs, yl_idxs, beta, layout, impl)
    ignore_index = check_ignore_index(ignore_index)
    return sequence_loss_of(scorer, wide_integers(targets), loss, ignore_index=ignore_index)


class LinearOptions(NamedTuple):
    """The options of `linear_dpo_loss`, checked: those of `dpo_loss`, or a type without reference
    and those that it takes.
    """

    free_type: str | None
    of_pairs: PreferenceOptions
    gamma: float
    alpha: float

    @classmethod
    def parse(cls, function: str, given: Mapping[str, Any]) -> "LinearOptions":
        """Make options from the keywords of a function, to which an unknown one is a TypeError."""
        names = (*PreferenceOptions._fields, *_MARGIN_AND_LIKELIHOOD)
        check_options(function, given, names)
        loss_type = given.get("loss_type", "sigmoid")
        free_type = None
        if isinstance(loss_type, str):
            check_one_of("loss_type", loss_type, (*LOSS_TYPES, *_FREE))
            free_type = loss_type if loss_type in _FREE else None
        # Also those that the type does not look at.
        gamma = check_finite("gamma", given.get("gamma", _MARGIN_AND_LIKELIHOOD["gamma"]))
        alpha = check_finite("alpha", given.get("alpha", _MARGIN_AND_LIKELIHOOD["alpha"]))
        of_pairs = {name: x for name, x in given.items() if name not in _MARGIN_AND_LIKELIHOOD}
        if free_type is not None:
            del of_pairs["loss_type"]
        found = PreferenceOptions.parse(function, of_pairs, LOSS_TYPES)
        if free_type is not None:
            default = PreferenceOptions().checked(LOSS_TYPES)
            for name in found._fields:
                if name not in _OF_FREE and getattr(found, name) != getattr(default, name):
                    raise ValueError(f"{name}: loss_type {free_type!r} does not take it")
        return cls(free_type, found, gamma, alpha)


def pair_loss(
    options: LinearOptions,
    ref_logps: Tensor | None,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float,
    layout: Layout,
    impl: str,
) -> SequenceLoss:
    """Bind everything but the token log-probs and their mask."""
    of_pairs = options.of_pairs
    without = options.free_type is not None
    if without and ref_logps is not None:
        raise ValueError(
            f"ref_logps: expected None, loss_type {options.free_type!r} has no reference"
        )
    if not without and not of_pairs.reference_free and ref_logps is None:
        raise ValueError(f"ref_logps: expected a tensor for loss_type {_named(of_pairs)}, got None")
    # Some sort over the batch, so the loss of a pair is not known before all log-probs are.
    one_by_one = not any(name in OF_THE_BATCH for name in of_pairs.loss_type)

    def with_reference(tokens: SequenceTokens) -> tuple[Tensor, Tensor]:
        return dpo_loss_of(
            of_pairs, tokens.logprob, ref_logps, yw_idxs, yl_idxs, beta, mask=tokens.mask,
            log_sum_sq_probs=tokens.log_sum_sq_probs, cu_seqlens=layout.cu_seqlens, impl=impl,
            whole_mask=tokens.whole_mask,
        )  # fmt: skip

    def of_sequences(tokens: SequenceTokens) -> tuple[Tensor, Tensor]:
        sums = sequence_logprobs(tokens.logprob, tokens.mask, cu_seqlens=layout.cu_seqlens)
        counts, smoothing = layout.counts(tokens.mask), of_pairs.label_smoothing
        if options.free_type == "simpo":
            return simpo_loss(
                sums, counts, yw_idxs, yl_idxs, beta, options.gamma, label_smoothing=smoothing
            )
        if options.free_type == "cpo":
            return cpo_loss(
                sums, yw_idxs, yl_idxs, beta, alpha=options.alpha, label_smoothing=smoothing
            )
        return orpo_loss(sums, counts, yw_idxs, yl_idxs, beta)

    def sets(targets: Tensor) -> Tensor:
        check_pair_indices("targets", targets, yw_idxs, yl_idxs, layout)
        return _sharing_pairs(layout.sequences(targets), yw_idxs.long(), yl_idxs.long())

    return SequenceLoss(
        "linear_dpo_loss", of_sequences if without else with_reference, layout,
        one_by_one=one_by_one and not getattr(ref_logps, "requires_grad", False),
        sets=sets,
        present=lambda present: present[yw_idxs.long()] | present[yl_idxs.long()],
        with_stats=("log_sum_sq_probs",) if of_pairs.use_weighting else (),
    )  # fmt: skip


def _named(options: PreferenceOptions) -> str:
    """The type, or types, as they were given."""
    return repr(options.loss_type[0] if len(options.loss_type) == 1 else options.loss_type)


def _sharing_pairs(sequences: int, yw_idxs: Tensor, yl_idxs: Tensor) -> Tensor:
    """Number the sets of sequences that pairs connect: (B,)."""
    leader = list(range(sequences))

    def lead(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    for chosen, rejected in torch.stack((yw_idxs, yl_idxs), dim=1).tolist():
        leader[lead(chosen)] = lead(rejected)
    return torch.tensor([lead(i) for i in range(sequences)], dtype=torch.int64)
