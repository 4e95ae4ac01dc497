"""Metrics of policy losses against those that TRL's own method logs, and what the comparison with
it rejects.
"""

from typing import Any

import pytest
import torch
from support.trl_stand_in import (
    FAMILY,
    LENGTHS,
    METRICS,
    TAU,
    TOKENS,
    B,
    Batch,
    T,
    assert_clips,
    assert_same,
    both,
    of_ours,
    of_trl,
    outcome,
    rollout_weights,
)

from fastrlhf import grpo_loss, kl_penalty, policy_loss


def test_shares_of_clipped_sequences_count_no_empty_one() -> None:
    # TRL does, among those that are not clipped: it divides by B.
    found, theirs = both("gspo")
    counted = int((LENGTHS > 0).sum())
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        assert found.metrics[name] * counted / B == pytest.approx(theirs.metrics[name], rel=1e-6)
    batch = Batch(completion_mask=torch.ones(B, T, dtype=torch.long))
    theirs = of_trl(batch, **FAMILY["gspo"][0])
    assert_clips(theirs)
    assert_same(of_ours(batch, grpo_loss, loss_type="gspo"), theirs)


@pytest.mark.parametrize("member", [name for name in FAMILY if name not in ("gspo", "luspo")])
def test_a_token_of_weight_zero_counts_as_one_without_advantage(member: str) -> None:
    # Fused losses do not even look at it. TRL's default, sequence_mask, makes such weights, and
    # its metrics count what they hide: give it the product as the advantage to see ours.
    batch, (given, options) = Batch(), FAMILY[member]
    weights = (torch.rand(B, T) < 0.5).double()
    product = {"advantages": batch.advantages[:, None] * weights}
    found = of_ours(batch, grpo_loss, loss_type=member, rollout_weights=weights, **options)
    assert_same(found, of_trl(batch, product, **given))
    weighted = of_trl(batch, {"importance_sampling_ratio": weights}, **given, use_vllm=True)
    assert_same(found, weighted, shares=False)
    for name in weighted.metrics.keys() & METRICS.keys():
        if "clip" in name:
            assert found.metrics[METRICS[name]] < weighted.metrics[name]


@pytest.mark.parametrize(
    ("member", "changed"),
    [
        ("cispo", {"clip_high": 5.0}),
        ("grpo", {"normalizer": int((LENGTHS > 0).sum())}),
        ("dr_grpo", {"reduction": "token-mean", "normalizer": None}),
        ("dapo", {"normalizer": None}),
        ("bnpo", {"reduction": "sequence-mean"}),
        ("gspo", {"ratio_level": "token"}),
        ("dapo", {"clip_high": 0.2}),
        ("grpo", {"rollout_weights": None}),
        ("sapo", {"sapo_temperatures": (TAU, 1.0)}),
        ("grpo", {"old_logprobs": None}),
        ("grpo", {"kl_estimator": "k2"}),
    ],
    ids=[
        "raw bound", "mean over sequences with tokens", "tokens instead of the constant",
        "tokens of this batch", "mean over sequences", "ratio of tokens", "symmetric bounds",
        "no weights", "exchanged temperatures", "no old policy", "other estimator",
    ],
)  # fmt: skip
def test_the_comparison_rejects(member: str, changed: dict[str, Any]) -> None:
    found, theirs = both(member, weights=rollout_weights("tokens"), beta=0.04)
    assert_same(found, theirs, shares=False)
    found, theirs = both(member, weights=rollout_weights("tokens"), beta=0.04, **changed)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(found, theirs, shares=False)


def test_the_comparison_rejects_a_penalty_with_the_importance_weight() -> None:
    batch, weights = Batch(), torch.rand(B, T, dtype=torch.float64)
    inputs = {"importance_sampling_ratio": weights}
    theirs = of_trl(batch, inputs, loss_type="bnpo", beta=0.04, use_vllm=True)
    loss, metrics = policy_loss(
        batch.logprobs, batch.old, batch.advantages, batch.mask,
        rollout_weights=weights, ref_logprobs=batch.ref, entropy=batch.entropy,
    )  # fmt: skip
    kl = kl_penalty(batch.logprobs, batch.ref, "k3")
    assert_same(outcome(batch, loss + 0.04 * kl[batch.mask].mean(), metrics), theirs)
    weighted = outcome(batch, loss + 0.04 * (weights * kl)[batch.mask].mean(), metrics)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(weighted, theirs)


def test_the_comparison_rejects_a_gradient_through_cispos_ratio() -> None:
    # Where all ratios are below the bound, the value of r·A·ln π alone tells nothing.
    batch = Batch()
    theirs = of_trl(batch, loss_type="cispo", epsilon_high=1e4)
    found = of_ours(batch, surrogate="cispo", clip_high=1e4 - 1, normalizer=TOKENS)
    assert_same(found, theirs)
    terms = (batch.logprobs - batch.old).exp() * batch.advantages[:, None] * batch.logprobs
    mutant = outcome(batch, -terms[batch.mask].sum() / TOKENS, found.metrics)
    torch.testing.assert_close(mutant.loss, theirs.loss, rtol=1e-12, atol=0)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(mutant, theirs)


@pytest.mark.parametrize("name", [name for name in METRICS if name != "cispo_clip_ratio"])
def test_the_comparison_rejects_a_metric_that_is_off(name: str) -> None:
    found, theirs = both("bnpo", beta=0.04)
    assert_same(found, theirs)
    off = found.metrics | {name: found.metrics[name] * 1.001}
    with pytest.raises(AssertionError, match=name):
        assert_same(found._replace(metrics=off), theirs)
