"""A reward model from pairs, by the Bradley-Terry loss.

    python examples/reward_model.py --steps 10           # a tiny random model, on a CPU
    python examples/reward_model.py --model Qwen/Qwen3-0.6B

A score needs no vocabulary, so nothing is fused here. `plackett_luce_loss` takes rankings of more
than two, `process_reward_loss` labels of steps.
"""

import argparse

import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig
from transformers import LlamaForSequenceClassification as Classifier

import fastrlhf


def load(name):
    if name:
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    ids = {"vocab_size": 4000, "pad_token_id": 0}
    return Classifier(LlamaConfig(num_attention_heads=4, num_labels=1, **sizes, **ids))


def batch(vocabulary, pairs=4, length=16):
    """The chosen sequences, then the rejected: here, the chosen have more words of low numbers."""
    chosen = torch.randint(3, vocabulary // 2, (pairs, length))
    return torch.cat((chosen, torch.randint(3, vocabulary, (pairs, length))))


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    model = load(options.model)
    model.config.pad_token_id = model.config.pad_token_id or 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if not options.model else 1e-6)
    for step in range(options.steps):
        ids = batch(model.config.vocab_size)
        scores = model(ids, attention_mask=torch.ones_like(ids)).logits[:, 0]  # (2 P,)
        # center_coef keeps scores near zero, which pairs alone leave open.
        losses, metrics = fastrlhf.reward_loss(*scores.chunk(2), center_coef=0.01)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        accuracy = metrics["rewards/accuracies"].item()
        print(f"step {step}: loss {losses.mean().item():.4f}, accuracy {accuracy:.2f}")
    return model


if __name__ == "__main__":
    main()
