"""TRPO's Fisher products, conjugate gradients and steps, against dense matrices in fp64."""

import math
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.compare import relative_error
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastrlhf
from fastrlhf import conjugate_gradient, fisher_vector_product, lm_head, trpo_step
from fastrlhf.hf import LMHead

MODES = ["forward", "double-vjp", "auto"]
B, T, WIDTH, VOCAB = 3, 4, 5, 7
# fp64: what is wrong by a temperature, a count of tokens or a missing term is wrong by percents.
TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors are tiny here: threads would spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def device_inputs(device, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=device)


class Batch:
    """A policy that is a small network in fp64, and the tokens of a batch."""

    def __init__(self, device, rows: slice = slice(None), headed: bool = True) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, 6), nn.Tanh(), *([nn.Linear(6, VOCAB)] if headed else [])]
        self.net = nn.Sequential(*layers).to(device, torch.float64)
        self.x = device_inputs(device, B, T, WIDTH)[rows]
        self.targets = torch.randint(VOCAB, (B, T), device=device)[rows]
        self.advantages = device_inputs(device, B, T)[rows]
        self.mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]], device=device)[rows]
        self.params = list(self.net.parameters())

    def policy(self) -> Tensor:
        return self.net(self.x)

    def step(self, **options):
        arguments = {
            "policy": self.policy, "params": self.params, "targets": self.targets,
            "advantages": self.advantages, "mask": self.mask,
        }  # fmt: skip
        return trpo_step(**arguments | options)


def flat(tensors) -> Tensor:
    return torch.cat([x.detach().reshape(-1) for x in tensors])


def bits(params) -> list[Tensor]:
    """Copies whose comparison tells -0 from 0 and takes a NaN for itself."""
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return [p.detach().clone().view(kind[p.element_size()]) for p in params]


def same_bits(params, before) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(params), before, strict=True))


def dense_jacobian(net: nn.Module, inputs: Tensor) -> Tensor:
    """(tokens, V, D) derivative of the logits with respect to all parameters."""
    named = dict(net.named_parameters())

    def logits(*values):
        return functional_call(net, dict(zip(named, values, strict=True)), (inputs,))

    parts = jacobian(logits, tuple(p.detach() for p in named.values()))
    lead = inputs.shape[:-1].numel()
    return torch.cat([j.reshape(lead, -1, p.numel()) for j, p in
                      zip(parts, named.values(), strict=True)], dim=-1)  # fmt: skip


def dense_fisher(batch: Batch, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """(D, D) mean of JᵀFJ over the tokens that count."""
    j = dense_jacobian(batch.net, batch.x)
    p = (batch.policy().detach() / temperature).softmax(-1).reshape(-1, VOCAB)
    of_tokens = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / temperature**2
    c = torch.ones_like(p[:, 0]) if mask is None else mask.reshape(-1).to(p)
    return torch.einsum("n,nvd,nvw,nwe->de", c / c.sum(), j, of_tokens, j)


def hessian_of_kl(policy, params, vector, direction, mask=None, temperature=1.0) -> Tensor:
    """Hessian-vector product of the mean KL at the policy itself, by double backward."""
    with sdpa_kernel(SDPBackend.MATH):
        logits = policy()
        kl = fastrlhf.kl_divergence(
            logits, logits.detach(), direction=direction, mask=mask, temperature=temperature
        )
        mean = kl.sum() / (kl.numel() if mask is None else mask.sum())
        slope = torch.autograd.grad(mean, params, create_graph=True)
        along = sum((g * v.view_as(g)).sum() for g, v in
                    zip(slope, vector.split([p.numel() for p in params]), strict=True))  # fmt: skip
        return flat(torch.autograd.grad(along, params))


# Fisher-vector products.


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


# A language model.

SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


class LanguageModel:
    """A tiny random Llama in fp64, its prompt, and its policies with and without the head."""

    def __init__(self, device, attention: str = "sdpa", **changes) -> None:
        transformers = pytest.importorskip("transformers", reason="needs transformers")
        config = transformers.LlamaConfig(**SMALL | changes)
        torch.manual_seed(0)
        self.model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=attention
        )
        nn.init.normal_(self.model.lm_head.weight, std=0.3)
        self.model.to(device, torch.float64).eval()
        self.ids = torch.randint(101, (2, 6), device=device)
        self.mask = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]], device=device)

    def logits(self) -> Tensor:
        return self.model(self.ids, use_cache=False).logits

    def hidden(self) -> Tensor:
        return self.model.base_model(self.ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("headed", [False, True])
def test_products_of_a_language_model_are_the_hessians_of_both_kls(
    mode, attention, headed, device
) -> None:
    lm = LanguageModel(device, attention)
    params = [p for n, p in lm.model.named_parameters() if not headed or "lm_head" not in n]
    head = lm_head(lm.model) if headed else None
    vector = device_inputs(device, sum(p.numel() for p in params))
    before = bits(lm.model.parameters())
    options = {"mask": lm.mask, "temperature": 0.7}
    found = fisher_vector_product(
        lm.hidden if headed else lm.logits, params, vector, head=head, mode=mode, **options
    )
    assert same_bits(lm.model.parameters(), before)
    for direction in ("forward", "reverse"):
        expected = hessian_of_kl(lm.logits, params, vector, direction, **options)
        # The softmax of transformers' eager attention is in fp32.
        assert relative_error(found, expected) < (1e-6 if attention == "eager" else TOLERANCE)
    assert relative_error(0.7 * found, expected) > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_a_tied_head_is_trained_through_the_logits(mode, device) -> None:
    lm = LanguageModel(device, tie_word_embeddings=True)
    params = list(lm.model.parameters())
    vector = device_inputs(device, sum(p.numel() for p in params))
    found = fisher_vector_product(lm.logits, params, vector, mode=mode)
    assert relative_error(found, hessian_of_kl(lm.logits, params, vector, "forward")) < TOLERANCE
    with pytest.raises(ValueError, match=r"^head: "):
        fisher_vector_product(lm.hidden, params, vector, head=lm_head(lm.model), mode=mode)


def with_lora(lm: LanguageModel, *modules: str) -> list[nn.Parameter]:
    """Adapt the model in place; returns the parameters of the adapters, all that is trained."""
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=2, target_modules=list(modules), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of renamed properties
        lm.model = peft.get_peft_model(lm.model, config).double().eval()
    for name, p in lm.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return [p for p in lm.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("mode", MODES)
def test_adapters_alone_over_a_frozen_base(mode, device) -> None:
    lm = LanguageModel(device)
    params = with_lora(lm, "q_proj", "down_proj")
    size = sum(p.numel() for p in params)
    assert size < 2000
    vector = device_inputs(device, size)
    before = bits(lm.model.parameters())
    expected = hessian_of_kl(lm.logits, params, vector, "forward", lm.mask)
    found = fisher_vector_product(lm.logits, params, vector, mask=lm.mask, mode=mode)
    assert relative_error(found, expected) < TOLERANCE
    lm.hidden = lambda: lm.model.base_model.model.model(lm.ids).last_hidden_state
    found = fisher_vector_product(
        lm.hidden, params, vector, mask=lm.mask, mode=mode, head=lm_head(lm.model)
    )
    assert relative_error(found, expected) < TOLERANCE
    assert same_bits(lm.model.parameters(), before)


def test_adapters_of_the_head_itself_are_not_left_out_in_silence(device) -> None:
    lm = LanguageModel(device)
    params = with_lora(lm, "q_proj", "lm_head")
    vector = device_inputs(device, sum(p.numel() for p in params))
    expected = hessian_of_kl(lm.logits, params, vector, "forward")
    assert relative_error(fisher_vector_product(lm.logits, params, vector), expected) < TOLERANCE
    hidden = lambda: lm.model.base_model.model.model(lm.ids).last_hidden_state  # noqa: E731
    with pytest.raises(ValueError, match=r"^head: "):
        fisher_vector_product(hidden, params, vector, head=lm_head(lm.model))


@pytest.mark.parametrize("headed", [False, True])
def test_a_step_of_a_language_model_stays_within_its_region(headed, device) -> None:
    lm = LanguageModel(device)
    head = lm_head(lm.model) if headed else None
    params = [p for n, p in lm.model.named_parameters() if "lm_head" not in n]
    with torch.no_grad():
        old = lm.logits()
    info = trpo_step(
        lm.hidden if headed else lm.logits, params, lm.ids, device_inputs(device, 2, 6), lm.mask,
        max_kl=1e-4, damping=1e-2, head=head,
    )  # fmt: skip
    with torch.no_grad():
        kl = fastrlhf.kl_divergence(lm.logits(), old, direction="forward", mask=lm.mask)
    assert info.accepted and 0 < info.kl <= 1e-4 and info.surrogate > 0
    torch.testing.assert_close(info.kl, kl.sum() / lm.mask.sum())


# Operations without forward-mode derivatives.


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


# Conjugate gradients.


def spd(size: int, condition: float, device) -> Tensor:
    q, _ = torch.linalg.qr(device_inputs(device, size, size))
    values = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64, device=device)
    return q @ torch.diag(values) @ q.T


def residual_of(matrix: Tensor, x: Tensor, target: Tensor) -> float:
    return float((target - matrix @ x).norm() / target.norm())


@pytest.mark.parametrize("condition", [2.0, 10.0, 1e3])
def test_conjugate_gradients_solve_in_as_many_steps_as_dimensions(condition, device) -> None:
    matrix, target = spd(12, condition, device), device_inputs(device, 12)
    # An ill-conditioned system takes some steps more than in exact arithmetic.
    for iterations, bound in ((12, 1e-5 if condition < 100 else 0.1), (24, 1e-10)):
        x, residual = conjugate_gradient(
            lambda v: matrix @ v, target, iterations=iterations, tolerance=0.0
        )
        assert residual_of(matrix, x, target) < bound and residual < bound
    assert relative_error(x, torch.linalg.solve(matrix, target)) < 1e-9
    # A bound that too few steps fail.
    x, _ = conjugate_gradient(lambda v: matrix @ v, target, iterations=6)
    assert residual_of(matrix, x, target) > 1e-5


@pytest.mark.parametrize("iterations", [1, 2, 5, 15])
@pytest.mark.parametrize("condition", [10.0, 1e8])
def test_the_residual_is_the_true_one(iterations, condition, device) -> None:
    matrix, target = spd(30, condition, device), device_inputs(device, 30)
    x, residual = conjugate_gradient(lambda v: matrix @ v, target, iterations=iterations)
    assert residual.shape == () and x.shape == (30,)
    assert float(residual) == pytest.approx(residual_of(matrix, x, target), rel=1e-6, abs=1e-12)


def test_each_iterate_is_the_best_of_its_krylov_space(device) -> None:
    matrix, target = spd(20, 100.0, device), device_inputs(device, 20)
    exact = torch.linalg.solve(matrix, target)
    basis = [target]
    for iterations in range(1, 6):
        x, _ = conjugate_gradient(lambda v: matrix @ v, target, iterations=iterations)
        k = torch.linalg.qr(torch.stack(basis, 1))[0]
        best = k @ torch.linalg.solve(k.T @ matrix @ k, k.T @ target)
        assert relative_error(x, best) < 1e-8
        assert (x - exact) @ matrix @ (x - exact) < exact @ matrix @ exact
        basis.append(matrix @ basis[-1])


def test_systems_that_are_solved_at_once(device) -> None:
    target = device_inputs(device, 9)
    x, residual = conjugate_gradient(lambda v: 4 * v, target, iterations=1)
    torch.testing.assert_close(x, target / 4)
    assert residual < 1e-15
    for iterations in (0, 1, 15):
        x, residual = conjugate_gradient(lambda v: 4 * v, 0 * target, iterations=iterations)
        assert not x.any() and residual == 0
    diagonal = torch.tensor([1.0, 5.0, 1.0, 5.0, 9.0], dtype=torch.float64, device=device)
    target = torch.ones_like(diagonal)
    # As many steps as there are different eigenvalues.
    x, _ = conjugate_gradient(lambda v: diagonal * v, target, iterations=3, tolerance=0.0)
    torch.testing.assert_close(x, 1 / diagonal)
    x, residual = conjugate_gradient(lambda v: diagonal * v, target, iterations=0)
    assert not x.any() and residual == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tolerance", [1e-10, 0.0])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e6])
def test_iterating_far_beyond_convergence_does_no_harm(dtype, tolerance, condition, device) -> None:
    matrix, target = (x.to(dtype) for x in (spd(10, condition, device), device_inputs(device, 10)))
    x, residual = conjugate_gradient(
        lambda v: matrix @ v, target, iterations=1500, tolerance=tolerance
    )
    assert x.isfinite().all() and residual.isfinite()
    true = residual_of(matrix, x, target)
    # What is reached is limited by the rounding of A x, or by the tolerance of the residual.
    rounding = torch.finfo(dtype).eps * float(matrix.norm() * x.norm() / target.norm())
    assert true < 20 * rounding + 1.1 * math.sqrt(tolerance)


def test_it_stays_where_the_tolerance_is_reached(device) -> None:
    matrix, target = spd(30, 1e3, device), device_inputs(device, 30)
    solve = lambda n: conjugate_gradient(lambda v: matrix @ v, target, iterations=n, tolerance=1e-2)  # noqa: E731
    first = next(n for n in range(1, 31) if float(solve(n)[1]) <= 0.1)
    assert 2 < first < 30
    for iterations in (first + 1, first + 20):
        for found, expected in zip(solve(iterations), solve(first), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("signs", ["first", "mixed", "negative", "zero"])
def test_an_operator_that_is_not_definite_gives_finite_numbers(signs, device) -> None:
    diagonal = torch.linspace(1, 2, 8, dtype=torch.float64, device=device)
    if signs == "first":
        diagonal[0] = -20
    elif signs == "mixed":
        diagonal[::2] *= -1
    else:
        diagonal = -diagonal if signs == "negative" else 0 * diagonal
    target = device_inputs(device, 8)
    for iterations in (1, 5, 100):
        x, residual = conjugate_gradient(lambda v: diagonal * v, target, iterations=iterations)
        assert x.isfinite().all() and residual.isfinite()
        if signs in ("negative", "zero"):
            assert not x.any() and residual == 1


def test_a_target_of_nan_is_not_reported_as_solved(device) -> None:
    for bad in (torch.nan, torch.inf):
        target = torch.tensor([1.0, bad], device=device)
        x, residual = conjugate_gradient(lambda v: 2 * v, target)
        assert x.isnan().any() or not residual <= 1
    batch = Batch(device)
    before = bits(batch.params)
    info = batch.step(advantages=batch.advantages.masked_fill(batch.mask != 0, torch.nan))
    assert not info.accepted and same_bits(batch.params, before)
    assert info.cg_residual.isnan()


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_the_solution_scales_with_the_target_in_fp32(scale, device) -> None:
    matrix, target = spd(6, 10.0, device).float(), device_inputs(device, 6).float()
    unit, _ = conjugate_gradient(lambda v: matrix @ v, target)
    x, residual = conjugate_gradient(lambda v: matrix @ v, target * scale)
    assert relative_error(x.double() / scale, unit) < 1e-4
    assert 0 <= residual < 1e-4


# Steps.


class Bandit:
    """Logits that are the parameters themselves: the Fisher matrix is known, block by block."""

    def __init__(self, device) -> None:
        torch.manual_seed(0)
        self.theta = (device_inputs(device, 4, VOCAB) / 2).requires_grad_()
        self.targets = torch.randint(VOCAB, (4,), device=device)
        self.advantages = device_inputs(device, 4)
        self.mask = torch.tensor([1, 1, 0, 1], device=device)

    def policy(self) -> Tensor:
        return 1.0 * self.theta

    def step(self, **options):
        arguments = {
            "policy": self.policy, "params": [self.theta], "targets": self.targets,
            "advantages": self.advantages, "mask": self.mask,
        }  # fmt: skip
        return trpo_step(**arguments | options)


def realised(info, max_kl: float, ratio: float = 0.8) -> float:
    """KL after the step over what a quadratic KL would be after so many backtracks."""
    return float(info.kl) / (max_kl * ratio ** (2 * info.backtracks))


@pytest.mark.parametrize("kind", ["bandit", "network"])
def test_the_realised_kl_tends_to_the_bound_as_the_step_shrinks(kind, device) -> None:
    errors = []
    for max_kl in (1e-2, 1e-4, 1e-6):
        batch = Bandit(device) if kind == "bandit" else Batch(device)
        info = batch.step(max_kl=max_kl, damping=1e-9, cg_iterations=60)
        assert info.accepted and info.kl <= max_kl and info.surrogate > 0
        errors.append(abs(realised(info, max_kl) - 1))
    # The KL's third order, relative to its second, is as the step: a tenth for a hundredth.
    assert errors[0] < 1
    for larger, smaller in pairwise(errors):
        assert smaller < 0.2 * larger, errors
    assert errors[2] < 5e-3


def test_a_policy_that_returns_its_parameters_themselves_is_held_to_the_kl(device) -> None:
    for view in (lambda x: x, lambda x: x.view(2, 2, VOCAB).flatten(0, 1)):
        steps = []
        for copied in (False, True):
            bandit = Bandit(device)
            policy = bandit.policy if copied else lambda b=bandit, f=view: f(b.theta)
            steps.append((bandit.step(policy=policy, max_kl=0.5, damping=1e-6), bandit.theta))
        # The KL is not that of the new parameters from themselves.
        (info, theta), (expected, expected_theta) = steps
        assert info.kl == expected.kl > 0 and info.backtracks == expected.backtracks
        assert torch.equal(theta, expected_theta)


def test_the_kl_grows_with_the_square_of_the_step(device) -> None:
    batch = Batch(device)
    start = flat(batch.params)
    with torch.no_grad():
        old = batch.policy()
    batch.step(max_kl=1e-6, damping=1e-6)
    direction = flat(batch.params) - start

    def kl(factor: float) -> float:
        with torch.no_grad():
            nn.utils.vector_to_parameters(start + factor * direction, batch.params)
            kl = fastrlhf.kl_divergence(
                batch.policy(), old, direction="forward", mask=batch.mask
            )  # fmt: skip
        return float(kl.sum() / batch.mask.sum())

    for factor in (2.0, 4.0, 8.0):
        assert kl(factor) / kl(1.0) == pytest.approx(factor**2, rel=0.02)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("mode", MODES)
def test_the_step_is_the_natural_gradient(temperature, mode, device) -> None:
    batch = Batch(device)
    max_kl, damping = 1e-3, 0.01
    start = flat(batch.params)
    logprobs = fastrlhf.token_logprobs(batch.policy(), batch.targets, temperature=temperature)
    count = batch.mask.sum()
    surrogate = ((logprobs - logprobs.detach()).exp() * batch.advantages * batch.mask).sum() / count
    gradient = flat(torch.autograd.grad(surrogate, batch.params))
    matrix = dense_fisher(batch, batch.mask, temperature)
    matrix += damping * torch.eye(len(matrix), dtype=torch.float64, device=device)
    x = torch.linalg.solve(matrix, gradient)
    length = math.sqrt(2 * max_kl / float(x @ matrix @ x))
    info = batch.step(
        max_kl=max_kl, damping=damping, cg_iterations=80, temperature=temperature, mode=mode
    )
    assert info.accepted and info.cg_residual < 1e-4
    assert info.step_size == pytest.approx(length * 0.8**info.backtracks, rel=1e-5)
    found = (flat(batch.params) - start) / info.step_size
    assert relative_error(found, x) < 1e-3
    # The gradient itself, or the solution without the mask, is nowhere near.
    matrix += dense_fisher(batch, None, temperature) - dense_fisher(batch, batch.mask, temperature)
    others = gradient * x.norm() / gradient.norm(), torch.linalg.solve(matrix, gradient)
    assert all(relative_error(found, other) > 0.03 for other in others)


def test_what_is_reported_is_what_happened(device) -> None:
    batch = Batch(device)
    with torch.no_grad():
        old = batch.policy()
    old_logprobs = fastrlhf.token_logprobs(old, batch.targets)
    info = batch.step(max_kl=0.05, damping=0.01)
    with torch.no_grad():
        new = batch.policy()
    count = batch.mask.sum()
    ratios = (fastrlhf.token_logprobs(new, batch.targets) - old_logprobs).exp()
    gained = ((ratios - 1) * batch.advantages * batch.mask).sum() / count
    p, q = old.log_softmax(-1), new.log_softmax(-1)
    kl = ((p.exp() * (p - q)).sum(-1) * batch.mask).sum() / count
    assert info.accepted and gained > 0 and kl <= 0.05
    torch.testing.assert_close(info.surrogate, gained)
    torch.testing.assert_close(info.kl, kl)
    # KL in the other direction is another number, which the comparison tells apart.
    other = ((q.exp() * (q - p)).sum(-1) * batch.mask).sum() / count
    assert abs(other / kl - 1) > 1e-3
    for x in (info.surrogate, info.kl, info.cg_residual):
        assert x.shape == () and not x.requires_grad


def test_a_step_too_long_for_the_exact_kl_is_shortened(device) -> None:
    shortened = 0
    for max_kl in (0.3, 1.0, 3.0):
        batch = Batch(device)
        start = flat(batch.params)
        info = batch.step(max_kl=max_kl, damping=1e-6, backtrack_ratio=0.7, max_backtracks=40)
        assert info.accepted and info.kl <= max_kl
        shortened += info.backtracks
        again = Batch(device)
        full = again.step(max_kl=max_kl, damping=1e-6, max_backtracks=0)
        assert full.accepted == (info.backtracks == 0)
        assert torch.equal(flat(again.params), start) != full.accepted
    assert shortened > 0


def rejections(device) -> dict:
    """Options with which no step can be accepted."""
    batch = Batch(device)

    def worse() -> Tensor:
        logits = batch.policy()
        if torch.is_grad_enabled():
            return logits
        # Away from every token that was sampled with an advantage.
        onehot = torch.nn.functional.one_hot(batch.targets, VOCAB)
        return logits - 1e-4 * batch.advantages.sign()[..., None] * onehot

    far = lambda: batch.policy() * (1 if torch.is_grad_enabled() else -9)  # noqa: E731
    nan = lambda: batch.policy() * (1 if torch.is_grad_enabled() else torch.nan)  # noqa: E731
    zeros = torch.zeros_like(batch.advantages)
    return {
        "a surrogate that gets worse": (batch, {"policy": worse, "max_kl": 1e-9}),
        "a KL that is too large": (batch, {"policy": far}),
        "NaN": (batch, {"policy": nan}),
        "a step below rounding": (batch, {"max_kl": 1e-300}),
        "advantages of zero": (batch, {"advantages": zeros}),
        "an empty mask": (batch, {"mask": torch.zeros_like(batch.mask)}),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("why", rejections("cpu"))
def test_a_rejected_step_restores_every_bit(why, dtype, device) -> None:
    batch, options = rejections(device)[why]
    batch.net.to(dtype)
    batch.x = batch.x.to(dtype)
    with torch.no_grad():
        batch.params[0][0, 0] = -0.0
    before = bits(batch.params)
    if why == "a step below rounding" and dtype != torch.float64:
        options["max_kl"] = 1e-30
    info = batch.step(max_backtracks=3, **options)
    assert not info.accepted and same_bits(batch.params, before)
    assert info.surrogate == info.kl == 0 and info.step_size == 0
    assert info.backtracks == (0 if why in ("advantages of zero", "an empty mask") else 4)
    assert math.isfinite(info.cg_residual)
    assert all(p.grad is None and p.requires_grad and p.is_leaf for p in batch.params)


def test_an_error_on_the_way_restores_every_bit(device) -> None:
    batch = Batch(device)
    before = bits(batch.params)

    def breaks() -> Tensor:
        if not torch.is_grad_enabled():
            raise MemoryError("while a step was tried")
        return batch.policy()

    with pytest.raises(MemoryError):
        batch.step(policy=breaks)
    assert same_bits(batch.params, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accepted_steps_in_lower_precision(dtype, device) -> None:
    batch = Batch(device)
    batch.net.to(dtype)
    batch.x = batch.x.to(dtype)
    before = bits(batch.params)
    info = batch.step(max_kl=0.05, damping=0.01, advantages=batch.advantages.float())
    assert info.accepted and not same_bits(batch.params, before)
    assert 0 < info.kl <= 0.05 and info.surrogate > 0
    assert info.kl.dtype == info.surrogate.dtype == torch.float32


def stepped(device, **options) -> Tensor:
    """Parameters after a step of the batch."""
    batch = Batch(device)
    assert batch.step(**{"damping": 0.01} | options).accepted
    return flat(batch.params)


def test_advantages_of_sequences_are_those_of_their_tokens(device) -> None:
    of_sequences = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64, device=device)
    found = stepped(device, advantages=of_sequences)
    assert torch.equal(found, stepped(device, advantages=of_sequences[:, None].expand(B, T)))
    assert not torch.equal(found, stepped(device))


def test_what_is_outside_of_the_mask_can_be_anything(device) -> None:
    batch = Batch(device)
    dead = batch.mask == 0
    with torch.no_grad():
        old = fastrlhf.token_logprobs(batch.policy(), batch.targets)
    expected = stepped(device, old_logprobs=old)
    for garbage in (torch.nan, torch.inf, -torch.inf, 1e30):
        found = stepped(
            device,
            targets=batch.targets.masked_fill(dead, 10**6),
            advantages=batch.advantages.masked_fill(dead, garbage),
            old_logprobs=old.masked_fill(dead, garbage),
        )
        assert torch.equal(found, expected)
    for kind in (batch.mask.bool(), batch.mask.double(), batch.mask.int()):
        assert torch.equal(stepped(device, mask=kind), stepped(device))


def test_a_batch_without_tokens_moves_nothing(device) -> None:
    batch = Batch(device)
    before, nothing = bits(batch.params), torch.zeros_like(batch.mask)
    info = batch.step(mask=nothing)
    assert not info.accepted and info.cg_residual == 0
    assert same_bits(batch.params, before)
    vector = device_inputs(device, sum(p.numel() for p in batch.params))
    for mode in MODES:
        product = fisher_vector_product(
            batch.policy, batch.params, vector, mask=nothing, damping=0.5, mode=mode
        )
        assert torch.equal(product, 0.5 * vector)


def test_old_logprobs_far_away_make_no_nan(device) -> None:
    batch = Batch(device)
    near = fastrlhf.token_logprobs(batch.policy(), batch.targets).detach()
    far = near.clone()
    far[0, 0] -= 1e4
    # Without an advantage, else the ratio, although finite, would be all of the surrogate.
    batch.advantages[0, 0] = 0.0
    expected = stepped(device, advantages=batch.advantages, old_logprobs=near)
    found = stepped(device, advantages=batch.advantages, old_logprobs=far)
    assert torch.equal(found, expected)


def test_old_logprobs_of_the_policy_itself_change_nothing(device) -> None:
    batch = Batch(device)
    with torch.no_grad():
        old = fastrlhf.token_logprobs(batch.policy(), batch.targets)
    torch.testing.assert_close(stepped(device), stepped(device, old_logprobs=old))
    # Others weigh the tokens: they are not ignored.
    other = old + device_inputs(device, B, T) / 2
    assert relative_error(stepped(device, old_logprobs=other), stepped(device)) > 1e-3


HEAD = {"scale": 1.5, "softcap": 2.0}


@pytest.mark.parametrize("mode", MODES)
def test_the_head_form_takes_the_same_step(mode, device) -> None:
    results = []
    for headed in (False, True):
        batch = Batch(device, headed=False)
        weight = 2 * device_inputs(device, VOCAB, 6)
        head = LMHead(weight, device_inputs(device, VOCAB), **HEAD)

        def logits(batch=batch, head=head):
            raw = 1.5 * (batch.policy() @ head.weight.T + head.bias)
            return 2.0 * torch.tanh(raw / 2.0)

        form = {"policy": batch.policy, "head": head} if headed else {"policy": logits}
        # Few iterations: conjugate gradients make more of each rounding the longer they go on.
        info = batch.step(**form, temperature=0.7, mode=mode, max_kl=0.02, cg_iterations=5)
        assert info.accepted
        results.append((flat(batch.params), info.surrogate, info.kl))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    start = Batch(device, headed=False).params
    assert relative_error(flat(start), results[0][0]) > 1e-3


# Several ranks.


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_group_of_one_process_takes_the_same_step(tmp_path, device) -> None:
    expected = stepped("cpu")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        assert torch.equal(stepped("cpu"), expected)
    finally:
        torch.distributed.destroy_process_group()


def take_a_step_as(rank: int, folder: str) -> None:
    """As one of two processes, with the rows of the batch that are its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    # Unequal counts of tokens, so that a mean of means is not the mean.
    batch = Batch("cpu", rows=slice(0, 2) if rank == 0 else slice(2, 3))
    info = batch.step(damping=0.01)
    product = fisher_vector_product(
        batch.policy, batch.params, torch.ones(flat(batch.params).numel()).double(),
        mask=batch.mask, damping=0.1,
    )  # fmt: skip
    torch.save([tuple(info), flat(batch.params), product], f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_with_a_part_each_take_the_step_of_the_whole(tmp_path) -> None:
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)
    ]
    assert [p.wait(timeout=1800) for p in processes] == [0, 0]
    whole = Batch("cpu")
    info = whole.step(damping=0.01)
    ones = torch.ones(flat(whole.params).numel(), dtype=torch.float64)
    product = fisher_vector_product(whole.policy, whole.params, ones, mask=whole.mask, damping=0.1)
    found = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for own_info, params, own_product in found:
        for value, expected in zip(own_info, info, strict=True):
            torch.testing.assert_close(value, expected)
        torch.testing.assert_close(params, flat(whole.params))
        torch.testing.assert_close(own_product, product)
    assert torch.equal(found[0][1], found[1][1])


# Errors.


def bad_arguments() -> dict:
    batch = Batch("cpu")
    weight = torch.zeros(VOCAB, VOCAB, dtype=torch.float64, requires_grad=True)
    float_targets = batch.targets.double()
    constant = batch.policy().detach()
    return {
        "policy without a gradient": (TypeError, "policy: ", {"policy": lambda: constant}),
        "policy of a tuple": (TypeError, "policy: ", {"policy": lambda: (batch.policy(),)}),
        "policy of other shape": (
            ValueError,
            r"policy: .*\(3, 4\).*\(3, 3, 7\)",
            {"policy": lambda: batch.policy()[:, :3]},
        ),
        "no params": (ValueError, "params: ", {"params": []}),
        "frozen params": (ValueError, "params: .*leaves", {"params": [constant]}),
        "params that are no leaves": (
            ValueError,
            "params: .*leaves",
            {"params": [2 * p for p in batch.params]},
        ),
        "head among params": (
            ValueError,
            "head: ",
            {"params": [*batch.params, weight], "head": LMHead(weight, None, 1.0, None)},
        ),
        "mode": (ValueError, "mode: .*'backward'", {"mode": "backward"}),
        "floating targets": (TypeError, "targets: .*integer", {"targets": float_targets}),
        "complex advantages": (
            TypeError,
            "advantages: .*real",
            {"advantages": batch.advantages.cfloat()},
        ),
        "shape of advantages": (
            ValueError,
            r"advantages: .*\(3, 4\).*\(4,\)",
            {"advantages": torch.zeros(T)},
        ),
        "shape of the mask": (ValueError, r"mask: .*\(3, 4\)", {"mask": torch.ones(B)}),
        "device of the mask": (ValueError, "mask: .*meta", {"mask": batch.mask.to("meta")}),
        "shape of old_logprobs": (
            ValueError,
            r"old_logprobs: .*\(3, 4\)",
            {"old_logprobs": torch.zeros(B)},
        ),
        "integer old_logprobs": (TypeError, "old_logprobs: ", {"old_logprobs": batch.targets}),
        "max_kl": (ValueError, "max_kl: .*positive", {"max_kl": 0.0}),
        "damping": (ValueError, "damping: ", {"damping": -0.1}),
        "NaN as damping": (ValueError, "damping: ", {"damping": math.nan}),
        "cg_iterations": (ValueError, "cg_iterations: ", {"cg_iterations": 0}),
        "backtrack_ratio": (ValueError, "backtrack_ratio: ", {"backtrack_ratio": 1.5}),
        "max_backtracks": (ValueError, "max_backtracks: ", {"max_backtracks": -1}),
        "temperature": (ValueError, "temperature: .*positive", {"temperature": 0.0}),
    }


@pytest.mark.parametrize("case", bad_arguments())
def test_bad_arguments_of_a_step_are_named(case) -> None:
    error, message, options = bad_arguments()[case]
    batch = Batch("cpu")
    with pytest.raises(error, match=f"^{message}"):
        batch.step(**options)


def bad_products() -> dict:
    batch = Batch("cpu")
    size = flat(batch.params).numel()
    constant = batch.policy().detach()
    return {
        "size": (ValueError, "vector: ", {"vector": torch.zeros(size + 1)}),
        "shape": (ValueError, "vector: ", {"vector": torch.zeros(size, 1)}),
        "dtype": (TypeError, "vector: ", {"vector": torch.zeros(size, dtype=torch.long)}),
        "mask": (ValueError, r"mask: .*\(3, 4\)", {"mask": torch.ones(T)}),
        "temperature": (ValueError, "temperature: .*positive", {"temperature": -1.0}),
        "policy of a tuple": (TypeError, "policy: ", {"policy": lambda: (batch.policy(),)}),
        "policy of a constant": (
            (TypeError, ValueError),
            "(policy|params): ",
            {"policy": lambda: constant},
        ),
    }


@pytest.mark.parametrize("case", bad_products())
@pytest.mark.parametrize("mode", MODES)
def test_bad_arguments_of_a_product_are_named(case, mode) -> None:
    error, message, options = bad_products()[case]
    batch = Batch("cpu")
    plain = {"policy": batch.policy, "params": batch.params, "vector": flat(batch.params)}
    with pytest.raises(error, match=f"^{message}"):
        fisher_vector_product(**plain | options, mode=mode)


def test_a_tensor_can_stand_for_params_only_in_a_list() -> None:
    batch = Batch("cpu")
    with pytest.raises((TypeError, ValueError), match=r"^params: "):
        fisher_vector_product(batch.policy, batch.params[0], flat(batch.params))


if __name__ == "__main__":
    take_a_step_as(int(sys.argv[1]), str(Path(sys.argv[2])))
