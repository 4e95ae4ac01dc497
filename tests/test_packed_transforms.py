"""Functions of packed sequences under transforms, derivatives of both orders, and graphs that serve
batches of other lengths.
"""

from collections.abc import Callable

import pytest
import torch
from support.packings import leaf, packing
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

import fastrlhf as fr


def packed_functions(impl: str) -> dict[str, Callable[..., Tensor]]:
    """Scalars of token log-probs (N,), numbers (B,) of sequences, a mask and borders."""

    def before(x: Tensor) -> Tensor:
        """Log-probs that do not depend on those that are trained."""
        return torch.arange(x.shape[0], dtype=x.dtype, device=x.device).cos() * 0.3

    def preference(x: Tensor, of_sequences: Tensor, mask: Tensor, borders: Tensor) -> Tensor:
        index = torch.arange(borders.shape[0] - 1, device=x.device)
        losses, _ = fr.dpo_loss(
            x, of_sequences, index, index.flip(0), 0.3, mask=mask, cu_seqlens=borders, impl=impl
        )
        return (losses * of_sequences).sum()

    def without_a_kernel(x: Tensor, of_sequences: Tensor, mask: Tensor, borders: Tensor) -> Tensor:
        index = torch.arange(borders.shape[0] - 1, device=x.device)
        options = {"loss_type": "apo_zero", "mask": mask, "cu_seqlens": borders}
        losses, _ = fr.dpo_loss(x, before(x), index, index.flip(0), **options)
        return (losses * of_sequences).sum()

    def policy(x: Tensor, of_sequences: Tensor, mask: Tensor, borders: Tensor) -> Tensor:
        return fr.policy_loss(
            x, before(x), of_sequences, mask, surrogate="sapo", ratio_level="sequence",
            reduction="sequence-mean", cu_seqlens=borders,
        )[0]  # fmt: skip

    def value(x: Tensor, of_sequences: Tensor, mask: Tensor, borders: Tensor) -> Tensor:
        estimates, returns = fr.gae(before(x), before(x), mask, cu_seqlens=borders, impl=impl)
        rewards = fr.shaped_rewards(
            of_sequences, before(x), returns, mask, kl_coef=0.1, cu_seqlens=borders
        )
        return fr.value_loss(x, rewards, estimates + returns, mask, cu_seqlens=borders)[0]

    def average(x: Tensor, of_sequences: Tensor, mask: Tensor, borders: Tensor) -> Tensor:
        means = fr.sequence_logprobs(x, mask, average=True, cu_seqlens=borders)
        targets = fr.shift_targets(mask.long(), mask, cu_seqlens=borders)
        return (means.square() * of_sequences).sum() + targets.sum()

    return {
        "preference": preference, "preference without a kernel": without_a_kernel,
        "policy": policy, "value": value, "average": average,
    }  # fmt: skip


# Those that have a kernel, with it too.
FUNCTIONS = pytest.mark.parametrize(
    ("name", "impl"),
    [*((name, "eager") for name in packed_functions("eager")), ("preference", "triton"),
     ("value", "triton")],
)  # fmt: skip


@FUNCTIONS
def test_transforms_give_what_autograd_gives(name, impl, device) -> None:
    function = packed_functions(impl)[name]
    pack = packing([3, 0, 40, 1, 2], device)
    of_sequences = torch.randn(5, dtype=torch.float64, device=device)
    samples = torch.stack([pack.packed(pack.random()) for _ in range(3)])
    mask = torch.rand(46, device=device) < 0.8
    rest = of_sequences, mask, pack.cu_seqlens

    def gradient(x: Tensor) -> Tensor:
        x = leaf(x)
        return torch.autograd.grad(function(x, *rest), x)[0]

    expected = torch.stack([gradient(x) for x in samples])
    grad, vmap = torch.func.grad, torch.func.vmap
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(grad(function)(samples[0], *rest), expected[0], **close)
    by_sample = vmap(grad(function), (0, None, None, None))(samples, *rest)
    torch.testing.assert_close(by_sample, expected, **close)
    tangent = torch.randn_like(samples[0])
    _, slope = torch.func.jvp(lambda x: function(x, *rest), (samples[0],), (tangent,))
    torch.testing.assert_close(slope, (expected[0] * tangent).sum(), **close)
    leaves = leaf(samples[0])
    many = torch.autograd.grad(
        function(leaves, *rest).expand(2), leaves, torch.eye(2).to(samples), is_grads_batched=True
    )[0]
    torch.testing.assert_close(many, expected[:1].expand(2, -1), **close)


@FUNCTIONS
def test_first_and_second_derivatives(name, impl, device) -> None:
    function = packed_functions(impl)[name]
    pack = packing([3, 0, 40, 1, 2], device)
    x = pack.packed(pack.random(scale=0.1)).requires_grad_()
    of_sequences = torch.randn(5, dtype=torch.float64, device=device)
    mask = torch.rand(46, device=device) < 0.8
    # Of what is given besides, only a reference is more than a constant.
    of_sequences.requires_grad_(name == "preference")
    inputs = (x, of_sequences, mask, pack.cu_seqlens)
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


BATCHES = [[3, 0, 5, 1], [2, 9], [7, 7, 7, 2], [30, 1, 1, 60], [100, 200, 3, 4, 5], [300, 400, 1]]


@FUNCTIONS
def test_a_graph_serves_batches_of_other_lengths(name, impl, device) -> None:
    """Compiled once for fixed shapes, once for any, and once more where the tree of sums has a
    level that it has not for a few tokens.
    """
    function = packed_functions(impl)[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for lengths in BATCHES:
        pack = packing(lengths, device)
        x = pack.packed(pack.random())
        rest = (
            torch.randn(len(lengths), dtype=torch.float64, device=device),
            torch.rand(x.shape, device=device) < 0.8,
            pack.cu_seqlens,
        )
        gradients = []
        for one in (function, compiled):
            y = leaf(x)
            result = one(y, *rest)
            result.backward()
            gradients.append((result.detach(), y.grad))
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-14)
    assert counter.frame_count <= 3


def test_wrong_borders_are_found_in_a_graph_too() -> None:
    compiled = torch.compile(
        lambda x, borders: fr.sequence_logprobs(x, cu_seqlens=borders),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    x = torch.ones(5)
    assert compiled(x, torch.tensor([0, 2, 5])).tolist() == [2.0, 3.0]
    with pytest.raises(RuntimeError, match="cu_seqlens: expected to start at 0"):
        compiled(x, torch.tensor([0, 3, 4]))
