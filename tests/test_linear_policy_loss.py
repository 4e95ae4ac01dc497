"""linear_policy_loss: policy losses from hidden states, their cost in matmuls and in memory."""

import math
from typing import Any

import pytest
import torch
from support.compare import assert_as_accurate, budget, relative_error
from support.matmuls import MatmulAudit
from support.policy_formulas import FORMS
from torch import Tensor

from fastrlhf import grpo_options, linear_policy_loss, logits_policy_loss
from fastrlhf.recipes.memory import peak_memory

LEVELS = ["token", "sequence"]
FULL = {"kl_coef": 0.3, "entropy_coef": 0.05, "clip_high": 0.28, "dual_clip": 1.5}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def problem(dtype: torch.dtype, device: Any, vocab: int = 40, width: int = 8) -> dict[str, Any]:
    """Three sequences of up to six tokens; garbage where the mask is 0, hidden states included."""
    hidden = torch.randn(3, 6, width, device=device).to(dtype)
    weight = torch.randn(vocab, width, device=device).to(dtype)
    targets = torch.randint(vocab, (3, 6), device=device)
    mask = torch.rand(3, 6, device=device) > 0.3
    mask[1] = False
    acc = torch.promote_types(dtype, torch.float32)
    logprob = (hidden.to(acc) @ weight.to(acc).T).log_softmax(-1)
    logprob = logprob.gather(-1, targets[..., None])[..., 0]
    tensors = {
        "old_logprobs": (logprob + 0.4 * torch.randn_like(logprob)).clamp(max=-1e-3),
        "ref_logprobs": logprob + 0.4 * torch.randn_like(logprob),
        "advantages": torch.randn_like(logprob),
    }
    for x in (*tensors.values(), hidden):
        x[~mask] = math.nan
    targets[~mask] = -7
    return {"hidden": hidden, "weight": weight, "targets": targets, "mask": mask} | tensors


def evaluate(given: dict[str, Any], **options: Any) -> tuple[Tensor, dict, list[Tensor]]:
    """Loss, metrics, and gradients of hidden states, weight and bias."""
    names = [name for name in ("hidden", "weight", "bias") if given.get(name) is not None]
    leaves = {name: given[name].detach().clone().requires_grad_() for name in names}
    loss, metrics = linear_policy_loss(**given | leaves, **options)
    return loss.detach(), metrics, list(torch.autograd.grad(loss, list(leaves.values())))


Result = tuple[Tensor, dict, list[Tensor]]


def through_logits(given: dict[str, Any], exact: bool, **options: Any) -> Result:
    """The same by way of the logits, in fp64 or as exactly as the inputs are given."""
    dtype = torch.float64 if exact else torch.promote_types(given["weight"].dtype, torch.float32)
    given = {
        name: x.double() if exact and torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in given.items()
    }
    leaves = [given.pop(name).detach().clone().requires_grad_() for name in ("hidden", "weight")]
    if given.get("bias") is not None:
        leaves.append(given["bias"].detach().clone().requires_grad_())
    bias = leaves[2] if given.pop("bias", None) is not None else 0.0
    hidden = torch.where(given["mask"].unsqueeze(-1), leaves[0], 0.0)
    logits = hidden.to(dtype) @ leaves[1].to(dtype).T + bias
    loss, metrics = logits_policy_loss(logits, **given, **options)
    return loss.detach(), metrics, list(torch.autograd.grad(loss, leaves))


def assert_right(found: Result, given: dict[str, Any], **options: Any) -> None:
    """Assert that loss, metrics and gradients err as little as those by way of the logits do."""
    plain = through_logits(given, exact=False, **options)
    exact = through_logits(given, exact=True, **options)
    # A product of ratios is off by as much as the log-probs of all tokens of its sequence together.
    terms = given["mask"].shape[1] if options.get("ratio_level") == "product" else 1
    # The tokens' losses are of about that size, and may cancel.
    size = max(1.0, abs(float(exact[0])))
    assert_as_accurate(found[0], plain[0], exact[0], size=terms * size, of="loss")
    assert found[1].keys() == exact[1].keys()
    for name, value in exact[1].items():
        size = max(1.0, abs(float(value)))
        assert_as_accurate(found[1][name], plain[1][name], value, size=size, of=name)
    for name, own, by_plain, right in zip(
        ("hidden", "weight", "bias"), found[2], plain[2], exact[2], strict=False
    ):
        assert not own.isnan().any()
        error, bound = (
            relative_error(own, right),
            budget(relative_error(by_plain, right), own.dtype, terms),
        )
        assert error <= bound, f"{name}: error {error:.2e}, not {bound:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("surrogate", "level"), FORMS)
@pytest.mark.parametrize("chunk_size", [1, 5, None])
def test_it_is_the_loss_of_the_logits(chunk_size, surrogate, level, dtype, device) -> None:
    given = problem(dtype, device)
    options = FULL | {"surrogate": surrogate, "ratio_level": level, "reduction": "sequence-mean"}
    found = evaluate(given, **options, chunk_size=chunk_size)
    assert found[2][0].dtype == found[2][1].dtype == dtype
    assert_right(found, given, **options)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("chunk_size", [1, 5, None])
def test_what_else_a_token_can_be_weighed_by(chunk_size, level, device) -> None:
    given = problem(torch.float64, device)
    weights = torch.rand(3, 6, device=device).double() > 0.5
    options = FULL | {
        "ratio_level": level, "kl_bias_correction": True, "kl_weights": weights.double(),
        "off_policy_mask_threshold": 0.0,
    }  # fmt: skip
    found = evaluate(given, **options, chunk_size=chunk_size)
    assert_right(found, given, **options)
    assert found[1]["off_policy_mask/masked_mean"] > 0


def test_losses_that_are_not_reduced_are_those_of_the_logits(device) -> None:
    given = problem(torch.float64, device)
    total = evaluate(given, reduction="constant", normalizer=1.0)
    leaves = {name: given[name].detach().clone().requires_grad_() for name in ("hidden", "weight")}
    losses, metrics = linear_policy_loss(**given | leaves, reduction="none")
    assert losses.shape == (3, 6) and not losses[~given["mask"]].any()
    torch.testing.assert_close(losses.detach().sum(), total[0])
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
    torch.testing.assert_close(list(gradients), total[2])
    assert metrics == total[1]


@pytest.mark.parametrize(
    "change",
    [{"clip_high": 0.2801}, {"kl_coef": 0.3001}, {"entropy_coef": 0.0501},
     {"ratio_level": "sequence"}, {"reduction": "token-mean"}, {"normalizer": 1.999}],
    ids=str,
)  # fmt: skip
def test_the_comparison_notices_a_change_of(change, device) -> None:
    given = problem(torch.float32, device)
    given["old_logprobs"] -= 0.3  # so that ratios are clipped from above
    options = FULL | {"reduction": "sequence-mean"}
    assert_right(evaluate(given, **options), given, **options)
    with pytest.raises(AssertionError, match=": error "):
        assert_right(evaluate(given, **options | change), given, **options)


@pytest.mark.parametrize("level", LEVELS)
def test_options_of_the_head(level, device) -> None:
    given = problem(torch.float64, device)
    head = {"temperature": 0.7, "softcap": 9.0, "scale": 0.5}
    options = FULL | {"ratio_level": level}
    bias = torch.randn(40, dtype=torch.float64, device=device)
    found = evaluate(given | {"bias": bias}, **options, **head, chunk_size=4)
    assert_right(found, given | {"bias": bias}, **options, **head)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("name", ["rollout weights", "on policy", "per sequence", "recipe"])
def test_other_ways_to_call_it(name, impl, device) -> None:
    given = problem(torch.float64, device)
    options: dict[str, Any] = {"impl": impl}
    if name == "rollout weights":
        options["rollout_weights"] = torch.rand(3, 6, dtype=torch.float64, device=device)
    elif name == "on policy":
        given["old_logprobs"] = None
    elif name == "per sequence":
        given["advantages"] = torch.randn(3, dtype=torch.float64, device=device)
    else:
        options |= grpo_options("gspo") | {"entropy": True}
    found = evaluate(given, **options)
    assert_right(found, given, **options)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize(
    ("hidden", "weight", "matmuls"),
    [(False, False, 1), (True, False, 2), (False, True, 2), (True, True, 3)],
)
def test_it_costs_one_matmul_and_one_for_each_gradient(
    hidden, weight, matmuls, entropy_coef, level, device
) -> None:
    given = problem(torch.float32, device)
    given["hidden"].requires_grad_(hidden)
    given["weight"].requires_grad_(weight)
    with MatmulAudit() as audit:
        loss, _ = linear_policy_loss(
            **given, ratio_level=level, entropy_coef=entropy_coef, chunk_size=6
        )
        if hidden or weight:
            loss.backward()
    rows = int(given["mask"].sum())
    assert audit.operations == matmuls * 2 * rows * 40 * 8


def test_tokens_without_an_advantage_cost_no_matmul(device) -> None:
    given = problem(torch.float32, device)
    del given["ref_logprobs"]
    given["advantages"][0] = torch.where(given["mask"][0], 0.0, math.nan)
    with MatmulAudit() as audit:
        found = evaluate(given)
    assert audit.operations == 3 * 2 * int(given["mask"][1:].sum()) * 40 * 8
    assert_right(found, given)


@pytest.mark.parametrize("level", LEVELS)
def test_no_tensor_is_as_large_as_the_logits(level) -> None:
    vocab, tokens, width, chunk = 2000, 300, 8, 50
    hidden = torch.randn(6, tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(vocab, (6, tokens))
    old, ones = torch.full((6, tokens), -8.0), torch.ones(6, tokens)

    def step() -> None:
        linear_policy_loss(
            hidden, weight, targets, old, ones, ones, ratio_level=level, entropy_coef=0.1,
            chunk_size=chunk,
        )[0].backward()  # fmt: skip

    with MatmulAudit() as audit:
        step()
    assert audit.largest <= chunk * vocab
    _, peak = peak_memory(step, torch.device("cpu"))
    # Logits would take 14 MiB; their chunks, a few at a time, take 0.4 each.
    assert peak < 3 * 2**20


@pytest.mark.parametrize("level", LEVELS)
def test_an_empty_mask_gives_zero(level, device) -> None:
    given = problem(torch.float32, device)
    given["mask"] = torch.zeros_like(given["mask"])
    loss, metrics, gradients = evaluate(given, ratio_level=level, entropy_coef=0.1, kl_coef=0.1)
    assert loss == 0 and all(value == 0 for value in metrics.values())
    assert not any(gradient.any() for gradient in gradients)


def test_an_upstream_gradient_scales_it_and_a_second_derivative_is_refused(device) -> None:
    given = problem(torch.float64, device)
    expected = evaluate(given)[2][0]
    given["hidden"].requires_grad_()
    loss, _ = linear_policy_loss(**given)
    (found,) = torch.autograd.grad(loss * 3, given["hidden"], retain_graph=True)
    torch.testing.assert_close(found, 3 * expected)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(loss, given["hidden"], create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss_type": "dapo"}, TypeError, "linear_policy_loss: unexpected option 'loss_type'"),
        ({"hidden": torch.zeros(3, 6, 9)}, ValueError, "hidden: expected shape"),
        ({"hidden": [1.0]}, TypeError, "hidden: expected a tensor, got list"),
        ({"weight": torch.zeros(40)}, ValueError, "weight: expected shape"),
        ({"targets": torch.zeros(3, 5).long()}, ValueError, r"\(3, 5\)"),
        ({"targets": torch.full((3, 6), 40)}, ValueError, r"targets: .*\[0, 40\)"),
        ({"mask": torch.ones(18)}, ValueError, r"mask: expected shape \(3, 6\)"),
        ({"advantages": torch.zeros(6)}, ValueError, "advantages: expected shape"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1"),
        ({"kl_coef": 1.0, "ref_logprobs": None}, ValueError, "ref_logprobs"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_errors_name_the_argument(change, error, message) -> None:
    with pytest.raises(error, match=message):
        linear_policy_loss(**problem(torch.float32, "cpu") | change)
