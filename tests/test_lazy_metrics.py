"""Values without a gradient come from the pass that has the gradient, if that came first."""

import pytest
import torch
from support.tiny_models import make
from torch import Tensor, nn

import fastrlhf

IDS = torch.arange(12).view(2, 6) % 7


def loss_and_entropy(model: nn.Module) -> tuple[Tensor, Tensor]:
    logits = model(IDS).logits[:, :-1] / 0.7
    logprobs = logits.log_softmax(-1).gather(-1, IDS[:, 1:, None])
    with torch.no_grad():
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    return logprobs.sum(), entropy


@pytest.mark.parametrize("trained", [True, False])
def test_an_entropy_that_is_a_metric_costs_nothing_beside_log_probs(trained) -> None:
    model = make("Llama")
    model.lm_head.requires_grad_(trained)
    exact = make("Llama").double()
    plain_loss, plain = loss_and_entropy(model)
    plain_loss.backward()
    plain_gradient = model.model.norm.weight.grad
    model.zero_grad()
    fastrlhf.lazy_report(clear=True)
    with fastrlhf.lazy_logits(model):
        loss, entropy = loss_and_entropy(model)
    assert not entropy.requires_grad
    entropy.zero_()  # whoever holds it may write into it
    with fastrlhf.lazy_logits(model):
        loss.backward()
        gradient = model.model.norm.weight.grad
        _, entropy = loss_and_entropy(model)
    exact_loss, exact_entropy = loss_and_entropy(exact)
    exact_loss.backward()
    exact_gradient = exact.model.norm.weight.grad
    plans = {use.what: use.plan for use in fastrlhf.lazy_report(clear=True).fused}
    assert plans == {"gather": "4G" if trained else "2G", "sum": "0G"}
    for found, usual, expected in (
        (entropy, plain, exact_entropy), (gradient, plain_gradient, exact_gradient),
    ):  # fmt: skip
        allowed = 4 * (usual - expected).norm() + torch.finfo(torch.float32).eps * expected.norm()
        assert (found - expected).norm() <= allowed


@pytest.mark.parametrize("grad", [True, False])
def test_who_writes_into_a_value_changes_that_alone(grad) -> None:
    model = make("Llama")
    with fastrlhf.lazy_logits(model), torch.set_grad_enabled(grad):
        logits = model(IDS).logits
        with torch.no_grad():
            first = logits.logsumexp(-1)
            kept = first.clone()
            first.zero_()
        assert torch.equal(logits.logsumexp(-1), kept)
        with torch.no_grad():
            logits.logsumexp(-1).zero_()
        assert torch.equal(logits.logsumexp(-1), kept)
