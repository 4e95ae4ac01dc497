"""GRPO on packed sequences: no padding, one row of tokens, and where each sequence ends.

    python examples/packed_grpo.py --steps 10            # a tiny random model, on a CPU
    python examples/packed_grpo.py --model Qwen/Qwen3-0.6B

`cu_seqlens` (B + 1,) are cumulative lengths, as FlashAttention's varlen interface takes them. What
is of tokens is (1, N), what is of sequences (B,). The reward here is the share of even ids.
"""

import argparse

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fastrlhf import group_advantages, grpo_options, model_policy_loss, model_token_stats


def load(name):
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_attention_heads=4, **sizes))


def sampled(model, prompts=4, group=4, prompt=6):
    """Groups of completions of a prompt, packed; None for the attention_mask, without padding."""
    groups = torch.arange(prompts, device=model.device).repeat_interleave(group)
    ids = torch.randint(10, 1000, (prompts, prompt), device=model.device)[groups]
    ids = model.generate(ids, do_sample=True, top_k=0, pad_token_id=0, max_new_tokens=16)
    is_end = torch.isin(ids, ids.new_tensor(model.generation_config.eos_token_id)).long()
    kept = is_end.cumsum(1) - is_end == 0  # up to the first end of sequence
    completion = kept & (torch.arange(ids.shape[1], device=ids.device) >= prompt)
    rewards = (completion & (ids % 2 == 0)).sum(1) / completion.sum(1)
    packed = {"mask": completion[kept][None], "cu_seqlens": F.pad(kept.sum(1).cumsum(0), (1, 0))}
    ids = ids[kept][None]
    old = model_token_stats(model, ids, **packed).logprob.detach()  # (1, N - 1)
    return (ids, None, old, group_advantages(rewards, groups)), packed, rewards.mean()


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    model = load(options.model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if not options.model else 1e-6)
    for step in range(options.steps):
        batch, packed, reward = sampled(model)
        for _ in range(2):  # updates of one batch of samples
            loss, _ = model_policy_loss(model, *batch, **packed, **grpo_options("dapo"))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"step {step}: reward {reward.item():.3f}, loss {loss.item():.4f}")
    return model


if __name__ == "__main__":
    main()
