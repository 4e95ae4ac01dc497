"""A tiny model, its hidden states, and a loss of its logits in two ways: lazily and plainly."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastrlhf
from support.tiny_models import SMALL, transformers

VOCAB = 11
IDS = torch.arange(6).view(2, 3)
CLOSE = {"rtol": 1e-9, "atol": 1e-9, "equal_nan": True}


def make_model(vocab: int = VOCAB) -> nn.Module:
    torch.manual_seed(0)
    config = {**SMALL, "vocab_size": vocab, "hidden_size": 8, "pad_token_id": None}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).double()
    nn.init.normal_(model.lm_head.weight, std=0.5)
    return model


MODEL = make_model()


def hidden_states(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, 8, dtype=torch.float64)


def lazily_or_not(lazy: bool, model: nn.Module = MODEL) -> Any:
    model.zero_grad()
    return fastrlhf.lazy_logits(model) if lazy else nullcontext()


def logprobs_of_ids(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, IDS[..., None]).squeeze(-1)


def form_of(x: Tensor) -> Any:
    strides = [n for n, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    return x.shape, x.dtype, x.numel() < 2 or strides


def assert_same_tensors(found: Any, plain: Any, of: str) -> None:
    if not isinstance(found, Tensor) or not isinstance(plain, Tensor):
        assert found == plain, of
        return
    assert form_of(found) == form_of(plain), of
    assert found.is_contiguous() == plain.is_contiguous(), of
    assert torch.allclose(found.double(), plain.double(), **CLOSE), of


def in_checkpoint(function: Callable[[Tensor], Tensor], reentrant: bool) -> Any:
    return lambda x: checkpoint(function, x, use_reentrant=reentrant)
