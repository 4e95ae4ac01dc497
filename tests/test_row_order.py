"""First light times a candidate for the kernel of the policy loss, in which a program writes the
gradient of another row than the one it has just read. It gives what the kernel gives, whatever the
distance between the two rows.
"""

import importlib

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from fastrlhf.kernels.policy_loss import PolicySettings, policy_loss

row_order = importlib.import_module("first_light.row_order")
SETTINGS = PolicySettings(0.8, 1.2, float("inf"), 1.0, 1.0, 0.0, 0.0)


def exact_policy(logits, targets, old, advantages, weights):
    """Losses and the gradient of their weighted sum, by the plain formula in fp64."""
    leaf = logits.detach().double().requires_grad_()
    logprobs = leaf.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    ratio = (logprobs - old.double()).exp()
    clipped = ratio.clamp(SETTINGS.ratio_low, SETTINGS.ratio_high)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), leaf)
    return losses.detach(), gradient


@pytest.mark.parametrize("cached_rows", [1, 3, 100])
@pytest.mark.parametrize(("rows", "vocab"), [(7, 1056), (5, 1057), (3, 40000)])
def test_rows_in_order_are_as_accurate_as_k3(rows, vocab, cached_rows) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = (3 * torch.randn(rows, vocab, device=device)).bfloat16()
    targets = torch.randint(vocab, (rows,), device=device)
    advantages, weights = torch.randn(rows, device=device), torch.rand(rows, device=device)
    logprobs = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    old = logprobs + torch.linspace(-0.4, 0.4, rows, device=device)
    exact = exact_policy(logits, targets, old, advantages, weights)

    def errors(losses, gradient) -> list[torch.Tensor]:
        return [(losses - exact[0]).abs(), (gradient.double() - exact[1]).norm(dim=1)]

    by_k3 = torch.empty_like(logits)
    losses, _, _ = policy_loss(
        by_k3[None], logits[None], targets, old, None, advantages, weights, surrogate="clip",
        kl_estimator="k3", settings=SETTINGS, entropy=False, temperature=1.0, softcap=None,
        scale=1.0, ignore_index=-100,
    )  # fmt: skip
    budgets = errors(losses, by_k3)
    found, in_place = torch.empty_like(logits), logits.clone()
    for out, source in ((found, logits), (in_place, in_place)):
        values = row_order.policy_loss_in_row_order(
            out, source, targets, old, advantages, weights,
            cached_bytes=cached_rows * vocab * logits.itemsize,
        )  # fmt: skip
        sizes = exact[0].abs(), exact[1].norm(dim=1)
        for error, budget, size in zip(errors(values, out), budgets, sizes, strict=True):
            # Added up in another order, by which a few roundings of fp32 may differ.
            assert (error <= 2 * budget + 16 * torch.finfo(torch.float32).eps * size).all()
    assert torch.equal(found, in_place)
    assert exact[1].any()
