"""dpo_loss against the method in which TRL's DPO trainer computes its loss."""

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.preference_batches import WITH_IMPL

from fastrlhf import dpo_loss


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
