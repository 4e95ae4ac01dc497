"""Advantages, rollout weights and reward losses against TRL's own methods, called on a stand-in for
their trainer, so that none of TRL's formulas is repeated here.
"""

from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.trl_stand_in import (
    FAMILY,
    SHIFTS,
    TOKENS,
    B,
    Batch,
    T,
    assert_clips,
    assert_same,
    from_trl,
    noise,
    of_ours,
    of_trl,
    outcome,
    stand_in,
)
from torch import Tensor

from fastrlhf import (
    gdpo_advantages,
    group_advantages,
    grpo_loss,
    kl_penalty,
    policy_loss,
    reward_loss,
    shaped_rewards,
)


def scored(
    name: str,
    rewards: Tensor,
    size: int,
    batch: Batch,
    weights: Sequence[float] = (1.0,),
    **given: Any,
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Let a trainer score completions in groups of a size, and return the inputs of its loss.
    Rewards are (B,), or (B, R) of as many functions as there are weights.
    """
    trainer = stand_in(name, num_generations=size, **given)
    ids = [[1] * n for n in batch.completion_mask.sum(-1).tolist()]
    sampled = (batch.old - batch.log_ratio).tolist()
    sampling = [row[: len(i)] for row, i in zip(sampled, ids, strict=True)]
    prompts = [[1]] * B
    generated = {
        "GRPO": (prompts, ids, batch.tool_mask.tolist(), ids, sampling, {}, None, None),
        "RLOO": (prompts, ids, ids),
    }
    vars(trainer).update(
        environment_factories=None, environments=None, tools=None, ref_model=object(),
        reward_func_names=[f"reward {i}" for i, _ in enumerate(weights)], reward_funcs=weights,
        reward_weights=torch.tensor(weights, dtype=torch.float64),
        _tokenizer=SimpleNamespace(pad_token_id=0), _pending_extra_logs={}, _pending_metrics={},
        _logs=defaultdict(list, rewards=defaultdict(list)),
        _generate=lambda prompts: generated[name],
        _calculate_rewards=lambda *_: rewards.view(B, -1),
        _get_per_token_logps_and_entropies=lambda model, *_, **__: (
            batch.ref if model is trainer.ref_model else batch.old, None, None,
        ),
    )  # fmt: skip
    inputs = [{"prompt": "a"}] * B
    output = from_trl(name)[0]._generate_and_score_completions(trainer, inputs)
    return output, trainer._metrics["train"]


@pytest.mark.parametrize("size", [1, 3, 9])
@pytest.mark.parametrize(
    ("name", "given", "kind"),
    [
        ("GRPO", {}, "grpo"),
        ("GRPO", {"scale_rewards": "none"}, "dr_grpo"),
        ("RLOO", {"beta": 0.0}, "rloo"),
    ],
    ids=["grpo", "dr_grpo", "rloo"],
)
def test_advantages_are_trls(name: str, given: dict[str, Any], kind: str, size: int) -> None:
    rewards = torch.randn(B, dtype=torch.float64)
    rewards[:3] = 0.1  # a group of equal rewards, whose mean is not quite 0.1
    theirs = scored(name, rewards, size, Batch(), **given)[0]["advantages"]
    found = group_advantages(rewards, torch.arange(B) // size, kind=kind)
    # A rounding error of 1e-17 in TRL's mean is divided by 1e-4.
    torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-12)
    assert size == 1 or theirs.any()


def test_reinforce_plus_plus_is_a_group_of_the_whole_batch_in_trl() -> None:
    rewards = torch.randn(B, dtype=torch.float64)
    groups = torch.arange(B) // 3
    found = group_advantages(rewards, groups, kind="reinforce++")
    whole = scored("GRPO", rewards, B, Batch())[0]["advantages"]
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1, 3, 9])
def test_scales_of_rewards_are_trls(size: int) -> None:
    rewards = torch.randn(B, dtype=torch.float64)
    rewards[4] = torch.nan  # no function has scored it
    # TRL divides n by n - 1 in fp32, whatever the rewards are in.
    for scale in ("group", "batch", "none"):
        theirs = scored("GRPO", rewards, size, Batch(), scale_rewards=scale)[0]["advantages"]
        groups = torch.arange(B) // size
        found = group_advantages(rewards, groups, scale_rewards=scale, valid=rewards.isfinite())
        torch.testing.assert_close(found, theirs, rtol=1e-7, atol=1e-12)
        assert size == 1 or found.any()


@pytest.mark.parametrize("size", [3, 9])
@pytest.mark.parametrize("missing", [False, True])
def test_several_rewards_are_those_that_trl_normalizes_before_their_sum(
    missing: bool, size: int
) -> None:
    rewards, weights = torch.randn(B, 3, dtype=torch.float64), [1.0, 0.5, -2.0]
    if missing:
        rewards[4], rewards[7, 1] = torch.nan, torch.nan
    given = {"multi_objective_aggregation": "normalize_then_sum", "weights": weights}
    theirs = scored("GRPO", rewards, size, Batch(), **given)[0]["advantages"]
    valid = rewards.isfinite() if missing else None
    found = gdpo_advantages(rewards, torch.arange(B) // size, weights=weights, valid=valid)
    torch.testing.assert_close(found, theirs, rtol=1e-7 if missing else 1e-12, atol=1e-12)
    assert found.any()


def test_rloo_has_its_penalty_in_the_rewards() -> None:
    batch, scores = Batch(), torch.randn(B, dtype=torch.float64)
    output, metrics = scored("RLOO", scores, 3, batch, beta=0.05)
    mask = batch.completion_mask
    rewards = shaped_rewards(scores, batch.old, batch.ref, mask, kl_coef=0.05).sum(-1)
    # The score of an empty completion has no token to go to, while TRL has one for each sequence.
    rewards = rewards + torch.where(mask.any(-1), 0.0, scores)
    found = group_advantages(rewards, torch.arange(B) // 3, kind="rloo")
    torch.testing.assert_close(found, output["advantages"], rtol=1e-12, atol=0)
    kl = kl_penalty(batch.old, batch.ref, "k1")[mask.bool()].mean()
    assert metrics["kl"] == [pytest.approx(kl.item(), rel=1e-12)]


@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
@pytest.mark.parametrize("member", FAMILY)
def test_weights_that_trl_makes_from_vllms_logprobs_serve_as_ours(member: str, mode: str) -> None:
    batch, (given, options) = Batch(), FAMILY[member]
    given = {**given, "use_vllm": True, "vllm_importance_sampling_mode": mode, "beta": 0.04}
    inputs, _ = scored("GRPO", batch.advantages, 3, batch, **given)
    weights = inputs["importance_sampling_ratio"]
    assert weights.shape == ((B, T) if mode.startswith("token") else (B, 1))
    assert (weights[batch.mask.any(-1)] == 0).any() == mode.endswith("mask")
    inputs["num_items_in_batch"] = torch.tensor(TOKENS)
    batch.advantages = inputs["advantages"]
    found = of_ours(
        batch, grpo_loss, loss_type=member, rollout_weights=weights, kl_coef=0.04, **options
    )
    assert_same(found, of_trl(batch, inputs, **given), shares=False)


@pytest.mark.parametrize("bounds", [(0.2, 0.2), (0.1, 0.35)])
def test_rloo_is_ppos_loss_of_summed_logprobs(bounds: tuple[float, float]) -> None:
    # Its ratio is that of whole sequences. ratio_level="sequence" takes a mean over tokens, so the
    # sums have to be given, as sequences of one token. An empty one counts, with a ratio of 1.
    batch = Batch(log_ratio=0.2 * SHIFTS[:, None] + noise(0.1))
    old = (batch.old * batch.completion_mask).sum(1)
    theirs = of_trl(
        batch, {"old_logps": old}, name="RLOO", epsilon=bounds[0], epsilon_high=bounds[1]
    )
    assert_clips(theirs)
    sums = (batch.logprobs * batch.completion_mask).sum(1, keepdim=True)
    loss, metrics = policy_loss(
        sums, old[:, None], batch.advantages, torch.ones(B, 1, dtype=torch.bool),
        clip_low=bounds[0], clip_high=bounds[1],
    )  # fmt: skip
    metrics["entropy"] = batch.entropy.detach()[batch.completion_mask.bool()].mean()
    assert_same(outcome(batch, loss, metrics), theirs)


@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_trls_reward_loss_is_the_mean_of_ours(with_margin: bool, center: float | None) -> None:
    scores = torch.randn(16, 1, dtype=torch.float64, requires_grad=True)
    margin = torch.rand(8, dtype=torch.float64)
    trainer = stand_in("Reward", center_rewards_coefficient=center)
    vars(trainer).update(_total_train_tokens=0, _tp_size=1)
    inputs = {"attention_mask": torch.ones(16, 1)} | ({"margin": margin} if with_margin else {})
    theirs = from_trl("Reward")[0].compute_loss(
        trainer, lambda **_: SimpleNamespace(logits=scores), inputs
    )
    chosen, rejected = scores.squeeze(1).chunk(2)
    losses, metrics = reward_loss(
        chosen, rejected, margin=margin if with_margin else None, center_coef=center or 0.0
    )
    torch.testing.assert_close(losses.mean(), theirs, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(x, scores)[0] for x in (losses.mean(), theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-16)
    # In metrics, both have the margin of the scores, which the asked-for margin is not taken from.
    for name, ours in (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):
        assert trainer._metrics["train"][name] == [pytest.approx(metrics[ours].item(), rel=1e-12)]
