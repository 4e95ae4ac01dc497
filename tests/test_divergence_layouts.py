"""Divergences of tensors in any layout, which tensors get a gradient, and derivatives of both
orders.
"""

import pytest
import torch
from support.divergence_formulas import (
    BACKENDS,
    KINDS,
    MEASURES,
    assert_close_to_oracle,
    evaluate,
    oracle,
    random_pair,
    transform_of,
)
from support.plain import plain_divergence
from torch import autograd

import fastrlhf


def layouts(device):
    """(B, T, V) = (2, 2, 33) logits of one content in many layouts, by name."""
    content = torch.randn(2, 2, 33, device=device)

    def filled(view: torch.Tensor) -> torch.Tensor:
        return view.copy_(content)

    new = lambda *shape: torch.full(shape, torch.nan, device=device)  # noqa: E731
    return content, {
        "contiguous": content.clone(),
        "all but the first position": filled(new(2, 3, 33)[:, 1:]),
        "strided part of the vocabulary": filled(new(2, 2, 80)[..., 7:73:2]),
        "vocabulary first": filled(new(33, 2, 2).permute(2, 1, 0)),
        "positions first": filled(new(2, 2, 33).transpose(0, 1)),
    }


@BACKENDS
@pytest.mark.parametrize("layout", layouts("cpu")[1])
def test_layouts_do_not_matter(impl, layout, device) -> None:
    content, views = layouts(device)
    other = torch.randn(2, 2, 33, device=device)
    # A transposed mask, and another layout for the other side.
    mask = torch.tensor([[1, 0], [1, 1]], device=device).T
    options = {"mask": mask, "impl": impl, **MEASURES["jsd 0.1"]}
    for sides, contents in (
        ((views[layout], other.mT.contiguous().mT), (content, other)),
        ((other, views[layout]), (other, content)),
    ):
        expected = evaluate(*contents, **options)
        x, y = (side.detach().requires_grad_() for side in sides)
        values = fastrlhf.kl_divergence(x, y, **options)
        found = values, *autograd.grad(values.sum(), (x, y))
        exact = oracle(*(x.flatten(0, 1) for x in contents), mask.flatten(), **MEASURES["jsd 0.1"])
        assert_close_to_oracle(found, expected, exact)


@BACKENDS
@KINDS
def test_expanded_rows_and_upstream_gradients(impl, measure, device) -> None:
    row = torch.randn(1, 1, 30, device=device, requires_grad=True)
    ref = torch.randn(2, 1, 30, device=device, requires_grad=True)
    sides = row.expand(2, 3, 30), ref.expand(2, 3, 30)
    values = fastrlhf.kl_divergence(*sides, impl=impl, **MEASURES[measure])
    found = autograd.grad(values.mean(), (row, ref))
    value, d_row, d_ref = oracle(row.expand(2, 1, 30)[:, 0], ref[:, 0], **MEASURES[measure])
    by_plain = plain_divergence(*sides, **MEASURES[measure])
    plain = by_plain, *autograd.grad(by_plain.mean(), (row, ref))
    exact = value[:, None].expand(2, 3), d_row.mean(0)[None, None], d_ref[:, None] / 2
    assert_close_to_oracle((values, *found), plain, exact)


@BACKENDS
@pytest.mark.parametrize("measure", ["reverse", "jsd 0.5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(impl, measure, dtype, device) -> None:
    rows = 1000 if device.type == "cuda" else 4
    logits, ref = random_pair(rows, 1500, device, (dtype, dtype))
    g = torch.randn(rows, device=device)
    options = {"impl": impl, "temperature": 0.7, **MEASURES[measure]}
    batch, again = (evaluate(logits, ref, g=g, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    for row in (0, rows - 1):
        one = slice(row, row + 1)
        alone = evaluate(logits[one], ref[one], g=g[one], **options)
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, batch, strict=True))


@BACKENDS
def test_only_what_needs_a_gradient_gets_one(impl, device) -> None:
    for wanted in ((True, False), (False, True), (False, False)):
        sides = random_pair(2, 20, device)
        for side, want in zip(sides, wanted, strict=True):
            side.requires_grad_(want)
        values = fastrlhf.kl_divergence(*sides, impl=impl)
        assert values.requires_grad == any(wanted)
        if any(wanted):
            values.sum().backward()
        assert [side.grad is not None for side in sides] == list(wanted)


@BACKENDS
def test_one_tensor_for_both_sides_gets_the_sum_of_both_gradients(impl, device) -> None:
    x = torch.randn(2, 20, dtype=torch.float64, device=device, requires_grad=True)
    values = fastrlhf.kl_divergence(x, 0.5 * x, impl=impl)
    _, d_own, d_half = evaluate(x, 0.5 * x, impl=impl)
    for create_graph in (False, True):
        (found,) = autograd.grad(values.sum(), x, retain_graph=True, create_graph=create_graph)
        torch.testing.assert_close(found, d_own + 0.5 * d_half)


@BACKENDS
@pytest.mark.parametrize("measure", ["forward", "jsd 0.1"])
def test_derivatives_of_both_orders(impl, measure, device) -> None:
    sides = [torch.randn(2, 4, dtype=torch.float64, device=device) for _ in range(2)]
    mask = torch.tensor([False, True], device=device)
    options = MEASURES[measure] | transform_of("all", 2, device)

    def values(x, y):
        return fastrlhf.kl_divergence(x, y, mask=mask, impl=impl, **options)

    inputs = [side.requires_grad_() for side in sides]
    assert autograd.gradcheck(values, inputs, fast_mode=True, rtol=1e-6, atol=1e-7)
    assert autograd.gradgradcheck(values, inputs, fast_mode=True, rtol=1e-6, atol=1e-7)
    # A side alone takes another way through the second derivative.
    inputs[1].requires_grad_(False)
    assert autograd.gradgradcheck(values, inputs, fast_mode=True, rtol=1e-6, atol=1e-7)


@BACKENDS
def test_a_temperature_tensor_broadcasts(impl, device) -> None:
    logits, ref = (torch.randn(2, 3, 20, device=device) for _ in range(2))
    own = torch.tensor([[0.5], [2.0]], device=device)
    found = fastrlhf.kl_divergence(logits, ref, temperature=own, impl=impl)
    for i, temperature in enumerate((0.5, 2.0)):
        expected = fastrlhf.kl_divergence(logits[i], ref[i], temperature=temperature, impl=impl)
        torch.testing.assert_close(found[i], expected)
