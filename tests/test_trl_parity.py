"""Policy losses, advantages and reward losses against TRL's own methods, called on a stand-in for
their trainer, so that none of TRL's formulas is repeated here.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
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

pytest.importorskip("trl", reason="needs trl")

# The third sequence has no token at all, the seventh no advantage. There are nine of them, because
# TRL has the n / (n - 1) of a standard deviation in fp32 even for fp64: 9 / 8 and 3 / 2 are exact.
LENGTHS = torch.tensor([9, 4, 0, 7, 1, 9, 5, 8, 6])
ADVANTAGES = torch.tensor([1.3, -0.7, 0.9, -1.6, 0.4, -1.1, 0.0, 0.8, -0.2], dtype=torch.float64)
# Of ln π - ln π_old, so that sequences and tokens pass every bound below, on both of its sides.
SHIFTS = torch.tensor([1.5, -1.0, 0.0, 2.0, -0.5, 0.1, 0.3, 0.0, -0.2], dtype=torch.float64)
B, T = len(LENGTHS), 9
LONGEST = 16  # completion allowed
TOKENS = 64  # of the global batch, of which this one is a part
TAU = 1.0625  # of sapo, instead of 1.05: see there

# The options that make TRL's loss from the member of the family which grpo_loss has by that name,
# with the bounds that ours has by default; and what ours needs besides.
FAMILY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # The mean over sequences counts all B of them, an empty one too; so it does for gspo and sapo.
    "grpo": ({"loss_type": "grpo"}, {}),
    "bnpo": ({"loss_type": "bnpo"}, {}),
    # The constant is neither a count of tokens nor of sequences, but their largest product.
    "dr_grpo": (
        {"loss_type": "dr_grpo", "max_completion_length": LONGEST},
        {"normalizer": B * LONGEST},
    ),
    # num_items_in_batch counts the tokens of the global batch, as our normalizer should.
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"normalizer": TOKENS}),
    "gspo": (
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
        },
        {},
    ),
    # TRL's epsilon_high is the bound of the ratio itself here; our clip_high, 4.0, its offset from
    # 1, as it is for every other member in TRL too.
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, {"normalizer": TOKENS}),
    "luspo": (
        {
            "loss_type": "luspo",
            "importance_sampling_level": "sequence",
            "epsilon": 2e-3,
            "epsilon_high": 2.5e-3,
        },
        {},
    ),
    # TRL has temperatures in fp32 even for fp64, which ours keeps: 1.05 would not be the same.
    "sapo": ({"loss_type": "sapo", "sapo_temperature_neg": TAU}, {"sapo_temperatures": (1.0, TAU)}),
}

# TRL's name of a metric, and ours. (It logs extremes over sequences as well.)
METRICS = {
    "kl": "kl",
    "entropy": "entropy",
    "clip_ratio/low_mean": "clip_ratio/low_mean",
    "clip_ratio/high_mean": "clip_ratio/high_mean",
    "clip_ratio/region_mean": "clip_ratio/region_mean",
    "cispo_clip_ratio": "clip_ratio/high_mean",
}
ONLY_IN_TRL = {"clip_ratio/low_min", "clip_ratio/high_max", "policy_loss", "entropy_coef"}
ONLY_IN_TRL |= {"vespo/phi_seq_mean"}


def from_trl(name: str) -> tuple[Any, Any]:
    """Import a trainer and its config; importorskip keeps the warnings of an import to itself."""
    trainer = pytest.importorskip(f"trl.trainer.{name.lower()}_trainer", reason="needs trl")
    config = pytest.importorskip(f"trl.trainer.{name.lower()}_config", reason="needs trl")
    return getattr(trainer, f"{name}Trainer"), getattr(config, f"{name}Config")


def same(x: Tensor, reduction: str = "none") -> Tensor:
    """Gather or reduce over one process."""
    return x


def stand_in(
    name: str, *, training: bool = True, processes: int = 1, **given: Any
) -> SimpleNamespace:
    """Make what the methods of a trainer read from it: TRL's default options, but those given."""
    _, config = from_trl(name)
    options = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    assert given.keys() <= options.keys(), f"no options of {name}: {given.keys() - options.keys()}"
    # What TRL sets when it makes a config; and a plain penalty, which its default is not: see
    # test_trls_default_penalty_is_weighted_by_the_ratio.
    options |= {"steps_per_generation": 1, "pad_to_multiple_of": None}
    options |= {"use_bias_correction_kl": False} | given
    low, high = options.get("epsilon"), options.get("epsilon_high")
    changed = {
        "epsilon_low": low,
        "epsilon_high": low if high is None else high,
        "current_gradient_accumulation_steps": options["gradient_accumulation_steps"],
        "_entropy_bonus_enabled": options.get("entropy_coef", 0.0) != 0.0,
        "aux_loss_enabled": False,
        "model": SimpleNamespace(training=training, is_gradient_checkpointing=False),
        "accelerator": SimpleNamespace(
            device=torch.device("cpu"), num_processes=processes, process_index=0,
            sync_gradients=True, gather=same, gather_for_metrics=same, reduce=same,
        ),
        "_metrics": defaultdict(lambda: defaultdict(list)),
    }  # fmt: skip
    return SimpleNamespace(**{**options, **changed}, args=SimpleNamespace(**options))


def ragged() -> Tensor:
    return (torch.arange(T) < LENGTHS[:, None]).long()


def holes() -> Tensor:
    """Some tokens amid the completions that a tool wrote."""
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, 3] = mask[3, 0] = mask[5, 4:6] = 0
    return mask


def noise(scale: float) -> Tensor:
    return scale * torch.randn(B, T, dtype=torch.float64)


@dataclass
class Batch:
    """One batch of fp64 tensors. Outside of the mask are numbers like those inside: TRL multiplies
    by the mask, so that NaN would stay.
    """

    old: Tensor = field(default_factory=lambda: -3 + noise(1.0))
    log_ratio: Tensor = field(default_factory=lambda: SHIFTS[:, None] + noise(0.7))
    entropy: Tensor = field(default_factory=lambda: noise(1.0).abs().requires_grad_())
    completion_mask: Tensor = field(default_factory=ragged)
    tool_mask: Tensor = field(default_factory=holes)
    advantages: Tensor = field(default_factory=lambda: ADVANTAGES)

    def __post_init__(self) -> None:
        self.logprobs = (self.old + self.log_ratio).requires_grad_()
        self.ref = self.logprobs.detach() + noise(0.5)
        self.mask = (self.completion_mask * self.tool_mask).bool()

    def for_trl(self) -> dict[str, Tensor]:
        ids = torch.zeros(B, 0, dtype=torch.long)
        return {
            "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids.new_zeros(B, T),
            "completion_mask": self.completion_mask, "tool_mask": self.tool_mask,
            "advantages": self.advantages, "old_per_token_logps": self.old,
            "ref_per_token_logps": self.ref, "num_items_in_batch": torch.tensor(TOKENS),
            "importance_sampling_ratio": torch.ones(B, 1, dtype=torch.float64),
        }  # fmt: skip


class Outcome(NamedTuple):
    """What a loss returns, and its gradient with respect to log-probs and entropies."""

    loss: Tensor
    d_logprobs: Tensor
    d_entropy: Tensor
    metrics: dict[str, float]


def outcome(batch: Batch, loss: Tensor, metrics: dict[str, Any]) -> Outcome:
    gradients = torch.autograd.grad(
        loss,
        (batch.logprobs, batch.entropy),
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return Outcome(loss.detach(), *gradients, {name: float(x) for name, x in metrics.items()})


def of_trl(
    batch: Batch, inputs: dict[str, Tensor] | None = None, *, name: str = "GRPO", **given: Any
) -> Outcome:
    """Run a trainer's own _compute_loss."""
    trainer = stand_in(name, **given)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        batch.logprobs, batch.entropy, None,
    )  # fmt: skip
    for static in ("get_off_policy_mask", "get_gamma_weights"):
        if hasattr(from_trl(name)[0], static):
            setattr(trainer, static, getattr(from_trl(name)[0], static))
    inputs = batch.for_trl() | (inputs or {})
    loss = from_trl(name)[0]._compute_loss(trainer, None, inputs)
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    return outcome(batch, loss, {name: values[-1] for name, values in metrics.items()})


def of_ours(batch: Batch, function: Callable[..., Any] = policy_loss, **options: Any) -> Outcome:
    """Run one of our losses, which has the penalty's reference and the entropy if only to report
    them.
    """
    inputs = {
        "old_logprobs": batch.old, "ref_logprobs": batch.ref, "entropy": batch.entropy,
    } | options  # fmt: skip
    return outcome(
        batch,
        *function(batch.logprobs, advantages=batch.advantages, mask=batch.mask, **inputs),
    )


def assert_same(found: Outcome, theirs: Outcome, *, shares: bool = True) -> None:
    """Compare everything; without shares, all but the shares of clipped ratios."""
    torch.testing.assert_close(found.loss, theirs.loss, rtol=1e-12, atol=1e-15)
    # Sums of terms that cancel, and slopes of saturated sigmoids, have lost digits on both sides.
    for name in ("d_logprobs", "d_entropy"):
        a, b = getattr(found, name), getattr(theirs, name)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    for name in theirs.metrics.keys() - ONLY_IN_TRL:
        if shares or "clip" not in name:
            # TRL takes means of shares in fp32.
            tolerance = 1e-6 if "clip" in name else 1e-12
            value = found.metrics[METRICS[name]]
            assert value == pytest.approx(theirs.metrics[name], rel=tolerance), name


def assert_clips(theirs: Outcome) -> None:
    """Check that clipping happens at each bound that there is, or the comparison shows little."""
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "cispo_clip_ratio"):
        assert theirs.metrics.get(name, 1.0) > 0, name


def rollout_weights(kind: str) -> Tensor | None:
    shape = {"tokens": (B, T), "sequences": (B, 1)}.get(kind)
    return None if shape is None else torch.rand(shape, dtype=torch.float64) * 2 + 0.1


def both(
    member: str, *, weights: Tensor | None = None, beta: float = 0.0, **changed: Any
) -> tuple[Outcome, Outcome]:
    """Run a member of the family, ours with changed options."""
    batch, (theirs, ours) = Batch(), FAMILY[member]
    inputs = {} if weights is None else {"importance_sampling_ratio": weights}
    given = {**theirs, "beta": beta, "use_vllm": weights is not None}
    options = {**ours, "kl_coef": beta, "rollout_weights": weights, "loss_type": member, **changed}
    return of_ours(batch, grpo_loss, **options), of_trl(batch, inputs, **given)


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


# Metrics.


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


# From completions to advantages and weights.


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


# RLOO and reward models.


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


# What the comparison rejects.


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
