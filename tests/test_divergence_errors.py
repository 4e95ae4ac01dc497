"""Errors of kl_divergence name the argument."""

import math

import pytest
import torch

import fastrlhf

LOGITS = torch.zeros(2, 3, 5)
BAD_INPUT = {
    "integer logits": (TypeError, "^logits: .*floating.*int64", {"logits": LOGITS.long()}),
    "fp8 logits": (TypeError, "^logits: .*float8", {"logits": LOGITS.to(torch.float8_e4m3fn)}),
    "a list": (TypeError, "^ref_logits: expected a tensor, got list", {"ref_logits": [1.0]}),
    "integer reference": (TypeError, "^ref_logits: .*int64", {"ref_logits": LOGITS.long()}),
    "0-d logits": (ValueError, r"^logits: .*\(\.\.\., V\)", {"logits": torch.tensor(1.0)}),
    "empty vocabulary": (ValueError, "^logits: .*V > 0", {"logits": torch.zeros(2, 3, 0)}),
    "another vocabulary": (
        ValueError,
        r"^ref_logits: .*\(2, 3, 5\).*got \(2, 3, 6\)",
        {"ref_logits": torch.zeros(2, 3, 6)},
    ),
    "one row for all": (ValueError, "^ref_logits: ", {"ref_logits": torch.zeros(1, 3, 5)}),
    "device": (ValueError, "^ref_logits: .*meta", {"ref_logits": LOGITS.to("meta")}),
    "unknown direction": (ValueError, "^direction: .*'kl'", {"direction": "kl"}),
    "direction None": (TypeError, "^direction: .*NoneType", {"direction": None}),
    "large beta": (ValueError, "^beta: .*got 1.5", {"direction": "jsd", "beta": 1.5}),
    "negative beta": (ValueError, "^beta: .*got -0.1", {"direction": "jsd", "beta": -0.1}),
    "beta NaN": (ValueError, "^beta: .*nan", {"direction": "jsd", "beta": math.nan}),
    "beta None": (TypeError, "^beta: .*number", {"direction": "jsd", "beta": None}),
    "mask of another shape": (
        ValueError,
        r"^mask: .*\(2, 3\).*got \(2,\)",
        {"mask": torch.ones(2)},
    ),
    "complex mask": (TypeError, "^mask: ", {"mask": torch.ones(2, 3, dtype=torch.cfloat)}),
    "list for a mask": (TypeError, "^mask: .*list", {"mask": [[1, 1, 1], [1, 1, 1]]}),
    "mask elsewhere": (ValueError, "^mask: .*meta", {"mask": torch.ones(2, 3, device="meta")}),
    "zero temperature": (ValueError, "^temperature: .*positive", {"temperature": 0.0}),
    "temperature None": (TypeError, "^temperature: .*number", {"temperature": None}),
    "one bad temperature": (
        ValueError,
        "^temperature: .*positive.*got -1",
        {"temperature": torch.tensor([[1.0, 1, 1], [1, -1, 1]])},
    ),
    "temperatures of another shape": (
        ValueError,
        r"^temperature: .*\(2, 3\).*got \(3,\)",
        {"temperature": torch.ones(3)},
    ),
    "differentiable temperature": (
        ValueError,
        "^temperature: .*without gradient",
        {"temperature": torch.ones(2, 3, requires_grad=True)},
    ),
    "zero softcap": (ValueError, "^softcap: .*positive", {"softcap": 0.0}),
    "zero scale": (ValueError, "^scale: .*positive", {"scale": 0.0}),
    "unknown impl": (ValueError, "^impl: .*'cuda'", {"impl": "cuda"}),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_names_the_argument(case) -> None:
    error, message, arguments = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        fastrlhf.kl_divergence(**{"logits": LOGITS, "ref_logits": LOGITS} | arguments)


def test_bad_temperatures_do_not_speak_of_arguments_that_are_not_there() -> None:
    for temperature in (torch.ones(3), torch.ones(2, 3, device="meta")):
        with pytest.raises(ValueError, match=r"^temperature: ") as error:
            fastrlhf.kl_divergence(LOGITS, LOGITS, temperature=temperature)
        assert "targets" not in str(error.value)
