"""What the backends of logits_policy_loss do besides their numbers: bits, strides, gradients in the
memory of the logits, graphs, operators, waits and memory.
"""

import math
from typing import Any

import pytest
import torch
from support.compare import assert_gradient_as_accurate, relative_error
from support.logits_policy_problems import (
    BACKENDS,
    FULL,
    ROUNDINGS,
    Problem,
    evaluate,
    expected,
    plain,
    problem,
)
from torch import Tensor

from fastrlhf import logits_policy_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_whatever_surrounds_it(dtype, device) -> None:
    logits = torch.randn(1, 40, 300, device=device).to(dtype)
    targets = torch.randint(300, (1, 40), device=device)
    tensors = {
        "old_logprobs": torch.full((1, 40), -5.0, device=device),
        "advantages": torch.randn(1, 40, device=device),
    }
    ones = torch.ones(1, 40, device=device)
    options = {"impl": "triton", "entropy_coef": 0.1, "reduction": "constant", "normalizer": 3.0}
    whole = evaluate(Problem(logits, targets, ones, tensors), **options)[1]
    assert torch.equal(whole, evaluate(Problem(logits, targets, ones, tensors), **options)[1])
    for t in (0, 17, 39):
        cut = slice(t, t + 1)
        alone = Problem(
            logits[:, cut], targets[:, cut], ones[:, cut],
            {name: x[:, cut] for name, x in tensors.items()},
        )  # fmt: skip
        assert torch.equal(evaluate(alone, **options)[1][0], whole[t])


def views(logits: Tensor) -> dict[str, Tensor]:
    """The same numbers in other places of memory."""
    batch, tokens, vocab = logits.shape
    room = logits.new_full((batch, tokens + 2, 2 * vocab + 1), math.nan)
    return {
        "a slice of positions": torch.cat((logits, room[:, :1, :vocab]), 1)[:, :-1],
        "padded rows": room[:, 1:-1, :vocab].copy_(logits),
        "every other logit": room.clone()[:, 1:-1, 1::2].copy_(logits),
        "tokens first": logits.transpose(0, 1).contiguous().transpose(0, 1),
        "vocabulary first": logits.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }


@BACKENDS
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("view", list(views(torch.zeros(1, 1, 1))))
def test_strides_do_not_matter(view, inplace, impl, device) -> None:
    given = problem(48, torch.float32, device)
    _, gradient, targets = expected(given, FULL, {})
    leaf = views(given.logits)[view].detach().requires_grad_()
    loss, _ = logits_policy_loss(
        leaf.view_as(leaf), **given.arguments(), **FULL, impl=impl, inplace_backward=inplace
    )
    loss.backward()
    found = leaf.grad.reshape(8, -1)
    assert_gradient_as_accurate(found, plain(given, FULL, {})[1], gradient, targets, ROUNDINGS)


@BACKENDS
def test_an_expanded_row_shares_its_memory_and_is_not_overwritten(impl, device) -> None:
    row = torch.randn(1, 1, 30, device=device, requires_grad=True)
    before = row.detach().clone()
    arguments = {
        "targets": torch.randint(30, (1, 5), device=device),
        "old_logprobs": None, "advantages": torch.randn(1, 5, device=device),
        "mask": torch.ones(1, 5, device=device),
    }  # fmt: skip
    results = []
    for inplace in (True, False):
        row.grad = None
        loss, _ = logits_policy_loss(
            row.expand(1, 5, 30), **arguments, impl=impl, inplace_backward=inplace
        )
        loss.backward()
        results.append(row.grad)
    assert torch.equal(row, before) and torch.equal(*results)


def test_in_place_the_logits_become_their_gradient(device) -> None:
    given = problem(64, torch.float32, device)
    expected_gradient = evaluate(given, impl="triton", **FULL)[1]
    leaf = given.logits.clone().requires_grad_()
    logits = leaf * 1.0
    saved = logits.square()  # keeps the logits for its backward
    loss, _ = logits_policy_loss(
        logits, **given.arguments(), impl="triton", inplace_backward=True, **FULL
    )
    assert torch.equal(logits.detach().view(8, -1), expected_gradient)
    loss.backward()
    assert torch.equal(leaf.grad.view(8, -1), expected_gradient)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_a_differentiable_use_of_spent_logits_is_refused(device) -> None:
    given = problem(64, torch.float32, device)
    for later in (lambda x: x.softmax(-1).square().sum(), lambda x: x.sum()):
        leaf = given.logits.nan_to_num().requires_grad_()
        logits = leaf * 1.0
        loss, _ = logits_policy_loss(
            logits, **given.arguments(), impl="triton", inplace_backward=True
        )
        with pytest.raises(RuntimeError, match=r"^logits_policy_loss: .*used after their gradient"):
            (loss + later(logits)).backward()


def test_fp16_gradients_are_scaled_before_they_are_rounded(device) -> None:
    logits = torch.randn(1, 8, 64, device=device).half().requires_grad_()
    arguments = {
        "targets": torch.randint(64, (1, 8), device=device), "old_logprobs": None,
        "advantages": torch.full((1,), 0.01, device=device),
        "mask": torch.ones(1, 8, device=device), "normalizer": 16384.0,
    }  # fmt: skip
    # A thousandth of the smallest number of fp16, but for the factor of a gradient scaler.
    loss, _ = logits_policy_loss(logits, **arguments, impl="triton")
    (gradient,) = torch.autograd.grad(loss * 2.0**16, logits)
    wide = logits.detach().double().requires_grad_()
    exact, _ = logits_policy_loss(wide, **arguments, impl="eager")
    (expected_gradient,) = torch.autograd.grad(exact * 2.0**16, wide)
    assert relative_error(gradient, expected_gradient) <= torch.finfo(torch.float16).eps


@BACKENDS
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.125, 0.0])
def test_an_upstream_gradient_scales_it(factor, inplace, impl, device) -> None:
    given = problem(64, torch.float32, device)
    plain = evaluate(given, impl=impl)[1]
    leaf = given.logits.clone().requires_grad_()
    loss, _ = logits_policy_loss(
        leaf * 1.0, **given.arguments(), impl=impl, inplace_backward=inplace
    )
    (loss * factor).backward()
    assert torch.equal(leaf.grad.view(8, -1), plain * factor)


@BACKENDS
def test_a_kept_graph_gives_the_same_gradient_again(impl, device) -> None:
    given = problem(64, torch.float32, device)
    leaf = given.logits.clone().requires_grad_()
    loss, _ = logits_policy_loss(leaf, **given.arguments(), impl=impl)
    half, whole, again = (
        torch.autograd.grad(loss, leaf, torch.tensor(x, device=device), retain_graph=True)[0]
        for x in (0.5, 1.0, 1.0)
    )
    assert torch.equal(whole, again) and torch.equal(half, whole * 0.5)
    # Not even the last backward, which may scale in place, touches what was given out before.
    before = whole.clone()
    torch.autograd.grad(loss * 3, leaf)
    assert torch.equal(whole, before)
    assert torch.equal(before.view(8, -1), evaluate(given, impl=impl)[1])


def test_a_second_derivative_is_refused_by_the_kernel(device) -> None:
    given = problem(20, torch.float64, device)
    logits = given.logits.nan_to_num().requires_grad_()
    loss, _ = logits_policy_loss(logits, **given.arguments(), impl="triton")
    with pytest.raises(RuntimeError, match=r"^logits_policy_loss: .*cannot be differentiated"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_without_gradients_the_logits_are_read_and_left_alone(device) -> None:
    given = problem(64, torch.float32, device)
    before = given.logits.clone()
    loss, metrics = logits_policy_loss(
        given.logits, **given.arguments(), impl="triton", inplace_backward=True
    )
    assert not loss.requires_grad
    assert torch.equal(before.nan_to_num(), given.logits.nan_to_num())
    expected_loss, _, expected_metrics = evaluate(given, impl="triton")
    torch.testing.assert_close(loss, expected_loss)
    for name, value in expected_metrics.items():
        torch.testing.assert_close(metrics[name], value)
    with torch.no_grad():
        leaf = given.logits.clone().requires_grad_()
        assert not logits_policy_loss(leaf, **given.arguments(), impl="triton")[0].requires_grad


@BACKENDS
def test_it_compiles_without_a_graph_break(impl, device) -> None:
    given = problem(32, torch.float32, device)
    head = torch.nn.Linear(16, 32, device=device)
    hidden = torch.randn(2, 4, 16, device=device)

    def step(hidden: Tensor) -> Tensor:
        return logits_policy_loss(head(hidden), **given.arguments(), **FULL, impl=impl)[0]

    step(hidden).backward()
    eager = [parameter.grad.clone() for parameter in head.parameters()]
    head.zero_grad()
    torch.compile(step, backend="aot_eager", fullgraph=True)(hidden).mul(1.0).backward()
    for parameter, gradient in zip(head.parameters(), eager, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_operators_pass_opcheck(device) -> None:
    given = problem(20, torch.float32, device)
    targets = torch.where(given.mask, given.targets, -100)
    rows = torch.where(given.mask, given.tensors["advantages"], 0.0)
    settings = [0.8, 1.2, math.inf, 1.0, 1.05, 0.1, 0.0]
    arguments = (
        torch.empty_like(given.logits), given.logits, targets, rows, None, rows, rows, None, 1.0,
        None, 1.0, "clip", "k3", settings, -100, True,
    )  # fmt: skip
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.fastrlhf.policy_loss.default, arguments, test_utils=checks)
    tokens = rows, rows, given.mask
    torch.library.opcheck(torch.ops.fastrlhf.gae.default, (*tokens, 1.0, 0.95), test_utils=checks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offsets_pass_2_to_the_31() -> None:
    vocab = 2**18
    rows = 2**31 // vocab + 2
    logits = torch.zeros(1, rows, vocab, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    targets = torch.zeros(1, rows, dtype=torch.int64, device="cuda")
    ones = torch.ones(1, rows, device="cuda")
    loss, _ = logits_policy_loss(logits, targets, None, ones, ones, reduction="sequence-sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    for row in (0, rows - 1):
        expected = torch.full((vocab,), 1 / vocab, device="cuda")
        expected[0] -= 1
        torch.testing.assert_close(gradient[0, row].float(), expected, rtol=1e-2, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_host_sync_and_no_more_memory_than_a_gradient() -> None:
    logits = torch.randn(2, 64, 32000, device="cuda").bfloat16().requires_grad_()
    targets = torch.randint(32000, (2, 64), device="cuda")
    old, ones = torch.full((2, 64), -10.0, device="cuda"), torch.ones(2, 64, device="cuda")

    def step(**options: Any) -> None:
        logits_policy_loss(logits * 1.0, targets, old, ones, ones, **options)[0].backward()
        logits.grad = None

    step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(clip_low=0.1, temperature=0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
