"""A row has the same bits whatever batch surrounds it, on the eager and the compiled backend too.

PyTorch sums a lone row in as many parts as there are threads, and some of its functions (cosh) have
other bits where a vector register is not filled: both depend on what surrounds a row.
"""

from collections.abc import Callable, Iterator
from importlib import import_module

import pytest
import torch
from torch import Tensor

import fastrlhf

ROWS = 9
Rows = tuple[Tensor, ...]


@pytest.fixture(params=[1, 3], ids="threads{}".format)
def threads(request) -> Iterator[None]:
    """Run on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def statistics(logits: Tensor, other: Tensor, targets: Tensor, impl: str, **options) -> Rows:
    logits = logits.clone().requires_grad_(True)
    found = fastrlhf.token_stats(logits, targets, entropy=True, impl=impl, **options)
    assert found.entropy is not None
    gradients = torch.autograd.grad((found.logprob + found.entropy).sum(), logits)
    return found.logprob, found.entropy, found.lse, *gradients


def divergences(logits: Tensor, other: Tensor, targets: Tensor, impl: str, **options) -> Rows:
    sides = [x.clone().requires_grad_(True) for x in (logits, other)]
    values = fastrlhf.kl_divergence(sides[0], sides[1], impl=impl, **options)
    return values, *torch.autograd.grad(values.sum(), sides)


def products(logits: Tensor, other: Tensor, targets: Tensor, impl: str, **options) -> Rows:
    return fastrlhf.softmax_fisher_product(logits, other, impl=impl, **options)


CASES: dict[str, tuple[Callable[..., Rows], dict]] = {
    "statistics": (statistics, {"temperature": 0.7}),
    "statistics of capped logits": (statistics, {"softcap": 0.5, "scale": 0.3}),
    "kl": (divergences, {"temperature": 0.7, "softcap": 30.0}),
    "jsd": (divergences, {"direction": "jsd", "beta": 0.3}),
    "fisher": (products, {"temperature": 0.7}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocab", [5, 33, 1000, 50257])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", ["eager", "compiled"])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(
    impl: str,
    case: str,
    vocab: int,
    dtype: torch.dtype,
    threads: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function, options = CASES[case][0], {"impl": impl, **CASES[case][1]}
    logits, other = (torch.randn(ROWS, vocab).mul(5).to(dtype) for _ in range(2))
    targets = torch.randint(vocab, (ROWS,))
    batches = [slice(i, i + 1) for i in range(ROWS)] + [slice(2, 7), slice(7, ROWS)]
    whole = function(logits, other, targets, **options)
    for rows in batches:
        part = function(logits[rows], other[rows], targets[rows], **options)
        for of_whole, of_part in zip(whole, part, strict=True):
            assert torch.equal(of_whole[rows], of_part)
    # Two rows at a time: the last one is alone.
    for module, name in (
        ("token_stats", "_EAGER_CHUNK_LOGITS"),
        ("eager_rows", "_CHUNK_LOGITS"),
        ("compiled_rows", "_CHUNK_LOGITS"),
        ("compiled_rows", "_HELD_NUMBERS"),
        ("compiled_rows", "_ROOM_LOGITS"),
    ):
        monkeypatch.setattr(import_module(f"fastrlhf.ops.{module}"), name, 2 * vocab)
    in_chunks = function(logits, other, targets, **options)
    for of_whole, of_chunks in zip(whole, in_chunks, strict=True):
        assert torch.equal(of_whole, of_chunks)
