"""dpo_loss: all types against the oracle, and the kernel of the margin losses in every layout."""

import importlib
import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from support.preference_formulas import (
    GRADIENT_RTOL,
    LOSS_TYPES,
    Expectation,
    expected_dpo,
    expected_rewards,
)
from torch import Tensor

from fastrlhf import dpo_loss
from fastrlhf.kernels import preference_loss as kernel
from fastrlhf.kernels.tiles import log_sigmoid, sigmoid

MARGIN_TYPES = ["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm"]  # those with a kernel
AVERAGED_TYPES = ["ipo", "sigmoid_norm"]
SMOOTHED_TYPES = ["sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"]
IMPLS = ["eager", "triton"]
INDEX_DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
WITH_IMPL = [(name, impl) for name in LOSS_TYPES for impl in IMPLS if name in MARGIN_TYPES] + [
    (name, "eager") for name in LOSS_TYPES if name not in MARGIN_TYPES
]
PROPERTY = settings(max_examples=15, deadline=None, derandomize=True, database=None)


class Batch(NamedTuple):
    """Arguments of dpo_loss, (B,) sums without a mask, tokens (B, T) with one."""

    pi_logps: Tensor
    ref_logps: Tensor
    yw_idxs: Tensor
    yl_idxs: Tensor
    mask: Tensor | None = None
    lengths: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        return Batch(*(None if x is None else x.to(device) for x in self))

    def loss(self, **options: Any) -> tuple[Tensor, Tensor]:
        """Losses and rewards of the batch."""
        pi, ref, yw, yl, mask, lengths = self
        return dpo_loss(pi, ref, yw, yl, mask=mask, lengths=lengths, **options)

    def expected(self, **options: Any) -> Expectation:
        """What the losses must be."""
        pi, ref, yw, yl, mask, lengths = self
        return expected_dpo(pi, ref, yw, yl, mask=mask, lengths=lengths, **options)

    def expected_rewards(self, beta: float = 0.1) -> Expectation:
        """What the rewards must be."""
        return expected_rewards(self.pi_logps, self.ref_logps, beta, self.mask)


def pairs_batch(dtype: torch.dtype, device: torch.device | str = "cpu") -> Batch:
    """Sums of 7 sequences; some in several pairs, one pair twice, sequence 6 in none."""
    ref = -60 * torch.rand(7, dtype=torch.float64)
    pi = ref + 6 * torch.randn(7, dtype=torch.float64)
    lengths = torch.tensor([3, 7, 1, 12, 9, 30, 5], device=device)
    yw = torch.tensor([0, 1, 2, 4, 0, 1], device=device)
    yl = torch.tensor([3, 0, 5, 3, 3, 0], device=device)
    return Batch(
        pi.to(device, dtype).requires_grad_(),
        ref.to(device, dtype).requires_grad_(),
        yw,
        yl,
        lengths=lengths,
    )


def tokens_batch(
    tokens: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    *,
    ref_per_token: bool = True,
    garbage: float = math.nan,
    mask_dtype: torch.dtype = torch.bool,
) -> Batch:
    """Token log-probs of 6 sequences with garbage outside the mask; sequence 4 is masked
    altogether, sequence 5 in no pair.
    """
    generator = torch.Generator().manual_seed(tokens)
    # Sums of the order of one, so that every slope counts.
    scale = tokens**-0.5
    pi = -scale * torch.rand(6, tokens, dtype=torch.float64, generator=generator)
    ref = pi + 0.5 * scale * torch.randn(6, tokens, dtype=torch.float64, generator=generator)
    mask = torch.rand(6, tokens, generator=generator) < 0.7
    mask[:, 0], mask[4] = True, False
    pi = torch.where(mask, pi, garbage)
    ref = torch.where(mask, ref, garbage) if ref_per_token else torch.where(mask, ref, 0.0).sum(-1)
    return Batch(
        pi.to(device, dtype).requires_grad_(),
        ref.to(device, dtype).requires_grad_(),
        torch.tensor([0, 1, 2, 0, 4], device=device),
        torch.tensor([1, 2, 3, 3, 0], device=device),
        mask.to(device, mask_dtype),
    )


def gradients(
    batch: Batch, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, rewards and the gradients of policy and reference."""
    losses, rewards = batch.loss(**options)
    upstream = torch.ones_like(losses) if upstream is None else upstream
    return (
        losses,
        rewards,
        *torch.autograd.grad(losses, (batch.pi_logps, batch.ref_logps), upstream),
    )


def of_sums(d_tokens: Tensor, mask: Tensor | None, dead: list[int]) -> Tensor:
    """The gradient of each sum, after checking that every kept token carries it and no other.

    A sequence without tokens carries none; its place is filled with NaN and listed in `dead`.
    """
    if d_tokens.ndim == 1:
        return d_tokens
    assert mask is not None
    keep = mask != 0
    assert (d_tokens[~keep] == 0).all()
    values = []
    for i, (row, kept) in enumerate(zip(d_tokens, keep, strict=True)):
        if not kept.any():
            dead.append(i)
        assert len(row[kept].unique()) <= 1
        values.append(row[kept][0] if kept.any() else row.new_tensor(math.nan))
    return torch.stack(values)


def assert_right(
    batch: Batch, *, impl: str, upstream: Tensor | None = None, **options: Any
) -> None:
    """Compare losses, rewards and all gradients with the oracle."""
    losses, rewards, d_pi, d_ref = gradients(batch, upstream, impl=impl, **options)
    accumulated = torch.promote_types(batch.pi_logps.dtype, torch.float32)
    assert (losses.dtype, rewards.dtype) == (accumulated, accumulated)
    assert (d_pi.dtype, d_ref.dtype) == (batch.pi_logps.dtype, batch.ref_logps.dtype)
    beta, loss_type = options.get("beta", 0.1), options.get("loss_type", "sigmoid")
    expected = batch.expected(**options)
    expected.assert_losses(losses, floor=float(loss_type == "exo_pair"))
    batch.expected_rewards(beta).assert_losses(rewards)
    assert not rewards.requires_grad
    dead: list[int] = []
    found = [of_sums(d_pi, batch.mask, dead), of_sums(d_ref, batch.mask, [])]
    live = [
        (i, j, len(expected.jacobian) // 2)
        for i in range(len(found[0]))
        for j in (0, 1)
        if i not in dead or (batch.ref_logps.ndim == 1 and j == 1)
    ]
    rows = [expected.jacobian[i + j * half] for j in (0, 1) for i, k, half in live if k == j]
    values = [torch.stack([found[j][i] for i, k, _ in live if k == j]) for j in (0, 1)]
    expected.jacobian = rows
    expected.assert_gradients(
        *values,
        weights=None if upstream is None else upstream.tolist(),
        rtol=gradient_rtol(batch.pi_logps.dtype, loss_type),
        floor=beta if cancels(loss_type, options.get("label_smoothing", 0.0)) else 0.0,
    )


def cancels(loss_type: str, label_smoothing: float) -> bool:
    """Whether the slope is a difference of terms of the order of beta, so that its last digits are
    those of the terms.
    """
    smoothed = loss_type in SMOOTHED_TYPES and label_smoothing > 0
    # aot sorts the reference alone as well, and what it adds up for that cancels.
    return smoothed or loss_type in ("exo_pair", "apo_zero", "apo_down", "aot")


def gradient_rtol(dtype: torch.dtype, loss_type: str) -> float:
    """The gate of discopop multiplies the rounding error of the margin by 1/τ = 20."""
    return GRADIENT_RTOL[dtype] * (20 if loss_type == "discopop" else 1)


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


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_log_probs_with_a_reference_in_fp64(impl, dtype, device) -> None:
    policy = torch.tensor([-3.0, -2.0], dtype=dtype, device=device, requires_grad=True)
    ref = torch.tensor([-2.0, -2.5], dtype=torch.float64, device=device)
    first, second = (torch.tensor([i], device=device) for i in (0, 1))
    losses, _ = dpo_loss(policy, ref, first, second, beta=0.1, impl=impl)
    (found,) = torch.autograd.grad(losses.sum(), policy)
    assert found.dtype == dtype
    slope = -0.1 / (1 + math.exp(0.1 * (-3 + 2 + 2 - 2.5)))
    expected = torch.tensor([slope, -slope], dtype=torch.float64)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


# All types against the formulas of their papers.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("beta", [0.01, 1.0])
@pytest.mark.parametrize(
    ("loss_type", "impl", "label_smoothing"),
    [
        *((*x, e) for x in WITH_IMPL if x[0] in SMOOTHED_TYPES for e in (1e-3, 0.49)),
        *((*x, 0.0) for x in WITH_IMPL if x[0] != "exo_pair"),
        # Without effect on these: the oracle does not use it.
        *((name, "eager", 0.25) for name in LOSS_TYPES if name not in SMOOTHED_TYPES),
        ("sigmoid_norm", "triton", 0.25),
        *((name, "eager", 0.5) for name in SMOOTHED_TYPES if name != "robust"),
    ],
)
def test_values_rewards_and_gradients_are_those_of_the_paper(
    loss_type: str,
    impl: str,
    beta: float,
    label_smoothing: float,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    batch = pairs_batch(dtype, device)
    upstream = torch.randn(6, dtype=torch.float64).to(device, dtype)
    assert_right(
        batch,
        impl=impl,
        upstream=upstream,
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
    )


@pytest.mark.parametrize("tau", [0.01, 0.05, 1.0])
def test_discopop_follows_its_temperature(tau: float) -> None:
    batch = pairs_batch(torch.float64)
    losses, _ = batch.loss(loss_type="discopop", discopop_tau=tau)
    batch.expected(loss_type="discopop", discopop_tau=tau).assert_losses(losses)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", [1e-4, 1.5, 50.0, 1e4])
@pytest.mark.parametrize(("loss_type", "impl"), WITH_IMPL)
def test_extreme_margins_stay_finite_and_right(
    loss_type: str,
    impl: str,
    margin: float,
    label_smoothing: float,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    # Scaled by beta, pair 0 has about the margin and pair 1 its negative; no two margins of the
    # reference are the same, which would leave the gradient of aot to the sort. NaN and inf fail
    # any comparison with a finite number.
    batch = Batch(
        torch.tensor([10 * margin - 7, -7], dtype=dtype, device=device).requires_grad_(),
        torch.tensor([-0.125, 0.25], dtype=dtype, device=device).requires_grad_(),
        torch.tensor([0, 1], device=device),
        torch.tensor([1, 0], device=device),
        lengths=torch.tensor([1, 1], device=device),
    )
    smoothing = 0.5 if loss_type == "exo_pair" and label_smoothing == 0 else label_smoothing
    options: dict[str, Any] = {"loss_type": loss_type, "label_smoothing": smoothing, "impl": impl}
    assert_right(batch, **options)


def test_discopop_goes_over_to_the_logistic_loss_where_its_exponential_would_overflow() -> None:
    scores = torch.tensor([-9e4, 9e4], requires_grad=True)
    losses, _ = dpo_loss(
        scores,
        torch.zeros(2),
        torch.tensor([0]),
        torch.tensor([1]),
        beta=1.0,
        loss_type="discopop",
    )
    (slope,) = torch.autograd.grad(losses.sum(), scores)
    assert losses.tolist() == [1.8e5]
    assert slope.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "hinge", "sigmoid_norm"])
def test_an_impossible_rejected_sequence_costs_nothing(
    loss_type: str, impl: str, device: torch.device
) -> None:
    # ln π(y_l) = -inf is what a masked vocabulary gives; -ln σ(+inf) is 0, not NaN.
    pi = torch.tensor([-1.0, -math.inf], device=device, requires_grad=True)
    losses, rewards = dpo_loss(
        pi,
        torch.tensor([-1.0, -2.0], device=device),
        torch.tensor([0], device=device),
        torch.tensor([1], device=device),
        loss_type=loss_type,
        lengths=torch.tensor([2, 2], device=device),
        impl=impl,
    )
    (d_pi,) = torch.autograd.grad(losses.sum(), pi)
    assert losses.tolist() == [0.0]
    assert rewards.tolist() == [0.0, -math.inf]
    assert d_pi.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_hinge_is_zero_with_a_zero_slope_from_margin_one_on(
    impl: str, device: torch.device
) -> None:
    scores = torch.tensor([2.0, 0.0, 3.0], device=device, requires_grad=True)
    losses, _ = dpo_loss(
        scores,
        torch.zeros(3, device=device),
        torch.tensor([0, 2], device=device),
        torch.tensor([1, 1], device=device),
        beta=0.5,
        loss_type="hinge",
        impl=impl,
    )
    (slope,) = torch.autograd.grad(losses.sum(), scores)
    assert losses.tolist() == [0.0, 0.0]
    assert slope.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", AVERAGED_TYPES)
def test_a_length_of_zero_counts_as_one(loss_type: str, impl: str, device: torch.device) -> None:
    batch = pairs_batch(torch.float64, device)
    empty = torch.tensor([0, 7, 1, 12, 9, 30, 5], device=device)
    assert_right(batch._replace(lengths=empty), impl=impl, loss_type=loss_type)


@pytest.mark.parametrize("loss_type", MARGIN_TYPES)
def test_gradients_of_the_kernels_gradients_are_right(loss_type: str, device: torch.device) -> None:
    # One pair, away from the kink of hinge: each call is four interpreted programs.
    pi, ref = (
        torch.tensor(x, dtype=torch.float64, device=device, requires_grad=True)
        for x in ([-3.0, -4.0], [-3.5, -4.25])
    )
    index, lengths = torch.tensor([0, 1], device=device), torch.tensor([2, 3], device=device)

    def losses_of(pi: Tensor, ref: Tensor) -> Tensor:
        batch = Batch(pi, ref, index[:1], index[1:], lengths=lengths)
        return batch.loss(loss_type=loss_type, label_smoothing=0.1, impl="triton")[0]

    assert torch.autograd.gradcheck(losses_of, (pi, ref))
    assert torch.autograd.gradgradcheck(losses_of, (pi, ref), fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_create_graph_counts_no_path_twice(impl: str, device: torch.device) -> None:
    # A reference that is itself a function of the policy's leaf: the derivative by the leaf is the
    # sum of two paths, whichever way the graph is built.
    leaf = torch.tensor([-1.0, -3.0], dtype=torch.float64, device=device, requires_grad=True)
    yw, yl = torch.tensor([0], device=device), torch.tensor([1], device=device)
    losses, _ = dpo_loss(leaf, 0.5 * leaf, yw, yl, beta=1.0, impl=impl)
    (plain,) = torch.autograd.grad(losses.sum(), leaf, retain_graph=True)
    (graphed,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
    slope = -0.5 / (1 + math.e)  # d = (leaf_0 - leaf_1) / 2 = 1
    torch.testing.assert_close(plain, plain.new_tensor([slope, -slope]))
    torch.testing.assert_close(graphed, plain)


# The comparison can fail: what it must not accept.


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


# The kernel: token log-probs to losses, and back to tokens.


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


# Properties.


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Sums of up to 5 sequences in multiples of 1/8, and any pairs of them."""
    size, pairs = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    eighths = st.lists(st.integers(-800, 0), min_size=size, max_size=size)
    index = st.lists(st.integers(0, size - 1), min_size=pairs, max_size=pairs)
    lengths = draw(st.lists(st.integers(0, 40), min_size=size, max_size=size))
    return Batch(
        torch.tensor(draw(eighths), dtype=torch.float64) / 8,
        torch.tensor(draw(eighths), dtype=torch.float64) / 8,
        torch.tensor(draw(index), dtype=torch.int64),
        torch.tensor(draw(index), dtype=torch.int64),
        lengths=torch.tensor(lengths),
    )


MARGIN_AND_IMPL = st.tuples(st.sampled_from(MARGIN_TYPES), st.sampled_from(IMPLS))


@PROPERTY
@given(batch=batches(), choice=st.sampled_from(WITH_IMPL), beta=st.floats(0.01, 2))
def test_any_batch_agrees_with_the_oracle(
    batch: Batch, choice: tuple[str, str], beta: float, device: torch.device
) -> None:
    batch = batch.to(device)
    options: dict[str, Any] = {"loss_type": choice[0], "beta": beta, "label_smoothing": 0.1}
    losses, rewards = batch.loss(impl=choice[1], **options)
    expected = batch.expected(**options)
    # Where a pair is a sequence against itself, all sizes cancel, so an absolute floor remains.
    for value, exact in zip(losses.tolist(), expected.losses, strict=True):
        assert value == pytest.approx(float(exact), rel=1e-11, abs=1e-12)
    batch.expected_rewards(beta).assert_losses(rewards)


@PROPERTY
@given(batch=batches(), impl=st.sampled_from(IMPLS))
def test_a_label_that_is_a_coin_flip_prefers_neither(
    batch: Batch, impl: str, device: torch.device
) -> None:
    batch = batch.to(device)
    swapped = batch._replace(yw_idxs=batch.yl_idxs, yl_idxs=batch.yw_idxs)
    one, other = (x.loss(label_smoothing=0.5, impl=impl)[0] for x in (batch, swapped))
    torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


@PROPERTY
@given(batch=batches(), choice=st.sampled_from(WITH_IMPL), seed=st.integers(0, 99))
def test_renumbering_the_sequences_changes_no_loss(
    batch: Batch, choice: tuple[str, str], seed: int, device: torch.device
) -> None:
    batch = batch.to(device)
    assert batch.lengths is not None
    order = torch.randperm(len(batch.pi_logps), generator=torch.Generator().manual_seed(seed)).to(
        device
    )  # new position → old
    position = order.argsort()
    moved = Batch(
        batch.pi_logps[order],
        batch.ref_logps[order],
        position[batch.yw_idxs],
        position[batch.yl_idxs],
        lengths=batch.lengths[order],
    )
    options = {"loss_type": choice[0], "impl": choice[1], "label_smoothing": 0.1}
    losses, rewards = batch.loss(**options)
    moved_losses, moved_rewards = moved.loss(**options)
    assert torch.equal(losses, moved_losses)
    assert torch.equal(rewards[order], moved_rewards)


@PROPERTY
@given(
    batch=batches(),
    choice=st.sampled_from([x for x in WITH_IMPL if x[0] != "aot"]),
    shift=st.integers(-400, 400),
)
def test_what_policy_and_reference_share_of_a_sequence_cancels(
    batch: Batch, choice: tuple[str, str], shift: int, device: torch.device
) -> None:
    batch = batch.to(device)
    # Of single sequences, except for aot, which compares policy and reference by rank.
    shifts = torch.zeros_like(batch.pi_logps)
    shifts[0] = shift / 8
    moved = batch._replace(pi_logps=batch.pi_logps + shifts, ref_logps=batch.ref_logps + shifts)
    options = {"loss_type": choice[0], "impl": choice[1], "label_smoothing": 0.1}
    assert all(map(torch.equal, batch.loss(**options), moved.loss(**options)))


@PROPERTY
@given(batch=batches(), choice=MARGIN_AND_IMPL)
def test_gradients_of_margin_losses_cancel_in_every_pair(
    batch: Batch, choice: tuple[str, str], device: torch.device
) -> None:
    batch = batch.to(device)
    loss_type, impl = choice
    leaves = batch._replace(
        pi_logps=batch.pi_logps.requires_grad_(), ref_logps=batch.ref_logps.requires_grad_()
    )
    *_, d_pi, d_ref = gradients(leaves, impl=impl, loss_type=loss_type)
    assert torch.equal(d_pi, -d_ref)
    assert batch.lengths is not None
    size = batch.lengths.clamp(min=1) if loss_type in AVERAGED_TYPES else 1
    assert (d_pi * size).sum().item() == pytest.approx(0, abs=1e-9)


# TRL's own code.


@pytest.fixture(scope="module")
def trl_compute_loss() -> Callable[..., Any]:
    """The method in which TRL's DPO trainer computes its loss."""
    module = pytest.importorskip("trl.trainer.dpo_trainer")
    return module.DPOTrainer._compute_loss


def _trl_trainer(loss_type: str, beta: float, label_smoothing: float) -> SimpleNamespace:
    """What `_compute_loss` looks up in its trainer; one process, reference computed beforehand."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        args=SimpleNamespace(discopop_tau=0.05),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )


@pytest.mark.parametrize(("loss_type", "impl"), WITH_IMPL)
def test_loss_gradient_and_rewards_are_those_of_trl(
    loss_type: str, impl: str, trl_compute_loss: Callable[..., Any], device: torch.device
) -> None:
    # TRL ignores label smoothing for "sigmoid"; 1/8 is the same number in the fp32 it computes in.
    smoothing = 0.0 if loss_type == "sigmoid" else 0.125
    generator = torch.Generator().manual_seed(1)
    completion = torch.rand(6, 12, generator=generator) < 0.6
    completion[:, 0], completion[:, 5] = False, True
    mask = completion[:, 1:]
    tokens = -torch.rand(6, 11, dtype=torch.float64, generator=generator)
    ref = -5 * torch.rand(6, dtype=torch.float64, generator=generator)

    pi = tokens.clone().requires_grad_()
    # TRL's head gives 0 for a token that is not scored.
    log_probs = torch.where(mask, pi, 0.0)
    outputs = SimpleNamespace(
        log_probs=log_probs,
        entropy=torch.zeros(6, 11),
        mean_logits=torch.zeros(6, 11),
        is_top1=torch.zeros(6, 11, dtype=torch.bool),
    )
    trainer = _trl_trainer(loss_type, 0.3, smoothing)
    inputs = {
        "input_ids": torch.zeros(6, 12, dtype=torch.int64),
        "attention_mask": torch.ones(6, 12, dtype=torch.int64),
        "completion_mask": completion.long(),
        "ref_chosen_logps": ref[:3],
        "ref_rejected_logps": ref[3:],
    }
    trl_loss = trl_compute_loss(trainer, lambda **_: outputs, inputs, False)
    (trl_gradient,) = torch.autograd.grad(trl_loss, pi)

    ours = torch.where(mask, tokens, math.nan).to(device).requires_grad_()
    losses, rewards = dpo_loss(
        ours,
        ref.to(device),
        torch.arange(3, device=device),
        torch.arange(3, 6, device=device),
        0.3,
        loss_type=loss_type,
        label_smoothing=smoothing,
        mask=mask.to(device),
        impl=impl,
    )
    (gradient,) = torch.autograd.grad(losses.mean(), ours)
    # TRL keeps the label smoothing of exo_pair in fp32.
    rtol = 1e-6 if loss_type == "exo_pair" else 1e-12
    torch.testing.assert_close(losses.mean().cpu(), trl_loss, rtol=rtol, atol=0)
    torch.testing.assert_close(gradient.cpu(), trl_gradient, rtol=rtol, atol=1e-15)
    for name, part in (("chosen", rewards[:3]), ("rejected", rewards[3:])):
        assert trainer._metrics["train"][f"rewards/{name}"] == [pytest.approx(part.mean().item())]


# Errors name the argument.

_FOUR = torch.zeros(4)
_TOKENS = torch.zeros(4, 3)
_PAIR = {"yw_idxs": torch.tensor([0, 1]), "yl_idxs": torch.tensor([2, 3])}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"loss_type": "dpo"}, ValueError, r"loss_type: expected one of sigmoid, .*, got 'dpo'"),
        ({"loss_type": "ipo"}, ValueError, "lengths: .*'ipo' averages"),
        ({"loss_type": "sigmoid_norm"}, ValueError, "lengths: .*'sigmoid_norm' averages"),
        ({"loss_type": "ipo", "lengths": torch.ones(3)}, ValueError, r"lengths: .*\(4,\).*\(3,\)"),
        ({"loss_type": "ipo", "lengths": [1, 2, 3, 4]}, TypeError, "lengths: .*got list"),
        ({"pi_logps": [0.0]}, TypeError, "pi_logps: expected a tensor, got list"),
        ({"pi_logps": _FOUR.long()}, TypeError, "pi_logps: .*floating.*int64"),
        ({"ref_logps": _FOUR.long()}, TypeError, "ref_logps: .*floating.*int64"),
        ({"ref_logps": None}, TypeError, "ref_logps: expected a tensor, got NoneType"),
        ({"pi_logps": _TOKENS}, ValueError, r"pi_logps: .*\(4, 3\).*need a mask"),
        ({"pi_logps": torch.zeros(())}, ValueError, r"pi_logps: expected shape \(B,\), got \(\)"),
        ({"ref_logps": _TOKENS}, ValueError, r"ref_logps: .*\(4,\).*got \(4, 3\)"),
        ({"ref_logps": torch.zeros(5)}, ValueError, r"ref_logps: .*\(4,\).*got \(5,\)"),
        ({"ref_logps": _FOUR.to("meta")}, ValueError, "ref_logps: expected on cpu"),
        ({"mask": torch.ones(4)}, ValueError, r"pi_logps: expected shape \(B, T\) with a mask"),
        ({"pi_logps": _TOKENS, "mask": torch.ones(4, 2)}, ValueError, r"mask: .*\(4, 3\)"),
        ({"pi_logps": _TOKENS, "mask": [1]}, TypeError, "mask: expected a tensor, got list"),
        (
            {"pi_logps": _TOKENS, "mask": torch.ones(4, 3, dtype=torch.complex64)},
            TypeError,
            "mask: .*boolean or 0/1",
        ),
        (
            {"pi_logps": _TOKENS, "mask": torch.ones(4, 3, device="meta")},
            ValueError,
            "mask: expected on cpu",
        ),
        (
            {"pi_logps": _TOKENS, "ref_logps": torch.zeros(4, 2), "mask": torch.ones(4, 3)},
            ValueError,
            r"ref_logps: .*\(4, 3\).*got \(4, 2\)",
        ),
        ({"yw_idxs": torch.zeros(2)}, TypeError, "yw_idxs: .*integer.*float32"),
        ({"yl_idxs": torch.ones(2, dtype=torch.bool)}, TypeError, "yl_idxs: .*integer.*bool"),
        ({"yw_idxs": [0, 1]}, TypeError, "yw_idxs: expected a tensor, got list"),
        ({"yw_idxs": torch.zeros(2, 1).long()}, ValueError, r"yw_idxs: .*\(P,\).*\(2, 1\)"),
        ({"yl_idxs": torch.tensor([2])}, ValueError, r"yl_idxs: .*\(2,\).*got \(1,\)"),
        ({"yl_idxs": torch.zeros(2, device="meta").long()}, ValueError, "yl_idxs: .*on cpu"),
        ({"yw_idxs": torch.tensor([0, 4])}, ValueError, r"yw_idxs: .*\[0, 4\).*got 4"),
        ({"yl_idxs": torch.tensor([-1, 0])}, ValueError, r"yl_idxs: .*\[0, 4\).*got -1"),
        ({"beta": 0.0}, ValueError, "beta: .*positive.*got 0.0"),
        ({"beta": -0.1}, ValueError, "beta: .*positive.*got -0.1"),
        ({"beta": math.nan}, ValueError, "beta: .*positive.*got nan"),
        ({"beta": math.inf}, ValueError, "beta: .*finite.*got inf"),
        ({"beta": "0.1"}, TypeError, "beta: expected a number, got str"),
        ({"discopop_tau": 0.0}, ValueError, "discopop_tau: .*positive.*got 0.0"),
        ({"label_smoothing": -0.01}, ValueError, r"label_smoothing: .*\[0, 0.5\].*-0.01"),
        ({"label_smoothing": 0.51}, ValueError, r"label_smoothing: .*\[0, 0.5\].*0.51"),
        ({"label_smoothing": math.nan}, ValueError, "label_smoothing: .*got nan"),
        (
            {"loss_type": "robust", "label_smoothing": 0.5},
            ValueError,
            "label_smoothing: expected less than 0.5 for loss_type 'robust'",
        ),
        (
            {"loss_type": "exo_pair"},
            ValueError,
            "label_smoothing: expected more than 0 for loss_type 'exo_pair'",
        ),
        (
            {"impl": "cuda"},
            ValueError,
            'impl: expected "auto", "triton", "compiled" or "eager", got \'cuda\'',
        ),
    ],
)
def test_errors_name_the_argument(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"pi_logps": _FOUR, "ref_logps": _FOUR, **_PAIR, **changed}
    with pytest.raises(error, match=message):
        dpo_loss(**arguments)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_unknown_impl_is_an_error_for_every_type(loss_type: str) -> None:
    with pytest.raises(ValueError, match="impl"):
        dpo_loss(
            _FOUR,
            _FOUR,
            **_PAIR,
            loss_type=loss_type,
            label_smoothing=0.1,
            lengths=torch.ones(4),
            impl="cuda",
        )


def test_triton_on_the_cpu_without_the_interpreter_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"impl: .*TRITON_INTERPRET=1"):
        dpo_loss(_FOUR, _FOUR, **_PAIR, impl="triton")
    dpo_loss(_FOUR, _FOUR, **_PAIR)  # auto falls back to eager
