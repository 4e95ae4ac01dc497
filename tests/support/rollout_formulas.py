"""The oracle of rollout corrections: one token at a time, in 60 digits, from the definitions.

Nothing here comes from the library or from torch's mathematics.
"""

from collections.abc import Callable, Sequence

from mpmath import inf, mp, mpf
from torch import Tensor

mp.dps = 60

Row = list[mpf]


def tokens_of(logprobs: Tensor, rollout: Tensor, mask: Tensor) -> list[tuple[Row, Row]]:
    """The log-probs of each sequence's tokens, trainer's and engine's."""
    return [
        tuple([mpf(x) for x, m in zip(row, kept, strict=True) if m] for row in pair)
        for *pair, kept in zip(
            logprobs.double().tolist(), rollout.double().tolist(), mask.tolist(), strict=True
        )
    ]  # fmt: skip


def log_ratio(own: mpf, engine: mpf) -> mpf:
    return mpf(0) if own == engine else own - engine


def unit_log_ratios(rows: list[tuple[Row, Row]], level: str) -> list[Row]:
    """Of each sequence, one for each of its tokens."""
    found = []
    for own, engine in rows:
        x = [log_ratio(a, b) for a, b in zip(own, engine, strict=True)]
        if level != "token" and x:
            total = -inf if -inf in x else sum(x)
            x = [total / (len(x) if level == "geometric" else 1)] * len(x)
        found.append(x)
    return found


def weight(x: mpf, treatment: str, low: float | None, high: float | None) -> mpf:
    ratio = mp.exp(x)
    if treatment == "mask":
        out = (low is not None and ratio < low) or (high is not None and ratio > high)
        return mpf(0) if out else ratio
    ratio = ratio if high is None else min(ratio, mpf(high))
    return ratio if low is None else max(ratio, mpf(low))


def mean(x: Sequence[mpf]) -> mpf:
    return sum(x, mpf(0)) / max(len(x), 1)


def moments(x: list[mpf]) -> dict[str, mpf]:
    average, squares = mean(x), mean([v * v for v in x])
    return {
        "mean": average, "std": mp.sqrt(mean([(v - average) ** 2 for v in x])),
        "min": min(x, default=mpf(0)), "max": max(x, default=mpf(0)),
        "eff_sample_size": average**2 / squares if squares else mpf(0),
    }  # fmt: skip


def correction(
    logprobs: Tensor, rollout: Tensor, mask: Tensor, mode: str, low: float | None,
    high: float | None, normalize: bool,
) -> tuple[list[list[mpf]], dict[str, mpf]]:  # fmt: skip
    """Weights of the tokens of each sequence, and all metrics."""
    level, treatment = mode.split("_")
    rows = tokens_of(logprobs, rollout, mask)
    units = unit_log_ratios(rows, level)
    weights = [[weight(x, treatment, low, high) for x in row] for row in units]
    # One of each sequence that has tokens, or all tokens.
    once = [row if level == "token" else row[:1] for row in units]
    flat = [x for row in once for x in row]
    ratio, applied = [mp.exp(x) for x in flat], [weight(x, treatment, low, high) for x in flat]
    found = metrics(rows)
    for name, value in moments(ratio).items():
        if name != "eff_sample_size":
            found[f"rollout_corr/ratio_{name}"] = value
    for name, value in moments(applied).items():
        found[f"rollout_corr/rollout_is_{name}"] = value
    name = "rollout_corr/rollout_is_ratio_fraction"
    found[f"{name}_high"] = mean([mpf(high is not None and r > high) for r in ratio])
    found[f"{name}_low"] = mean([mpf(low is not None and r < low) for r in ratio])
    if normalize:
        factor = mean(applied) or mpf(1)
        weights = [[w / factor for w in row] for row in weights]
        found["rollout_corr/rollout_is_batch_norm_factor"] = factor
    return weights, found


def metrics(rows: list[tuple[Row, Row]]) -> dict[str, mpf]:
    pairs = [(a, b) for own, engine in rows for a, b in zip(own, engine, strict=True)]
    x = [log_ratio(a, b) for a, b in pairs]
    of_sequences: dict[str, Row] = {}

    def add(name: str, value: mpf) -> None:
        of_sequences.setdefault(f"rollout_corr/{name}", []).append(value)

    for own, engine in rows:
        if not own:
            continue
        log_ppl, rollout_log_ppl = -mean(own), -mean(engine)
        add("training_ppl", mp.exp(log_ppl))
        add("training_log_ppl", log_ppl)
        add("rollout_ppl", mp.exp(rollout_log_ppl))
        add("rollout_log_ppl", rollout_log_ppl)
        add("log_ppl_diff", log_ppl - rollout_log_ppl)
        add("log_ppl_abs_diff", abs(log_ppl - rollout_log_ppl))
        add("ppl_ratio", mp.exp(log_ppl - rollout_log_ppl))
        add("chi2_seq", mp.exp(2 * (sum(own) - sum(engine))) - 1)
    return {name: mean(values) for name, values in of_sequences.items()} | {
        "rollout_corr/kl": mean([-v for v in x]),
        "rollout_corr/k3_kl": mean([mp.exp(v) - 1 - v for v in x]),
        "rollout_corr/chi2_token": mean([mp.exp(2 * v) - 1 for v in x]),
        "sampling/sampling_logp_difference/mean": mean([abs(v) for v in x]),
        "sampling/sampling_logp_difference/max": max([abs(v) for v in x], default=mpf(0)),
    }


ESTIMATES: dict[str, Callable[[mpf], mpf]] = {
    "k1": lambda x: -x,
    "k2": lambda x: x * x / 2,
    "k3": lambda x: mp.exp(x) - 1 - x,
}


def rejection(
    logprobs: Tensor, rollout: Tensor, mask: Tensor, level: str, estimator: str, low: float,
    high: float,
) -> tuple[list[list[bool]], dict[str, mpf]]:  # fmt: skip
    """Which tokens of each sequence are kept, and all metrics."""
    kept, units = [], []
    for own, engine in tokens_of(logprobs, rollout, mask):
        found = [
            ESTIMATES[estimator](log_ratio(a, b)) for a, b in zip(own, engine, strict=True)
        ]  # fmt: skip
        if level == "token":
            kept.append([low <= v <= high for v in found])
            units += found
        elif level == "sequence_max":
            kept.append([max(found) <= high and low <= min(found)] * len(found) if found else [])
            units += found
        elif found:
            value = mean(found) if level == "sequence_mean" else sum(found)
            kept.append([low <= value <= high] * len(found))
            units.append(value)
        else:
            kept.append([])
    name = f"rollout_corr/rollout_rs_{level.replace('sequence', 'seq')}_{estimator}"
    flat = [mpf(not k) for row in kept for k in row]
    return kept, {
        f"{name}_mean": mean(units), f"{name}_min": min(units, default=mpf(0)),
        f"{name}_max": max(units, default=mpf(0)),
        f"{name}_fraction_high": mean([mpf(v > high) for v in units]),
        f"{name}_fraction_low": mean([mpf(v < low) for v in units]),
        f"{name}_masked_fraction": mean(flat),
        f"{name}_seq_masked_fraction": mean([mpf(not all(row)) for row in kept if row]),
    }  # fmt: skip
