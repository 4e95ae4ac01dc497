"""The losses of PPO and GRPO on what a tiny model wrote, beside formulas written here."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for name in ("transformers", "peft", "accelerate", "vaderSentiment", "matplotlib", "tensorboard"):
    pytest.importorskip(name)

from support.compare import budget  # noqa: E402
from support.recipe_models import (  # noqa: E402, F401  the fixtures are of every test
    PEFT_READS_AN_OLD_NAME,
    one_thread,
    randomize_adapters,
    write_tiny_model,
)
from torch import Tensor  # noqa: E402

from fastrlhf.recipes import grpo, ppo  # noqa: E402
from fastrlhf.recipes.models import add_adapters, load_model  # noqa: E402
from fastrlhf.recipes.rollout import rollout  # noqa: E402

pytestmark = pytest.mark.filterwarnings(PEFT_READS_AN_OLD_NAME)

NEW_TOKENS = 8
TEMPERATURE = 1.7
# Ratios of 1 to the rounding of log-probs of a dozen nats in either of two forwards.
ROUNDING = budget(0.0, torch.float32, size=2 * 12)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What a policy wrote, of unequal lengths."""
    folder: Path = write_tiny_model(tmp_path_factory.mktemp("model"), fillers=100)
    base, tokenizer = load_model(str(folder), torch.device("cpu"))
    policy = add_adapters(base, rank=2)
    torch.manual_seed(0)
    randomize_adapters(policy, std=0.1)
    base.generation_config.eos_token_id = list(range(2, 113, 4))  # so that texts end
    prompts = ["the", "the film was good", "film was", "was the film"] * 4
    batch = rollout(
        policy, tokenizer, prompts, new_tokens=NEW_TOKENS, temperature=TEMPERATURE,
        hidden_states=True,
    )  # fmt: skip
    lengths = batch["completion_mask"].sum(1)
    assert lengths.unique().numel() > 3
    return SimpleNamespace(policy=policy, batch=batch, lengths=lengths, rows=len(prompts))


class Processes:
    """Of a run: this process, and others that have `factor` times its tokens on average."""

    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def mean(self, value: Tensor) -> float:
        return float(value) * self.factor


@pytest.mark.parametrize("others", [1.0, 1.5])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_what_members_of_the_family_divide_by(written, loss_type, others) -> None:
    advantages = torch.randn(written.rows)
    options = grpo.GRPOOptions(
        loss_type=loss_type, kl_coef=0.0, new_tokens=NEW_TOKENS, temperature=TEMPERATURE
    )
    loss, _ = grpo.grpo_loss(
        Processes(others), written.policy, written.batch, advantages, options
    )  # fmt: skip
    # All ratios are 1: each token has its sequence's advantage.
    by_row = advantages.double() * written.lengths
    expected = {
        "grpo": (by_row / written.lengths).mean(),
        "dr_grpo": by_row.sum() / (written.rows * NEW_TOKENS),
        "bnpo": by_row.sum() / (written.lengths.sum() * others),
        "dapo": by_row.sum() / (written.lengths.sum() * others),
    }[loss_type]
    assert len({round(float(x), 3) for x in (by_row.mean(), expected)}) == 2
    allowed = ROUNDING * float(advantages.abs().max())
    assert abs(float(loss.detach()) + float(expected)) <= allowed


@pytest.mark.parametrize("coefficient", [0.0, 0.3, 2.0])
def test_the_loss_of_ppo_is_the_policy_s_and_the_critic_s(written, coefficient) -> None:
    mask = written.batch["completion_mask"][:, 1:]
    values, advantages, returns = torch.randn(3, *mask.shape)
    part = {name: x for name, x in written.batch.items() if isinstance(x, Tensor)}
    part |= {"values": values, "advantages": advantages, "returns": returns}
    options = ppo.PPOOptions(value_coef=coefficient, temperature=TEMPERATURE)
    tokens = 2.0 * int(mask.sum())  # the other process has three times as many
    loss, figures = ppo.ppo_loss(
        written.policy, lambda hidden, batch: values, part, tokens, options
    )  # fmt: skip
    policy = -advantages[mask].double().sum() / tokens
    error = 0.5 * (values - returns)[mask].double().square().sum() / tokens
    allowed = ROUNDING * float(advantages.abs().max() + returns.abs().max() ** 2)
    assert abs(float(figures["policy_loss"]) - float(policy)) <= allowed
    assert abs(float(figures["value_loss"]) - float(error)) <= allowed
    assert abs(float(loss.detach()) - float(policy + coefficient * error)) <= 2 * allowed
    assert figures["clipped"] == 0 and figures["approx_kl"] <= ROUNDING**2
