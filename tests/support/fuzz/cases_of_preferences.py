"""Cases of losses of pairs, and of sequences that are good or bad."""

from typing import Any

import torch
from torch import Tensor

import fastrlhf

from . import formulas as f
from .draw import DTYPES, Draw
from .judge import Case
from .shared import head, head_reach, head_terms, largest, subset, targets_of, vocabulary


def pairs_of(d: Draw, sequences: int) -> tuple[Tensor, Tensor]:
    count = d.size(4) if sequences else 0
    return d.integers(sequences, (count,)), d.integers(sequences, (count,))


PAIR_LOSSES = (
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "aot", "aot_unpaired",
)  # fmt: skip


def aot(kind: str, policy: Tensor, ref: Tensor, w: Tensor, l: Tensor, o: dict[str, Any]) -> Tensor:
    if kind == "aot":
        margin = (policy[w] - policy[l]).sort().values - (ref[w] - ref[l]).sort().values
    else:
        s = policy - ref
        margin = s[w].sort().values - s[l].sort().values
    return f.pair_losses("sigmoid", margin, torch.zeros_like(margin), o)


def check_ties(kind: str, policy: Tensor, ref: Tensor, w: Tensor, l: Tensor) -> None:
    """Equal numbers that are sorted have a gradient that depends on the sort."""
    sorted_ones = (
        [policy[w] - policy[l]] if kind == "aot" else [(policy - ref)[w], (policy - ref)[l]]
    )
    for x in sorted_ones:
        f.keep_off(x.sort().values.diff(), 0.0)


def dpo_loss(d: Draw) -> Case:
    sequences, length, kind = d.size(4), d.size(5, 1), d.of(*PAIR_LOSSES)
    masked, dtype = d.chance(0.6), d.of(*DTYPES)
    mask = d.bits(sequences, length) if masked else None
    shape = (sequences, length) if masked else (sequences,)
    policy = d.logprobs(*shape, dtype=dtype)
    summed = not masked or d.chance(0.4)
    ref = d.logprobs(*((sequences,) if summed else shape), dtype=d.of(dtype, *DTYPES))
    if mask is not None:
        policy = d.hidden(policy, mask)
        ref = ref if summed else d.hidden(ref, mask)
    pairs = pairs_of(d, sequences)
    o = {"label_smoothing": d.of(0.1, 0.25, 0.4) if kind == "exo_pair" else d.of(0.0, 0.1, 0.4),
         "discopop_tau": d.of(0.05, 0.5, 1.0)}  # fmt: skip
    beta, impl = d.of(0.1, 0.5, 2), d.of("eager", "triton", "auto")
    lengths = None if masked else d.integers(9, (sequences,))
    x = {"pi_logps": policy, "ref_logps": ref}

    def call(x: dict[str, Tensor]) -> tuple:
        return fastrlhf.dpo_loss(
            *x.values(), *pairs, beta, loss_type=kind, lengths=lengths, mask=mask, impl=impl, **o
        )

    def formula(x: dict[str, Tensor]) -> tuple:
        pi, ref = (y if y.ndim == 1 else f.where_kept(y, mask).sum(-1) for y in x.values())
        w, l = (i.long() for i in pairs)
        count = (lengths if mask is None else (mask != 0).sum(-1)).clamp(min=1).to(pi.dtype)
        settings = {**o, "beta": beta, "lengths_w": count[w], "lengths_l": count[l]}
        if kind.startswith("aot"):
            check_ties(kind, pi, ref, w, l)
            losses = aot(kind, pi, ref, w, l, settings)
        else:
            s = pi - ref
            losses = f.pair_losses(kind, s[w], s[l], settings)
        return losses, beta * (pi - ref).detach()

    size = largest(policy, mask) + largest(ref, None if summed else mask)
    return Case("dpo_loss", x, call, formula, subset(d, *x), squared(kind, size * beta + 1),
                grad_size=4.0 * (1 + 2 * beta) / o["discopop_tau"],
        terms=beta,)  # fmt: skip


def squared(kind: str, size: float) -> float:
    return size * size * 100 if kind in ("ipo", "sppo_hard") else size


def reference_free(d: Draw) -> Case:
    sequences, kind, dtype = d.size(4), d.of("simpo", "cpo", "orpo"), d.of(*DTYPES)
    logps = d.logprobs(sequences, dtype=dtype) - 1e-2
    lengths, pairs = d.integers(9, (sequences,)), pairs_of(d, sequences)
    beta, gamma, alpha = d.of(0.1, 0.5, 2), d.of(0.0, 0.5), d.of(0.0, 1.0)
    eps = d.of(0.0, 0.1)

    def call(x: dict[str, Tensor]) -> tuple:
        if kind == "simpo":
            return fastrlhf.simpo_loss(x["logps"], lengths, *pairs, beta, gamma)
        if kind == "cpo":
            return fastrlhf.cpo_loss(x["logps"], *pairs, beta, alpha=alpha, label_smoothing=eps)
        return fastrlhf.orpo_loss(x["logps"], lengths, *pairs, beta)

    def formula(x: dict[str, Tensor]) -> tuple:
        w, l = (i.long() for i in pairs)
        sums = x["logps"]
        mean = sums / lengths.clamp(min=1).to(sums.dtype)
        if kind == "simpo":
            return f.ell(beta * (mean[w] - mean[l]) - gamma), beta * mean.detach()
        if kind == "cpo":
            o = {"beta": beta, "label_smoothing": eps}
            return f.pair_losses("sigmoid", sums[w], sums[l], o) - alpha * sums[
                w
            ], beta * sums.detach()
        odds = mean - torch.log(-torch.expm1(mean))
        return -mean[w] + beta * f.ell(odds[w] - odds[l]), beta * mean.detach()

    # Where a probability is nearly 1, its odds know the log-prob a hundred times less well.
    return Case(
        kind, {"logps": logps}, call, formula, subset(d, "logps"), largest(logps, None) * 100
    )


def kto_loss(d: Draw) -> Case:
    sequences, dtype = d.size(4), d.of(*DTYPES)
    x = {name: d.logprobs(sequences, dtype=dtype) for name in ("pi_logps", "ref_logps")}
    desirable, kl, beta = d.bits(sequences), d.of(0.0, 0.3, -1.0, 2), d.of(0.1, 0.5)
    weights = {"desirable_weight": d.of(1.0, 0.5), "undesirable_weight": d.of(1, 2.0)}

    def call(x: dict[str, Tensor]) -> tuple:
        return fastrlhf.kto_loss(*x.values(), desirable, kl, beta, **weights)

    def formula(x: dict[str, Tensor]) -> tuple:
        s = x["pi_logps"] - x["ref_logps"]
        gain = beta * (s - max(kl, 0.0))
        good = weights["desirable_weight"] * f.sigmoid(-gain)
        bad = weights["undesirable_weight"] * f.sigmoid(gain)
        return torch.where(desirable != 0, good, bad), beta * s.detach()

    size = sum(largest(y, None) for y in x.values())
    return Case("kto_loss", x, call, formula, subset(d, *x), size)


def linear_dpo_loss(d: Draw) -> Case:
    shape, vocab, dtype = (d.size(4), d.size(4)), vocabulary(d), d.of(*DTYPES)
    targets, _ = targets_of(d, shape, vocab, -100)
    live, kind = targets != -100, d.of(*PAIR_LOSSES[:12])
    x = head(d, shape, vocab, live, dtype)
    transform = {"temperature": d.of(1.0, 0.7), "softcap": d.of(None, 30.0)}
    acc = torch.promote_types(dtype, torch.float32)
    ref = -d.normal(shape[0]).abs().to(acc) * 5
    pairs, beta = pairs_of(d, shape[0]), d.of(0.1, 0.5)
    o = {"label_smoothing": 0.1, "discopop_tau": 0.5}
    options = {"chunk_size": d.of(None, 1, 2), "impl": d.of("eager", "triton"), "loss_type": kind}

    def call(x: dict[str, Tensor]) -> tuple:
        given = (x["hidden"], x["weight"], targets, ref, *pairs, beta)
        return fastrlhf.linear_dpo_loss(*given, bias=x.get("bias"), **transform, **o, **options)

    def formula(x: dict[str, Tensor]) -> tuple:
        logits = f.head_logits(x["hidden"], x["weight"], x.get("bias"), live)
        lp, _ = f.token_stats(logits, targets, transform)
        w, l = (i.long() for i in pairs)
        count = live.sum(-1).clamp(min=1).to(lp.dtype)
        settings = {**o, "beta": beta, "lengths_w": count[w], "lengths_l": count[l]}
        s = lp.sum(-1) - ref.to(lp.dtype)
        return f.pair_losses(kind, s[w], s[l], settings), beta * s.detach()

    size = head_reach(x, live, transform) * (1 + shape[1]) + largest(ref, None)
    size = squared(kind, size)
    return Case("linear_dpo_loss", x, call, formula, subset(d, *x), size, grad_size=8.0,
                terms=head_terms(x, live, transform))  # fmt: skip
