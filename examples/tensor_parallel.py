"""A vocabulary that ranks share: each holds some rows of the head, and all have the same loss.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py --steps 10    # gloo on a CPU
    torchrun --nproc-per-node 8 examples/tensor_parallel.py --model Qwen/Qwen3-0.6B

Forward, 12 bytes a token are gathered, and no logits; backward, the gradient of the hidden states
is added up. Here the backbone is whole on every rank, and a head that is tied to the embeddings is
untied. One that torch's or transformers' tensor parallelism cuts needs none of this: give the model
to `sft_loss` and its siblings.
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastrlhf


def load(name):
    torch.manual_seed(0)  # the same on every rank
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=4001, num_attention_heads=4, **sizes))


def batch(step, vocabulary):
    generator = torch.Generator().manual_seed(step)  # the same on every rank
    ids = torch.randint(vocabulary, (2, 16), generator=generator)
    return ids, fastrlhf.shift_targets(ids, torch.arange(16).expand(2, 16) >= 4)


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    model = load(options.model).to(device)
    rows = nn.Parameter(model.lm_head.weight.detach().tensor_split(world)[rank].clone())
    parameters = [*model.model.parameters(), rows]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(options.steps):
        ids, targets = (x.to(device) for x in batch(step, model.config.vocab_size))
        hidden = model.model(ids).last_hidden_state  # (B, T, H)
        loss = fastrlhf.linear_cross_entropy(hidden, rows, targets, group=dist.group.WORLD)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"rank {rank}, rows {len(rows)}, step {step}: loss {loss.item():.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
