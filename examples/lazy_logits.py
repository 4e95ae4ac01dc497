"""A training loop written for plain PyTorch, fused without an edit of it.

    python examples/lazy_logits.py --steps 10            # a tiny random model, on a CPU
    python examples/lazy_logits.py --model Qwen/Qwen3-0.6B

Within `lazy_logits`, the model's logits have not been computed. What takes few numbers of each
token is computed from the hidden states; anything else builds them. `lazy_report` tells which.
"""

import argparse

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastrlhf


def load(name):
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=4000, num_attention_heads=4, **sizes))


def step_loss(model, ids):  # knows nothing of fastrlhf
    logits = model(ids).logits[:, :-1].float()
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    accuracy = (logits.argmax(-1) == ids[:, 1:]).float().mean()
    return loss, accuracy


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    model = load(options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if not options.model else 1e-6)
    with fastrlhf.lazy_logits(model):
        for step in range(options.steps):
            ids = torch.randint(model.config.vocab_size, (4, 24))
            loss, accuracy = step_loss(model, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step}: loss {loss.item():.4f}, accuracy {accuracy.item():.2f}")
    print(fastrlhf.lazy_report())
    return model


if __name__ == "__main__":
    main()
