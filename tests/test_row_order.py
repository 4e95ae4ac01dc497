"""The candidate for K3 that first light times gives what K3 gives, whatever the distance between
a row and the one whose gradient is written.
"""

import importlib

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from fastrlhf.kernels.policy_loss import PolicySettings, policy_loss

row_order = importlib.import_module("first_light.row_order")
SETTINGS = PolicySettings(0.8, 1.2, float("inf"), 1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize("cached_rows", [1, 3, 100])
@pytest.mark.parametrize(("rows", "vocab"), [(7, 1056), (5, 1057), (3, 40000)])
def test_rows_in_order_give_what_k3_gives(rows, vocab, cached_rows) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = (3 * torch.randn(rows, vocab, device=device)).bfloat16()
    targets = torch.randint(vocab, (rows,), device=device)
    advantages, weights = torch.randn(rows, device=device), torch.rand(rows, device=device)
    logprobs = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    tokens = (targets, logprobs + torch.linspace(-0.4, 0.4, rows, device=device))
    expected = torch.empty_like(logits)
    losses, _, _ = policy_loss(
        expected[None], logits[None], *tokens, None, advantages, weights, surrogate="clip",
        kl_estimator="k3", settings=SETTINGS, entropy=False, temperature=1.0, softcap=None,
        scale=1.0, ignore_index=-100,
    )  # fmt: skip
    found, in_place = torch.empty_like(logits), logits.clone()
    for out, source in ((found, logits), (in_place, in_place)):
        values = row_order.policy_loss_in_row_order(
            out, source, *tokens, advantages, weights,
            cached_bytes=cached_rows * vocab * logits.itemsize,
        )  # fmt: skip
        torch.testing.assert_close(values, losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.float(), expected.float(), rtol=2**-7, atol=1e-9)
    assert torch.equal(found, in_place)
    assert expected.abs().sum() > 0
