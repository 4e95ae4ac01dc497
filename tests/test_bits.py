"""The comparison of two states of the library looks at all functions, and sees a single bit."""

import inspect
from pathlib import Path

import pytest
import torch

import fastrlhf

pytest.importorskip("transformers", reason="its models are compared too")
pytest.importorskip("peft", reason="its models are compared too")
from support.bits import record
from support.fuzz import cases

# What computes nothing, or is called by what is compared; sft_loss is another name.
NOT_COMPARED = {
    "check", "get_backend", "set_backend", "warm_up", "lazy_report", "update_reference", "lm_head",
    "head_inputs", "enable_lazy_logits", "disable_lazy_logits", "sft_loss",
}  # fmt: skip


def test_every_public_function_is_called() -> None:
    files = [*Path(cases.__file__).parent.glob("cases_of_*.py")]
    files.append(Path(record.__file__).with_name("calls.py"))
    sources = "".join(file.read_text() for file in files)
    functions = {name for name in fastrlhf.__all__ if inspect.isfunction(getattr(fastrlhf, name))}
    assert {name for name in functions - NOT_COMPARED if f"fastrlhf.{name}" not in sources} == set()


@pytest.mark.parametrize(
    "name", ["dpo_loss sigmoid", "token_stats eager", "advantages and returns"]
)
def test_the_same_call_has_the_same_digest(name, monkeypatch) -> None:
    monkeypatch.setattr(record, "CALLS", {name: record.CALLS[name]})
    first, second = dict(record.of_calls()), dict(record.of_calls())
    assert first == second and "Error" not in first[name]


def test_a_bit_a_dtype_and_a_sign_are_seen() -> None:
    x = torch.ones(3)
    others = [
        torch.tensor([1, 1, 1 + 2**-23]),
        x.double(),
        x.view(3, 1),
        torch.tensor([1.0, 1, -1]),
    ]
    assert len({record.digest([y]) for y in (x, *others)}) == 5
    assert record.digest([torch.zeros(1)]) != record.digest([-torch.zeros(1)])
    assert record.digest([x, None]) != record.digest([x])


def test_gradients_are_compared_too() -> None:
    x = torch.ones(3, requires_grad=True)
    one = record.digest_of_call(2 * x, [x], seed=0)
    same_value = record.digest_of_call(2 * x.detach() + 0 * x, [x], seed=0)
    assert one != same_value
