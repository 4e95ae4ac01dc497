"""dpo_loss of tensors in any layout: strides, expanded tensors, index dtypes, and batches without
pairs or sequences.
"""

import math
from collections.abc import Callable

import pytest
import torch
from support.preference_batches import (
    IMPLS,
    MARGIN_TYPES,
    Batch,
    assert_right,
    gradients,
    pairs_batch,
    tokens_batch,
)
from torch import Tensor

from fastrlhf import dpo_loss

INDEX_DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def _columns(x: Tensor) -> Tensor:
    """A slice of a wider tensor: tokens are neighbours, rows are not."""
    return torch.cat((x.new_full((len(x), 3), math.nan), x), 1)[:, 3:]


def _strided(x: Tensor) -> Tensor:
    """Every other column of a wider tensor."""
    return torch.stack((x, x.new_full(x.shape, math.nan)), -1).flatten(1)[:, ::2]


def _transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def _rows(x: Tensor) -> Tensor:
    """Every other row of a taller tensor."""
    return torch.stack((x, x.new_full(x.shape, math.nan)), 1).flatten(0, 1)[::2]


def _numeric(mask: Tensor, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """The layout, with zeros in the place of NaN for masks that have none."""
    laid = layout(mask.double())
    base = laid._base
    assert base is not None
    other = torch.nan_to_num(base, nan=1.0).to(dtype)
    return other.as_strided(laid.shape, laid.stride(), laid.storage_offset())


@pytest.mark.parametrize("ref_per_token", [True, False], ids=["token ref", "summed ref"])
@pytest.mark.parametrize(
    ("layout", "mask_dtype"),
    [
        (_columns, torch.bool),
        (_strided, torch.int64),
        (_transposed, torch.bool),
        (_rows, torch.float32),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # no addresses
)
@pytest.mark.parametrize("impl", IMPLS)
def test_strides_change_nothing(
    impl: str,
    layout: Callable[[Tensor], Tensor],
    mask_dtype: torch.dtype,
    ref_per_token: bool,
    device: torch.device,
) -> None:
    plain = tokens_batch(37, device, ref_per_token=ref_per_token)
    assert plain.mask is not None
    ref_layout = layout if ref_per_token else _strided_vector
    laid = plain._replace(
        pi_logps=layout(plain.pi_logps.detach()).requires_grad_(),
        ref_logps=ref_layout(plain.ref_logps.detach()).requires_grad_(),
        mask=_numeric(plain.mask, layout, mask_dtype),
        yw_idxs=torch.stack((plain.yw_idxs, plain.yl_idxs), 1)[:, 0],
        yl_idxs=torch.stack((plain.yw_idxs, plain.yl_idxs), 1)[:, 1],
    )
    assert not laid.pi_logps.is_contiguous() and not laid.yw_idxs.is_contiguous()
    upstream = torch.randn(5, 2, dtype=torch.float64).to(device)[:, 1]
    found = gradients(laid, upstream, impl=impl)
    # Eager sums add up in an order that depends on strides.
    rtol = 0 if impl == "triton" else 1e-14
    for one, other in zip(gradients(plain, upstream.contiguous(), impl=impl), found, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=0)


def _strided_vector(x: Tensor) -> Tensor:
    return torch.stack((x, x.new_full(x.shape, math.nan)), -1)[:, 0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, 37), (6, 1), (1, 1), (1,)], ids=str)
def test_an_expanded_reference_gets_the_sum_of_its_gradients(
    impl: str, shape: tuple[int, ...], device: torch.device
) -> None:
    batch = tokens_batch(37, device)
    assert batch.mask is not None
    small = torch.randn(shape, dtype=torch.float64).to(device).requires_grad_()
    full = (6, 37) if len(shape) == 2 else (6,)
    losses, rewards = batch._replace(ref_logps=small.expand(full)).loss(impl=impl)
    copied = batch._replace(ref_logps=small.detach().expand(full).clone().requires_grad_())
    same_losses, same_rewards, _, d_copy = gradients(copied, impl=impl)
    assert torch.equal(losses, same_losses) and torch.equal(rewards, same_rewards)
    (d_small,) = torch.autograd.grad(losses.sum(), small)
    torch.testing.assert_close(d_small, d_copy.sum_to_size(shape))


@pytest.mark.parametrize("impl", IMPLS)
def test_an_expanded_mask_and_expanded_sums_are_read_right(impl: str, device: torch.device) -> None:
    batch = tokens_batch(37, device, garbage=0.5)
    mask = (torch.arange(37, device=device) % 3 > 0).expand(6, 37)
    assert_right(batch._replace(mask=mask), impl=impl, loss_type="ipo")
    sums = pairs_batch(torch.float64, device)
    constant = torch.tensor(-3.0, dtype=torch.float64, device=device, requires_grad=True)
    losses, _ = sums._replace(ref_logps=constant.expand(7)).loss(impl=impl)
    copied = sums._replace(ref_logps=torch.full_like(sums.ref_logps, -3.0))
    assert torch.equal(losses, copied.loss(impl=impl)[0])
    losses, _ = sums._replace(pi_logps=constant.expand(7)).loss(impl=impl)
    copied = sums._replace(pi_logps=torch.full_like(sums.pi_logps, -3.0))
    assert torch.equal(losses, copied.loss(impl=impl)[0])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_reduced_loss_hands_down_an_expanded_gradient(
    impl: str, reduction: str, device: torch.device
) -> None:
    batch = tokens_batch(37, device)
    losses, _ = batch.loss(impl=impl)
    share = 1.0 if reduction == "sum" else 1 / 5
    (found,) = torch.autograd.grad(getattr(losses, reduction)(), batch.pi_logps)
    *_, expected, _ = gradients(batch, torch.full_like(losses, share), impl=impl)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("sequences", "dtype", "impl"),
    [
        *((7, dtype, impl) for dtype in INDEX_DTYPES for impl in IMPLS),
        *((300, dtype, "eager") for dtype in INDEX_DTYPES),
    ],
    ids=str,
)
def test_any_integer_type_indexes_a_batch_of_any_size(
    impl: str, sequences: int, dtype: torch.dtype, device: torch.device
) -> None:
    # 300 sequences are more than int8 and uint8 can count.
    last = min(sequences - 1, torch.iinfo(dtype).max)
    pi = torch.linspace(-9, -1, sequences, dtype=torch.float64).to(device).requires_grad_()
    yw = torch.tensor([0, last, 3, 5], device=device)
    yl = torch.tensor([last, 2, 5, 0], device=device)
    batch = Batch(pi, torch.zeros_like(pi).requires_grad_(), yw, yl)
    narrow = batch._replace(yw_idxs=yw.to(dtype), yl_idxs=yl.to(dtype))
    for one, other in zip(gradients(batch, impl=impl), gradients(narrow, impl=impl), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("loss_type", MARGIN_TYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_no_pairs_give_no_losses_and_zero_gradients(
    impl: str, loss_type: str, device: torch.device
) -> None:
    batch = tokens_batch(5, device)
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    losses, rewards, d_pi, d_ref = gradients(
        batch._replace(yw_idxs=nothing, yl_idxs=nothing), impl=impl, loss_type=loss_type
    )
    assert losses.shape == (0,)
    batch.expected_rewards().assert_losses(rewards)
    assert (d_pi == 0).all() and (d_ref == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_batch_gives_empty_results(impl: str, device: torch.device) -> None:
    empty = torch.zeros(0, device=device, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    losses, rewards = dpo_loss(empty, empty, nothing, nothing, impl=impl)
    assert losses.shape == rewards.shape == (0,)
    losses.sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0,)
