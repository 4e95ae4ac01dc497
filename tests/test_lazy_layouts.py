"""Lazy logits lie in memory as plain ones would, and what is viewed of them is the same."""

from collections.abc import Callable

import pytest
import torch
from support.tiny_models import make
from torch import Tensor

import fastrlhf

IDS = torch.arange(12).view(2, 6) % 7
TEMPERATURES = torch.tensor([0.5, 2.0])[:, None, None]

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x[..., :-1, :].contiguous().view(-1, x.shape[-1]),
    "clone": lambda x: x[..., :-1, :].clone().view(-1, x.shape[-1]),
    "float": lambda x: x[..., :-1, :].to(torch.float64, copy=True).view(-1, x.shape[-1]),
    "temperature": lambda x: (x / TEMPERATURES).view(-1, x.shape[-1]),
    "temperature of a part": lambda x: (x / TEMPERATURES)[:, 1:].contiguous().view(10, -1),
    "reshape": lambda x: x[:, 1:].reshape(-1, x.shape[-1]),
    "part of a copy": lambda x: x[:, :-1].contiguous()[:, 2:],
}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return make("Llama")


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_laid_out_as_plain_ones_and_are_not_built(model, name) -> None:
    def logprobs(viewed: Tensor) -> Tensor:
        return viewed.to(torch.promote_types(viewed.dtype, torch.float32)).log_softmax(-1)[..., 3]

    plain_logits = model(IDS).logits
    plain = VIEWS[name](plain_logits)
    with fastrlhf.lazy_logits(model):
        lazy = VIEWS[name](model(IDS).logits)
    assert (lazy.shape, lazy.stride(), lazy.dtype) == (plain.shape, plain.stride(), plain.dtype)
    exact = logprobs(VIEWS[name](plain_logits.double()))
    allowed = 4 * (logprobs(plain) - exact).abs().max() + 4 * torch.finfo(torch.float32).eps
    assert (logprobs(lazy) - exact).abs().max() <= allowed
    assert not lazy.is_built
    assert torch.equal(lazy + 0, plain)


def test_what_has_no_view_has_none(model) -> None:
    with fastrlhf.lazy_logits(model), pytest.raises(RuntimeError, match="view size is not"):
        model(IDS).logits[:, :-1].view(10, -1)
