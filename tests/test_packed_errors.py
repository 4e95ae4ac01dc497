"""Errors of packed sequences: wrong borders, and arguments that do not go together, are named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastrlhf as fr
from fastrlhf.ops.layout import checked_cu_seqlens

X, ONES = torch.zeros(5), torch.ones(5)
PAIR = torch.tensor([0]), torch.tensor([1])
CALLS: dict[str, Callable[..., Any]] = {
    "dpo_loss": lambda x, ones, **kw: fr.dpo_loss(x, x, *PAIR, mask=ones, **kw),
    "sequence_logprobs": fr.sequence_logprobs,
    "policy_loss": lambda x, ones, **kw: fr.policy_loss(x, x, x, ones, **kw),
    "ppo_loss": lambda x, ones, **kw: fr.ppo_loss(x, x, x, ones, **kw),
    "grpo_loss": lambda x, ones, **kw: fr.grpo_loss(x, x, x, ones, **kw),
    "value_loss": lambda x, ones, **kw: fr.value_loss(x, x, x, ones, **kw),
    "process_reward_loss": lambda x, ones, **kw: fr.process_reward_loss(x, x, ones, **kw),
    "process_reward_scores": lambda x, ones, **kw: fr.process_reward_scores(x, ones, **kw),
    "gae": lambda x, ones, **kw: fr.gae(x, x, ones, **kw),
    "shaped_rewards": lambda x, ones, **kw: fr.shaped_rewards(
        torch.zeros(2), x, x, ones, kl_coef=0.1, **kw
    ),
    "shift_targets": lambda x, ones, **kw: fr.shift_targets(x.long(), ones, **kw),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("borders", "error", "message"),
    [
        ([0, 2, 5], TypeError, "expected a tensor, got list"),
        (torch.tensor([0.0, 2.0, 5.0]), TypeError, "expected int32 or int64, got torch.float32"),
        (torch.tensor([0, 2, 5], dtype=torch.int16), TypeError, "int32 or int64, got torch.int16"),
        (torch.tensor([[0, 2, 5]]), ValueError, r"expected shape \(B \+ 1,\), got \(1, 3\)"),
        (torch.tensor([], dtype=torch.int32), ValueError, r"expected shape \(B \+ 1,\), got \(0,"),
        (torch.tensor(5), ValueError, r"expected shape \(B \+ 1,\), got \(\)"),
        (torch.tensor([1, 2, 5]), ValueError, "expected to start at 0, got 1"),
        (torch.tensor([0, 2, 4]), ValueError, "expected to end at 5, .* got 4"),
        (torch.tensor([0, 2, 6]), ValueError, "expected to end at 5, .* got 6"),
        (torch.tensor([0, 4, 3, 5]), ValueError, "expected not to decrease, got 3 after 4"),
        (torch.tensor([0, 2, 5], device="meta"), ValueError, "expected on cpu, .* got meta"),
    ],
)
def test_wrong_borders_are_named(name, borders, error, message) -> None:
    with pytest.raises(error, match=f"^cu_seqlens: .*{message}"):
        CALLS[name](X, ONES, cu_seqlens=borders)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", [(2, 5), (5, 1), (1, 1, 5)])
def test_borders_do_not_go_with_rows(name, shape) -> None:
    x, ones = X.expand(shape[0], -1), ONES.expand(shape[0], -1)
    if shape == (5, 1):
        x, ones = X.unsqueeze(1), ONES.unsqueeze(1)
    if shape == (1, 1, 5):
        x, ones = X.view(shape), ONES.view(shape)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected None for .*packed tokens are"):
        CALLS[name](x, ones, cu_seqlens=torch.tensor([0, 2, 5]))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "shift_targets"])
def test_packed_tokens_need_borders(name) -> None:
    with pytest.raises(ValueError, match=r"\(B, T\).*got \(5,\); packed tokens .* cu_seqlens"):
        CALLS[name](X, ONES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fr.dpo_loss(X, torch.zeros(3), *PAIR, cu_seqlens=BORDERS), r"ref_logps: .*\(2,\)"),
        (
            lambda: fr.dpo_loss(X, torch.zeros(1, 5), *PAIR, cu_seqlens=BORDERS),
            r"ref_logps: .*\(5,\)",
        ),
        (
            lambda: fr.dpo_loss(X, X, torch.tensor([0]), torch.tensor([2]), cu_seqlens=BORDERS),
            r"yl_idxs: expected indices in \[0, 2\)",
        ),
        (
            lambda: fr.policy_loss(X, X, torch.zeros(3), ONES, cu_seqlens=BORDERS),
            r"advantages: expected shape \(5,\).*or \(B,\)",
        ),
        (
            lambda: fr.policy_loss(X, torch.zeros(2), X, ONES, cu_seqlens=BORDERS),
            r"old_logprobs: expected shape \(5,\)",
        ),
        (
            lambda: fr.value_loss(X, X, X, torch.ones(1, 5), cu_seqlens=BORDERS),
            r"mask: expected shape \(5,\)",
        ),
        (
            lambda: fr.shaped_rewards(X, X, X, ONES, kl_coef=0.1, cu_seqlens=BORDERS),
            r"scores: expected shape \(2,\)",
        ),
        (lambda: fr.gae(X, X, torch.ones(1, 5), cu_seqlens=BORDERS), r"mask: expected shape \(5,"),
    ],
)
def test_other_errors_name_their_argument(call, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


BORDERS = torch.tensor([0, 2, 5])


def test_checked_borders_are_int64_whatever_came() -> None:
    for dtype in (torch.int32, torch.int64):
        checked = checked_cu_seqlens("hidden", torch.zeros(5), BORDERS.to(dtype))
        assert checked.dtype == torch.int64 and torch.equal(checked, BORDERS)
