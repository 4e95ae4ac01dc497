"""The options of `dpo_loss` once more, from their papers, in 150 digits and one pair at a time.

Nothing comes from the library or from torch; the losses themselves are those of
`preference_formulas`.
"""

from decimal import Decimal, localcontext
from typing import Any

from torch import Tensor

from support.preference_formulas import _CONTEXT, _OF_PAIR, Expectation, Options, Pair, decimals

ZERO, ONE = Decimal(0), Decimal(1)


def f_score(s: Decimal, name: str, alpha: Decimal) -> Decimal:
    """f'(e^s) - f'(1) of the f-DPO paper."""
    u = s.exp()
    return {
        "reverse_kl": s,
        "forward_kl": 1 - 1 / u,
        "js": (2 * u / (1 + u)).ln(),
        "alpha": (1 - (-alpha * s).exp()) / alpha,
    }[name]


class _Sequence:
    """Tokens of one sequence under policy and reference."""

    def __init__(self, policy: list[Decimal], ref: list[Decimal], ref_sum: Decimal | None) -> None:
        self.policy, self.ref, self.ref_sum = policy, ref, ref_sum

    def sums(self, public: int, options: dict[str, Any]) -> tuple[Decimal, Decimal]:
        """Of policy and reference, with tokens beyond the public length weighed."""
        ld = options.get("ld_alpha")
        weights = [
            ONE if i < public or ld is None else Decimal(ld) for i in range(len(self.policy))
        ]
        policy = sum((w * x for w, x in zip(weights, self.policy, strict=True)), ZERO)
        if options.get("reference_free"):
            ref = ZERO
        elif self.ref_sum is not None:
            ref = self.ref_sum
        else:
            ref = sum((w * x for w, x in zip(weights, self.ref, strict=True)), ZERO)
        if options.get("average"):
            n = max(len(self.policy), 1)
            return policy / n, ref / n
        return policy, ref


def expected_losses(
    pi: Tensor, ref: Tensor, mask: Tensor, yw: Tensor, yl: Tensor, beta: float,
    log_sum_sq_probs: Tensor | None = None, **options: Any,
) -> Expectation:  # fmt: skip
    """What `dpo_loss` must give. The inputs of the expectation are the tokens of the mask of the
    policy, then those of the reference, or its sums.
    """
    names = options.get("loss_type", "sigmoid")
    names = (names,) if isinstance(names, str) else names
    factors = options.get("loss_weights") or [1.0] * len(names)
    counts = [int(n) for n in mask.sum(-1)]
    of_tokens = ref.ndim == 2
    inputs = [*decimals(pi[mask]), *decimals(ref[mask] if of_tokens else ref)]
    index = list(zip(yw.tolist(), yl.tolist(), strict=True))
    o = Options(
        Decimal(beta),
        Decimal(options.get("label_smoothing", 0.0)),
        Decimal(options.get("discopop_tau", 0.05)),
    )
    with localcontext(_CONTEXT):
        weights = [ONE] * len(counts)
        if options.get("use_weighting"):
            assert log_sum_sq_probs is not None
            for i, n in enumerate(counts):
                policy, squares = (decimals(x[i][mask[i]]) for x in (pi, log_sum_sq_probs))
                weights[i] = ((sum(policy, ZERO) - sum(squares, ZERO)) / max(n, 1)).exp()

    def sequences(x: list[Decimal]) -> list[_Sequence]:
        made, start, total = [], 0, sum(counts)
        for i, n in enumerate(counts):
            ref_tokens = x[total + start : total + start + n] if of_tokens else []
            ref_sum = None if of_tokens else x[total + i]
            made.append(_Sequence(x[start : start + n], ref_tokens, ref_sum))
            start += n
        return made

    def of_pair(name: str, all_of_them: list[_Sequence], w: int, l: int) -> Decimal:
        nll = -sum(all_of_them[w].policy, ZERO)
        if name == "sft":
            tokens = sum(counts[i] for i, _ in index)
            return nll * len(index) / max(tokens, 1)
        public = min(counts[w], counts[l])
        (pw, rw), (pl, rl) = (all_of_them[i].sums(public, options) for i in (w, l))
        divergence = options.get("f_divergence", "reverse_kl")
        f_alpha = Decimal(options.get("f_alpha", 0.5))
        sw, sl = f_score(pw - rw, divergence, f_alpha), f_score(pl - rl, divergence, f_alpha)
        lengths = Decimal(counts[w]), Decimal(counts[l])
        if options.get("dpop_lambda"):
            # The penalty is taken off once scores are averaged, if they are.
            n = max(counts[w], 1) if name in ("ipo", "sigmoid_norm") else 1
            sw -= Decimal(options["dpop_lambda"]) * max(ZERO, -sw / n) * n
        if divergence != "reverse_kl" or options.get("dpop_lambda"):
            return _OF_PAIR[name](Pair(sw, sl, ZERO, ZERO, *lengths), o)
        return _OF_PAIR[name](Pair(pw, pl, rw, rl, *lengths), o)

    def losses_of(x: list[Decimal]) -> list[Decimal]:
        made = sequences(x)
        losses = []
        for w, l in index:
            loss = sum(
                (
                    Decimal(f) * of_pair(name, made, w, l)
                    for f, name in zip(factors, names, strict=True)
                ),
                ZERO,
            )
            if options.get("rpo_alpha"):
                nll = -sum(made[w].policy, ZERO) / max(counts[w], 1)
                loss += Decimal(options["rpo_alpha"]) * nll
            losses.append(loss * weights[w] * weights[l])
        return losses

    return Expectation(losses_of, inputs)
