"""dpo_loss of token log-probs: they are summed over the mask, in at least fp32, and each kept token
carries the gradient of its sum, whatever stands outside of the mask.
"""

import math
from typing import Any

import pytest
import torch
from support.preference_batches import (
    IMPLS,
    MARGIN_TYPES,
    assert_right,
    gradients,
    of_sums,
    pairs_batch,
    tokens_batch,
)
from support.preference_formulas import GRADIENT_RTOL, LOSS_TYPES

from fastrlhf import dpo_loss


@pytest.mark.parametrize("ref_per_token", [True, False], ids=["token ref", "summed ref"])
@pytest.mark.parametrize(
    ("loss_type", "tokens"),
    [
        *(("sigmoid", tokens) for tokens in (1, 37, 1024, 1500)),
        *(("ipo", tokens) for tokens in (1, 128, 1025)),
        *((name, 37) for name in ("robust", "hinge", "sigmoid_norm")),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_token_log_probs_are_summed_over_the_mask(
    impl: str, loss_type: str, tokens: int, ref_per_token: bool, device: torch.device
) -> None:
    batch = tokens_batch(tokens, device, ref_per_token=ref_per_token)
    upstream = torch.randn(5, dtype=torch.float64).to(device)
    assert_right(batch, impl=impl, upstream=upstream, loss_type=loss_type, label_smoothing=0.1)


@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name not in MARGIN_TYPES])
def test_types_without_a_kernel_take_tokens_too(loss_type: str, device: torch.device) -> None:
    batch = tokens_batch(37, device)
    assert_right(batch, impl="auto", loss_type=loss_type, label_smoothing=0.1)


@pytest.mark.parametrize("ref_per_token", [True, False], ids=["token ref", "summed ref"])
@pytest.mark.parametrize("dtype", list(GRADIENT_RTOL), ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_dtype_is_summed_in_at_least_fp32(
    impl: str, dtype: torch.dtype, ref_per_token: bool, device: torch.device
) -> None:
    batch = tokens_batch(300, device, dtype, ref_per_token=ref_per_token)
    assert_right(batch, impl=impl)


@pytest.mark.parametrize("dtype", list(GRADIENT_RTOL), ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_of_the_reference_has_the_precision_of_the_reference(
    impl: str, dtype: torch.dtype, device: torch.device
) -> None:
    batch = tokens_batch(37, device, dtype)
    batch = batch._replace(ref_logps=batch.ref_logps.detach().float().requires_grad_())
    assert batch.mask is not None
    *_, d_ref = gradients(batch, impl=impl)
    expected = batch.expected()
    expected.jacobian = expected.jacobian[6:10]  # sequences 0 to 3 of the reference
    found = of_sums(d_ref, batch.mask, [])[:4]
    expected.assert_gradients(found, rtol=GRADIENT_RTOL[torch.float32])


@pytest.mark.parametrize("tokens", [None, 5], ids=["sums", "tokens"])
@pytest.mark.parametrize("policy", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ref", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_both_implementations_promote_mixed_dtypes_alike(
    policy: torch.dtype, ref: torch.dtype, tokens: int | None, device: torch.device
) -> None:
    batch = pairs_batch(torch.float64, device) if tokens is None else tokens_batch(tokens, device)
    batch = batch._replace(pi_logps=batch.pi_logps.to(policy), ref_logps=batch.ref_logps.to(ref))
    for mine, definition in zip(batch.loss(impl="triton"), batch.loss(impl="eager"), strict=True):
        torch.testing.assert_close(mine, definition)


@pytest.mark.parametrize(
    ("garbage", "mask_dtype"),
    [
        *((x, torch.bool) for x in (math.nan, math.inf, -math.inf, -1e9)),
        *((math.nan, x) for x in (torch.int64, torch.uint8, torch.float32)),
    ],
    ids=str,
)
@pytest.mark.parametrize("ref_per_token", [True, False], ids=["token ref", "summed ref"])
@pytest.mark.parametrize("impl", IMPLS)
def test_what_stands_outside_the_mask_changes_no_bit(
    impl: str,
    ref_per_token: bool,
    garbage: float,
    mask_dtype: torch.dtype,
    device: torch.device,
) -> None:
    options: dict[str, Any] = {"impl": impl, "loss_type": "sigmoid_norm"}
    clean = tokens_batch(37, device, garbage=0.0, ref_per_token=ref_per_token)
    dirty = tokens_batch(
        37, device, garbage=garbage, ref_per_token=ref_per_token, mask_dtype=mask_dtype
    )
    found = gradients(dirty, **options)
    for one, other in zip(gradients(clean, **options), found, strict=True):
        assert torch.equal(one, other)
    assert dirty.mask is not None
    *_, d_pi, d_ref = found
    assert (d_pi[dirty.mask == 0] == 0).all()
    assert not ref_per_token or (d_ref[dirty.mask == 0] == 0).all()


@pytest.mark.parametrize("loss_type", MARGIN_TYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_batch_without_any_token_has_margin_zero(
    impl: str, loss_type: str, device: torch.device
) -> None:
    batch = tokens_batch(5, device)
    assert batch.mask is not None
    losses, rewards, d_pi, d_ref = gradients(
        batch._replace(mask=torch.zeros_like(batch.mask)), impl=impl, loss_type=loss_type, beta=0.5
    )
    at_zero = {"hinge": 1.0, "ipo": 1.0}.get(loss_type, math.log(2))
    torch.testing.assert_close(losses, torch.full_like(losses, at_zero))
    for zero in (rewards, d_pi, d_ref):
        assert (zero == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_sequences_of_no_positions_are_empty_sums(impl: str, device: torch.device) -> None:
    none = torch.zeros(2, 0, device=device, requires_grad=True)
    ref = torch.tensor([1.0, 3.0], device=device)
    yw, yl = torch.tensor([0], device=device), torch.tensor([1], device=device)
    losses, rewards = dpo_loss(none, ref, yw, yl, 0.5, mask=none.detach() != 0, impl=impl)
    torch.testing.assert_close(losses.tolist(), [math.log1p(math.exp(-1.0))])
    assert rewards.tolist() == [-0.5, -1.5]
    (d_none,) = torch.autograd.grad(losses.sum(), none)
    assert d_none.shape == (2, 0)
