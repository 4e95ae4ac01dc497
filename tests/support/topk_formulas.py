"""The divergences of `topk_kl_divergence` a second time: a row in 60 digits, with the gradient in
closed form; and in plain PyTorch, as trainers write them, whose error is the budget of ours.

Dims: N tokens, k words, V vocabulary.
"""

from typing import Any

import mpmath
import torch
import torch.nn.functional as F
from mpmath import mpf
from torch import Tensor

DIRECTIONS = ["forward", "reverse", "jsd", "skewed_forward", "skewed_reverse"]
RESTS = {
    "tail": {"tail": True},
    "words": {"tail": False},
    "renormalized": {"tail": False, "renormalize": True},
}


def _to_mixture(own: mpf, other: mpf, share: mpf) -> mpf:
    """own·ln(own/m), m = share·own + (1-share)·other."""
    mixture = share * own + (1 - share) * other
    if own == 0:
        return mpf(0)
    return own * mpmath.log(own / mixture) if mixture else mpf("inf")


def _term(t: mpf, s: mpf, direction: str, beta: mpf, skew: mpf) -> tuple[mpf, mpf]:
    """What a bucket adds, and its derivative with respect to ln s."""
    if direction == "jsd":
        weights = (beta, beta), (1 - beta, 1 - beta)
    else:
        share = skew if direction.startswith("skewed") else mpf(0)
        weights = ((1, share), None) if "forward" in direction else (None, (1, share))
    value = slope = mpf(0)
    of_teacher, of_student = weights
    if of_teacher is not None:
        weight, share = of_teacher
        value += weight * _to_mixture(t, s, share)
        if t:
            by = (
                (1 - share) * s / (share * t + (1 - share) * s) if s else mpf(1 if not share else 0)
            )
            slope -= weight * t * by
    if of_student is not None and s:
        weight, share = of_student
        mixture = share * s + (1 - share) * t
        value += weight * _to_mixture(s, t, share)
        slope += weight * s * (mpmath.log(s / mixture) + 1 - share * s / mixture)
    return value, slope


def exact_row(
    logits: Tensor,
    words: dict[int, float],
    *,
    direction: str,
    tail: bool = True,
    renormalize: bool = False,
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[float, list[float]]:
    """Value and gradient of one row (V,), given log-probs of the teacher's words by number."""
    with mpmath.workdps(60):
        raw = [mpf(float(x)) * mpf(scale) for x in logits]
        chain = [mpf(scale) / mpf(temperature)] * len(raw)
        if softcap is not None:
            cap = mpf(softcap)
            chain = [c * mpmath.sech(x / cap) ** 2 for c, x in zip(chain, raw, strict=True)]
            raw = [cap * mpmath.tanh(x / cap) for x in raw]
        z = [x / mpf(temperature) for x in raw]
        inside = [v for v in range(len(z)) if not renormalize or v in words]
        top = max((z[v] for v in inside), default=mpf(0))
        weight = {v: mpmath.exp(z[v] - top) for v in inside}
        norm = sum(weight.values())
        p = {v: w / norm for v, w in weight.items()}
        t = {v: mpmath.exp(mpf(x)) for v, x in words.items()}
        if renormalize:
            total = sum(t.values())
            t = {v: x / total for v, x in t.items()}
        options = direction, mpf(beta), mpf(skew)
        found = {v: _term(t[v], p[v], *options) for v in words}
        value, slopes = sum(x for x, _ in found.values()), {v: a for v, (_, a) in found.items()}
        all_slopes, of_rest = sum(slopes.values(), mpf(0)), mpf(0)
        if tail:
            rest = sum((p[v] for v in p if v not in words), mpf(0))
            more, slope = _term(1 - sum(t.values()), rest, *options)
            value, all_slopes = value + more, all_slopes + slope
            of_rest = slope / rest if rest else mpf(0)
        dz = [
            slopes.get(v, p.get(v, mpf(0)) * of_rest) - p.get(v, mpf(0)) * all_slopes
            for v in range(len(z))
        ]
        return float(value), [float(a * b) for a, b in zip(dz, chain, strict=True)]


def exact_rows(
    logits: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Values (N,) and gradients (N, V) of logits (N, V); what the mask leaves out is 0."""
    values, gradients = torch.zeros(len(logits)).double(), torch.zeros(logits.shape).double()
    for i, row in enumerate(logits.detach().cpu().double()):
        if mask is not None and not mask[i]:
            continue
        pairs = zip(teacher_ids[i].tolist(), teacher_logprobs[i].tolist(), strict=True)
        words = {v: x for v, x in pairs if v != -1 and x != -torch.inf}
        own = float(temperature[i]) if isinstance(temperature, Tensor) else temperature
        values[i], found = exact_row(row, words, temperature=own, **options)
        gradients[i] = torch.tensor(found, dtype=torch.float64)
    return values, gradients


def plain_rows(
    logits: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    *,
    direction: str,
    tail: bool = True,
    renormalize: bool = False,
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Values (...) of logits (..., V) of words that are all there, in fp32 at least. The student's
    rest is summed up: 1 minus its words would leave nothing to compare with where it is small.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = F.log_softmax(
        z / (temperature.to(z)[..., None] if isinstance(temperature, Tensor) else temperature), -1
    )
    log_s, log_t = log_p.gather(-1, teacher_ids), teacher_logprobs.to(z)
    if tail:
        others = log_p.scatter(-1, teacher_ids, -torch.inf).logsumexp(-1, keepdim=True)
        log_s = torch.cat((log_s, others), -1)
        log_t = torch.cat((log_t, torch.log(-torch.expm1(log_t.logsumexp(-1, keepdim=True)))), -1)
    if renormalize:
        log_s, log_t = log_s.log_softmax(-1), log_t.log_softmax(-1)

    def kl(log_own: Tensor, log_other: Tensor, share: float = 0.0) -> Tensor:
        mixture = log_other
        if share:
            own, other = (
                log_own + torch.tensor(share).log(),
                log_other + torch.tensor(1 - share).log(),
            )
            mixture = torch.logaddexp(own, other)
        return (log_own.exp() * (log_own - mixture)).sum(-1)

    if direction == "jsd":
        return beta * kl(log_t, log_s, beta) + (1 - beta) * kl(log_s, log_t, 1 - beta)
    share = skew if direction.startswith("skewed") else 0.0
    return kl(log_t, log_s, share) if "forward" in direction else kl(log_s, log_t, share)
