"""GRPO and its family: sets of options of the policy loss, by the names that their users know.

The options are those of `policy_options.py`, the loss that takes them is in `policy.py`, and the
advantages come from `groups.py`.

Dims: B sequences, T tokens.
"""

import math
from typing import Literal, cast

from torch import Tensor

from fastrlhf.losses.policy import Metrics, policy_loss
from fastrlhf.losses.policy_options import (
    OPTIONAL_ARGUMENTS,
    PolicyArguments,
    PolicyLossOptions,
    PolicyOptions,
)
from fastrlhf.losses.signatures import check_options, showing
from fastrlhf.ops.checks import check_one_of
from fastrlhf.ops.keywords import Unpack

LossType = Literal[
    "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "gspo_token", "luspo", "gmpo", "cispo", "sapo",
    "vespo", "dppo_tv", "dppo_kl", "gpg", "dro", "prime_rl",
]  # fmt: skip

# The options by which the members differ, with the bounds of their papers.
_GSPO: PolicyLossOptions = {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}
_GRPO: dict[str, PolicyLossOptions] = {
    "grpo": {"reduction": "sequence-mean"},
    "bnpo": {"reduction": "token-mean"},
    "dr_grpo": {"reduction": "constant"},
    "dapo": {"reduction": "token-mean", "clip_high": 0.28},
    "gspo": {**_GSPO, "reduction": "sequence-mean"},
    "gspo_token": {**_GSPO, "ratio_level": "sequence-token", "reduction": "sequence-mean"},
    "luspo": {
        "ratio_level": "sequence", "reduction": "sequence-sum",
        "clip_low": 2e-3, "clip_high": 2.5e-3,
    },
    "gmpo": {
        "surrogate": "gmpo", "ratio_level": "sequence", "reduction": "sequence-mean",
        "clip_low": -math.expm1(-0.4), "clip_high": math.expm1(0.4),
    },
    "cispo": {"surrogate": "cispo", "reduction": "token-mean", "clip_high": 4.0},
    "sapo": {"surrogate": "sapo", "reduction": "sequence-mean"},
    "vespo": {"surrogate": "vespo", "ratio_level": "product", "reduction": "token-mean"},
    "dppo_tv": {"surrogate": "dppo_tv", "reduction": "token-mean"},
    "dppo_kl": {
        "surrogate": "dppo_kl", "reduction": "token-mean", "clip_low": 0.05, "clip_high": 0.05,
    },
    "gpg": {"surrogate": "plain", "reduction": "token-mean"},
    "dro": {
        "surrogate": "plain", "reduction": "token-mean",
        "kl_reference": "old", "kl_estimator": "k2", "kl_coef": 0.1,
    },
    "prime_rl": {
        "surrogate": "dppo_tv", "reduction": "token-mean",
        "kl_reference": "old", "kl_estimator": "k2", "kl_coef": 2e-3,
    },
}  # fmt: skip


class _Preset:
    """Stands in a signature for a default that depends on the loss_type."""

    def __repr__(self) -> str:
        return "..."


_OPTIONS = dict.fromkeys(PolicyOptions._fields, _Preset())


@showing(PolicyLossOptions, _OPTIONS)
def grpo_options(loss_type: LossType, **changes: Unpack[PolicyLossOptions]) -> PolicyLossOptions:
    """Return the options of `policy_loss` that a member of GRPO's family consists of.

    Eager equivalent: a dict; `policy_loss(..., **grpo_options(loss_type))` is
    `grpo_loss(..., loss_type=loss_type)`.

    They serve its fused forms too: `linear_policy_loss(..., **grpo_options("gspo"))`. What is
    passed besides replaces or joins them: `grpo_options("dapo", clip_high=0.3, kl_coef=0.01)`.

    Args:
        loss_type: "grpo" (2402.03300): mean over tokens, then over sequences.
            "bnpo": mean over the tokens of the batch.
            "dr_grpo" (2503.20783): sum divided by a constant, `normalizer`, which is B times the
            longest completion allowed.
            "dapo" (2503.14476): clip_high 0.28 and mean over tokens, those of the global batch if
            `normalizer` counts them.
            "gspo" (2507.18071): the sequence's ratio, clipped at 3e-4 and 4e-4; "gspo_token": the
            same with advantages of tokens, each of which has its own gradient.
            "luspo" (2602.05261): GSPO with the sum over the tokens of a sequence for their mean,
            clipped at 2e-3 and 2.5e-3.
            "gmpo" (2507.20673): the geometric mean of the ratios, each within e^-0.4 and e^0.4.
            "cispo" (2506.13585): ratio detached and at most 5 (clip_high 4; that bound is of
            2510.13786).
            "sapo" (2511.20347): a sigmoid for a clip.
            "vespo" (2602.10693): a weight r^k·e^(λ(1-r)) of the sequence's ratio for a clip.
            "dppo_tv", "dppo_kl" (2602.04879): bounds of the divergence, 0.2 and 0.05, for those of
            the ratio.
            "gpg" (2504.02546): the policy gradient itself, with the advantages of
            `group_advantages(kind="gpg")`.
            "dro" (2405.19107, as some trainers have it for tokens): the policy gradient, and β/2
            times the squared log-ratio, β = kl_coef = 0.1.
            "prime_rl": that trainer's default: DPPO's bounds, and 1e-3 times the squared log-ratio
            (kl_coef 2e-3), the penalty of Kimi K2.5 (2602.02276). Its old_logprobs are those of
            the sampler.

    Returns:
        A dict of options, for `**`.

    Raises:
        ValueError: an unknown loss_type.
        TypeError: an unknown option; what they are is checked by the function that takes them.

    Source: the papers that are named above; GRPO itself is 2402.03300 Eq. 3.

    Example:
        >>> options = fastrlhf.grpo_options("dapo", kl_coef=0.01)
        >>> options["clip_high"], options["reduction"], options["kl_coef"]
        (0.28, 'token-mean', 0.01)
    """
    check_one_of("loss_type", loss_type, _GRPO)
    check_options("grpo_options", changes, PolicyOptions._fields)
    return cast(PolicyLossOptions, {**_GRPO[loss_type], **changes})


@showing(PolicyArguments, {**OPTIONAL_ARGUMENTS, **_OPTIONS})
def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: LossType = "dapo",
    **options: Unpack[PolicyArguments],
) -> tuple[Tensor, Metrics]:
    """Compute a loss of GRPO's family: `policy_loss` with `grpo_options(loss_type)`.

    Eager equivalent: `policy_loss(..., **{**grpo_options(loss_type), **options})`, with its
    arguments. Advantages come from `group_advantages`; the papers' penalty is ref_logprobs and a
    kl_coef (0.04 in 2402.03300), which is 0 here unless given.

    Returns:
        loss and metrics, differentiable, as `policy_loss`.

    Raises:
        TypeError, ValueError: as `policy_loss` and `grpo_options`.

    Source: as `grpo_options`.

    Example:
        >>> old = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]])  # two answers to one prompt
        >>> logprobs = torch.tensor([[-0.9, -1.8], [-3.0, -1.0]])
        >>> advantages = fastrlhf.group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
        >>> mask = torch.ones(2, 2)
        >>> loss, metrics = fastrlhf.grpo_loss(logprobs, old, advantages, mask, loss_type="dapo")
        >>> loss
        tensor(-0.0577)
    """
    known = ("loss_type", *OPTIONAL_ARGUMENTS, *PolicyOptions._fields)
    check_options("grpo_loss", options, known)
    recipe = cast(PolicyArguments, {**grpo_options(loss_type), **options})
    return policy_loss(logprobs, old_logprobs, advantages, mask, **recipe)
