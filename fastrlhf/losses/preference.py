"""The DPO family: losses of preference pairs from log-probs under a policy and a reference model.

A loss that depends on the margin between the two sequences alone is a row of `MARGIN_LOSSES` (in
`fastrlhf.reference`, and with a kernel); any other is a function here and a row of `_PAIR_LOSSES`.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed, P pairs.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_lengths, check_pairs, every_token
from fastrlhf.ops.backend import check_impl
from fastrlhf.ops.checks import (
    check_between,
    check_counts,
    check_floating,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
)
from fastrlhf.ops.preference_loss import preference_loss
from fastrlhf.ops.ranks import Group, check_group
from fastrlhf.reference import (
    MARGIN_LOSSES,
    ROWS,
    log_sigmoid,
    masked_sum,
    sequence_scores,
    sigmoid,
    sigmoid_loss,
)


class _Pairs(NamedTuple):
    """Scores of each pair, (P,): s = ln π - ln π_ref, and ln π_ref itself for losses that sort it
    alone.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_ref: Tensor
    rejected_ref: Tensor


class _Options(NamedTuple):
    beta: float
    label_smoothing: float
    discopop_tau: float


def _exo_pair(pairs: _Pairs, options: _Options) -> Tensor:
    """KL(σ(d) ‖ 1-ε) of the policy's preference from the smoothed label: EXO, 2402.00856 Eq. 16."""
    d = options.beta * (pairs.chosen - pairs.rejected)
    kept = _negative_entropy(d) - sigmoid(d) * math.log1p(-options.label_smoothing)
    return kept + _negative_entropy(-d) - sigmoid(-d) * math.log(options.label_smoothing)


def _negative_entropy(d: Tensor) -> Tensor:
    """σ(d)·ln σ(d), which is 0 where σ(d) is, an infinite d included."""
    possible = d != -torch.inf
    d = torch.where(possible, d, 0.0)
    return torch.where(possible, sigmoid(d) * log_sigmoid(d), 0.0)


def _nca_pair(pairs: _Pairs, options: _Options) -> Tensor:
    """ℓ(a) + ½ℓ(-a) + ½ℓ(-b): NCA, 2402.05369."""
    a, b = options.beta * pairs.chosen, options.beta * pairs.rejected
    return -log_sigmoid(a) - 0.5 * log_sigmoid(-a) - 0.5 * log_sigmoid(-b)


def _bco_pair(pairs: _Pairs, options: _Options) -> Tensor:
    """ℓ(a) + ℓ(-b), without the reward shift: BCO, 2404.04656."""
    return -log_sigmoid(options.beta * pairs.chosen) - log_sigmoid(-options.beta * pairs.rejected)


def _sppo_hard(pairs: _Pairs, options: _Options) -> Tensor:
    """(s_w - 1/(2β))² + (s_l + 1/(2β))²: SPPO with hard labels, 2405.00675."""
    half = 0.5 / options.beta
    return (pairs.chosen - half).square() + (pairs.rejected + half).square()


def _apo_zero(pairs: _Pairs, options: _Options) -> Tensor:
    """1 - σ(a) + σ(b): APO-zero, 2408.06266 Eq. 7."""
    return sigmoid(-options.beta * pairs.chosen) + sigmoid(options.beta * pairs.rejected)


def _apo_down(pairs: _Pairs, options: _Options) -> Tensor:
    """σ(a) + 1 - σ(a - b): APO-down, 2408.06266 Eq. 8."""
    d = options.beta * (pairs.chosen - pairs.rejected)
    return sigmoid(options.beta * pairs.chosen) + sigmoid(-d)


def _discopop(pairs: _Pairs, options: _Options) -> Tensor:
    """ℓ(d)·(1-m) + e^-d·m with m = σ(d/τ): DiscoPOP, 2406.08414 Eq. 5."""
    d = options.beta * (pairs.chosen - pairs.rejected)
    gate = d / options.discopop_tau
    # One exponent for e^-d·m: apart, the factors are inf and 0 for a strongly negative d. There,
    # ln m is the gate but for a trifle, and d is taken off the gate before either can be infinite.
    negative = d < 0
    rate = torch.where(negative, 1 / options.discopop_tau - 1, d.new_full((), -1.0))
    trifle = torch.log1p(torch.exp(torch.where(negative, gate, -gate)))
    return -log_sigmoid(d) * sigmoid(-gate) + torch.exp(rate * d - trifle)


def _aot(pairs: _Pairs, options: _Options) -> Tensor:
    """Sigmoid loss between sorted policy margins and sorted reference margins: AOT, 2406.05882."""
    policy = (pairs.chosen + pairs.chosen_ref) - (pairs.rejected + pairs.rejected_ref)
    ref = pairs.chosen_ref - pairs.rejected_ref
    margin = policy.sort(0).values - ref.sort(0).values
    return sigmoid_loss(margin, options.beta, options.label_smoothing)


def _aot_unpaired(pairs: _Pairs, options: _Options) -> Tensor:
    """Sigmoid loss between sorted scores of chosen and of rejected sequences: unpaired AOT,
    2406.05882.
    """
    margin = pairs.chosen.sort(0).values - pairs.rejected.sort(0).values
    return sigmoid_loss(margin, options.beta, options.label_smoothing)


_PAIR_LOSSES: dict[str, Callable[[_Pairs, _Options], Tensor]] = {
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
}

LOSS_TYPES = (*MARGIN_LOSSES, *_PAIR_LOSSES)


def dpo_loss(
    pi_logps: Tensor,
    ref_logps: Tensor,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float = 0.1,
    *,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    discopop_tau: float = 0.05,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute a loss of the DPO family for each preference pair, and the implicit reward of each
    sequence.

    Eager equivalent for the default, as listed in the DPO paper (appendix B)::

        s = pi_logps - ref_logps
        losses = -F.logsigmoid(beta * (s[yw_idxs] - s[yl_idxs]))
        rewards = beta * s.detach()

    Args:
        pi_logps: (B,) log-probs of whole sequences under the policy, in nats; or, with `mask`, (B,
            T) log-probs of tokens, which are summed over the mask.
        ref_logps: (B,) likewise under the reference model; with `mask`, (B, T) or (B,).
        yw_idxs: (P,) integer indices of the preferred sequences.
        yl_idxs: (P,) integer indices of the others. A sequence may be part of any number of pairs.
        beta: positive strength of the KL regularisation.
        loss_type: with d = β·(s_w - s_l), a = β·s_w, b = β·s_l and ℓ = -ln σ:
            "sigmoid" ℓ(d), with label smoothing cDPO; "robust", "hinge", "ipo", "exo_pair",
            "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sigmoid_norm",
            "aot" and "aot_unpaired" as in their papers. The last two sort over the batch: their
            losses belong to ranks, not to pairs.
        label_smoothing: probability ε in [0, 0.5] that a label is flipped, for sigmoid, robust
            (below 0.5), exo_pair (above 0; its paper takes 1e-3), aot and aot_unpaired; the others
            do not use it.
        lengths: (B,) tokens of each sequence. ipo and sigmoid_norm average over tokens and need
            this or the mask.
        mask: (B, T) bool or 0/1, the tokens that count; the others can hold anything. It also gives
            the lengths.
        discopop_tau: temperature τ of discopop, positive.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last. With
            them, log-probs of tokens and the mask are (N,) or (1, N), and all tokens count where
            there is no mask. A ref_logps of the shape of pi_logps is of tokens.
        group: torch.distributed group over whose ranks the tokens of each sequence are spread, see
            `fastrlhf.losses.ranks`; None: all are here. A ref_logps (B,) is of whole sequences.
        impl: "auto" (Triton on a GPU, and under TRITON_INTERPRET=1; else eager PyTorch), "triton",
            "compiled" or "eager", two names of the same here. The losses of the margin alone
            (sigmoid, robust, hinge, ipo, sigmoid_norm) have a kernel, the others run in eager
            PyTorch whatever it says.

    Returns:
        losses (P,), not reduced, and rewards (B,) = β·s, detached; fp32 (fp64 for fp64 log-probs).

    The losses are differentiable, twice too, with respect to pi_logps and ref_logps. A kernel takes
    one launch forward, from token log-probs to losses and slopes, and one backward, and its bits do
    not depend on scheduling.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: shapes, devices, an index outside [0, B) (on a GPU an assertion in the kernel),
            cu_seqlens that do not fit (on a GPU an assertion too), an unknown loss_type, missing
            lengths, beta, label_smoothing or discopop_tau out of range.

    Source: 2305.18290 Eq. 7; the other types as their functions say.
    """
    if check_group(group) is not None and mask is None and cu_seqlens is None:
        raise ValueError(
            "group: expected None for log-probs of sequences; sequence_logprobs(..., group=group) "
            "adds up their tokens"
        )
    if mask is None and cu_seqlens is not None:
        mask = every_token("pi_logps", pi_logps, cu_seqlens)
    layout = check_pairs("pi_logps", pi_logps, yw_idxs, yl_idxs, mask, cu_seqlens, group)
    check_floating("ref_logps", ref_logps)
    check_same_device("ref_logps", ref_logps, "pi_logps", pi_logps)
    if mask is not None and (ref_logps.ndim == 2 or ref_logps.shape == pi_logps.shape):
        check_shape("ref_logps", ref_logps, tuple(pi_logps.shape), "the shape of pi_logps")
        ref_logps = layout.tokens(ref_logps)
    else:
        sums = (layout.sequences(pi_logps),)
        check_shape("ref_logps", ref_logps, sums, "one sum for each of B sequences")
    if mask is not None:
        pi_logps, mask = layout.tokens(pi_logps), layout.tokens(mask)
    beta = check_positive("beta", beta)
    discopop_tau = check_positive("discopop_tau", discopop_tau)
    check_impl(impl)
    label_smoothing = _check_loss_type(loss_type, label_smoothing)
    averaged = loss_type in MARGIN_LOSSES and MARGIN_LOSSES[loss_type].average
    if averaged and mask is None:
        check_lengths(lengths, pi_logps, f"loss_type {loss_type!r} averages over tokens")
    elif lengths is not None:
        check_counts("lengths", lengths)  # though nothing looks at them
    if loss_type in MARGIN_LOSSES:
        if mask is not None and group is not None:  # its tokens first: the rest is of sequences
            lengths = layout.counts(mask)
            pi_logps = sequence_scores(pi_logps, ref_logps, mask, layout)
            ref_logps, mask, layout = torch.zeros_like(pi_logps), None, ROWS
        return preference_loss(
            pi_logps, ref_logps, yw_idxs, yl_idxs, mask, None if mask is not None else lengths,
            loss_type=loss_type, beta=beta, label_smoothing=label_smoothing, impl=impl,
            layout=layout,
        )  # fmt: skip
    scores = sequence_scores(pi_logps, ref_logps, mask, layout)
    ref_sums = masked_sum(ref_logps, mask if ref_logps.ndim == 2 else None, layout)
    pairs = _Pairs(*(x[i.long()] for x in (scores, ref_sums) for i in (yw_idxs, yl_idxs)))
    losses = _PAIR_LOSSES[loss_type](pairs, _Options(beta, label_smoothing, discopop_tau))
    return losses, (beta * scores).detach()


def _check_loss_type(loss_type: str, label_smoothing: float) -> float:
    check_one_of("loss_type", loss_type, LOSS_TYPES)
    label_smoothing = check_between("label_smoothing", label_smoothing, 0, 0.5)
    if loss_type == "robust" and label_smoothing == 0.5:
        raise ValueError("label_smoothing: expected less than 0.5 for loss_type 'robust', got 0.5")
    if loss_type == "exo_pair" and label_smoothing == 0:
        raise ValueError(
            "label_smoothing: expected more than 0 for loss_type 'exo_pair' (its paper takes "
            "1e-3), got 0"
        )
    return label_smoothing
