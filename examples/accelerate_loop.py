"""SFT under accelerate: the tokens of all micro-batches and all processes are one mean.

    python examples/accelerate_loop.py --steps 10        # a tiny random model, on a CPU
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
    accelerate launch examples/accelerate_loop.py --model Qwen/Qwen3-0.6B

The loss takes the model as accelerate prepares it (DDP, FSDP, DeepSpeed). A mean of each
micro-batch by itself would weigh tokens of short batches more; `global_normalizer` counts them all.
"""

import argparse

import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastrlhf


def load(name):
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=4000, num_attention_heads=4, **sizes))


def micro_batch(vocabulary, device, prompt=6):
    """Two sequences of random ids, of different lengths: what is scored is their completions."""
    lengths = torch.randint(prompt + 4, 24, (2, 1), device=device)
    places = torch.arange(24, device=device)
    ids = torch.randint(vocabulary, (2, 24), device=device)
    return ids, (places < lengths).long(), (places >= prompt) & (places < lengths)


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    accelerator, model = Accelerator(), load(options.model)
    rate, vocabulary = 1e-3 if not options.model else 1e-6, model.config.vocab_size
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), rate))
    ranks = dist.group.WORLD if accelerator.num_processes > 1 else None
    for step in range(options.steps):
        batches = [micro_batch(vocabulary, accelerator.device) for _ in range(4)]
        scored = [mask[:, 1:] for _, _, mask in batches]  # nothing predicts the first token
        # DDP and FSDP take the mean of the ranks' gradients.
        tokens = fastrlhf.global_normalizer(scored, ranks, gradients="mean")
        for ids, attention, mask in batches:
            loss, _ = fastrlhf.sft_loss(model, ids, attention, mask=mask, normalizer=tokens)
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step}: loss of the last micro-batch {loss.item():.4f}")
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
