"""A model whose head FSDP2 shards by itself, in one of two processes."""

import torch
from torch.distributed.fsdp import fully_shard

import fastrlhf


def small_model() -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """Gradients of all parameters, accumulated over two passes."""
    ids = torch.arange(27).view(3, 9)
    for _ in range(2):
        fastrlhf.model_token_stats(model, ids).logprob.sum().backward()
    found = [p.grad for p in model.parameters()]
    return [x.full_tensor() if hasattr(x, "full_tensor") else x for x in found]


def compare_with_whole_model(rank: int, folder: str, parts: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        model, whole = small_model(), small_model()
        wanted = gradients(whole)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(
            [model.model.norm, model.lm_head] if parts == "norm" else model.lm_head, mesh=mesh
        )
        fully_shard(model, mesh=mesh)
        for found, want in zip(gradients(model), wanted, strict=True):
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    finally:
        torch.distributed.destroy_process_group()
