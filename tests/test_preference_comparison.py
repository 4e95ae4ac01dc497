"""The comparison that tests of dpo_loss make can fail: wrong losses, gradients and kernels, which
it must reject.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from support.preference_batches import (
    AVERAGED_TYPES,
    Batch,
    assert_right,
    gradients,
    pairs_batch,
    tokens_batch,
)
from support.preference_formulas import GRADIENT_RTOL, LOSS_TYPES
from torch import Tensor

from fastrlhf.kernels import preference_loss as kernel
from fastrlhf.kernels.tiles import log_sigmoid, sigmoid


def _unsmoothed(batch: Batch, options: dict[str, Any]) -> Tensor:
    return batch.loss(**{**options, "label_smoothing": 0.0})[0]


def _swapped(batch: Batch, options: dict[str, Any]) -> Tensor:
    swapped = batch._replace(yw_idxs=batch.yl_idxs, yl_idxs=batch.yw_idxs)
    return swapped.loss(**options)[0]


def _without_reference(batch: Batch, options: dict[str, Any]) -> Tensor:
    return batch._replace(ref_logps=torch.zeros_like(batch.ref_logps)).loss(**options)[0]


def _rejected_sign_flipped(batch: Batch, options: dict[str, Any]) -> Tensor:
    scores = (batch.pi_logps - batch.ref_logps).detach()
    # Every pair on its own, with s_l for -s_l.
    pairs = torch.cat((scores[batch.yw_idxs], -scores[batch.yl_idxs]))
    first, second = torch.arange(12).chunk(2)
    mutant = batch._replace(
        pi_logps=pairs, ref_logps=torch.zeros_like(pairs), yw_idxs=first, yl_idxs=second
    )
    return mutant.loss(**options)[0]


def _beta_off(batch: Batch, options: dict[str, Any]) -> Tensor:
    return batch.loss(**{**options, "beta": 0.1 * (1 + 1e-4)})[0]


def _averages_wrongly(batch: Batch, options: dict[str, Any]) -> Tensor:
    assert batch.lengths is not None
    return batch._replace(lengths=batch.lengths + 1).loss(**options)[0]


@pytest.mark.parametrize(
    ("loss_type", "mutant"),
    [
        *((name, _unsmoothed) for name in ("sigmoid", "robust", "aot", "aot_unpaired")),
        *((name, _swapped) for name in LOSS_TYPES),
        *((name, _without_reference) for name in LOSS_TYPES),
        *((name, _beta_off) for name in LOSS_TYPES),
        *((name, _rejected_sign_flipped) for name in LOSS_TYPES if name not in AVERAGED_TYPES),
        *((name, _averages_wrongly) for name in AVERAGED_TYPES),
    ],
)
def test_the_comparison_of_fp32_losses_rejects(
    loss_type: str, mutant: Callable[[Batch, dict[str, Any]], Tensor]
) -> None:
    batch = pairs_batch(torch.float32)
    options = {"loss_type": loss_type, "label_smoothing": 1e-3, "impl": "eager"}
    expected = batch.expected(loss_type=loss_type, label_smoothing=1e-3)
    expected.assert_losses(batch.loss(**options)[0])
    with pytest.raises(AssertionError, match="x bound"):
        expected.assert_losses(mutant(batch, options))


@pytest.mark.parametrize(
    "mutant",
    [
        lambda g: 1.0001 * g,
        lambda g: 0 * g,
        lambda g: -g,
        lambda g: g.abs(),  # the rejected term with the wrong sign
        lambda g: g.roll(1),
        lambda g: torch.full_like(g, math.nan),
    ],
    ids=["off by 1e-4", "zero", "negated", "sign of rejected", "of another sequence", "nan"],
)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_comparison_of_fp32_gradients_rejects(
    loss_type: str, mutant: Callable[[Tensor], Tensor]
) -> None:
    # Distinct sequences: each gradient entry is one slope, and tolerances have nothing to hide in.
    batch = pairs_batch(torch.float32)._replace(
        yw_idxs=torch.tensor([0, 1, 2]), yl_idxs=torch.tensor([3, 4, 5])
    )
    rtol = GRADIENT_RTOL[torch.float32]
    options = {"loss_type": loss_type, "label_smoothing": 0.1}
    if loss_type == "hinge":
        options["beta"] = 0.01  # no pair is past the kink
    if loss_type == "discopop":
        options["discopop_tau"] = 1.0
    *_, d_pi, d_ref = gradients(batch, impl="eager", **options)
    expected = batch.expected(**options)
    expected.assert_gradients(d_pi, d_ref, rtol=rtol)
    with pytest.raises(AssertionError, match="gradient"):
        expected.assert_gradients(mutant(d_pi), d_ref, rtol=rtol)
    with pytest.raises(AssertionError, match="gradient"):
        expected.assert_gradients(d_pi, mutant(d_ref), rtol=rtol)


@triton.jit
def _slope_off(margin, beta, label_smoothing):
    d = beta * margin
    loss = -(1.0 - label_smoothing) * log_sigmoid(d) - label_smoothing * log_sigmoid(-d)
    slope = label_smoothing * sigmoid(d) - (1.0 - label_smoothing) * sigmoid(-d)
    return loss, 1.001 * beta * slope


@triton.jit
def _slope_without_beta(margin, beta, label_smoothing):
    d = beta * margin
    loss = -(1.0 - label_smoothing) * log_sigmoid(d) - label_smoothing * log_sigmoid(-d)
    return loss, label_smoothing * sigmoid(d) - (1.0 - label_smoothing) * sigmoid(-d)


@triton.jit
def _slope_zero(margin, beta, label_smoothing):
    d = beta * margin
    loss = -(1.0 - label_smoothing) * log_sigmoid(d) - label_smoothing * log_sigmoid(-d)
    return loss, 0.0 * tl.abs(margin)


@triton.jit
def _smoothing_dropped(margin, beta, label_smoothing):
    return -log_sigmoid(beta * margin), -beta * sigmoid(-beta * margin)


@triton.jit
def _smoothing_dropped_from_the_slope(margin, beta, label_smoothing):
    d = beta * margin
    loss = -(1.0 - label_smoothing) * log_sigmoid(d) - label_smoothing * log_sigmoid(-d)
    return loss, -beta * sigmoid(-d)


@pytest.mark.parametrize(
    "mutant",
    [
        _slope_off,
        _slope_without_beta,
        _slope_zero,
        _smoothing_dropped,
        _smoothing_dropped_from_the_slope,
    ],
    ids=lambda mutant: mutant.__name__,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_a_kernel_with_a_wrong_formula_is_found_out(
    dtype: torch.dtype, mutant: Any, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    batch = tokens_batch(5, device, dtype)
    assert_right(batch, impl="triton", label_smoothing=0.01)
    monkeypatch.setitem(kernel.FORMULAS, "sigmoid", mutant)
    with pytest.raises(AssertionError, match=r"x bound|gradient"):
        assert_right(batch, impl="triton", label_smoothing=0.01)
