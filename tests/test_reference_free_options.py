"""Further types of the losses without a reference: of cpo_loss, simpo_loss, and tpo_loss."""

import math
from decimal import Decimal
from typing import Any

import pytest
import torch
from support.preference_formulas import Expectation, decimals, ell
from torch import Tensor

from fastrlhf import cpo_loss, simpo_loss, tpo_loss

LENGTHS = torch.tensor([4, 2, 3, 5, 1, 6])
YW, YL, GOLD = torch.tensor([0, 1, 4]), torch.tensor([2, 3, 5]), torch.tensor([3, 3, 0])
FINE = [torch.float64, torch.float32]


def logps(dtype: torch.dtype) -> Tensor:
    return (-8 * torch.rand(6, dtype=torch.float64)).to(dtype).requires_grad_()


def contrast(name: str, d: Decimal, beta: Decimal, e: Decimal, gamma: Decimal) -> Decimal:
    """The loss of a margin: of TRL's CPO and TPO trainers, and of the papers they name."""
    if name == "hinge":
        return max(Decimal(0), 1 - beta * d)
    if name == "ipo":
        return (d - 1 / (2 * beta)) ** 2
    d = beta * d - (gamma if name in ("tpo-l", "simpo") else 0)
    return (1 - e) * ell(d) + e * ell(-d)


def expected(
    x: Tensor, name: str, beta: float, e: float = 0.0, gamma: float = 0.0, alpha: float = 0.0,
    learned: Tensor | None = None,
) -> Expectation:  # fmt: skip
    """Of log-probs, averaged where the type averages; minus alpha times those learned."""
    counts = decimals(LENGTHS)
    options = Decimal(beta), Decimal(e), Decimal(gamma)

    def losses_of(inputs: list[Decimal]) -> list[Decimal]:
        averaged = name in ("ipo", "simpo", "tpo-l")
        s = [v / n if averaged else v for v, n in zip(inputs, counts, strict=True)]
        losses = []
        for i, (w, l) in enumerate(zip(YW.tolist(), YL.tolist(), strict=True)):
            loss = contrast(name, s[w] - s[l], *options)
            if learned is not None:
                loss -= Decimal(alpha) * inputs[int(learned[i])]
            losses.append(loss)
        return losses

    return Expectation(losses_of, decimals(x))


def assert_right(found: tuple[Tensor, Tensor], x: Tensor, wanted: Expectation) -> None:
    losses, rewards = found
    assert losses.dtype == rewards.dtype == x.dtype and not rewards.requires_grad
    wanted.assert_losses(losses, ulps=8, floor=1.0)
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=x.dtype)
    (gradient,) = torch.autograd.grad(losses, x, upstream)
    wanted.assert_gradients(gradient, weights=upstream.tolist(), floor=1.0)


@pytest.mark.parametrize("dtype", FINE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_simpo_with_label_smoothing(smoothing: float, dtype: torch.dtype) -> None:
    x = logps(dtype)
    found = simpo_loss(x, LENGTHS, YW, YL, 2.0, 0.7, label_smoothing=smoothing)
    assert_right(found, x, expected(x, "simpo", 2.0, smoothing, 0.7))


@pytest.mark.parametrize("dtype", FINE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo"])
def test_types_of_cpo(name: str, dtype: torch.dtype) -> None:
    x = logps(dtype)
    found = cpo_loss(x, YW, YL, 0.3, alpha=0.6, loss_type=name, lengths=LENGTHS)
    assert_right(found, x, expected(x, name, 0.3, alpha=0.6, learned=YW))
    scores = x / LENGTHS if name == "ipo" else x
    torch.testing.assert_close(found[1], (0.3 * scores).detach())


@pytest.mark.parametrize("dtype", FINE, ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    ("name", "smoothing"),
    [("sigmoid", 0.0), ("sigmoid", 0.1), ("hinge", 0.0), ("ipo", 0.0), ("tpo-l", 0.1)],
)
def test_types_of_tpo(name: str, smoothing: float, dtype: torch.dtype) -> None:
    x = logps(dtype)
    found = tpo_loss(
        x, YW, YL, GOLD, 0.3, alpha=0.6, loss_type=name, lengths=LENGTHS, gamma=0.7,
        label_smoothing=smoothing,
    )  # fmt: skip
    assert_right(found, x, expected(x, name, 0.3, smoothing, 0.7, alpha=0.6, learned=GOLD))
    # Where the gold sequences are the preferred ones, it is CPO.
    if name != "tpo-l":
        options: dict[str, Any] = {"loss_type": name, "lengths": LENGTHS, "alpha": 0.6}
        options["label_smoothing"] = smoothing
        of_cpo, of_tpo = (
            cpo_loss(x, YW, YL, 0.3, **options),
            tpo_loss(x, YW, YL, YW, 0.3, **options),
        )
        assert torch.equal(of_cpo[0], of_tpo[0]) and torch.equal(of_cpo[1], of_tpo[1])


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "tpo-l"])
def test_derivatives_of_both_orders_are_right(name: str) -> None:
    nll = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def losses_of(x: Tensor, nll: Tensor) -> Tensor:
        return tpo_loss(x, YW, YL, GOLD, 0.3, nll=nll, loss_type=name, lengths=LENGTHS)[0]

    assert torch.autograd.gradcheck(losses_of, (logps(torch.float64), nll))
    assert torch.autograd.gradgradcheck(losses_of, (logps(torch.float64), nll))


def test_half_precision_and_no_pairs() -> None:
    x, none = logps(torch.bfloat16), torch.zeros(0, dtype=torch.long)
    losses, _ = tpo_loss(x, YW, YL, GOLD, loss_type="tpo-l", lengths=LENGTHS)
    wide = tpo_loss(x.float(), YW, YL, GOLD, loss_type="tpo-l", lengths=LENGTHS)[0]
    assert losses.dtype == torch.float32 and torch.equal(losses, wide)
    losses, rewards = tpo_loss(x, none, none, none)
    assert losses.shape == (0,) and rewards.shape == (6,)


def test_trls_likelihood_of_the_gold_tokens() -> None:
    x = logps(torch.float64)
    nll = -x[GOLD].sum() / LENGTHS[GOLD].sum()
    losses, _ = tpo_loss(x, YW, YL, GOLD, 0.3, nll=nll, alpha=0.5)
    without, _ = tpo_loss(x, YW, YL, GOLD, 0.3, alpha=0.0)
    torch.testing.assert_close(losses.mean(), without.mean() + 0.5 * nll)


_SIX = torch.zeros(6)
_CPO: dict[str, Any] = {"logps": _SIX, "yw_idxs": YW, "yl_idxs": YL}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"loss_type": "robust"}, ValueError, "loss_type: expected one of sigmoid, hinge, ipo"),
        ({"loss_type": "ipo"}, ValueError, "lengths: "),
        ({"lengths": torch.zeros(6) - 1}, ValueError, "lengths: "),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, ValueError, "label_smoothing: expected 0"),
        ({"label_smoothing": 0.6}, ValueError, r"label_smoothing: .*\[0, 0.5\]"),
    ],
)
def test_errors_name_the_argument(changed: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        cpo_loss(**{**_CPO, **changed})
    with pytest.raises(error, match=f"^{message}"):
        tpo_loss(**{**_CPO, "gold_idxs": GOLD, **changed})


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"gold_idxs": torch.tensor([0])}, ValueError, r"gold_idxs: expected shape \(3,\)"),
        ({"gold_idxs": torch.tensor([0, 1, 6])}, ValueError, r"gold_idxs: .*\[0, 6\).*got 6"),
        ({"gold_idxs": torch.zeros(3)}, TypeError, "gold_idxs: .*integer"),
        ({"loss_type": "tpo-l"}, ValueError, "lengths: "),
        ({"gamma": math.nan}, ValueError, "gamma: "),
        ({"alpha": math.inf}, ValueError, "alpha: "),
        ({"nll": torch.zeros(2)}, ValueError, r"nll: .*\(3,\)"),
    ],
)
def test_errors_of_tpo_name_the_argument(
    changed: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        tpo_loss(**{**_CPO, "gold_idxs": GOLD, **changed})
