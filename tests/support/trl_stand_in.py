"""A stand-in for TRL's trainer, on which its methods are called, and the comparison of what they
compute with what this library computes.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastrlhf import grpo_loss, policy_loss

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
