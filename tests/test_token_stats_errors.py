"""Errors of token_stats name the argument, and on a GPU bad values trap in the kernel."""

import subprocess
import sys

import pytest
import torch

import fastrlhf

LOGITS, TARGETS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
BAD_INPUT = {
    "integer logits": (TypeError, "logits: .*floating.*int64", {"logits": LOGITS.long()}),
    "fp8 logits": (TypeError, "logits: .*float8", {"logits": LOGITS.to(torch.float8_e4m3fn)}),
    "a list": (TypeError, "logits: expected a tensor, got list", {"logits": [1.0]}),
    "0-d logits": (ValueError, r"logits: .*\(\.\.\., V\)", {"logits": torch.tensor(1.0)}),
    "empty vocabulary": (ValueError, "logits: .*V > 0", {"logits": torch.zeros(2, 3, 0)}),
    "floating targets": (TypeError, "targets: .*integer", {"targets": TARGETS.float()}),
    "boolean targets": (TypeError, "targets: .*integer", {"targets": TARGETS.bool()}),
    "shape": (ValueError, r"targets: .*\(2, 3\).*got \(2, 2\)", {"targets": TARGETS[:, 1:]}),
    "device": (ValueError, "targets: .*meta", {"targets": TARGETS.to("meta")}),
    "target too large": (ValueError, r"targets: .*\[0, 5\).*got 5", {"targets": TARGETS + 5}),
    "negative target": (ValueError, r"targets: .*\[0, 5\).*got -1", {"targets": TARGETS - 1}),
    "zero temperature": (ValueError, "temperature: .*positive", {"temperature": 0.0}),
    "infinite temperature": (ValueError, "temperature: .*finite", {"temperature": torch.inf}),
    "temperature None": (TypeError, "temperature: .*number", {"temperature": None}),
    "one bad temperature": (
        ValueError,
        "temperature: .*positive.*got -1",
        {"temperature": torch.tensor([[1.0, 1, 1], [1, -1, 1]])},
    ),
    "temperatures of another shape": (
        ValueError,
        r"temperature: .*\(2,\).*\(2, 3\), got \(3,\)",
        {"temperature": torch.ones(3)},
    ),
    "integer temperatures": (TypeError, "temperature: .*floating", {"temperature": TARGETS + 1}),
    "differentiable temperature": (
        ValueError,
        "temperature: .*without gradient",
        {"temperature": torch.ones(2, 3, requires_grad=True)},
    ),
    "zero softcap": (ValueError, "softcap: .*positive", {"softcap": 0.0}),
    "negative softcap": (ValueError, "softcap: .*positive", {"softcap": -30.0}),
    "zero scale": (ValueError, "scale: .*positive", {"scale": 0.0}),
    "unknown impl": (ValueError, "impl: .*'cuda'", {"impl": "cuda"}),
}


@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.parametrize("operation", [fastrlhf.token_stats, fastrlhf.token_logprobs])
def test_bad_input_names_the_argument(case, operation) -> None:
    error, message, arguments = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        operation(**{"logits": LOGITS, "targets": TARGETS} | arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bad", ["targets[1] = 5", "temperature[1] = 0.0"])
def test_bad_values_on_a_gpu_trap_in_the_kernel(bad) -> None:
    code = f"""
import torch, fastrlhf
targets, temperature = torch.zeros(3, dtype=torch.long), torch.ones(3)
{bad}
logits = torch.zeros(3, 5, device="cuda")
fastrlhf.token_stats(logits, targets.cuda(), temperature=temperature.cuda())
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "fastrlhf: a t" in done.stdout + done.stderr
