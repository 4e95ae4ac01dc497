"""Fisher-vector products of TRPO against dense matrices in fp64, in forward mode and by two
backward passes.
"""

import pytest
import torch
from support.compare import relative_error
from support.one_thread import one_thread  # noqa: F401  of every test in this file
from support.trpo_problems import (
    MODES,
    TOLERANCE,
    VOCAB,
    Batch,
    bits,
    dense_fisher,
    device_inputs,
    flat,
    same_bits,
)

from fastrlhf import fisher_vector_product


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("masked", [False, True])
def test_products_match_the_dense_matrix(mode, temperature, masked, device) -> None:
    batch = Batch(device)
    mask = batch.mask if masked else None
    matrix = dense_fisher(batch, mask, temperature)
    vector = device_inputs(device, len(matrix))
    before = bits(batch.params)
    for damping in (0.0, 0.3):
        found = fisher_vector_product(
            batch.policy, batch.params, vector, mask=mask, temperature=temperature, mode=mode,
            damping=damping,
        )  # fmt: skip
        expected = matrix @ vector + damping * vector
        assert found.dtype == torch.float64 and not found.requires_grad
        assert relative_error(found, expected) < TOLERANCE
    assert same_bits(batch.params, before)
    assert all(p.grad is None and p.requires_grad and p.is_leaf for p in batch.params)


@pytest.mark.parametrize("mutant", ["mask", "temperature", "damping", "sum", "order"])
def test_the_comparison_of_products_rejects_mutants(mutant, device) -> None:
    batch = Batch(device)
    vector = device_inputs(device, flat(batch.params).numel())
    options = {"mask": batch.mask, "temperature": 0.6, "damping": 0.01}
    expected = dense_fisher(batch, batch.mask, 0.6) @ vector + 0.01 * vector
    factor = batch.mask.sum() if mutant == "sum" else 1
    options = {key: x for key, x in options.items() if key != mutant}
    vector = vector.flip(0) if mutant == "order" else vector
    found = fisher_vector_product(batch.policy, batch.params, vector, **options) * factor
    assert relative_error(found, expected) > 1e6 * TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_the_product_is_symmetric_and_positive_semidefinite(mode, device) -> None:
    batch = Batch(device)
    size = flat(batch.params).numel()
    rows = [fisher_vector_product(batch.policy, batch.params, e, mask=batch.mask, mode=mode)
            for e in torch.eye(size, dtype=torch.float64, device=device)]  # fmt: skip
    matrix = torch.stack(rows)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-14)
    torch.testing.assert_close(matrix, dense_fisher(batch, batch.mask))
    values = torch.linalg.eigvalsh(matrix)
    assert values[0] > -1e-14 and values[-1] > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_garbage_outside_of_the_mask_does_not_matter(mode, device) -> None:
    batch = Batch(device)
    vector = device_inputs(device, flat(batch.params).numel())
    options = {"mask": batch.mask, "mode": mode}
    expected = fisher_vector_product(batch.policy, batch.params, vector, **options)
    clean, x = batch.policy, batch.x
    batch.x = torch.where(batch.mask[..., None] != 0, x, 1e4)
    found = fisher_vector_product(batch.policy, batch.params, vector, **options)
    torch.testing.assert_close(found, expected)
    batch.x = x
    # Vocabulary that is masked by -inf has no probability, and no tangent that counts.
    banned = torch.arange(VOCAB, device=device) == 2
    minus = fisher_vector_product(
        lambda: clean().masked_fill(banned, -torch.inf), batch.params, vector, **options
    )
    low = fisher_vector_product(
        lambda: clean().masked_fill(banned, -1e5), batch.params, vector, **options
    )
    torch.testing.assert_close(minus, low)
    assert minus.isfinite().all()


def test_parameters_the_policy_does_not_use_get_their_damping_alone(device) -> None:
    batch = Batch(device)
    unused = torch.ones(3, dtype=torch.float64, device=device, requires_grad=True)
    vector = device_inputs(device, flat(batch.params).numel() + 3)
    expected = dense_fisher(batch) @ vector[3:] + 0.5 * vector[3:]
    for mode in MODES:
        found = fisher_vector_product(
            batch.policy, [unused, *batch.params], vector, damping=0.5, mode=mode
        )
        torch.testing.assert_close(found[:3], 0.5 * vector[:3])
        assert relative_error(found[3:], expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_products_in_lower_precision(dtype, mode, device) -> None:
    batch = Batch(device)
    batch.net.to(dtype)
    batch.x = batch.x.to(dtype)
    vector = torch.randn(flat(batch.params).numel(), device=device)
    before = bits(batch.params)
    found = fisher_vector_product(batch.policy, batch.params, vector.to(dtype), mode=mode)
    assert found.dtype == torch.float32 and same_bits(batch.params, before)
    wide = Batch(device)
    with torch.no_grad():
        for p, q in zip(wide.params, batch.params, strict=True):
            p.copy_(q)
    wide.x = batch.x.double()
    expected = dense_fisher(wide) @ vector.to(dtype).double()
    assert relative_error(found, expected) < (1e-5 if dtype == torch.float32 else 3e-2)


class Cube(torch.autograd.Function):
    """x³ with derivatives of every order backward, and none forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, upstream):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * upstream


def test_without_forward_mode_auto_falls_back_and_forward_raises(device) -> None:
    batch = Batch(device)
    vector = device_inputs(device, flat(batch.params).numel())
    before = bits(batch.params)

    def opaque():
        return Cube.apply(batch.policy())

    expected = fisher_vector_product(lambda: batch.policy() ** 3, batch.params, vector)
    for mode in ("auto", "double-vjp"):
        found = fisher_vector_product(opaque, batch.params, vector, mode=mode)
        assert relative_error(found, expected) < TOLERANCE
    with pytest.raises((RuntimeError, NotImplementedError), match=r"forward|jvp"):
        fisher_vector_product(opaque, batch.params, vector, mode="forward")
    assert same_bits(batch.params, before)
    # And forward-mode tangents are not left behind.
    assert relative_error(
        fisher_vector_product(lambda: batch.policy() ** 3, batch.params, vector), expected
    ) < TOLERANCE  # fmt: skip
    assert batch.step(policy=opaque, damping=0.01).accepted


def test_an_error_of_the_policy_itself_is_not_hidden_by_the_fallback(device) -> None:
    batch = Batch(device)
    before = bits(batch.params)

    def broken():
        raise RuntimeError("the policy is broken")

    for mode in MODES:
        with pytest.raises(RuntimeError, match="the policy is broken"):
            fisher_vector_product(broken, batch.params, flat(batch.params), mode=mode)
    assert same_bits(batch.params, before)


def test_forward_mode_calls_the_policy_once_for_a_product(device) -> None:
    batch = Batch(device)
    calls = []

    def counted():
        calls.append(torch.is_grad_enabled())
        return batch.policy()

    for mode in MODES:
        fisher_vector_product(counted, batch.params, flat(batch.params), mode=mode)
        assert len(calls) == 1
        calls.clear()
    info = batch.step(policy=counted, cg_iterations=3)
    # One for the gradient, one for each product, and one without a graph for each step tried.
    assert calls == [True] * 4 + [False] * (info.backtracks + 1)
