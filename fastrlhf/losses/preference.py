"""The DPO family: losses of preference pairs from log-probs under a policy and a reference model.

A loss that has a kernel is a function of the margin between the two sequences, and a row of
`MARGIN_LOSSES` (in `fastrlhf.reference`); any other is a row of `PAIR_LOSSES` of `pair_losses.py`.

The options are checked in `preference_options.py`, the log-probs and the indices of pairs here and
in `arguments.py`. From there the way goes to the kernel, through `fastrlhf.ops.preference_loss`, or
to `pair_scores.py`, which makes the scores and sums the losses. The same losses from hidden states
are in `linear_preference.py`, and those of a model in `hf/model_preference.py`.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed, P pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_lengths, check_pairs, every_token
from fastrlhf.losses.f_divergence import f_score
from fastrlhf.losses.pair_losses import LOSS_TYPES as LOSS_TYPES
from fastrlhf.losses.pair_scores import Logps, summed_losses
from fastrlhf.losses.preference_options import DPOOptions, PreferenceOptions
from fastrlhf.losses.signatures import showing
from fastrlhf.losses.wpo import check_log_sum_sq_probs, weights_of
from fastrlhf.ops.backend import check_impl
from fastrlhf.ops.checks import (
    check_counts,
    check_floating,
    check_positive,
    check_same_device,
    check_shape,
)
from fastrlhf.ops.keywords import Unpack
from fastrlhf.ops.preference_loss import preference_loss
from fastrlhf.ops.ranks import Group, check_group
from fastrlhf.ops.tracing import replaced
from fastrlhf.reference import ROWS, Layout


@showing(DPOOptions, PreferenceOptions()._asdict())
def dpo_loss(
    pi_logps: Tensor,
    ref_logps: Tensor | None,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float = 0.1,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    log_sum_sq_probs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
    impl: str = "auto",
    **options: Unpack[DPOOptions],
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
        ref_logps: (B,) likewise under the reference model; with `mask`, (B, T) or (B,). May be None
            with reference_free.
        yw_idxs: (P,) integer indices of the preferred sequences.
        yl_idxs: (P,) integer indices of the others. A sequence may be part of any number of pairs.
        beta: positive strength of the KL regularisation.
        lengths: (B,) tokens of each sequence, which ipo, sigmoid_norm, sft, rpo_alpha and average
            need, if there is no mask.
        mask: (B, T) bool or 0/1, the tokens that count; the others can hold anything. It also gives
            the lengths.
        log_sum_sq_probs: (B, T) ln Σ p² of the policy, for use_weighting alone; see `wpo_weights`.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last. With
            them, log-probs of tokens and the mask are (N,) or (1, N), and all tokens count where
            there is no mask. A ref_logps of the shape of pi_logps is of tokens.
        group: torch.distributed group over whose ranks the tokens of each sequence are spread, see
            `fastrlhf.losses.ranks`; None: all are here. A ref_logps (B,) is of whole sequences.
        impl: "auto" (Triton on a GPU, and under TRITON_INTERPRET=1; else eager PyTorch), "triton",
            "compiled" or "eager", which are the same here. Five losses have a kernel (sigmoid,
            robust, hinge, ipo, sigmoid_norm). The others, sums of several, and the options from
            rpo_alpha on (but for reference_free) run in eager PyTorch whatever it says.

    Options:
        loss_type: with d = β·(s_w - s_l), a = β·s_w, b = β·s_l and ℓ = -ln σ:
            "sigmoid" ℓ(d), with label smoothing cDPO; "robust", "hinge", "ipo", "exo_pair",
            "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sigmoid_norm",
            "aot" and "aot_unpaired" as in their papers. The last two sort over the batch: their
            losses belong to ranks, not to pairs. "sft" is -ln π of the preferred sequences, divided
            by the mean number of their tokens: its mean over pairs is that over all their tokens,
            TRL's "sft". A tuple of names is the sum of those losses, as in MPO.
        loss_weights: a number for each loss of such a tuple; None: 1 each.
        label_smoothing: probability ε in [0, 0.5] that a label is flipped, for sigmoid, robust
            (below 0.5), exo_pair (above 0; its paper takes 1e-3), aot and aot_unpaired; the others
            do not use it.
        discopop_tau: temperature τ of discopop, positive.
        rpo_alpha: weight of -ln π of the preferred sequence, averaged over its own tokens: RPO.
        dpop_lambda: λ of max(0, -s_w), which is taken off the margin s_w - s_l before β (50 in its
            paper): DPOP, for the losses of the margin alone (sigmoid, robust, hinge, ipo,
            sigmoid_norm, exo_pair, discopop).
        reference_free: ln π_ref counts as 0, whatever ref_logps holds.
        average: average all log-probs over the tokens of their sequences before anything else.
        f_divergence: "reverse_kl", "forward_kl", "js" or "alpha", the divergence that keeps the
            policy near the reference: f-DPO. With u = π/π_ref, s becomes f'(u) less its value at
            u = 1: ln u, 1 - 1/u, ln(2u / (1 + u)) or (1 - u^-α)/α; but for the first, in the losses
            of the margin alone.
        f_alpha: α in (0, 1] of "alpha".
        ld_alpha: α in [0, 1], by which the tokens beyond the length of the shorter sequence of
            a pair are weighed: LD-DPO. Needs the mask, and a ref_logps of tokens. None: 1.
        use_weighting: multiply the loss of each pair, all parts of it, by the `wpo_weights` of both
            of its sequences: WPO. Needs the mask and log_sum_sq_probs.

    Returns:
        losses (P,), not reduced, and rewards (B,) = β·s, detached, with s as f_divergence and
        average make it, but without ld_alpha, for it is of pairs; fp32 (fp64 for fp64 log-probs).

    The losses are differentiable, twice too, with respect to pi_logps and ref_logps. A kernel takes
    one launch forward, from token log-probs to losses and slopes, and one backward, and its bits do
    not depend on scheduling.

    Raises:
        TypeError: a tensor of the wrong kind, an unknown option.
        ValueError: shapes, devices, an index outside [0, B) (on a GPU an assertion in the kernel),
            cu_seqlens that do not fit (on a GPU an assertion too), an unknown loss_type, missing
            lengths, beta or an option out of range, options that do not go together.

    Source: 2305.18290 Eq. 7; MPO 2411.10442, RPO 2404.19733, DPOP 2402.13228, f-DPO 2309.16240,
    LD-DPO 2409.06411, WPO 2406.11827; the types as their functions say.

    Example:
        >>> pi_logps = torch.tensor([-10.0, -12.0, -14.0, -11.0], requires_grad=True)
        >>> ref_logps = torch.tensor([-11.0, -12.0, -13.0, -12.0])
        >>> chosen, rejected = torch.tensor([0, 1]), torch.tensor([2, 3])
        >>> losses, rewards = fastrlhf.dpo_loss(pi_logps, ref_logps, chosen, rejected, beta=0.1)
        >>> losses.detach(), rewards
        (tensor([0.5981, 0.7444]), tensor([ 0.1000,  0.0000, -0.1000,  0.1000]))
        >>> losses.mean().backward()
    """
    given = PairInputs(
        pi_logps, ref_logps, yw_idxs, yl_idxs, lengths, mask, log_sum_sq_probs, cu_seqlens
    )
    options_of_pairs = PreferenceOptions.parse("dpo_loss", options, LOSS_TYPES)
    return dpo_loss_of(options_of_pairs, given, beta, group=group, impl=impl)


class PairInputs(NamedTuple):
    """The tensors of `dpo_loss`, as the caller gave them; see there."""

    pi_logps: Tensor
    ref_logps: Tensor | None
    yw_idxs: Tensor
    yl_idxs: Tensor
    lengths: Tensor | None = None
    mask: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def with_mask(self, group: Group | None) -> "PairInputs":
        """Mark all packed tokens where they have no mask.

        Raises:
            ValueError: a group, over which only tokens can be spread, with log-probs of sequences.
        """
        spread = check_group(group) is not None
        if self.mask is not None:
            return self
        if spread and self.cu_seqlens is None:
            raise ValueError(
                "group: expected None for log-probs of sequences; sequence_logprobs(..., "
                "group=group) adds up their tokens"
            )
        if self.cu_seqlens is None:
            return self
        return replaced(self, mask=every_token("pi_logps", self.pi_logps, self.cu_seqlens))


def dpo_loss_of(
    options: PreferenceOptions,
    given: PairInputs,
    beta: float,
    *,
    group: Group | None = None,
    impl: str = "auto",
    whole_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what `dpo_loss` does with options that are checked. `whole_mask`: that of the whole
    batch, where only some of its sequences are here.
    """
    given = given.with_mask(group)
    layout = check_pairs(
        "pi_logps", given.pi_logps, given.yw_idxs, given.yl_idxs, given.mask, given.cu_seqlens,
        group,
    )  # fmt: skip
    ref_logps = _checked_reference(options, given, layout)
    _check_tokens_known(options, given, ref_logps, group)
    beta = check_positive("beta", beta)
    check_impl(impl)
    lengths = _needed_lengths(options, given)
    pi_logps, mask = given.pi_logps, given.mask
    if mask is not None:
        pi_logps, mask = layout.tokens(pi_logps), layout.tokens(mask)
    logps = Logps(pi_logps, ref_logps, mask, lengths, layout)
    if options.one_margin_loss is not None:
        return _kernel_losses(logps, (given.yw_idxs, given.yl_idxs), beta, options, group, impl)
    pair = given.yw_idxs.long(), given.yl_idxs.long()
    losses = summed_losses(logps, pair, beta, options, mask if whole_mask is None else whole_mask)
    if options.use_weighting:
        assert mask is not None and given.log_sum_sq_probs is not None
        weights = weights_of(pi_logps, layout.tokens(given.log_sum_sq_probs), mask, layout)
        losses = losses * (weights[pair[0]] * weights[pair[1]])
    scores = f_score(logps.scores(options.average), options.f_divergence, options.f_alpha)
    return losses, (beta * scores).detach()


def _kernel_losses(
    logps: Logps,
    pair: tuple[Tensor, Tensor],
    beta: float,
    options: PreferenceOptions,
    group: Group | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Compute the losses and rewards of a type that has a kernel."""
    assert options.one_margin_loss is not None
    if logps.mask is not None and group is not None:
        # The ranks add up their tokens first; from then on each has the numbers of all sequences.
        sums = logps.scores()
        lengths = logps.layout.counts(logps.mask)
        logps = Logps(sums, torch.zeros_like(sums), None, lengths, ROWS)
    return preference_loss(
        logps.policy, logps.ref, *pair, logps.mask, logps.lengths,
        loss_type=options.one_margin_loss, beta=beta, label_smoothing=options.label_smoothing,
        impl=impl, layout=logps.layout,
    )  # fmt: skip


def _needed_lengths(options: PreferenceOptions, given: PairInputs) -> Tensor | None:
    """Return the lengths where they are needed: for an average over tokens, without a mask. Others
    are checked all the same.
    """
    if options.averages and given.mask is None:
        check_lengths(given.lengths, given.pi_logps, f"{options.averages} averages over tokens")
        return given.lengths
    if given.lengths is not None:
        check_counts("lengths", given.lengths)
    return None


def _checked_reference(options: PreferenceOptions, given: PairInputs, layout: Layout) -> Tensor:
    """Check the log-probs of the reference and return them, or zeros (B,) where it is not to count,
    whatever was given.
    """
    pi_logps, ref_logps = given.pi_logps, given.ref_logps
    of_sequences = (layout.sequences(pi_logps),)
    zeros = pi_logps.new_zeros(of_sequences) if options.reference_free else None
    if ref_logps is None:
        ref_logps = zeros
    if ref_logps is None:
        raise TypeError(
            "ref_logps: expected a tensor, got NoneType; without a reference, reference_free=True"
        )
    check_floating("ref_logps", ref_logps)
    check_same_device("ref_logps", ref_logps, "pi_logps", pi_logps)
    of_tokens = ref_logps.ndim == 2 or ref_logps.shape == pi_logps.shape
    if given.mask is not None and of_tokens:
        check_shape("ref_logps", ref_logps, tuple(pi_logps.shape), "the shape of pi_logps")
        ref_logps = layout.tokens(ref_logps)
    else:
        check_shape("ref_logps", ref_logps, of_sequences, "one sum for each of B sequences")
    return ref_logps if zeros is None else zeros


def _check_tokens_known(
    options: PreferenceOptions, given: PairInputs, ref_logps: Tensor, group: Group | None
) -> None:
    """Raise where options look at tokens that are not given."""
    for name, asked in (
        ("ld_alpha", options.ld_alpha is not None), ("use_weighting", options.use_weighting),
    ):  # fmt: skip
        if asked and given.mask is None:
            raise ValueError(f"mask: expected a tensor with {name}, which is of tokens, got None")
    if options.ld_alpha is not None:
        if group is not None:
            raise ValueError(
                "group: expected None with ld_alpha, which needs the order of the tokens"
            )
        if ref_logps.ndim == 1 and not options.reference_free:
            raise ValueError(
                "ref_logps: expected log-probs of tokens, of the shape of pi_logps, with ld_alpha, "
                f"got {tuple(ref_logps.shape)}"
            )
    if given.log_sum_sq_probs is None:
        if options.use_weighting:
            raise ValueError("log_sum_sq_probs: expected a tensor with use_weighting, got None")
        return
    check_log_sum_sq_probs(given.log_sum_sq_probs, "pi_logps", given.pi_logps)
    if not options.use_weighting:
        raise ValueError("log_sum_sq_probs: expected None without use_weighting, got a tensor")
