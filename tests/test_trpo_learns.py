"""TRPO on control and on a language model: returns go up, and every accepted step keeps its KL."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrlhf import gae, lm_head, trpo_step, whiten

ENVIRONMENTS, STEPS = 24, 500


def play(policy: nn.Module, environments: list, seed: int) -> dict[str, Tensor]:
    """Play one episode in each environment: observations (B, T, 4), actions, rewards and mask."""
    observations = torch.zeros(ENVIRONMENTS, STEPS, 4)
    actions = torch.zeros(ENVIRONMENTS, STEPS, dtype=torch.int64)
    rewards, mask = torch.zeros(ENVIRONMENTS, STEPS), torch.zeros(ENVIRONMENTS, STEPS)
    now = torch.stack(
        [torch.tensor(env.reset(seed=seed + i)[0]) for i, env in enumerate(environments)]
    )
    playing = list(range(ENVIRONMENTS))
    for t in range(STEPS):
        observations[playing, t] = now[playing]
        with torch.no_grad():
            chosen = torch.multinomial(policy(now[playing]).softmax(-1), 1)[:, 0]
        actions[playing, t], mask[playing, t] = chosen, 1
        still = []
        for i, action in zip(playing, chosen.tolist(), strict=True):
            seen, reward, ended, _, _ = environments[i].step(action)
            rewards[i, t], now[i] = reward, torch.from_numpy(seen)
            if not ended:
                still.append(i)
        playing = still
        if not playing:
            break
    return {"observations": observations, "actions": actions, "rewards": rewards, "mask": mask}


def fit(critic: nn.Module, observations: Tensor, returns: Tensor, mask: Tensor) -> None:
    """Regress a few steps towards the returns."""
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    inside = mask != 0
    for _ in range(20):
        loss = F.mse_loss(critic(observations[inside])[:, 0], returns[inside] / 100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_it_solves_cart_pole() -> None:
    gymnasium = pytest.importorskip("gymnasium", reason="needs gymnasium")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what it makes of torch
        environments = [gymnasium.make("CartPole-v1") for _ in range(ENVIRONMENTS)]
    policy, critic = (
        nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, outputs)) for outputs in (2, 1)
    )
    params = list(policy.parameters())
    curve, steps = [], 0
    for iteration in range(40):
        batch = play(policy, environments, seed=1000 * iteration)
        mask, observations = batch["mask"], batch["observations"]
        curve.append(float(mask.sum() / ENVIRONMENTS))
        if min(curve[-2:]) >= 475 and len(curve) > 1:
            break
        steps += int(mask.sum())
        with torch.no_grad():
            values = 100 * critic(observations)[..., 0]
        advantages, returns = gae(
            batch["rewards"], values, mask, gamma=0.99, lam=0.95, impl="eager"
        )
        info = trpo_step(
            lambda: policy(observations),  # noqa: B023
            params, batch["actions"], whiten(advantages, mask), mask, max_kl=0.02, damping=0.01,
        )  # fmt: skip
        assert not info.accepted or (info.kl <= 0.02 and info.surrogate > 0)
        fit(critic, observations, returns, mask)
    print(f"returns by iteration: {[round(x) for x in curve]}, after {steps} steps")
    # 24 episodes each, twice in a row.
    assert min(curve[-2:]) >= 475, curve
    assert steps <= 250_000


def sample(model: nn.Module, prompts: Tensor, tokens: int) -> Tensor:
    """Continue each prompt by so many tokens, each drawn from the model."""
    ids = prompts
    for _ in range(tokens):
        with torch.no_grad():
            last = model(ids).logits[:, -1]
        ids = torch.cat((ids, torch.multinomial(last.softmax(-1), 1)), 1)
    return ids


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
def test_lora_raises_a_reward_of_tokens_and_no_accepted_step_leaves_its_region() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    peft = pytest.importorskip("peft", reason="needs peft")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_config(config)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    model = peft.get_peft_model(base, adapters).eval()
    params = [p for p in model.parameters() if p.requires_grad]
    head, backbone = lm_head(model), model.get_base_model().model
    max_kl, history = 0.05, []
    for _ in range(9):
        ids = sample(model, torch.randint(64, (96, 2)), tokens=8)
        mask = torch.arange(9).expand(96, 9) >= 1  # of the tokens that follow
        rewards = (ids[:, 1:] % 4 == 0).float()
        history.append(rewards[mask].mean().item())
        with torch.no_grad():
            before = model(ids).logits[:, :-1].log_softmax(-1)

        info = trpo_step(
            lambda: backbone(ids).last_hidden_state[:, :-1],  # noqa: B023
            params, ids[:, 1:], rewards - rewards[mask].mean(), mask, max_kl=max_kl,
            damping=1e-2, cg_iterations=8, head=head,
        )  # fmt: skip
        assert info.accepted and info.surrogate > 0
        with torch.no_grad():
            after = model(ids).logits[:, :-1].log_softmax(-1)
        exact = (before.exp() * (before - after)).sum(-1)[mask].mean()
        torch.testing.assert_close(info.kl, exact, rtol=1e-3, atol=1e-6)
        assert 0 < exact <= max_kl
    assert history[0] < 0.4 and history[-1] > history[0] + 0.2, history
