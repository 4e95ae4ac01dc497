"""The DPO family: losses of preference pairs from log-probs under a policy and a reference model.

A loss that depends on the margin between the two sequences alone is a row of `MARGIN_LOSSES` (in
`fastrlhf.reference`, and with a kernel); any other is a row of `PAIR_LOSSES` of `pair_losses.py`.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed, P pairs.
"""

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
            "compiled" or "eager", which are the same here. The losses of the margin alone
            (sigmoid, robust, hinge, ipo, sigmoid_norm) have a kernel, the others, sums of several
            and the options from rpo_alpha on (but for reference_free) run in eager PyTorch whatever
            it says.

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
    return dpo_loss_of(
        PreferenceOptions.parse("dpo_loss", options, LOSS_TYPES), pi_logps, ref_logps, yw_idxs,
        yl_idxs, beta, lengths=lengths, mask=mask, log_sum_sq_probs=log_sum_sq_probs,
        cu_seqlens=cu_seqlens, group=group, impl=impl,
    )  # fmt: skip


def dpo_loss_of(
    options: PreferenceOptions,
    pi_logps: Tensor,
    ref_logps: Tensor | None,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    log_sum_sq_probs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group: Group | None = None,
    impl: str = "auto",
    whole_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what `dpo_loss` does with options that are checked. `whole_mask`: that of the whole
    batch, of which the mask has some sequences.
    """
    if check_group(group) is not None and mask is None and cu_seqlens is None:
        raise ValueError(
            "group: expected None for log-probs of sequences; sequence_logprobs(..., group=group) "
            "adds up their tokens"
        )
    if mask is None and cu_seqlens is not None:
        mask = every_token("pi_logps", pi_logps, cu_seqlens)
    layout = check_pairs("pi_logps", pi_logps, yw_idxs, yl_idxs, mask, cu_seqlens, group)
    ref_logps = _checked_reference(ref_logps, pi_logps, mask, layout, options)
    _check_tokens_known(options, pi_logps, ref_logps, mask, log_sum_sq_probs, group)
    beta = check_positive("beta", beta)
    check_impl(impl)
    if options.averages and mask is None:
        check_lengths(lengths, pi_logps, f"{options.averages} averages over tokens")
    elif lengths is not None:
        check_counts("lengths", lengths)  # though nothing looks at them
        lengths = None
    if mask is not None:
        pi_logps, mask = layout.tokens(pi_logps), layout.tokens(mask)
    logps, pair = Logps(pi_logps, ref_logps, mask, lengths, layout), (yw_idxs, yl_idxs)
    if options.one_margin_loss is not None:
        return _margin_losses(logps, pair, beta, options, group, impl)
    pair = yw_idxs.long(), yl_idxs.long()
    losses = summed_losses(logps, pair, beta, options, mask if whole_mask is None else whole_mask)
    if options.use_weighting:
        assert mask is not None and log_sum_sq_probs is not None
        weights = weights_of(pi_logps, layout.tokens(log_sum_sq_probs), mask, layout)
        losses = losses * (weights[pair[0]] * weights[pair[1]])
    scores = f_score(logps.scores(options.average), options.f_divergence, options.f_alpha)
    return losses, (beta * scores).detach()


def _margin_losses(
    logps: Logps,
    pair: tuple[Tensor, Tensor],
    beta: float,
    options: PreferenceOptions,
    group: Group | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The losses of a type that has a kernel."""
    assert options.one_margin_loss is not None
    if logps.mask is not None and group is not None:  # its tokens first: the rest is of sequences
        sums = logps.scores()
        lengths = logps.layout.counts(logps.mask)
        logps = Logps(sums, torch.zeros_like(sums), None, lengths, ROWS)
    return preference_loss(
        logps.policy, logps.ref, *pair, logps.mask, logps.lengths,
        loss_type=options.one_margin_loss, beta=beta, label_smoothing=options.label_smoothing,
        impl=impl, layout=logps.layout,
    )  # fmt: skip


def _checked_reference(
    ref_logps: Tensor | None,
    pi_logps: Tensor,
    mask: Tensor | None,
    layout: Layout,
    options: PreferenceOptions,
) -> Tensor:
    """Check the log-probs of the reference; zeros (B,) where it is not to count."""
    sums = (layout.sequences(pi_logps),)
    nothing = pi_logps.new_zeros(sums) if options.reference_free else None
    given = nothing if ref_logps is None else ref_logps
    if given is None:
        raise TypeError(
            "ref_logps: expected a tensor, got NoneType; without a reference, reference_free=True"
        )
    check_floating("ref_logps", given)
    check_same_device("ref_logps", given, "pi_logps", pi_logps)
    if mask is not None and (given.ndim == 2 or given.shape == pi_logps.shape):
        check_shape("ref_logps", given, tuple(pi_logps.shape), "the shape of pi_logps")
        given = layout.tokens(given)
    else:
        check_shape("ref_logps", given, sums, "one sum for each of B sequences")
    return given if nothing is None else nothing


def _check_tokens_known(
    options: PreferenceOptions,
    pi_logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor | None,
    log_sum_sq_probs: Tensor | None,
    group: Group | None,
) -> None:
    """Raise where options look at tokens that are not given."""
    for name, asked in (
        ("ld_alpha", options.ld_alpha is not None), ("use_weighting", options.use_weighting),
    ):  # fmt: skip
        if asked and mask is None:
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
    if log_sum_sq_probs is None:
        if options.use_weighting:
            raise ValueError("log_sum_sq_probs: expected a tensor with use_weighting, got None")
        return
    check_log_sum_sq_probs(log_sum_sq_probs, "pi_logps", pi_logps)
    if not options.use_weighting:
        raise ValueError("log_sum_sq_probs: expected None without use_weighting, got a tensor")
