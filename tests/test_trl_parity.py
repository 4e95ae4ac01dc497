"""Policy losses against TRL's own method, called on a stand-in for its trainer, so that none of
TRL's formulas is repeated here: each member of the family, denominators, clipping and the penalty.
"""

from typing import Any

import pytest
import torch
from support.trl_stand_in import (
    FAMILY,
    LONGEST,
    SHIFTS,
    TOKENS,
    B,
    Batch,
    T,
    assert_clips,
    assert_same,
    both,
    noise,
    of_ours,
    of_trl,
    outcome,
    rollout_weights,
)

from fastrlhf import grpo_loss


# The importance weight multiplies the surrogate before the penalty is added, which it leaves alone.
@pytest.mark.parametrize("kind", ["none", "tokens", "sequences"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("member", FAMILY)
def test_each_member_of_the_family_has_trls_loss_gradient_and_metrics(
    member: str, beta: float, kind: str
) -> None:
    found, theirs = both(member, weights=rollout_weights(kind), beta=beta)
    assert_clips(theirs)
    # For the shares of sequences, see test_shares_of_clipped_sequences_count_no_empty_one.
    assert_same(found, theirs, shares=member not in ("gspo", "luspo"))
    assert ("kl" in theirs.metrics) == (beta != 0)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_levels_and_unequal_bounds_go_with_every_member(
    loss_type: str, level: str, beta: float
) -> None:
    batch, (theirs, ours) = Batch(), FAMILY[loss_type]
    high = 1.35 if loss_type == "cispo" else 0.35  # see FAMILY
    given = {**theirs, "epsilon": 0.1, "epsilon_high": high, "importance_sampling_level": level}
    options = {**ours, "clip_low": 0.1, "clip_high": 0.35, "ratio_level": level}
    expected = of_trl(batch, **given, beta=beta)
    assert_clips(expected)
    found = of_ours(batch, grpo_loss, loss_type=loss_type, kl_coef=beta, **options)
    assert_same(found, expected, shares=level == "token")


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sequence_sum_is_trls_luspo(level: str) -> None:
    batch = Batch()
    theirs = of_trl(batch, loss_type="luspo", importance_sampling_level=level, beta=0.04)
    assert_clips(theirs)
    found = of_ours(batch, ratio_level=level, reduction="sequence-sum", kl_coef=0.04)
    assert_same(found, theirs, shares=level == "token")


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("member", FAMILY)
def test_without_old_logprobs_the_ratio_is_one(member: str, beta: float) -> None:
    # TRL leaves them out where a batch is used for one step.
    batch, (given, options) = Batch(), FAMILY[member]
    inputs: Any = {"old_per_token_logps": None}
    theirs = of_trl(batch, inputs, **given, beta=beta)
    found = of_ours(batch, grpo_loss, loss_type=member, old_logprobs=None, kl_coef=beta, **options)
    assert_same(found, theirs)
    assert theirs.d_logprobs.any()


@pytest.mark.parametrize("member", FAMILY)
def test_a_batch_without_tokens_has_loss_zero_and_no_gradient(member: str) -> None:
    batch, (given, options) = Batch(tool_mask=torch.zeros(B, T, dtype=torch.long)), FAMILY[member]
    theirs = of_trl(batch, {"num_items_in_batch": torch.tensor(0)}, **given, beta=0.04)
    found = of_ours(batch, grpo_loss, loss_type=member, kl_coef=0.04, **options)
    assert_same(found, theirs)
    assert found.loss == 0 and not found.d_logprobs.any()


# Denominators.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("member", ["dapo", "cispo"])
def test_the_normalizer_is_what_trl_makes_of_num_items_in_batch(
    member: str, training: bool
) -> None:
    # TRL counts the tokens of a generation, which spans processes and optimizer steps. Gradients
    # are summed over the accumulation steps of one of these, but averaged over processes.
    batch, (given, options) = Batch(), FAMILY[member]
    spread = {"processes": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 8}
    theirs = of_trl(batch, **given, **spread, training=training)
    normalizer = TOKENS / 2 * (2 / 8 if training else 1)
    options = {**options, "normalizer": torch.tensor(normalizer)}
    assert_same(of_ours(batch, grpo_loss, loss_type=member, **options), theirs)


@pytest.mark.parametrize("member", ["dapo", "cispo"])
def test_a_batch_that_is_the_global_one_needs_no_normalizer(member: str) -> None:
    batch, (given, _) = Batch(), FAMILY[member]
    theirs = of_trl(batch, {"num_items_in_batch": batch.mask.sum()}, **given)
    assert_same(of_ours(batch, grpo_loss, loss_type=member), theirs)


@pytest.mark.parametrize(
    ("member", "whole"),
    [("grpo", B), ("gspo", B), ("sapo", B), ("bnpo", None), ("dr_grpo", B * LONGEST)],
)
def test_with_accumulation_the_denominator_is_that_of_all_steps(
    member: str, whole: int | None
) -> None:
    batch, (given, options) = Batch(), FAMILY[member]
    theirs = of_trl(batch, **given, gradient_accumulation_steps=4)
    options = {**options, "normalizer": 4 * (batch.mask.sum() if whole is None else whole)}
    found = of_ours(batch, grpo_loss, loss_type=member, **options)
    assert_same(found, theirs, shares=member not in ("gspo", "luspo"))


# Two-sided clipping.


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("delta", [1.3, 2.0, 4.0])
def test_delta_is_dual_clip_where_it_is_above_the_bound(delta: float, level: str) -> None:
    # TRL bounds r·A by delta for every A; where A > 0, 1 + epsilon_high has bounded it before.
    batch = Batch()
    theirs = of_trl(batch, loss_type="bnpo", importance_sampling_level=level, delta=delta)
    assert_clips(theirs)
    found = of_ours(batch, ratio_level=level, dual_clip=delta)
    assert_same(found, theirs, shares=level == "token")
    assert of_ours(batch, ratio_level=level).loss > found.loss


@pytest.mark.parametrize("delta", [1.05, 1.2])
def test_a_smaller_delta_trades_places_with_the_bound(delta: float) -> None:
    # TRL bounds r by delta first, which makes delta the bound where A > 0. Where A < 0, the min of
    # two terms takes the larger ratio, which 1 + epsilon_high bounds. Ours has one option for each
    # sign of A. The losses meet where delta is 1 + epsilon_high; no paper has it smaller.
    batch = Batch()
    theirs = of_trl(batch, loss_type="bnpo", delta=delta)
    swapped = of_ours(batch, clip_high=delta - 1, dual_clip=1.2)
    assert_same(swapped, theirs, shares=False)
    as_named = of_ours(batch, dual_clip=delta)
    assert torch.allclose(as_named.loss, theirs.loss) == (delta == 1.2)
    # TRL asks whether a ratio is above the bound when it has already been clamped to delta.
    assert theirs.metrics["clip_ratio/high_mean"] == 0
    assert as_named.metrics["clip_ratio/high_mean"] > 0


# The penalty.


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trls_default_penalty_is_weighted_by_the_ratio(level: str, on_policy: bool) -> None:
    # use_bias_correction_kl, from DeepSeek-V3.2.
    batch = Batch()
    given = {"loss_type": "bnpo", "importance_sampling_level": level, "beta": 0.04}
    inputs: Any = {"old_per_token_logps": None} if on_policy else {}
    theirs = of_trl(batch, inputs, **given, use_bias_correction_kl=True)
    options = {"old_logprobs": None} if on_policy else {}
    found = of_ours(
        batch, ratio_level=level, kl_coef=0.04, kl_bias_correction=True, **options
    )  # fmt: skip
    assert_same(found, theirs, shares=level == "token")


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.5])
@pytest.mark.parametrize("member", ["grpo", "cispo", "gspo"])
def test_the_off_policy_mask_is_trls(member: str, threshold: float) -> None:
    batch, (given, options) = Batch(), FAMILY[member]
    named = {"off_policy_mask_threshold": threshold}
    theirs = of_trl(batch, **given, **named, beta=0.04)
    found = of_ours(batch, grpo_loss, loss_type=member, kl_coef=0.04, **options, **named)
    # Its clipped shares still count what the mask leaves out, as ours do.
    assert_same(found, theirs, shares=member != "gspo")
    without = of_trl(batch, **given, beta=0.04)
    assert found.loss != without.loss


@pytest.mark.parametrize("weighed", [False, True])
def test_vespo_is_trls(weighed: bool) -> None:
    batch = Batch(log_ratio=SHIFTS[:, None] / 10 + noise(0.1))
    weights = torch.rand(B, T, dtype=torch.float64) + 0.5 if weighed else None
    inputs: Any = {}
    old = batch.old
    if weights is not None:
        # TRL's ratio has the sampler's part, of all positions; ours has it in old_logprobs.
        weights = torch.where(batch.mask, weights, 1.0)
        inputs, old = {"importance_sampling_ratio": weights}, batch.old - weights.log()
    else:
        inputs = {"importance_sampling_ratio": None}
    theirs = of_trl(batch, inputs, loss_type="vespo", beta=0.04)
    found = of_ours(
        batch, grpo_loss, loss_type="vespo", old_logprobs=old, kl_coef=0.04, normalizer=TOKENS
    )
    assert_same(found, theirs)
    assert theirs.d_logprobs.any()


def test_on_policy_trls_default_penalty_has_the_gradient_of_k2() -> None:
    # d(r·k3) = (k3 + dk3/dlnπ) dlnπ at r = 1, which is ln π - ln ref: that of KL(π‖ref), where k3
    # alone has that of KL(ref‖π). The values stay those of k3.
    batch = Batch()
    inputs: Any = {"old_per_token_logps": None}
    given = {"loss_type": "bnpo", "beta": 0.04}
    theirs = of_trl(batch, inputs, **given, use_bias_correction_kl=True)
    k2 = of_ours(batch, old_logprobs=None, kl_coef=0.04, kl_estimator="k2")
    k3 = of_ours(batch, old_logprobs=None, kl_coef=0.04)
    torch.testing.assert_close(k2.d_logprobs, theirs.d_logprobs, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(k3.loss, theirs.loss, rtol=1e-12, atol=0)
    assert not torch.allclose(k3.d_logprobs, theirs.d_logprobs)


@pytest.mark.parametrize("member", ["bnpo", "dapo", "cispo"])
def test_the_entropy_bonus_agrees_where_this_batchs_tokens_are_averaged(member: str) -> None:
    batch, (given, _) = Batch(), FAMILY[member]
    theirs = of_trl(batch, {"num_items_in_batch": batch.mask.sum()}, **given, entropy_coef=0.01)
    assert_same(of_ours(batch, grpo_loss, loss_type=member, entropy_coef=0.01), theirs)
    assert theirs.d_entropy.any()


@pytest.mark.parametrize("member", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"])
def test_trls_entropy_bonus_is_averaged_over_tokens_whatever_the_loss(member: str) -> None:
    # Ours is a part of the loss of each token, and reduced with it. TRL's is ours without one, less
    # the mean over this batch's tokens, which is also what it reports.
    batch, (given, options) = Batch(), FAMILY[member]
    theirs = of_trl(batch, **given, entropy_coef=0.01)
    loss, metrics = grpo_loss(
        batch.logprobs, batch.old, batch.advantages, batch.mask, loss_type=member, **options
    )
    mean = batch.entropy[batch.mask].mean()
    found = outcome(batch, loss - 0.01 * mean, {**metrics, "entropy": mean.detach()})
    assert_same(found, theirs, shares=member not in ("gspo", "luspo"))
    as_reduced = of_ours(batch, grpo_loss, loss_type=member, entropy_coef=0.01, **options)
    assert not torch.allclose(as_reduced.d_entropy, theirs.d_entropy)
