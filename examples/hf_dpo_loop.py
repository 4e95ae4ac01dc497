"""DPO in a hand-written loop over a Hugging Face model, without ever building the logits.

    python examples/hf_dpo_loop.py --steps 10            # a tiny random model, on a CPU
    python examples/hf_dpo_loop.py --model Qwen/Qwen3-0.6B

`model_dpo_loss` makes the loss inside the model's own forward. Put your own data into `batch`.
"""

import argparse
import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fastrlhf import model_dpo_loss, model_token_stats


def load(name):
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=4000, num_attention_heads=4, **sizes))


def batch(vocabulary, pairs=2, prompt=6, longest=12):
    """The chosen sequences, then the rejected ones of the same prompts, padded on the right."""
    ids = torch.randint(vocabulary, (2 * pairs, prompt + longest))
    ids[pairs:, :prompt] = ids[:pairs, :prompt]
    lengths = prompt + torch.randint(4, longest + 1, (2 * pairs, 1))
    places = torch.arange(prompt + longest)
    return ids, (places < lengths).long(), (places < lengths) & (places >= prompt)


def step_loss(model, reference, ids, attention, mask):
    with torch.no_grad():
        ref = model_token_stats(reference, ids, attention, mask=mask).logprob.sum(-1)
    chosen, rejected = torch.arange(len(ids), device=ids.device).chunk(2)
    losses, rewards = model_dpo_loss(model, ids, attention, ref, chosen, rejected, mask=mask)
    return losses.mean(), (rewards[chosen] > rewards[rejected]).float().mean()


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    model = load(options.model)
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if not options.model else 1e-6)
    for step in range(options.steps):
        loss, accuracy = step_loss(model, reference, *batch(model.config.vocab_size))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}, accuracy {accuracy.item():.2f}")
    return model


if __name__ == "__main__":
    main()
