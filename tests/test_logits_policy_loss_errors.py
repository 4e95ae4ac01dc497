"""Errors of logits_policy_loss name the argument."""

import pytest
import torch
from support.logits_policy_problems import BACKENDS, evaluate, problem

from fastrlhf import logits_policy_loss


@BACKENDS
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"clip": 0.1}, TypeError, "logits_policy_loss: unexpected option 'clip'; expected one of"),
        ({"entropy": torch.ones(2, 4)}, TypeError, "entropy: expected a bool"),
        ({"entropy_coef": "x"}, TypeError, "entropy_coef: expected a number"),
        ({"targets": torch.zeros(2, 4)}, TypeError, "targets: .*integer"),
        ({"targets": torch.zeros(2, 3).long()}, ValueError, r"targets: expected shape \(2, 4\)"),
        ({"mask": torch.ones(2, 3)}, ValueError, r"mask: expected shape \(2, 4\)"),
        ({"mask": torch.ones(8)}, ValueError, r"mask: expected shape \(2, 4\)"),
        ({"mask": None}, TypeError, "mask: expected a tensor"),
        ({"advantages": None}, TypeError, "advantages: expected a tensor"),
        ({"advantages": torch.zeros(4)}, ValueError, "advantages: expected shape"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a positive"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs: .*kl_coef"),
        ({"reduction": "constant"}, ValueError, "normalizer: expected"),
        ({"surrogate": "ppo"}, ValueError, "surrogate: expected one of"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_name_the_argument(change, error, message, impl) -> None:
    given = problem(20)
    arguments = given.arguments() | {"ref_logprobs": None} | change
    with pytest.raises(error, match=message):
        logits_policy_loss(given.logits.requires_grad_(), impl=impl, **arguments)


@BACKENDS
@pytest.mark.parametrize("target", [-100, -1, 20])
@pytest.mark.skipif(torch.cuda.is_available(), reason="an assertion would end the process")
def test_a_wanted_target_outside_of_the_vocabulary_is_an_error(impl, target) -> None:
    given = problem(20)
    given.targets[0, 0] = target
    with pytest.raises(ValueError, match=rf"targets: expected indices in \[0, 20\).*got {target}"):
        evaluate(given, impl=impl)
