"""pf_ppo_weights: how often policy filtration learns from each sample."""

import math
from decimal import Decimal
from typing import Any

import pytest
import torch
from support.preference_formulas import Expectation, decimals
from torch import Tensor

from fastrlhf import pf_ppo_weights, policy_loss

FINE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
METHODS = ["pow", "max_min", "max_random"]
METHOD = pytest.mark.parametrize("method", METHODS)
SCORES = torch.tensor([0.5, -2.0, 1.5, 0.0, 1.5, -0.25, 3e-3])


def shares(x: list[Decimal], method: str, power: Decimal) -> list[Decimal]:
    """What verl draws by, but for its 1e-8."""
    if method == "pow":
        return [abs(v) ** power if v else Decimal(power == 0) for v in x]
    best, worst = max(x), min(x)
    if method == "max_min":
        return [Decimal(v in (best, worst)) for v in x]
    return [Decimal("0.4") if v == best else Decimal("0.1") for v in x]


def expected(scores: Tensor, method: str, power: float) -> Expectation:
    # Ties are ties whatever the derivative's step does to them: the derivative of `pow` alone.
    def weights_of(x: list[Decimal]) -> list[Decimal]:
        of = shares(x if method == "pow" else decimals(scores), method, Decimal(power))
        return [s * len(x) / sum(of) for s in of]

    return Expectation(weights_of, decimals(scores))


@FINE
@METHOD
@pytest.mark.parametrize("power", [2.0, 1, 0.5, 0, 7.5])
def test_weights_are_the_shares_of_as_many_draws(
    power: float, method: str, dtype: torch.dtype
) -> None:
    scores = SCORES.to(dtype)
    found = pf_ppo_weights(scores, method=method, power=power)
    assert found.dtype == dtype and found.shape == (7,)
    expected(scores, method, power).assert_losses(found, ulps=8)
    assert found.double().sum().item() == pytest.approx(7, rel=4 * torch.finfo(dtype).eps)


def test_examples_by_hand() -> None:
    scores = torch.tensor([3.0, -1.0, 1.0, 3.0, 0.0])
    assert pf_ppo_weights(scores).tolist() == pytest.approx([2.25, 0.25, 0.25, 2.25, 0])
    found = pf_ppo_weights(scores, method="max_min").tolist()
    assert found == pytest.approx([5 / 3, 5 / 3, 0, 5 / 3, 0])
    found = pf_ppo_weights(scores, method="max_random").tolist()
    assert found == pytest.approx([x * 5 / 1.1 for x in (0.4, 0.1, 0.1, 0.4, 0.1)])
    for method in METHODS:
        assert pf_ppo_weights(torch.zeros(4), method=method).tolist() == [1, 1, 1, 1]
        assert pf_ppo_weights(torch.tensor([7]), method=method).tolist() == [1]
        assert pf_ppo_weights(torch.zeros(0), method=method).shape == (0,)
    assert torch.equal(pf_ppo_weights(scores), pf_ppo_weights(scores, method="pow", power=2))


@METHOD
def test_what_is_drawn_is_drawn_by_these_shares(method: str) -> None:
    scores = SCORES.repeat(3000)
    weights = pf_ppo_weights(scores, method=method)
    generator = torch.Generator().manual_seed(3)
    drawn = pf_ppo_weights(scores, method=method, generator=generator)
    assert drawn.sum() == len(scores) and torch.equal(drawn, drawn.round())
    assert (drawn[weights == 0] == 0).all()
    again = pf_ppo_weights(scores, method=method, generator=generator.manual_seed(3))
    other = pf_ppo_weights(scores, method=method, generator=generator)
    assert torch.equal(again, drawn) and not torch.equal(other, drawn)
    # Of each score 3000 samples; a sum of so many draws is within five of its deviations.
    for total, want in zip(drawn.view(-1, 7).sum(0), weights.view(-1, 7).sum(0), strict=True):
        assert abs(total - want) <= 5 * math.sqrt(want) + 1


def test_every_number_that_a_generator_can_give_finds_a_sample(monkeypatch) -> None:
    scores = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0])
    for number, found in ((0.0, 1), (0.2 - 1e-9, 1), (0.2 + 1e-9, 3), (1 - 2**-53, 3)):
        monkeypatch.setattr(
            torch, "rand", lambda n, x=number, **_: torch.full((n,), x, dtype=torch.float64)
        )
        drawn = pf_ppo_weights(scores, generator=torch.Generator())
        assert drawn.tolist() == [5.0 * (i == found) for i in range(5)]


@METHOD
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e9])
def test_what_is_not_valid_is_never_learnt_from(garbage: float, method: str) -> None:
    valid = torch.tensor([1, 0, 1, 1, 0, 1, 1])
    scores = torch.where(valid != 0, SCORES, garbage)
    found = pf_ppo_weights(scores, method=method, valid=valid)
    assert (found[valid == 0] == 0).all()
    alone = pf_ppo_weights(SCORES[valid != 0], method=method)
    torch.testing.assert_close(found[valid != 0], alone)
    draw = torch.Generator().manual_seed(1)
    drawn = pf_ppo_weights(scores, method=method, valid=valid, generator=draw)
    assert drawn.sum() == 5 and (drawn[valid == 0] == 0).all()
    nothing = torch.zeros(7)
    for generator in (None, draw):
        none = pf_ppo_weights(scores, method=method, valid=nothing, generator=generator)
        assert torch.equal(none, nothing)


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_not_valid_is_neither_the_best_nor_the_worst(sign: int) -> None:
    scores, valid = sign * torch.tensor([3.0, 1.0, 2.0, math.nan]), torch.tensor([1, 1, 1, 0])
    found = pf_ppo_weights(scores, method="max_min", valid=valid)
    assert found.tolist() == pytest.approx([1.5, 1.5, 0, 0])
    best = pf_ppo_weights(scores, method="max_random", valid=valid)
    assert best.argmax() == (0 if sign == 1 else 1)


def test_scores_of_any_size_and_dtype() -> None:
    for size in (1e-30, 1e30):
        scores = SCORES.double() * size
        torch.testing.assert_close(pf_ppo_weights(scores.float()), pf_ppo_weights(SCORES))
    half = SCORES.bfloat16()
    assert torch.equal(pf_ppo_weights(half), pf_ppo_weights(half.float()))
    assert pf_ppo_weights(torch.tensor([True, False, True])).tolist() == [1.5, 0, 1.5]
    assert not pf_ppo_weights(SCORES.clone().requires_grad_()).requires_grad
    compiled = torch.compile(pf_ppo_weights, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(SCORES), pf_ppo_weights(SCORES))


def test_a_score_that_is_none_is_not_hidden() -> None:
    scores = torch.tensor([1.0, math.nan, 2.0])
    with pytest.raises(ValueError, match=r"^scores: expected finite .*got nan; .*`valid`"):
        pf_ppo_weights(scores)
    for method in METHODS:  # where the host is not to look, as on a GPU
        found = torch.func.vmap(lambda x, m=method: pf_ppo_weights(x, method=m))(scores[None])
        assert found.isnan().all()


def test_to_weigh_an_advantage_is_to_repeat_its_sequence() -> None:
    logps, old = -torch.rand(2, 7, 3, dtype=torch.float64)
    mask, advantages = torch.ones(7, 3), torch.randn(7, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    times = pf_ppo_weights(SCORES.double(), generator=draw)
    options = {"reduction": "constant", "normalizer": 21}
    weighted, _ = policy_loss(logps, old, advantages * times, mask, **options)
    index = torch.arange(7).repeat_interleave(times.long())
    tensors = (x[index] for x in (logps, old, advantages, mask))
    torch.testing.assert_close(weighted, policy_loss(*tensors, **options)[0])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"scores": [1.0]}, TypeError, "scores: expected a tensor, got list"),
        ({"scores": SCORES.cfloat()}, TypeError, "scores: .*real.*complex"),
        ({"scores": SCORES[None]}, ValueError, r"scores: expected shape \(B,\), got \(1, 7\)"),
        ({"method": "best"}, ValueError, "method: .*pow, max_min, max_random, got 'best'"),
        ({"method": 2}, TypeError, "method: expected a string, got int"),
        ({"power": -1}, ValueError, "power: .*at least 0, got -1"),
        ({"power": "2"}, TypeError, "power: expected a number, got str"),
        ({"generator": 3}, TypeError, "generator: expected a torch.Generator or None, got int"),
        ({"valid": torch.ones(3)}, ValueError, r"valid: .*\(7,\).*got \(3,\)"),
        ({"valid": SCORES}, ValueError, "valid: expected a mask of 0 and 1, got 0.5"),
        ({"group": 1}, TypeError, "group: expected a torch.distributed"),
    ],
)
def test_errors_name_the_argument(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="^" + message):
        pf_ppo_weights(**{"scores": SCORES, **changed})
