"""dpo_loss of sums: losses, rewards and gradients of every type against the formulas of their
papers, also where margins are extreme, a sequence is impossible or a length is zero.
"""

import math
from typing import Any

import pytest
import torch
from support.preference_batches import (
    AVERAGED_TYPES,
    IMPLS,
    MARGIN_TYPES,
    SMOOTHED_TYPES,
    WITH_IMPL,
    Batch,
    assert_right,
    pairs_batch,
)
from support.preference_formulas import LOSS_TYPES
from torch import Tensor

from fastrlhf import dpo_loss


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


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_discopop_of_an_impossible_chosen_sequence_is_infinite(tau: float) -> None:
    scores = torch.tensor([-torch.inf, -1.0])
    pair = torch.zeros(2), torch.tensor([0]), torch.tensor([1])
    losses, _ = dpo_loss(scores, *pair, beta=1.0, loss_type="discopop", discopop_tau=tau)
    assert losses.tolist() == [torch.inf]


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
