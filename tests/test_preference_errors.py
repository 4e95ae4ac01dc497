"""Errors of dpo_loss name the argument."""

import math
from typing import Any

import pytest
import torch
from support.preference_formulas import LOSS_TYPES

from fastrlhf import dpo_loss

_FOUR = torch.zeros(4)
_TOKENS = torch.zeros(4, 3)
_PAIR = {"yw_idxs": torch.tensor([0, 1]), "yl_idxs": torch.tensor([2, 3])}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"loss_type": "dpo"}, ValueError, r"loss_type: expected one of sigmoid, .*, got 'dpo'"),
        ({"loss_type": "ipo"}, ValueError, "lengths: .*'ipo' averages"),
        ({"loss_type": "sigmoid_norm"}, ValueError, "lengths: .*'sigmoid_norm' averages"),
        ({"loss_type": "ipo", "lengths": torch.ones(3)}, ValueError, r"lengths: .*\(4,\).*\(3,\)"),
        ({"loss_type": "ipo", "lengths": [1, 2, 3, 4]}, TypeError, "lengths: .*got list"),
        ({"pi_logps": [0.0]}, TypeError, "pi_logps: expected a tensor, got list"),
        ({"pi_logps": _FOUR.long()}, TypeError, "pi_logps: .*floating.*int64"),
        ({"ref_logps": _FOUR.long()}, TypeError, "ref_logps: .*floating.*int64"),
        ({"ref_logps": None}, TypeError, "ref_logps: expected a tensor, got NoneType"),
        ({"pi_logps": _TOKENS}, ValueError, r"pi_logps: .*\(4, 3\).*need a mask"),
        ({"pi_logps": torch.zeros(())}, ValueError, r"pi_logps: expected shape \(B,\), got \(\)"),
        ({"ref_logps": _TOKENS}, ValueError, r"ref_logps: .*\(4,\).*got \(4, 3\)"),
        ({"ref_logps": torch.zeros(5)}, ValueError, r"ref_logps: .*\(4,\).*got \(5,\)"),
        ({"ref_logps": _FOUR.to("meta")}, ValueError, "ref_logps: expected on cpu"),
        ({"mask": torch.ones(4)}, ValueError, r"pi_logps: expected shape \(B, T\) with a mask"),
        ({"pi_logps": _TOKENS, "mask": torch.ones(4, 2)}, ValueError, r"mask: .*\(4, 3\)"),
        ({"pi_logps": _TOKENS, "mask": [1]}, TypeError, "mask: expected a tensor, got list"),
        (
            {"pi_logps": _TOKENS, "mask": torch.ones(4, 3, dtype=torch.complex64)},
            TypeError,
            "mask: .*boolean or 0/1",
        ),
        (
            {"pi_logps": _TOKENS, "mask": torch.ones(4, 3, device="meta")},
            ValueError,
            "mask: expected on cpu",
        ),
        (
            {"pi_logps": _TOKENS, "ref_logps": torch.zeros(4, 2), "mask": torch.ones(4, 3)},
            ValueError,
            r"ref_logps: .*\(4, 3\).*got \(4, 2\)",
        ),
        ({"yw_idxs": torch.zeros(2)}, TypeError, "yw_idxs: .*integer.*float32"),
        ({"yl_idxs": torch.ones(2, dtype=torch.bool)}, TypeError, "yl_idxs: .*integer.*bool"),
        ({"yw_idxs": [0, 1]}, TypeError, "yw_idxs: expected a tensor, got list"),
        ({"yw_idxs": torch.zeros(2, 1).long()}, ValueError, r"yw_idxs: .*\(P,\).*\(2, 1\)"),
        ({"yl_idxs": torch.tensor([2])}, ValueError, r"yl_idxs: .*\(2,\).*got \(1,\)"),
        ({"yl_idxs": torch.zeros(2, device="meta").long()}, ValueError, "yl_idxs: .*on cpu"),
        ({"yw_idxs": torch.tensor([0, 4])}, ValueError, r"yw_idxs: .*\[0, 4\).*got 4"),
        ({"yl_idxs": torch.tensor([-1, 0])}, ValueError, r"yl_idxs: .*\[0, 4\).*got -1"),
        ({"beta": 0.0}, ValueError, "beta: .*positive.*got 0.0"),
        ({"beta": -0.1}, ValueError, "beta: .*positive.*got -0.1"),
        ({"beta": math.nan}, ValueError, "beta: .*positive.*got nan"),
        ({"beta": math.inf}, ValueError, "beta: .*finite.*got inf"),
        ({"beta": "0.1"}, TypeError, "beta: expected a number, got str"),
        ({"discopop_tau": 0.0}, ValueError, "discopop_tau: .*positive.*got 0.0"),
        ({"label_smoothing": -0.01}, ValueError, r"label_smoothing: .*\[0, 0.5\].*-0.01"),
        ({"label_smoothing": 0.51}, ValueError, r"label_smoothing: .*\[0, 0.5\].*0.51"),
        ({"label_smoothing": math.nan}, ValueError, "label_smoothing: .*got nan"),
        (
            {"loss_type": "robust", "label_smoothing": 0.5},
            ValueError,
            "label_smoothing: expected less than 0.5 for loss_type 'robust'",
        ),
        (
            {"loss_type": "exo_pair"},
            ValueError,
            "label_smoothing: expected more than 0 for loss_type 'exo_pair'",
        ),
        (
            {"impl": "cuda"},
            ValueError,
            'impl: expected "auto", "triton", "compiled" or "eager", got \'cuda\'',
        ),
    ],
)
def test_errors_name_the_argument(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"pi_logps": _FOUR, "ref_logps": _FOUR, **_PAIR, **changed}
    with pytest.raises(error, match=message):
        dpo_loss(**arguments)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_unknown_impl_is_an_error_for_every_type(loss_type: str) -> None:
    with pytest.raises(ValueError, match="impl"):
        dpo_loss(
            _FOUR,
            _FOUR,
            **_PAIR,
            loss_type=loss_type,
            label_smoothing=0.1,
            lengths=torch.ones(4),
            impl="cuda",
        )


def test_triton_on_the_cpu_without_the_interpreter_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"impl: .*TRITON_INTERPRET=1"):
        dpo_loss(_FOUR, _FOUR, **_PAIR, impl="triton")
    dpo_loss(_FOUR, _FOUR, **_PAIR)  # auto falls back to eager
