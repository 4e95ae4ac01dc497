"""Sums, counts and spreads of packed sequences: exact, each other's transpose, and with bits that
do not depend on the company.
"""

import math
from typing import Any

import pytest
import torch
from support.packings import (
    BACKENDS,
    DTYPES,
    LENGTH_SETS,
    LENGTHS,
    SHAPES,
    Example,
    check,
    leaf,
    masked,
    packing,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastrlhf as fr
from fastrlhf.ops.layout import layout_of
from fastrlhf.reference import ROWS


@DTYPES
@SHAPES
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("lengths", LENGTH_SETS)
def test_sums_of_sequences(lengths, average, leading, dtype) -> None:
    pack = packing(LENGTH_SETS[lengths])
    tokens = masked(pack)

    def function(x: Tensor, **rest: Any) -> dict[str, Tensor]:
        return {"sums": fr.sequence_logprobs(x, average=average, **rest)}

    check(Example(function, {"x": tokens()}, {"mask": tokens.mask}), pack, dtype, leading)


def test_counts_are_exact_and_ids_are_those_of_the_lengths() -> None:
    pack = packing(LENGTHS)
    tokens = pack.packed(pack.random(), (1,))
    layout = layout_of("x", tokens, pack.cu_seqlens.int())
    mask = tokens > 0
    assert layout.sequences(tokens) == len(LENGTHS)
    assert layout.cu_seqlens is not None and layout.cu_seqlens.dtype == torch.int64
    expected = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    assert torch.equal(layout.ids(tokens), expected.unsqueeze(0))
    counts = [int(x.sum()) for x in mask[0].split(LENGTHS)]
    assert layout.counts(mask).tolist() == counts
    values = torch.arange(len(LENGTHS))
    assert torch.equal(layout.spread(values), expected.unsqueeze(0))
    assert layout_of("x", torch.zeros(2, 3)) is ROWS
    ids = ROWS.ids(torch.zeros(2, 3))
    assert ids.tolist() == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("lengths", LENGTH_SETS)
def test_sums_and_spreads_are_each_others_transpose_to_any_order(lengths) -> None:
    pack = packing([min(n, 40) for n in LENGTH_SETS[lengths]][:12])
    tokens = pack.packed(pack.random()).requires_grad_()
    sequences = torch.randn(len(pack.cu_seqlens) - 1, dtype=torch.float64, requires_grad=True)
    if not tokens.numel():
        return
    layout = layout_of("x", tokens, pack.cu_seqlens)

    def function(x: Tensor, y: Tensor) -> Tensor:
        mean = layout.sums(x * layout.spread(y.square()))
        return (layout.spread(mean.square()) * x).sum()

    precision = {"rtol": 1e-6, "atol": 1e-6, "fast_mode": True}
    assert gradcheck(function, (tokens, sequences), check_forward_ad=True, **precision)
    assert gradgradcheck(function, (tokens, sequences), **precision)


def test_nothing_cancels_and_nothing_infinite_leaves_its_sequence() -> None:
    x = torch.cat((
        torch.full((40,), 1e30), torch.full((40,), 1e-3), torch.full((35,), -math.inf),
        torch.full((3,), 0.5), torch.full((60,), math.nan), torch.full((33,), 1.0),
    )).requires_grad_()  # fmt: skip
    cu_seqlens = torch.tensor([0, 40, 80, 115, 118, 178, 211])
    sums = fr.sequence_logprobs(x, cu_seqlens=cu_seqlens)
    assert sums[1].item() == pytest.approx(0.04, rel=1e-6)
    assert sums[2].item() == -math.inf and sums[3].item() == 1.5
    assert sums[4].isnan() and sums[5].item() == 33.0
    (sums * torch.arange(6.0)).sum().backward()
    expected = torch.repeat_interleave(torch.arange(6.0), cu_seqlens.diff())
    assert torch.equal(x.grad, expected)


def test_sums_of_a_hundred_thousand_tokens_have_the_accuracy_of_rows() -> None:
    lengths = [50_000, 1, 49_999]
    x = torch.rand(100_000) + 1.0
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    sums = fr.sequence_logprobs(x, cu_seqlens=cu_seqlens)
    exact = torch.stack([part.double().sum() for part in x.split(lengths)])
    relative = ((sums.double() - exact) / exact).abs().max()
    # One rounding for each level of the tree, and for the sums of few.
    assert relative <= 8 * torch.finfo(torch.float32).eps


@BACKENDS
def test_bits_do_not_change_from_run_to_run_or_with_the_company(impl, device) -> None:
    pack = packing([64, 96, 33], device)
    pi, ref = (pack.packed(pack.random(torch.float32)) for _ in range(2))
    pairs = torch.tensor([0], device=device), torch.tensor([1], device=device)

    def run(borders: list[int]) -> tuple[Tensor, ...]:
        x = leaf(pi[: borders[-1]])
        cu_seqlens = torch.tensor(borders, device=device)
        losses, rewards = fr.dpo_loss(
            x, ref[: borders[-1]], *pairs, cu_seqlens=cu_seqlens, impl=impl
        )
        (losses * 0.7).sum().backward()
        return losses.detach(), rewards[:2], x.grad[:160]

    first, again, fewer = run([0, 64, 160, 193]), run([0, 64, 160, 193]), run([0, 64, 160])
    for a, b, c in zip(first, again, fewer, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
