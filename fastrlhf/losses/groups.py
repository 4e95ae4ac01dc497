"""Advantages of samples over the others that answer the same prompt, without a value model.

Everything here is a constant of the training step: nothing is differentiable.

The formula of each kind is in `advantage_kinds.py`; `samples.py` puts the samples of a group next
to each other. The advantages go into `policy_loss` (`policy.py`).

Dims: B samples, each a sequence.
"""

from typing import Literal

import torch
from torch import Tensor

from fastrlhf.losses.advantage_kinds import (
    FORMULAS,
    SCALED,
    Formula,
    scaled_by_batch,
    whitened,
)
from fastrlhf.losses.arguments import check_like
from fastrlhf.losses.samples import (
    check_batch_is_finite,
    check_groups,
    counting,
    in_groups,
    kept,
    of_all_ranks,
)
from fastrlhf.ops.checks import (
    check_counts,
    check_one_of,
    check_positive,
    check_real,
    check_whole,
    known_on_host,
)
from fastrlhf.ops.ranks import Group, check_group
from fastrlhf.reference import accumulation_dtype

AdvantageKind = Literal[
    "grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline", "remax", "opo", "gpg",
    "pass@k", "grpo_passk",
]  # fmt: skip
ScaleRewards = Literal["group", "batch", "none"]


@torch.no_grad()
def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    kind: AdvantageKind = "grpo",
    scale_rewards: ScaleRewards | None = None,
    eps: float = 1e-4,
    lengths: Tensor | None = None,
    baselines: Tensor | None = None,
    k: int | None = None,
    valid: Tensor | None = None,
    group: Group | None = None,
) -> Tensor:
    """Compute the advantage of each sequence over the others that answer the same prompt.

    Call it once on all that was sampled, with a `group` that of every rank, before that is cut into
    minibatches: a group that is cut has another mean, and a group of one has no advantage at all.

    Eager equivalent, for the rewards R of one group, μ their mean, σ their sample standard
    deviation (n - 1) and n their number::

        grpo: (R - μ) / (σ + eps); with scale_rewards="batch", σ is that of the rewards of the
            whole batch; with "none", it is dr_grpo
        dr_grpo: R - μ
        rloo: R_i - mean of the other R_j = (R - μ) · n / (n - 1)
        reinforce++: (R - μ) / (σ + eps), where μ and σ are those of the whole batch
        reinforce++-baseline: (R - μ) / (σ + eps), where σ is that of R - μ over the whole batch
        remax: R - baselines
        opo: R - Σ lengths · R / Σ lengths
        gpg: (R - μ) · B / M, where M samples of B are in groups of unequal rewards
        pass@k: for rewards of 0 and 1, the part of a sample in whether k of its group have a 1
            among them: w of n are 0, q = C(w, k) / C(n, k), and so that is
            √(q / (1 - q)) for a 1, and -(n - w) / w times as much for a 0
        grpo_passk: (R - the largest other R) / (σ + eps) for the best one, 0 for the others

    Args:
        rewards: (B,) one for each sequence, floating, integer or bool.
        groups: (B,) integer, the same for the samples of one prompt; in any order, of any sizes.
        kind: see above.
        scale_rewards: what grpo divides by, in TRL's words; None: "group".
        eps: positive, added to what is divided by (verl has 1e-6); other kinds do not look at it.
        lengths: (B,) tokens of each sequence, for opo alone: whole numbers. A group without tokens
            gets the plain mean for its baseline.
        baselines: (B,) for remax alone: the reward of the prompt's greedy completion.
        k: for pass@k alone: how many samples are drawn. Groups of fewer get 0.
        valid: (B,) bool or 0/1; a sample with 0, whose reward can be anything (a verifier that
            crashed), gets 0 and counts nowhere. None: all are. Of those that count, a reward that
            is not finite makes its group NaN (its sample, for remax); where it would make the batch
            NaN, as for kinds that divide by what is of the batch, it is an error on the CPU.
        group: torch.distributed group whose ranks have parts of the batch, of any B each: rewards
            of one dtype, and groups that are the same where the prompt is, on whatever rank. The
            host waits for the sizes. None: this process has all.

    Returns:
        (B,) fp32 (fp64 for fp64 rewards), not differentiable. A group of equal rewards gets exactly
        0, so that the fused losses do not read its tokens; so does a group of one. (For
        reinforce++ the batch is the group; remax has none.) Over ranks, each has its part of what
        one process gets for all, in their order, in the same bits.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; an unknown kind; options
            of another kind; rewards for pass@k that are not 0 or 1 (on a GPU, their group is NaN);
            a group that is none, or without this process.

    Source: 2402.03300 (GRPO), 2503.20783 (Dr. GRPO), 2402.14740 (RLOO), 2501.03262 (REINFORCE++ and
    its baseline), 2310.10505 (ReMax), 2505.23585 (OPO), 2504.02546 (GPG), 2508.10751 §2.4 (pass@k),
    2503.19595 (grpo_passk, as verl calls it).

    Example:
        >>> rewards, groups = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])
        >>> fastrlhf.group_advantages(rewards, groups, kind="rloo")
        tensor([ 1., -1.,  1., -1.])
    """
    check_real("rewards", rewards)
    if rewards.ndim != 1:
        raise ValueError(f"rewards: expected shape (B,), got {tuple(rewards.shape)}")
    check_groups(groups, rewards)
    formula, eps = _formula(kind, scale_rewards), check_positive("eps", eps)
    _check_of_kind("lengths", lengths, kind, "opo", rewards)
    _check_of_kind("baselines", baselines, kind, "remax", rewards)
    _check_k(k, kind)
    check_group(group)
    counts, dtype = counting(valid, rewards), accumulation_dtype(rewards.dtype)
    if baselines is not None:
        return (kept(rewards, counts) - kept(baselines, counts)).to(dtype)
    if lengths is None:
        lengths = counts
    # In dtypes that are the same on every rank, and that all backends send.
    parts = rewards.to(dtype), groups.long(), counts.to(torch.uint8), lengths.to(dtype)
    (rewards, groups, counts, lengths), this_rank = of_all_ranks(parts, group)
    counts = counts != 0
    rewards = kept(rewards, counts)
    if kind == "pass@k":
        _check_binary(rewards)
    if kind == "reinforce++":
        groups = torch.zeros_like(groups)
    if kind == "reinforce++" or formula in (scaled_by_batch, whitened):
        check_batch_is_finite(rewards, _option_as_given(kind, scale_rewards))
    samples, places = in_groups(rewards, groups, counts, lengths, k)
    return formula(samples, eps)[places][this_rank]


def _formula(kind: str, scale_rewards: str | None) -> Formula:
    check_one_of("kind", kind, FORMULAS)
    if scale_rewards is None:
        return FORMULAS[kind]
    check_one_of("scale_rewards", scale_rewards, SCALED)
    if kind != "grpo":
        raise ValueError(
            f"scale_rewards: expected None for kind {kind!r}, of kind 'grpo' alone, got "
            f"{scale_rewards!r}"
        )
    return SCALED[scale_rewards]


def _option_as_given(kind: str, scale_rewards: str | None) -> str:
    return f"kind {kind!r}" if scale_rewards is None else f"scale_rewards {scale_rewards!r}"


def _check_of_kind(name: str, x: Tensor | None, kind: str, its_kind: str, rewards: Tensor) -> None:
    """Check numbers (B,) that one kind needs, and no other takes."""
    if kind != its_kind:
        if x is not None:
            raise ValueError(f"{name}: expected None for kind {kind!r}, of kind {its_kind!r} alone")
        return
    if x is None:
        raise ValueError(f"{name}: expected a tensor of shape (B,) for kind {kind!r}, got None")
    (check_counts if name == "lengths" else check_real)(name, x)
    check_like(name, x, "rewards", rewards)


def _check_k(k: int | None, kind: str) -> None:
    if kind == "pass@k":
        check_whole("k", k, 1)  # type: ignore[arg-type]
    elif k is not None:
        raise ValueError(f"k: expected None for kind {kind!r}, of kind 'pass@k' alone, got {k!r}")


def _check_binary(rewards: Tensor) -> None:
    """Raise ValueError, on the CPU, for what is neither 0 nor 1."""
    if known_on_host(rewards):
        other = (rewards != 0) & (rewards != 1)
        if other.any():
            worst = rewards[other][0].item()
            raise ValueError(f"rewards: expected 0 and 1 for kind 'pass@k', got {worst}")
