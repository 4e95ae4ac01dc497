"""The kernel of dpo_loss: how often it is launched, what it reads, that its bits depend on neither
run nor company, and which backend runs when.
"""

import importlib
import math
from typing import Any

import pytest
import torch
from support.preference_batches import (
    IMPLS,
    MARGIN_TYPES,
    Batch,
    gradients,
    pairs_batch,
    tokens_batch,
)
from support.preference_formulas import LOSS_TYPES

from fastrlhf.kernels import preference_loss as kernel


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[str]:
    """Names of the kernels launched so far, whether interpreted or compiled."""
    names: list[str] = []
    if device.type == "cpu":
        owner, name = importlib.import_module("triton.runtime.interpreter").GridExecutor, "__call__"
    else:
        owner, name = importlib.import_module("triton.runtime.jit").JITFunction, "run"
    original = getattr(owner, name)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return names


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_the_backward_kernel_reads_nothing_past_the_pairs(
    dtype: torch.dtype, device: torch.device
) -> None:
    # Lanes past the last pair must match no sequence, 255 = uint8(-1) included.
    slopes, d_losses = (torch.full((256,), math.nan, device=device) for _ in range(2))
    slopes[:2], d_losses[:2] = 0.5, 2.0
    weights = torch.ones(256, device=device)
    d_policy, d_sums = kernel.preference_loss_backward(
        torch.tensor([0, 1], dtype=dtype, device=device),
        torch.tensor([2, 255], dtype=dtype, device=device),
        None,
        slopes[:2],
        weights,
        d_losses[:2],
        tokens=1,
        dtype=torch.float32,
    )
    expected = torch.zeros(256, device=device)
    expected[[0, 1]], expected[[2, 255]] = 1.0, -1.0
    assert torch.equal(d_sums, expected)
    assert torch.equal(d_policy[:, 0], expected)


@pytest.mark.parametrize("loss_type", MARGIN_TYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_sequence_against_itself_has_margin_and_gradient_zero(
    impl: str, loss_type: str, device: torch.device
) -> None:
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    batch = tokens_batch(5, device)
    assert batch.mask is not None
    single = Batch(
        batch.pi_logps[:1].detach().requires_grad_(),
        batch.ref_logps[:1].detach().requires_grad_(),
        zero,
        zero,
        batch.mask[:1],
    )
    losses, _, d_pi, d_ref = gradients(single, impl=impl, loss_type=loss_type, beta=0.5)
    at_zero = {"hinge": 1.0, "ipo": 1.0}.get(loss_type, math.log(2))
    torch.testing.assert_close(losses, torch.full_like(losses, at_zero))
    assert (d_pi == 0).all() and (d_ref == 0).all()


def test_more_pairs_than_a_tile_add_up_in_one_launch(
    launches: list[str], device: torch.device
) -> None:
    pi, ref = (-5 * torch.rand(4, dtype=torch.float64).to(device) for _ in range(2))
    yw, yl = (torch.randint(4, (270,)).to(device) for _ in range(2))
    lengths = torch.tensor([1, 4, 2, 9], device=device)
    batch = Batch(pi.requires_grad_(), ref.requires_grad_(), yw, yl, lengths=lengths)
    upstream = torch.randn(270, dtype=torch.float64).to(device)
    # Margins of a (4, 4) table, so that the oracle has 16 pairs to differentiate and not 270.
    first, second = (x.flatten() for x in torch.meshgrid(*[torch.arange(4)] * 2, indexing="ij"))
    table = batch._replace(yw_idxs=first, yl_idxs=second).expected(loss_type="ipo", beta=0.5)
    losses, _, d_pi, d_ref = gradients(batch, upstream, impl="triton", loss_type="ipo", beta=0.5)
    assert launches == ["_preference_loss_fwd_kernel", "_preference_loss_bwd_kernel"]
    where = (4 * yw + yl).cpu()
    expected = torch.tensor([float(x) for x in table.losses], dtype=torch.float64)[where]
    torch.testing.assert_close(losses.cpu(), expected, rtol=1e-12, atol=1e-14)
    weights = torch.zeros(16, dtype=torch.float64).index_add_(0, where, upstream.cpu())
    table.assert_gradients(d_pi, d_ref, weights=weights.tolist())


@pytest.mark.parametrize("loss_type", MARGIN_TYPES)
def test_a_single_nan_upstream_reaches_its_own_pair_alone(
    loss_type: str, device: torch.device
) -> None:
    batch = pairs_batch(torch.float64, device)
    upstream = torch.tensor([1.0, 1.0, math.nan, 1.0, 1.0, 1.0], dtype=torch.float64).to(device)
    *_, d_pi, d_ref = gradients(batch, upstream, impl="triton", loss_type=loss_type)
    assert d_pi.isnan().tolist() == [False, False, True, False, False, True, False]
    assert d_ref.isnan().tolist() == d_pi.isnan().tolist()


@pytest.mark.parametrize("needs", ["policy", "reference"])
@pytest.mark.parametrize("impl", IMPLS)
def test_either_gradient_alone_is_the_same(impl: str, needs: str, device: torch.device) -> None:
    batch = tokens_batch(37, device)
    *_, d_pi, d_ref = gradients(batch, impl=impl)
    name, expected = ("pi_logps", d_pi) if needs == "policy" else ("ref_logps", d_ref)
    other = "ref_logps" if needs == "policy" else "pi_logps"
    alone = batch._replace(**{other: getattr(batch, other).detach()})
    losses, _ = alone.loss(impl=impl)
    (found,) = torch.autograd.grad(losses.sum(), getattr(alone, name))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_change_from_run_to_run_or_with_the_company(
    loss_type: str, dtype: torch.dtype, device: torch.device
) -> None:
    batch = tokens_batch(1500, device, dtype)
    first = gradients(batch, impl="triton", loss_type=loss_type)
    again = gradients(batch, impl="triton", loss_type=loss_type)
    assert all(map(torch.equal, first, again))
    last = slice(-1, None)
    alone = batch._replace(yw_idxs=batch.yw_idxs[last], yl_idxs=batch.yl_idxs[last])
    assert torch.equal(first[0][last], alone.loss(impl="triton", loss_type=loss_type)[0])


@pytest.mark.parametrize("mode", ["sums", "tokens", "tokens, summed ref"])
@pytest.mark.parametrize("loss_type", MARGIN_TYPES)
def test_one_launch_forward_and_one_backward(
    loss_type: str, mode: str, launches: list[str], device: torch.device
) -> None:
    if mode == "sums":
        batch = pairs_batch(torch.float32, device)
    else:
        batch = tokens_batch(
            1500, device, torch.bfloat16, ref_per_token=mode != "tokens, summed ref"
        )
    losses, _ = batch.loss(loss_type=loss_type, impl="triton")
    assert launches == ["_preference_loss_fwd_kernel"]
    losses.mean().backward()
    assert launches == ["_preference_loss_fwd_kernel", "_preference_loss_bwd_kernel"]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_eager_launches_nothing(loss_type: str, launches: list[str], device: torch.device) -> None:
    batch = pairs_batch(torch.float32, device)
    gradients(batch, loss_type=loss_type, label_smoothing=0.1, impl="eager")
    assert launches == []


def test_auto_takes_the_kernel_where_it_runs(launches: list[str], device: torch.device) -> None:
    pairs_batch(torch.float32, device).loss()
    assert launches == ["_preference_loss_fwd_kernel"]


@pytest.mark.parametrize("impl", IMPLS)
def test_integer_options_are_numbers(impl: str, device: torch.device) -> None:
    batch = pairs_batch(torch.float64, device)
    one = batch.loss(beta=1, label_smoothing=0, impl=impl)[0]
    assert torch.equal(one, batch.loss(beta=1.0, label_smoothing=0.0, impl=impl)[0])
