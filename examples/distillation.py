"""On-policy distillation: the student writes, and comes closer to the teacher at every token of it.

    python examples/distillation.py --steps 10           # tiny random models, on a CPU
    python examples/distillation.py --model Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-1.7B

The Jensen-Shannon divergence is exact over the whole vocabulary, and neither model's logits are
built. Their widths may differ, their vocabularies may not.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastrlhf


def load(name, width=64):
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    sizes = {"hidden_size": width, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_attention_heads=4, **sizes))


@torch.no_grad()
def written(student, batch=4, prompt=6, new_tokens=16):
    ids = torch.randint(10, 1000, (batch, prompt), device=student.device)
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    ids = student.generate(ids, do_sample=True, top_k=0, pad_token_id=0, **length)
    return ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids) >= prompt


def step_loss(student, teacher, ids, mask):
    attention = torch.ones_like(ids)
    values = fastrlhf.model_kl_divergence(
        student, teacher, ids, attention, mask=mask, direction="jsd", beta=0.5
    )  # (B, T - 1), zero where the mask is
    return values.sum() / mask[:, 1:].sum()


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--teacher")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    student, teacher = load(options.model).eval(), load(options.teacher, width=96).eval()
    teacher.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3 if not options.model else 1e-6)
    for step in range(options.steps):
        loss = step_loss(student, teacher, *written(student))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: divergence {loss.item():.6f} nats a token")
    return student


if __name__ == "__main__":
    main()
