"""update_reference: the reference of TR-DPO."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from fastrlhf import update_reference


def models(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Two of one architecture, with a tied parameter and a buffer."""
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[3].weight = model[2].weight
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn_like(p))
    return model.to(dtype), other.to(dtype)


@pytest.mark.parametrize("alpha", [0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_each_parameter_is_the_mixture(dtype: torch.dtype, alpha: float) -> None:
    reference, model = models(dtype)
    before = [p.detach().clone().double() for p in reference.parameters()]
    policy = [p.detach().clone() for p in model.parameters()]
    places = [p.data_ptr() for p in reference.parameters()]
    buffers = [b.clone() for b in reference.buffers()]
    update_reference(reference, model, alpha)
    for p, place, old, new in zip(reference.parameters(), places, before, policy, strict=True):
        assert p.data_ptr() == place and p.dtype == dtype and p.requires_grad
        exact = alpha * new.double() + (1 - alpha) * old
        wide = torch.promote_types(dtype, torch.float32)
        plain = (alpha * new.to(wide) + (1 - alpha) * old.to(wide)).to(dtype)
        # Rounded once: as near as the dtype allows.
        error, allowed = ((x.double() - exact).abs().max() for x in (p.detach(), plain))
        assert error <= allowed + 4 * torch.finfo(wide).eps * 4
        if alpha in (0, 1):
            assert torch.equal(p.detach().double(), exact)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), policy, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(reference.buffers(), buffers, strict=True))


def test_a_reference_in_fp32_keeps_what_bf16_would_round_away() -> None:
    reference, model = models()
    model = model.bfloat16()
    before = [p.detach().clone() for p in reference.parameters()]
    for _ in range(100):
        update_reference(reference, model, 1e-3)
    for p, old, new in zip(reference.parameters(), before, model.parameters(), strict=True):
        exact = new.double() + (1 - 1e-3) ** 100 * (old.double() - new.double())
        assert (p.double() - exact).abs().max() < 1e-4 * old.abs().max() + 1e-5


def test_a_hard_update_is_trls() -> None:
    callbacks = pytest.importorskip("trl.trainer.callbacks", reason="needs trl")
    for alpha in (0.6, 1.0):
        reference, model = models(torch.float64)
        theirs = copy.deepcopy(reference)
        update_reference(reference, model, alpha)
        callbacks.SyncRefModelCallback._sync_target_model(model, theirs, alpha)
        for p, q in zip(reference.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def changed(model: nn.Module, name: str, parameter: Any) -> nn.Module:
    module, _, own = name.rpartition(".")
    setattr(model.get_submodule(module), own, parameter)
    return model


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda r, m: (None, m, 0.5), TypeError, "reference_model: expected a module, got None"),
        (lambda r, m: (r, dict(m.named_parameters()), 0.5), TypeError, "model: expected a module"),
        (lambda r, m: (r, m, 1.1), ValueError, r"alpha: .*\[0, 1\]"),
        (lambda r, m: (r, m, math.nan), ValueError, "alpha: "),
        (lambda r, m: (r, m, "half"), TypeError, "alpha: expected a number"),
        (lambda r, m: (r, m[:2], 0.5), ValueError, "model: expected parameter '2.weight'"),
        (lambda r, m: (r[:2], m, 0.5), ValueError, "reference_model: .* parameter '2.weight'"),
        (lambda r, m: (r, nn.ModuleDict({"module": m}), 0.5), ValueError, "model: .*'0.weight'"),
        (lambda r, m: (r, r, 0.5), ValueError, "reference_model: expected parameters of its own"),
        (
            lambda r, m: (r, changed(m, "2.bias", nn.Parameter(torch.zeros(4))), 0.5),
            ValueError, r"reference_model: expected '2.bias' of shape \(4,\)",
        ),
        (
            lambda r, m: (r, changed(m, "2.bias", nn.Parameter(torch.zeros(3).char(), False)), 0.5),
            TypeError, "model: expected floating parameters, got '2.bias' of torch.int8",
        ),
        (
            lambda r, m: (r, changed(m, "2.bias", nn.Parameter(torch.zeros(3).to("meta"))), 0.5),
            ValueError, "model: expected parameters with data, got '2.bias' on meta",
        ),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong_and_leave_the_reference(
    wrong: Any, error: type[Exception], message: str
) -> None:
    reference, model = models()
    before = [p.detach().clone() for p in reference.parameters()]
    arguments = wrong(reference, model)
    with pytest.raises(error, match=f"^{message}"):
        update_reference(*arguments)
    assert all(torch.equal(p, q) for p, q in zip(reference.parameters(), before, strict=True))


def test_parts_of_zero_3_are_named() -> None:
    reference, model = models()
    parameter = nn.Parameter(torch.zeros(0))
    parameter.ds_id, parameter.ds_numel = 0, 3
    with pytest.raises(ValueError, match=r"^model: expected whole parameters, got a part of"):
        update_reference(reference, changed(model, "2.bias", parameter))
