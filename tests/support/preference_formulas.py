"""The oracle of the preference losses: the papers' formulas, one pair at a time, in 150 digits.

Nothing here is written for accuracy or speed, and nothing comes from the library or from torch:
`decimal` carries so many digits that σ(x) may be 1 / (1 + e^-x) and -ln σ(x) its logarithm.
Derivatives are central differences, exact to 20 digits.

`Expectation` compares. A loss may err as if each input had been off by a few units in the last
place: that is the error that no formula in the same precision avoids, and far less than that of the
mutants by which the tests prove the comparison.
"""

from collections.abc import Callable, Sequence
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_CONTEXT = Context(prec=150, Emax=MAX_EMAX, Emin=MIN_EMIN)
_STEP = Decimal("1e-40")

# How far gradients of each dtype may be off, relative to the sum of the sizes of what they add up.
GRADIENT_RTOL = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-8,
}


class Pair(NamedTuple):
    """Log-probs of the two sequences of a pair under policy and reference, and their tokens."""

    chosen: Decimal
    rejected: Decimal
    chosen_ref: Decimal
    rejected_ref: Decimal
    chosen_length: Decimal
    rejected_length: Decimal


class Options(NamedTuple):
    beta: Decimal
    smoothing: Decimal
    tau: Decimal


# Cached, because a derivative moves one input and leaves most pairs as they were.
@lru_cache(maxsize=4096)
def sigma(x: Decimal) -> Decimal:
    """The logistic function."""
    return 1 / (1 + (-x).exp())


@lru_cache(maxsize=4096)
def ell(x: Decimal) -> Decimal:
    """-ln σ(x)."""
    return -sigma(x).ln()


def _chosen_score(pair: Pair) -> Decimal:
    return pair.chosen - pair.chosen_ref


def _rejected_score(pair: Pair) -> Decimal:
    return pair.rejected - pair.rejected_ref


def _d(pair: Pair, o: Options) -> Decimal:
    return o.beta * ((pair.chosen - pair.rejected) - (pair.chosen_ref - pair.rejected_ref))


def _mean_difference(pair: Pair) -> Decimal:
    chosen = _chosen_score(pair) / max(pair.chosen_length, Decimal(1))
    return chosen - _rejected_score(pair) / max(pair.rejected_length, Decimal(1))


def _cdpo(d: Decimal, e: Decimal) -> Decimal:
    return (1 - e) * ell(d) + e * ell(-d)


def _sigmoid(pair: Pair, o: Options) -> Decimal:
    return _cdpo(_d(pair, o), o.smoothing)


def _robust(pair: Pair, o: Options) -> Decimal:
    d, e = _d(pair, o), o.smoothing
    return ((1 - e) * ell(d) - e * ell(-d)) / (1 - 2 * e)


def _hinge(pair: Pair, o: Options) -> Decimal:
    return max(Decimal(0), 1 - _d(pair, o))


def _ipo(pair: Pair, o: Options) -> Decimal:
    return (_mean_difference(pair) - 1 / (2 * o.beta)) ** 2


def _exo_pair(pair: Pair, o: Options) -> Decimal:
    d, e = _d(pair, o), o.smoothing
    return sigma(d) * (sigma(d).ln() - (1 - e).ln()) + sigma(-d) * (sigma(-d).ln() - e.ln())


def _nca_pair(pair: Pair, o: Options) -> Decimal:
    a, b = o.beta * _chosen_score(pair), o.beta * _rejected_score(pair)
    return ell(a) + ell(-a) / 2 + ell(-b) / 2


def _bco_pair(pair: Pair, o: Options) -> Decimal:
    return ell(o.beta * _chosen_score(pair)) + ell(-o.beta * _rejected_score(pair))


def _sppo_hard(pair: Pair, o: Options) -> Decimal:
    half = 1 / (2 * o.beta)
    return (_chosen_score(pair) - half) ** 2 + (_rejected_score(pair) + half) ** 2


def _apo_zero(pair: Pair, o: Options) -> Decimal:
    return 1 - sigma(o.beta * _chosen_score(pair)) + sigma(o.beta * _rejected_score(pair))


def _apo_down(pair: Pair, o: Options) -> Decimal:
    return sigma(o.beta * _chosen_score(pair)) + 1 - sigma(_d(pair, o))


def _discopop(pair: Pair, o: Options) -> Decimal:
    d = _d(pair, o)
    m = sigma(d / o.tau)
    return ell(d) * (1 - m) + (-d).exp() * m


def _sigmoid_norm(pair: Pair, o: Options) -> Decimal:
    return ell(o.beta * _mean_difference(pair))


_OF_PAIR: dict[str, Callable[[Pair, Options], Decimal]] = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
}
LOSS_TYPES = [*_OF_PAIR, "aot", "aot_unpaired"]


def _aot(pairs: list[Pair], o: Options) -> list[Decimal]:
    policy = sorted(pair.chosen - pair.rejected for pair in pairs)
    ref = sorted(pair.chosen_ref - pair.rejected_ref for pair in pairs)
    return [_cdpo(o.beta * (p - r), o.smoothing) for p, r in zip(policy, ref, strict=True)]


def _aot_unpaired(pairs: list[Pair], o: Options) -> list[Decimal]:
    chosen, rejected = sorted(map(_chosen_score, pairs)), sorted(map(_rejected_score, pairs))
    return [_cdpo(o.beta * (w - l), o.smoothing) for w, l in zip(chosen, rejected, strict=True)]


def _simpo(w: Decimal, l: Decimal, beta: Decimal, gamma: Decimal) -> Decimal:
    return ell(beta * (w - l) - gamma)


def _orpo_ratio(w: Decimal, l: Decimal) -> Decimal:
    def log_odds(mean: Decimal) -> Decimal:
        return (mean.exp() / (1 - mean.exp())).ln()

    return ell(log_odds(w) - log_odds(l))


class Expectation:
    """What a loss must be, given as a function of Decimals, and its derivatives.

    `magnitudes` bounds the size of what each input is the sum of (its own size by default).
    """

    def __init__(
        self,
        losses_of: Callable[[list[Decimal]], list[Decimal]],
        inputs: Sequence[Decimal],
        magnitudes: Sequence[Decimal] | None = None,
    ) -> None:
        with localcontext(_CONTEXT):
            self.losses = losses_of(list(inputs))
            self.magnitudes = [abs(x) for x in (inputs if magnitudes is None else magnitudes)]
            self.jacobian = []  # one row for each input
            for i, x in enumerate(inputs):
                above, below = (
                    losses_of([*inputs[:i], x + step, *inputs[i + 1 :]]) for step in (_STEP, -_STEP)
                )
                self.jacobian.append(
                    [(u - v) / (2 * _STEP) for u, v in zip(above, below, strict=True)]
                )

    def assert_losses(self, actual: Tensor, ulps: float = 4, *, floor: float = 0.0) -> None:
        """Accept only values that rounding of the inputs by `ulps` units explains, and of terms of
        size `floor` that cancel.
        """
        assert actual.shape == (len(self.losses),)
        info = torch.finfo(actual.dtype)
        for j, (value, expected) in enumerate(zip(actual.tolist(), self.losses, strict=True)):
            conditioning = sum(
                float(size * abs(row[j]))
                for size, row in zip(self.magnitudes, self.jacobian, strict=True)
            )
            bound = ulps * info.eps * (abs(float(expected)) + conditioning + floor) + info.tiny
            error = abs(value - float(expected))
            assert error <= bound, (
                f"loss {j}: {value!r}, expected {float(expected)!r}, {error / bound:.3g} x bound"
            )

    def assert_gradients(
        self,
        *actual: Tensor,
        weights: Sequence[float] | None = None,
        rtol: float | None = None,
        floor: float = 0.0,
    ) -> None:
        """Compare the gradients of Σ weights·losses, one tensor after the other, with those of the
        inputs in their order; terms of size `floor` may cancel inside each loss.
        """
        assert sum(len(g) for g in actual) == len(self.jacobian)
        weights = [1.0] * len(self.losses) if weights is None else weights
        entries = [(x, g.dtype) for g in actual for x in g.tolist()]
        for i, ((value, dtype), row) in enumerate(zip(entries, self.jacobian, strict=True)):
            terms = [Decimal(w) * slope for w, slope in zip(weights, row, strict=True)]
            expected, size = float(sum(terms)), float(sum(map(abs, terms)))
            cancelled = 4 * torch.finfo(dtype).eps * floor * sum(map(abs, weights))
            bound = (GRADIENT_RTOL[dtype] if rtol is None else rtol) * size + cancelled
            error = abs(value - expected)
            assert error <= bound + torch.finfo(dtype).tiny, (
                f"gradient {i}: {value!r}, expected {expected!r}, error {error:.3g} > {bound:.3g}"
            )


def decimals(values: Tensor) -> list[Decimal]:
    """The exact values of a 1-d tensor."""
    return [Decimal(x) for x in values.detach().double().tolist()]


def sums(values: Tensor, mask: Tensor | None) -> tuple[list[Decimal], list[Decimal]]:
    """The exact sums over the mask, and the sums of absolute values; without a mask, values are
    sums.
    """
    if mask is None:
        return decimals(values), decimals(values)
    kept = [
        [Decimal(x) for x, keep in zip(*rows, strict=True) if keep]
        for rows in zip(values.detach().double().tolist(), mask.tolist(), strict=True)
    ]
    with localcontext(_CONTEXT):
        return [sum(r, Decimal(0)) for r in kept], [sum(map(abs, r), Decimal(0)) for r in kept]


def expected_dpo(
    pi_logps: Tensor,
    ref_logps: Tensor,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float = 0.1,
    *,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    discopop_tau: float = 0.05,
) -> Expectation:
    """What `dpo_loss` must give; the inputs of the expectation are the sums of the policy, then
    those of the reference.
    """
    pi, pi_size = sums(pi_logps, mask)
    ref, ref_size = sums(ref_logps, mask if ref_logps.ndim == 2 else None)
    if mask is not None:
        counts = [Decimal(sum(bool(x) for x in row)) for row in mask.tolist()]
    else:
        counts = [Decimal(1)] * len(pi) if lengths is None else decimals(lengths)
    index = list(zip(yw_idxs.tolist(), yl_idxs.tolist(), strict=True))
    options = Options(Decimal(beta), Decimal(label_smoothing), Decimal(discopop_tau))

    def losses_of(inputs: list[Decimal]) -> list[Decimal]:
        policy, reference = inputs[: len(pi)], inputs[len(pi) :]
        pairs = [
            Pair(policy[w], policy[l], reference[w], reference[l], counts[w], counts[l])
            for w, l in index
        ]
        if loss_type == "aot":
            return _aot(pairs, options)
        if loss_type == "aot_unpaired":
            return _aot_unpaired(pairs, options)
        return [_OF_PAIR[loss_type](pair, options) for pair in pairs]

    return Expectation(losses_of, [*pi, *ref], [*pi_size, *ref_size])


def expected_rewards(
    pi_logps: Tensor, ref_logps: Tensor, beta: float, mask: Tensor | None = None
) -> Expectation:
    """What the rewards β(ln π - ln π_ref) of `dpo_loss` and `kto_loss` must be."""
    pi, pi_size = sums(pi_logps, mask)
    ref, ref_size = sums(ref_logps, mask if ref_logps.ndim == 2 else None)

    def rewards_of(inputs: list[Decimal]) -> list[Decimal]:
        return [
            Decimal(beta) * (p - r)
            for p, r in zip(inputs[: len(pi)], inputs[len(pi) :], strict=True)
        ]

    return Expectation(rewards_of, [*pi, *ref], [*pi_size, *ref_size])


def expected_simpo(
    logps: Tensor, lengths: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, beta: float, gamma: float
) -> Expectation:
    """What `simpo_loss` must give."""
    counts, index = decimals(lengths), list(zip(yw_idxs.tolist(), yl_idxs.tolist(), strict=True))

    def losses_of(x: list[Decimal]) -> list[Decimal]:
        return [
            _simpo(x[w] / counts[w], x[l] / counts[l], Decimal(beta), Decimal(gamma))
            for w, l in index
        ]

    return Expectation(losses_of, decimals(logps))


def expected_cpo(
    logps: Tensor,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float,
    *,
    nll: Tensor | None = None,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
) -> Expectation:
    """What `cpo_loss` must give; nll, if there is one for each pair, follows logps in the
    inputs.
    """
    x, index = decimals(logps), list(zip(yw_idxs.tolist(), yl_idxs.tolist(), strict=True))

    def losses_of(inputs: list[Decimal]) -> list[Decimal]:
        nlls = inputs[len(x) :] or [-inputs[w] for w, _ in index]
        return [
            _cdpo(Decimal(beta) * (inputs[w] - inputs[l]), Decimal(label_smoothing))
            + Decimal(alpha) * n
            for (w, l), n in zip(index, nlls, strict=True)
        ]

    return Expectation(losses_of, [*x, *([] if nll is None else decimals(nll))])


def expected_orpo(
    logps: Tensor,
    lengths: Tensor,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float,
    *,
    nll: Tensor | None = None,
) -> Expectation:
    """What `orpo_loss` must give; nll, if there is one for each pair, follows logps in the
    inputs.
    """
    x, counts = decimals(logps), decimals(lengths)
    index = list(zip(yw_idxs.tolist(), yl_idxs.tolist(), strict=True))

    def losses_of(inputs: list[Decimal]) -> list[Decimal]:
        means = [s / n for s, n in zip(inputs[: len(x)], counts, strict=True)]
        nlls = inputs[len(x) :] or [-means[w] for w, _ in index]
        return [
            n + Decimal(beta) * _orpo_ratio(means[w], means[l])
            for (w, l), n in zip(index, nlls, strict=True)
        ]

    return Expectation(losses_of, [*x, *([] if nll is None else decimals(nll))])


def expected_kto(
    pi_logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Sequence[float],
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Expectation:
    """What `kto_loss` must give, `kl` one number for each sequence."""
    pi, ref = decimals(pi_logps), decimals(ref_logps)

    def losses_of(inputs: list[Decimal]) -> list[Decimal]:
        losses = []
        for i, good in enumerate(desirable.tolist()):
            score = inputs[i] - inputs[len(pi) + i]
            baseline = max(Decimal(0), Decimal(kl[i]))
            if good:
                value = 1 - sigma(Decimal(beta) * (score - baseline))
                losses.append(Decimal(desirable_weight) * value)
            else:
                value = 1 - sigma(Decimal(beta) * (baseline - score))
                losses.append(Decimal(undesirable_weight) * value)
        return losses

    return Expectation(losses_of, [*pi, *ref])
