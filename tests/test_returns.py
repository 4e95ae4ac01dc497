"""gae with numbers of each sequence, on every backend, against the recurrence in 60 digits; and
what is made of rewards without a value model.
"""

import math
from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrlhf import (
    gae,
    group_advantages,
    length_adaptive_lambda,
    monte_carlo_returns,
    outcome_rewards,
    shaped_rewards,
)

BACKENDS = pytest.mark.parametrize("impl", ["eager", "compiled", "triton"])
FINE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])

# All tokens of the first row count, none of the second, some of the others, not the last ones.
ROWS, TOKENS = 4, 70


class Problem:
    """Rewards, values and a mask, with λ and a last value of each sequence; garbage outside."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        garbage: float = math.nan,
        tokens: int = TOKENS,
    ) -> None:
        self.mask = torch.rand(ROWS, tokens, device=device) < 0.6
        self.mask[0], self.mask[1], self.mask[2, -1] = True, False, False
        self.rewards, self.values = (
            torch.where(self.mask, torch.randn(ROWS, tokens, device=device), garbage).to(dtype)
            for _ in range(2)
        )
        self.lam = torch.tensor([0.9, 0.3, 1.0, 0.0], dtype=dtype, device=device)
        self.last = torch.tensor([1.5, -2.0, 0.0, 3.0], dtype=dtype, device=device)

    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rewards, self.values, self.mask

    def expected(
        self, gamma: float, lam: Tensor | None = None, last: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Advantages, returns, and the size of what an estimate adds up."""
        lam = self.lam if lam is None else lam
        last = self.last if last is None else last
        found = torch.zeros(3, *self.mask.shape, dtype=torch.float64)
        rows = zip(*(x.double().tolist() for x in (*self.tokens(), lam, last)), strict=True)
        with localcontext(Context(prec=60)):
            g = Decimal(gamma)
            for i, (rewards, values, mask, of_row, value) in enumerate(rows):
                decay, next_value = g * Decimal(of_row), Decimal(value)
                advantage = size = Decimal(0)
                for t in reversed([t for t, keep in enumerate(mask) if keep]):
                    r, v = Decimal(rewards[t]), Decimal(values[t])
                    advantage = r + g * next_value - v + decay * advantage
                    size = abs(r) + abs(g * next_value) + abs(v) + decay * size
                    next_value = v
                    estimates = advantage, advantage + v, size
                    found[:, i, t] = found.new_tensor([*map(float, estimates)])
        return found[0], found[1], found[2]


def assert_right(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor]) -> None:
    """Accept an error of three roundings of what an estimate adds up."""
    for actual, want in zip(found, expected[:2], strict=True):
        error = (actual.cpu().double() - want).abs()
        bound = 3 * torch.finfo(actual.dtype).eps * expected[2]
        assert (error <= bound).all(), f"{(error / bound).nan_to_num().max():.3g} x bound"


def packed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows one after the other, and their borders."""
    return x.reshape(-1), torch.arange(0, x.numel() + 1, x.shape[1], device=x.device)


@BACKENDS
@FINE
@pytest.mark.parametrize("gamma", [0, 0.97])
def test_each_sequence_can_have_its_lambda_and_its_last_value(
    gamma: float, dtype: torch.dtype, impl: str, device: torch.device
) -> None:
    p = Problem(dtype, device)
    both = gae(*p.tokens(), gamma=gamma, lam=p.lam, last_values=p.last, impl=impl)
    assert both[0].dtype == both[1].dtype == dtype
    assert_right(both, p.expected(gamma))
    nothing, same = torch.zeros(ROWS), torch.full((ROWS,), 0.75)
    lam_alone = gae(*p.tokens(), gamma=gamma, lam=p.lam, impl=impl)
    assert_right(lam_alone, p.expected(gamma, last=nothing))
    last_alone = gae(*p.tokens(), gamma=gamma, lam=0.75, last_values=p.last, impl=impl)
    assert_right(last_alone, p.expected(gamma, lam=same))


@BACKENDS
@FINE
def test_packed_sequences_have_theirs(dtype: torch.dtype, impl: str, device: torch.device) -> None:
    p = Problem(dtype, device)
    *tokens, borders = *(packed(x)[0] for x in p.tokens()), packed(p.mask)[1]
    found = gae(*tokens, gamma=0.97, lam=p.lam, last_values=p.last, cu_seqlens=borders, impl=impl)
    rows = tuple(x.view(ROWS, TOKENS) for x in found)
    assert_right(rows, p.expected(0.97))
    # A sequence of no tokens has numbers too, which reach no other.
    twice = torch.cat((borders[:2], borders[1:]))
    lam, last = (torch.cat((x[:1], x.new_ones(1), x[1:])) for x in (p.lam, p.last))
    again = gae(*tokens, gamma=0.97, lam=lam, last_values=last, cu_seqlens=twice, impl=impl)
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one, other)


@BACKENDS
def test_equal_numbers_of_each_sequence_are_one_number(impl: str, device: torch.device) -> None:
    p = Problem(torch.float32, device)
    # Halves and quarters, so that γλ is exact in any order.
    expected = gae(*p.tokens(), gamma=0.5, lam=0.25, impl=impl)
    lam = torch.full((ROWS,), 0.25, device=device)
    for numbers in ({"lam": lam}, {"lam": 0.25, "last_values": 0 * lam}):
        found = gae(*p.tokens(), gamma=0.5, **numbers, impl=impl)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@BACKENDS
def test_the_last_value_is_that_of_a_token_after_the_end(impl: str, device: torch.device) -> None:
    p = Problem(torch.float64, device)
    found = gae(*p.tokens(), gamma=0.9, lam=0.8, last_values=p.last, impl=impl)
    # Of one more token, whose reward is its value, so that it has no advantage.
    longer = [torch.cat((x, p.last[:, None]), 1) for x in (p.rewards, p.values)]
    mask = torch.cat((p.mask, torch.ones(ROWS, 1, dtype=torch.bool, device=device)), 1)
    expected = gae(*longer, mask, gamma=0.9, lam=0.8, impl=impl)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other[:, :-1], rtol=1e-12, atol=1e-14)


@BACKENDS
@pytest.mark.parametrize("returns_lam", [1.0, 0.5, "of each"])
def test_returns_can_have_a_lambda_of_their_own(
    returns_lam: float | str, impl: str, device: torch.device
) -> None:
    p = Problem(torch.float32, device)
    own = p.lam.flip(0) if returns_lam == "of each" else returns_lam
    options = {"gamma": 0.97, "last_values": p.last, "impl": impl}
    advantages, returns = gae(*p.tokens(), lam=p.lam, returns_lam=own, **options)
    assert torch.equal(advantages, gae(*p.tokens(), lam=p.lam, **options)[0])
    assert torch.equal(returns, gae(*p.tokens(), lam=own, **options)[1])


@BACKENDS
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_garbage_outside_of_the_mask_changes_no_bit(
    garbage: float, impl: str, device: torch.device
) -> None:
    p = Problem(torch.float32, device, garbage)
    last = torch.where(p.mask.any(1), p.last, garbage)  # of a sequence without tokens
    clean = (torch.where(p.mask, x, 0.0) for x in (p.rewards, p.values))
    expected = gae(*clean, p.mask, lam=p.lam, last_values=p.last, impl=impl)
    found = gae(*p.tokens(), lam=p.lam, last_values=last, impl=impl)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) and (one[~p.mask] == 0).all()


@BACKENDS
def test_dtypes_and_strides_of_the_numbers_do_not_matter(impl: str, device: torch.device) -> None:
    p = Problem(torch.float32, device)
    expected = gae(*p.tokens(), lam=p.lam, last_values=p.last, impl=impl)
    wide = torch.stack((p.lam, p.last), 1)
    for both in (wide, wide.double()):
        strided = gae(*p.tokens(), lam=both[:, 0], last_values=both[:, 1], impl=impl)
        for one, other in zip(strided, expected, strict=True):
            assert one.dtype == torch.float32 and torch.equal(one, other)
    for row in range(ROWS):
        alone = (x[row : row + 1] for x in p.tokens())
        numbers = {"lam": p.lam[row : row + 1], "last_values": p.last[row : row + 1]}
        for one, other in zip(gae(*alone, **numbers, impl=impl), expected, strict=True):
            assert torch.equal(one, other[row : row + 1])
    lam, last = (x.clone().requires_grad_() for x in (p.lam, p.last))
    found = gae(*p.tokens(), lam=lam, last_values=last, impl=impl)
    assert not any(x.requires_grad for x in found)


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_an_empty_batch_gives_empty_results(
    shape: tuple[int, int], impl: str, device: torch.device
) -> None:
    empty, numbers = torch.zeros(shape, device=device), torch.zeros(shape[0], device=device)
    found = gae(empty, empty, empty, lam=numbers, last_values=numbers, impl=impl)
    assert all(x.shape == shape for x in found)


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_compiled_and_what_is_batched_is_the_same(packing: bool) -> None:
    p = Problem(torch.float64, torch.device("cpu"), garbage=0.0)
    tokens, borders = list(p.tokens()), None
    if packing:
        tokens, borders = [packed(x)[0] for x in tokens], packed(p.mask)[1]

    def call(rewards: Tensor, lam: Tensor, last: Tensor) -> Tensor:
        options = {"lam": lam, "last_values": last, "cu_seqlens": borders, "impl": "eager"}
        return torch.stack(gae(rewards, *tokens[1:], gamma=0.97, returns_lam=1.0, **options))

    want = call(tokens[0], p.lam, p.last)
    batched = torch.func.vmap(call)(tokens[0][None], p.lam[None], p.last[None])[0]
    torch.testing.assert_close(batched, want)
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens[0], p.lam, p.last), want)


def test_the_operators_pass_opcheck(device: torch.device) -> None:
    p = Problem(torch.float32, device, tokens=5)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    numbers = 0.97, 0.0, p.lam, p.last
    scan, eager_scan = torch.ops.fastrlhf.gae.default, torch.ops.fastrlhf.packed_gae.default
    torch.library.opcheck(scan, (*p.tokens(), *numbers), test_utils=checks)
    ids = torch.arange(ROWS, device=device).repeat_interleave(5)
    flat = (x.reshape(-1) for x in p.tokens())
    torch.library.opcheck(eager_scan, (*flat, ids, *numbers), test_utils=checks)


# monte_carlo_returns


@BACKENDS
@FINE
@pytest.mark.parametrize("gamma", [0.9, 1])
def test_returns_are_discounted_sums_of_what_follows(
    gamma: float, dtype: torch.dtype, impl: str, device: torch.device
) -> None:
    p = Problem(dtype, device)
    p.values = torch.zeros_like(p.values)
    ones = torch.ones(ROWS)
    found = monte_carlo_returns(p.rewards, p.mask, gamma=gamma, last_values=p.last, impl=impl)
    assert found.dtype == dtype
    _, returns, sizes = p.expected(gamma, lam=ones)
    # What follows a token, discounted, and the last value as many times as tokens are left.
    sums = torch.zeros(ROWS, TOKENS, dtype=torch.float64)
    for i in range(ROWS):
        total = float(p.last[i])
        for t in reversed(p.mask[i].nonzero()[:, 0].tolist()):
            total = float(p.rewards[i, t]) + gamma * total
            sums[i, t] = total
    torch.testing.assert_close(sums, returns, rtol=1e-12, atol=1e-12)
    assert_right((found, found), (returns, returns, sizes))
    flat, borders = packed(p.rewards)
    of_packed = monte_carlo_returns(
        flat, p.mask.reshape(-1), gamma=gamma, last_values=p.last, cu_seqlens=borders, impl=impl
    )
    assert_right((of_packed.view(ROWS, TOKENS),) * 2, (returns, returns, sizes))


def test_returns_by_hand() -> None:
    rewards = torch.tensor([[1, 50, 2, 4], [0, 1, 0, 1]])
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]])
    found = monte_carlo_returns(rewards, mask, gamma=0.5, last_values=torch.tensor([0.0, 8.0]))
    assert found.tolist() == [[3, 0, 4, 4], [1.5, 3, 4, 0]]
    assert found.dtype == torch.float32
    half = monte_carlo_returns(rewards.bfloat16(), mask, gamma=0.5)
    assert half.dtype == torch.float32 and half.tolist() == [[3, 0, 4, 4], [0.5, 1, 0, 0]]
    by_default = monte_carlo_returns(rewards, mask)
    assert by_default.tolist() == [[7, 0, 6, 4], [1, 1, 0, 0]]
    assert not monte_carlo_returns(rewards.float().requires_grad_(), mask).requires_grad


def test_rewards_of_steps_become_grpos_advantages_of_tokens() -> None:
    # Process supervision of 2402.03300: steps are standardised over the group, and a token has the
    # sum of those that end at it or later.
    steps = torch.tensor([0.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    ends = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 1]], dtype=torch.bool)
    standardised = group_advantages(steps, torch.zeros(4).long())
    rewards = torch.zeros(2, 4, dtype=torch.float64).masked_scatter(ends, standardised)
    found = monte_carlo_returns(rewards, torch.ones(2, 4))
    a, b, c, d = standardised.tolist()
    assert found.tolist() == [
        pytest.approx(x) for x in ([a + b, a + b, b, b], [c + d, c + d, d, d])
    ]


# outcome_rewards

MASK = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_the_score_is_that_of_the_last_token_or_of_every_one(
    mask_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    scores = torch.tensor([3, -2, 7]).to(dtype)
    found = outcome_rewards(scores, MASK.to(mask_dtype))
    assert found.tolist() == [[0, 0, 3, 0], [0, 0, 0, -2], [0, 0, 0, 0]]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    every = outcome_rewards(scores, MASK.to(mask_dtype), every_token=True)
    assert every.tolist() == [[3, 0, 3, 0], [0, -2, -2, -2], [0, 0, 0, 0]]
    flat, borders = packed(MASK.to(mask_dtype))
    for all_of_them, rows in ((False, found), (True, every)):
        for shape in ((12,), (1, 12)):
            got = outcome_rewards(
                scores, flat.view(shape), every_token=all_of_them, cu_seqlens=borders
            )
            assert torch.equal(got, rows.view(shape))


def test_outcome_rewards_are_shaped_ones_without_a_penalty() -> None:
    scores, logps = torch.randn(3), torch.randn(3, 4)
    found = outcome_rewards(scores, MASK)
    assert torch.equal(found, shaped_rewards(scores, logps, logps, MASK, kl_coef=0.0))
    scores[2] = math.nan  # which has no token to go to
    assert torch.equal(outcome_rewards(scores.requires_grad_(), MASK), found)
    assert not outcome_rewards(scores, MASK).requires_grad
    assert outcome_rewards(torch.zeros(0), torch.zeros(0, 4)).shape == (0, 4)


# length_adaptive_lambda


@FINE
def test_lambda_grows_with_the_length(dtype: torch.dtype) -> None:
    lengths = torch.tensor([0, 1, 20, 21, 100, 1000, 32000])
    given = lengths if dtype == torch.float32 else lengths.to(dtype)
    found = length_adaptive_lambda(given)
    assert found.dtype == dtype
    want = [max(0.0, 1 - 1 / (0.05 * n)) if n else 0.0 for n in lengths.tolist()]
    eps = torch.finfo(dtype).eps
    assert found.tolist() == pytest.approx(want, rel=0, abs=2 * eps)
    # The weights of the temporal differences add up to α times the length.
    assert (1 / (1 - found[4:].double())).tolist() == pytest.approx([5, 50, 1600], rel=4000 * eps)
    other = length_adaptive_lambda(given, alpha=0.5)
    assert other[3].item() == pytest.approx(1 - 1 / 10.5, rel=2 * eps)
    adapted = length_adaptive_lambda(torch.tensor([30, 0, 25, 70]))
    p = Problem(torch.float32, torch.device("cpu"))
    gae(*p.tokens(), lam=adapted, returns_lam=1.0)  # goes together


# Errors

_ZEROS, _MASK, _TWO = torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2)
_ARGUMENTS: dict[Callable[..., Any], dict[str, Any]] = {
    gae: {"rewards": _ZEROS, "values": _ZEROS, "mask": _MASK},
    monte_carlo_returns: {"rewards": _ZEROS, "mask": _MASK},
    outcome_rewards: {"scores": _TWO, "mask": _MASK},
    length_adaptive_lambda: {"lengths": _TWO},
}


@pytest.mark.parametrize(
    ("function", "changed", "error", "message"),
    [
        (gae, {"lam": _TWO + 1.5}, ValueError, r"lam: expected numbers in \[0, 1\], got 1.5"),
        (gae, {"lam": _TWO - 1}, ValueError, r"lam: .*\[0, 1\], got -1"),
        (gae, {"lam": _TWO * math.nan}, ValueError, r"lam: .*\[0, 1\], got nan"),
        (gae, {"lam": _TWO[:1]}, ValueError, r"lam: .*\(2,\).*got \(1,\)"),
        (gae, {"lam": _ZEROS}, ValueError, r"lam: .*\(2,\).*got \(2, 3\)"),
        (gae, {"lam": torch.tensor(1.0)}, TypeError, r"lam: .*number.*got one of shape \(\)"),
        (gae, {"lam": _TWO.long()}, TypeError, "lam: .*floating.*int64"),
        (gae, {"lam": _TWO.to("meta")}, ValueError, "lam: expected on cpu"),
        (gae, {"returns_lam": 1.5}, ValueError, r"returns_lam: .*\[0, 1\], got 1.5"),
        (gae, {"returns_lam": _TWO + 2}, ValueError, r"returns_lam: .*\[0, 1\], got 2"),
        (gae, {"returns_lam": "1"}, TypeError, "returns_lam: expected a number, got str"),
        (gae, {"last_values": 0.0}, TypeError, "last_values: expected a tensor, got float"),
        (gae, {"last_values": _TWO.long()}, TypeError, "last_values: .*floating.*int64"),
        (gae, {"last_values": _ZEROS}, ValueError, r"last_values: .*\(2,\).*got \(2, 3\)"),
        (gae, {"last_values": _TWO.to("meta")}, ValueError, "last_values: expected on cpu"),
        (monte_carlo_returns, {"rewards": None}, TypeError, "rewards: .*tensor, got NoneType"),
        (monte_carlo_returns, {"rewards": _TWO}, ValueError, r"rewards: .*\(B, T\), got \(2,\)"),
        (monte_carlo_returns, {"mask": _TWO}, ValueError, r"mask: .*\(2, 3\).*got \(2,\)"),
        (monte_carlo_returns, {"gamma": 2}, ValueError, r"gamma: .*\[0, 1\], got 2"),
        (monte_carlo_returns, {"last_values": _ZEROS}, ValueError, r"last_values: .*\(2,\)"),
        (outcome_rewards, {"scores": _ZEROS}, ValueError, r"scores: .*\(2,\).*got \(2, 3\)"),
        (outcome_rewards, {"scores": _TWO.cfloat()}, TypeError, "scores: .*real.*complex"),
        (outcome_rewards, {"scores": _TWO.to("meta")}, ValueError, "scores: expected on cpu"),
        (outcome_rewards, {"mask": _TWO}, ValueError, r"mask: .*\(B, T\), got \(2,\)"),
        (outcome_rewards, {"mask": _MASK * 0.5}, ValueError, "mask: .*0 and 1, got 0.5"),
        (outcome_rewards, {"every_token": 1}, TypeError, "every_token: expected a bool, got int"),
        (length_adaptive_lambda, {"lengths": 3}, TypeError, "lengths: expected a tensor, got int"),
        (length_adaptive_lambda, {"lengths": _TWO - 1}, ValueError, "lengths: .*at least 0"),
        (length_adaptive_lambda, {"alpha": 0}, ValueError, "alpha: .*positive.*got 0"),
    ],
)
def test_errors_name_the_argument(
    function: Callable[..., Any], changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="^" + message):
        function(**{**_ARGUMENTS[function], **changed})
